"""Whole networks as they are timed: the problems, the candidates, what they are built of, and two ways to take time.

Times hold all that a user waits for: what the host launches, and copies into and out of graphs.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uctrans

from .candidates import operator_backend

MODELS = ("uctransnet", "dual_branch_uctransnet")
OURS, OURS_COMPILED = "ours", "ours compiled"
WARM_UP_CALLS = 4  # two plain ones, the one that records, and a replay
SMOOTHNESS = 8  # pixels between the random values that the images are interpolated from
FOREGROUND_ABOVE = 0.2  # of their mean, which makes the masks something that can be learned


@dataclass(frozen=True)
class NetworkProblem:
    """A network of the registry at its published depth, and a batch of square images."""

    model: str
    batch: int
    pixels: int = 224
    base_channels: int = 64
    device: str = "cuda"

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        sizes = {"model": self.model, "base_channels": self.base_channels, "pixels": self.pixels}
        return sizes | {"batch": self.batch, "device": self.device}

    def __str__(self) -> str:
        return f"{self.model}-{self.base_channels}ch-{self.pixels}px-B{self.batch}"


@dataclass(frozen=True)
class Variant:
    """How a network is run.

    Attributes:
        backend: of its operators.
        half: bfloat16 autocast and channels-last; or float32 and contiguous, as the published script has it.
        graphed: captured as a CUDA graph by us, the whole step where it is trained.
        compile_mode: of ``torch.compile``; ``None`` for eager.
        is_project: trained by the project's own training step.
    """

    backend: str
    half: bool = True
    graphed: bool = True
    compile_mode: str | None = None
    is_project: bool = False

    def on(self, device: str) -> "Variant":
        """This variant as it can be on ``device``: there are no Triton kernels and no graphs on a CPU."""
        if torch.device(device).type == "cuda":
            return self
        backend = operator_backend(device) if self.backend == "triton" else self.backend
        mode = "max-autotune-no-cudagraphs" if self.compile_mode == "max-autotune" else self.compile_mode
        return replace(self, backend=backend, graphed=False, compile_mode=mode)

    @property
    def makes_own_graphs(self) -> bool:
        """Whether ``torch.compile`` captures CUDA graphs by itself."""
        return self.compile_mode == "max-autotune"

    @property
    def dtype(self) -> str:
        """What most products are computed in."""
        return "bfloat16" if self.half else "float32"

    def __str__(self) -> str:
        layout = "channels-last" if self.half else "contiguous"
        compiled = "eager" if self.compile_mode is None else f"compiled ({self.compile_mode})"
        return ", ".join([self.backend, self.dtype, layout, compiled, *(["CUDA graph"] if self.graphed else [])])


# The strongest baselines of each kind. Tuned compilation takes minutes, so its two forms are candidates of their own,
# and what is claimed against the compiler must hold against both.
CANDIDATES = {
    OURS: Variant("triton", is_project=True),
    "published": Variant("reference", half=False, graphed=False),
    "published graphed": Variant("reference", half=False),
    "reference bf16": Variant("reference"),
    "composed bf16": Variant("composed"),
    OURS_COMPILED: Variant("triton", compile_mode="default", is_project=True),
    "compiled": Variant("reference", compile_mode="max-autotune-no-cudagraphs"),
    "compiled, own graphs": Variant("reference", compile_mode="max-autotune", graphed=False),
}


def is_compiled(candidate: str) -> bool:
    """Whether ``torch.compile`` is part of it, which takes minutes."""
    return CANDIDATES[candidate].compile_mode is not None


def network(problem: NetworkProblem, variant: Variant, dropout: bool = True) -> nn.Module:
    """The network of ``problem``, of the same weights for every variant."""
    torch.manual_seed(0)
    options = {} if dropout else {"embedding_dropout": 0.0, "attention_dropout": 0.0}
    sizes = {"base_channels": problem.base_channels, "image_size": problem.pixels}
    model = uctrans.create_model(problem.model, backend=variant.backend, **sizes, **options)
    return model.to(problem.device, memory_format=memory_format(variant))


def batch(problem: NetworkProblem, variant: Variant) -> tuple[Tensor, Tensor]:
    """Images 0..1 (B, 3, h, w) and their masks (B, h, w) on the device: smooth random blobs under noise."""
    generator = torch.Generator().manual_seed(1)
    side = -(-problem.pixels // SMOOTHNESS)
    coarse = torch.randn(problem.batch, 3, side, side, generator=generator)
    blobs = F.interpolate(coarse, size=(problem.pixels, problem.pixels), mode="bilinear")
    images = (blobs + torch.randn(blobs.shape, generator=generator)).sigmoid()
    masks = (blobs.mean(1) > FOREGROUND_ABOVE).to(torch.uint8)
    return images.to(problem.device, memory_format=memory_format(variant)), masks.to(problem.device)


def memory_format(variant: Variant) -> torch.memory_format:
    """The layout of maps and of the weights of convolutions."""
    return torch.channels_last if variant.half else torch.contiguous_format


def autocast(problem: NetworkProblem, variant: Variant) -> torch.autocast:
    """The precision of the variant; a cache of casts would not outlive the capture of a graph."""
    device_type = torch.device(problem.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=variant.half, cache_enabled=False)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions of float32 in float32, as matrix products are by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compiled(function: Callable[..., Tensor], variant: Variant) -> Callable[..., Tensor]:
    """``function`` as the variant has it compiled, for fixed shapes and without a graph break; or as it is."""
    if variant.compile_mode is None:
        return function
    return torch.compile(function, mode=variant.compile_mode, fullgraph=True, dynamic=False)


def graphs_skipped() -> int:
    """How often so far ``torch.compile`` was to capture CUDA graphs and did not, for which it has a warning at most."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def own_graphs_notes(variant: Variant, skipped_before: int) -> dict[str, int]:
    """Notes for the record on a variant that has run and is to make its own graphs; none for others.

    ``skipped_before`` is what :func:`graphs_skipped` said before it was compiled.

    Raises:
        RuntimeError: it runs without some of its graphs.
    """
    if not variant.makes_own_graphs:
        return {}
    if skipped := graphs_skipped() - skipped_before:
        raise RuntimeError(
            f"torch.compile left out {skipped} of the CUDA graphs that it was to make (counter cudagraph_skips): what "
            "runs is no graph; TORCH_LOGS=cudagraphs names the reason"
        )
    return {"cudagraph_skips": 0}


def in_a_row(run: Callable[[], object], device: str, calls: int) -> Callable[[], float]:
    """Seconds a call of several that follow each other, as in training: the host may run ahead of the device."""
    on_gpu = torch.device(device).type == "cuda"
    for _ in range(WARM_UP_CALLS if on_gpu else 1):
        run()

    def on_events() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def on_the_clock() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return on_events if on_gpu else on_the_clock


def one_by_one(run: Callable[[], object], device: str, calls: int) -> Callable[[], float]:
    """Seconds from a call to its result on the device, the host's part included; the median of several calls."""
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for _ in range(WARM_UP_CALLS):
        run()

    def once() -> float:
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        return time.perf_counter() - start

    return lambda: statistics.median(once() for _ in range(calls))
