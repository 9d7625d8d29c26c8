"""The regular and the dilated branch read one map: is anything faster than two plain convolutions?

    python -m pytest benchmarks/test_branches.py -m "not gpu" --benchmark-only
    python -m pytest benchmarks/test_branches.py -m gpu --benchmark-only --record NAME.jsonl

Every candidate computes what :class:`uctrans.layers.DualBranchDown` computes after its pool, in training mode, of the
same weights, and takes turns with it. ``times_plain`` is the candidate's time over that of the layer itself.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uctrans.layers import DualBranchDown

from . import timing
from .gate import relative_error
from .race import CLOCK, paired, work_notes
from .roofline import FLOP_OF_A_MULTIPLY_ADD, Work
from .timing import Call

PASSES = ("forward", "both")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ROUNDS = {"cuda": 30, "cpu": 7}
DILATION = 2
WIDTHS = (64, 128, 256, 512, 512)  # of the scales, and of the deepest feature
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class BranchProblem:
    """One down-sampling, finest first, of square images."""

    pixels: int
    batch: int
    dtype: torch.dtype
    stage: int
    memory_format: str
    device: str = "cuda"

    @property
    def side(self) -> int:
        """Height and width of the pooled map."""
        return self.pixels >> (self.stage + 1)

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        sizes = {"pixels": self.pixels, "batch": self.batch, "dtype": str(self.dtype).removeprefix("torch.")}
        detail = f"{WIDTHS[self.stage]} -> {WIDTHS[self.stage + 1]} channels at {self.side}x{self.side}"
        return sizes | {"device": self.device, "detail": f"{detail}, {self.memory_format}"}

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}-{dtype}-{self.pixels}px-B{self.batch}-stage_{self.stage + 1}-{self.memory_format}"


def plain(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    """The layer itself: two branches, each reading the map."""
    return torch.cat([layer.regular(pooled), layer.dilated(pooled)], dim=1)


def two_streams(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    """The dilated branch beside the regular one, on a stream of its own."""
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        dilated = layer.dilated(pooled)
    regular = layer.regular(pooled)
    here.wait_stream(beside)
    return torch.cat([regular, dilated], dim=1)


def one_norm(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    """Concatenate before the last batch norm and ReLU instead of after them: one call of each for both branches."""
    convolved = [branch[1].conv(branch[0](pooled)) for branch in (layer.regular, layer.dilated)]
    return _norm_relu(torch.cat(convolved, dim=1), layer, 1)


def one_read(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    """Both first convolutions as one 5x5 convolution, its kernel zero where neither has a tap."""
    regular, dilated = _norm_relu(_merged_first(layer, pooled), layer, 0).chunk(2, dim=1)
    return torch.cat([layer.regular[1](regular), layer.dilated[1](dilated)], dim=1)


def merged(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    """:func:`one_read`, and the second convolutions as one 5x5 convolution in two groups: nothing is concatenated."""
    first = _norm_relu(_merged_first(layer, pooled), layer, 0)
    kernel = torch.cat([F.pad(layer.regular[1].conv.weight, [1, 1, 1, 1]), _spread(layer.dilated[1].conv.weight)])
    second = F.conv2d(first, kernel, _joined(layer, 1, "conv", "bias"), padding=DILATION, groups=2)
    return _norm_relu(second, layer, 1)


def phases(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    """The dilated branch without dilation, on the four maps of every second row and column; batch norm sees all."""
    batch, _, height, width = pooled.shape
    apart = pooled.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2))  # [B, C, rows, 2, columns, 2]
    apart = apart.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)
    for block in layer.dilated:
        apart = block.act(block.norm(F.conv2d(apart, block.conv.weight, block.conv.bias, padding=1)))
    together = apart.unflatten(0, (2, 2, batch)).permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
    return torch.cat([layer.regular(pooled), together], dim=1)


CANDIDATES = {
    "plain": plain,
    "one norm": one_norm,
    "one read": one_read,
    "merged": merged,
    "phases": phases,
    "two streams": two_streams,
}


def _spread(weight: Tensor) -> Tensor:
    """A kernel of 3x3 taps two pixels apart, as one of 5x5 with zeros between them."""
    spread = weight.new_zeros(*weight.shape[:2], 5, 5)
    spread[..., ::DILATION, ::DILATION] = weight
    return spread


def _merged_first(layer: DualBranchDown, pooled: Tensor) -> Tensor:
    kernel = torch.cat([F.pad(layer.regular[0].conv.weight, [1, 1, 1, 1]), _spread(layer.dilated[0].conv.weight)])
    return F.conv2d(pooled, kernel, _joined(layer, 0, "conv", "bias"), padding=DILATION)


def _joined(layer: DualBranchDown, index: int, part: str, name: str) -> Tensor:
    return torch.cat([getattr(getattr(branch[index], part), name) for branch in (layer.regular, layer.dilated)])


def _norm_relu(feature: Tensor, layer: DualBranchDown, index: int) -> Tensor:
    weight, bias = (_joined(layer, index, "norm", name) for name in ("weight", "bias"))
    return F.relu(F.batch_norm(feature, None, None, weight, bias, training=True), inplace=True)


def problems() -> list:
    on_cpu = [
        BranchProblem(224, 4, torch.float32, stage, memory_format, "cpu")
        for memory_format in MEMORY_FORMATS
        for stage in range(4)
    ]
    on_gpu = [
        BranchProblem(224, batch, torch.bfloat16, stage, "channels_last") for batch in (32, 4) for stage in range(4)
    ]
    on_gpu = [pytest.param(problem, marks=pytest.mark.gpu, id=str(problem)) for problem in on_gpu]
    return [*(pytest.param(problem, id=str(problem)) for problem in on_cpu), *on_gpu]


def down_sampling(problem: BranchProblem) -> nn.Module:
    torch.manual_seed(0)
    layer = DualBranchDown(WIDTHS[problem.stage], WIDTHS[problem.stage + 1], DILATION).train()
    return layer.to(problem.device, problem.dtype, memory_format=MEMORY_FORMATS[problem.memory_format])


def call(problem: BranchProblem, layer: nn.Module) -> Call:
    """A pooled map; gradients by it and by all weights."""
    generator = torch.Generator(problem.device).manual_seed(1)

    def normal(channels: int) -> Tensor:
        shape = (problem.batch, channels, problem.side, problem.side)
        drawn = torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)
        return drawn.contiguous(memory_format=MEMORY_FORMATS[problem.memory_format])

    pooled = normal(WIDTHS[problem.stage]).requires_grad_()
    return Call((pooled,), (pooled, *layer.parameters()), normal(WIDTHS[problem.stage + 1]))


def branch_work(problem: BranchProblem, passes: str) -> Work:
    """Work of two plain branches: the map is read once, half-wide maps are written and read between, then the result.

    Backward takes twice that.
    """
    width, out = WIDTHS[problem.stage], WIDTHS[problem.stage + 1]
    pixels = problem.batch * problem.side**2
    flop = FLOP_OF_A_MULTIPLY_ADD * pixels * 9 * (width * out + out * out // 2)
    elements = pixels * (width + 3 * out)
    times = {"forward": 1, "both": 3}[passes]
    return Work(times * flop, times * elements * problem.dtype.itemsize)


def assert_same_function(problem: BranchProblem, candidate: str) -> None:
    """Output and all gradients are those of the layer; in float64, as rounding moves values across ReLU's threshold."""
    small = replace(problem, pixels=32, batch=2, dtype=torch.float64)
    layer = down_sampling(small)
    results = [
        timing.run_pass(partial(CANDIDATES[name], layer), "both", call(small, layer)) for name in (candidate, "plain")
    ]
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", problems())
def test_branches(request, benchmark, record, problem, passes, candidate):
    if candidate == "two streams" and problem.device == "cpu":
        pytest.skip("a CPU has no streams")
    benchmark.group = f"two branches over one map, {passes}"
    assert_same_function(problem, candidate)
    layer = down_sampling(problem)
    entrant, baseline = (
        timing.sampler(partial(CANDIDATES[name], layer), passes, [call(problem, layer)])
        for name in (candidate, "plain")
    )
    entrant(), baseline()
    error = relative_error(entrant.results[0], baseline.results[0].double())
    assert error <= TOLERANCES[problem.dtype], f"the output is off by {error}"
    outcome = paired(benchmark, entrant, baseline, ROUNDS[problem.device])
    notes = problem.as_json() | {"passes": passes, "candidate": candidate, "relative_error": error}
    work = branch_work(problem, passes)
    notes |= work_notes(work, record.ceilings, record.measured, problem.dtype, outcome["median_seconds"])
    notes |= {"times_plain": outcome.pop("ratio"), "times_plain_quartiles": outcome.pop("ratio_quartiles")}
    notes["threads"] = torch.get_num_threads()
    seconds = outcome.pop("seconds")
    benchmark.extra_info |= notes | outcome
    record.measured_test(request.node.name, benchmark.group, notes | outcome, seconds)
