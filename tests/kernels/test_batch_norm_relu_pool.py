"""Batch norm, ReLU and max-pool as one operator: against PyTorch's three, in numbers, ties, memory and errors.

Statistics, checks of arguments, and cuts of maps are shared with ``batch_norm_relu`` and tested there. Without a GPU
the kernels run in Triton's interpreter: maps are as small as they can be and still be awkward.
"""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.kernels.support import (
    BACKENDS,
    DEVICE,
    FORMATS,
    OTHER_PAIRS,
    PAIRS,
    UPSTREAM,
    alternately,
    assert_same_bits,
    assert_within_budget_of,
    change_constants,
    channels_of_a_wider_map,
    copied,
    drawn,
    every_other_column,
    norm_inputs,
    normal,
    over_pairs,
    running_statistics,
)
from uctrans.kernels import batch_norm_relu, batch_norm_relu_pool
from uctrans.kernels.formats import memory_format_of
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")

from uctrans.kernels.batch_norm_relu import triton, triton_layout

TRITON = {"backend": "triton"}
EPS = 1e-5
SHAPES = {
    "even": (2, 5, 4, 6),
    "odd": (2, 3, 3, 5),
    "two rows": (1, 8, 2, 5),
    "two columns": (1, 3, 5, 2),
    "one window": (3, 4, 2, 2),
    "one channel, one image": (1, 1, 5, 3),
    "130 channels": (1, 130, 3, 2),
    "more windows than a tile": (1, 1, 67, 62),
    "empty batch": (0, 3, 4, 5),
}
SHAPE = (1, 3, 3, 4)


def inputs_of(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    return norm_inputs(shape, dtype, memory_format, seed)


def gradients_of(inputs, rounded=None, seed=7):
    """Return gradients of the map and of the pooled one: any numbers of the feature's dtype."""
    batch, channels, height, width = inputs[0].shape
    sizes = ((batch, channels, height, width), (batch, channels, height // 2, width // 2))
    dtype = rounded or inputs[0].dtype
    return [normal(*size, dtype=dtype, seed=seed + place) for place, size in enumerate(sizes)]


def results(inputs, upstream=None, training=True, function=batch_norm_relu_pool, running=None, rounded=None, **options):
    """Return both maps, the gradients by feature, weight and bias, and the running statistics after it.

    A gradient of ``upstream`` may be ``None``: that map is not used.
    """
    running = [tensor.clone() for tensor in (running or running_statistics(inputs))]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    maps = function(*leaves, *running, training=training, **options)
    pairs = zip(maps, upstream or gradients_of(inputs, rounded), strict=True)
    used, weights = zip(*((each, weight.to(each)) for each, weight in pairs if weight is not None), strict=True)
    return [*(each.detach() for each in maps), *torch.autograd.grad(used, leaves, weights), *running]


published = partial(results, backend="reference")


def assert_as_exact_as_the_reference(draws, backend="triton", **options):
    assert_within_budget_of(published, partial(results, backend=backend), draws, **options)


class TestErrorBudget:
    @over_pairs(SHAPES)
    def test_kernels(self, name, memory_format, dtype):
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of(SHAPES[name], dtype, memory_format)])

    @over_pairs(["even", "odd"])
    def test_kernels_in_evaluation(self, name, memory_format, dtype):
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of(SHAPES[name], dtype, memory_format)], training=False)

    @pytest.mark.parametrize(("memory_format", "dtype"), OTHER_PAIRS, ids=str)
    def test_kernels_in_the_other_format(self, memory_format, dtype):
        assert_as_exact_as_the_reference([inputs_of(SHAPES["odd"], dtype, memory_format)])

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(("name", "memory_format"), alternately(SHAPES, FORMATS), ids=str)
    def test_composed(self, name, memory_format, training):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            draws = [inputs_of(SHAPES[name], dtype, memory_format, seed) for seed in range(3)]
            assert_as_exact_as_the_reference(draws, "composed", training=training)

    # Tiles of 4 elements, in one part for each tile, and in one part for all.
    @pytest.mark.parametrize("parts", [{"STEPS": 1}, {"STEPS": 1, "MOST_PARTS": 1}], ids=["many parts", "one part"])
    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_many_tiles(self, memory_format, dtype, parts, monkeypatch):
        changes = {"WINDOW_TILE": 4, "MOST_CHANNELS": 2, "PROGRAM_TILES": 1} | parts
        change_constants(monkeypatch, [triton_layout], changes)
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of((2, 3, 3, 2), dtype, memory_format)])

    @drawn(
        4,
        lambda st: {
            "shape": st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(2, 5), st.integers(3, 5)),
            "training": st.booleans(),
            "memory_format": st.sampled_from(FORMATS),
            "seed": st.integers(0, 2**16),
        },
    )
    def test_any_shape(self, shape, training, memory_format, seed):
        inputs = inputs_of(shape, torch.float32, memory_format, seed)
        found, expected = (results(inputs, training=training, backend=name) for name in ("triton", "reference"))
        for result, close in zip(found, expected, strict=True):
            torch.testing.assert_close(result, close, rtol=1e-4, atol=1e-4 * max(1.0, close.abs().max().item()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
def test_it_is_batch_norm_relu_and_the_pool_of_its_map(memory_format, dtype, training):
    """The same bits, both in the map's format, and the gradients too where the pooled map is not used."""
    inputs = inputs_of((2, 5, 5, 4), dtype, memory_format)
    gradient, _ = gradients_of(inputs)
    output, pooled, *others = results(inputs, [gradient, None], training, **TRITON)
    running = running_statistics(inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    expected = batch_norm_relu(*leaves, *running, training=training, **TRITON)
    assert_same_bits([output, pooled], [expected, F.max_pool2d(expected, 2)])
    assert_same_bits(others, [*torch.autograd.grad(expected, leaves, gradient.to(dtype)), *running])
    assert all(each.is_contiguous(memory_format=memory_format) for each in (output, pooled, others[0]))


class TestWinners:
    """Which pixel of a window has the gradient; in evaluation and at scale 1, where all numbers are exact."""

    @staticmethod
    def gradients(feature, backend, bias=0.0):
        """By the feature, of numbered gradients, whose sums are exact in half precision too."""
        channels = feature.shape[1]
        parameters = torch.ones(channels, device=DEVICE), torch.full((channels,), bias, device=DEVICE)
        running = torch.zeros(channels, device=DEVICE), torch.full((channels,), 0.75, device=DEVICE)
        leaf = feature.clone().requires_grad_()
        maps = batch_norm_relu_pool(leaf, *parameters, *running, training=False, eps=0.25, backend=backend)
        upstream = [
            (1 + torch.arange(each.numel(), device=DEVICE) % 900).reshape(each.shape).to(each.dtype) for each in maps
        ]
        return torch.autograd.grad(maps, leaf, upstream)[0]

    @staticmethod
    def windows_of(values):
        """A map of two channels that has every pattern of these values in one of its windows."""
        side = len(values)
        patterns = torch.cartesian_prod(*4 * [torch.tensor(values)]).reshape(side**2, side**2, 2, 2)
        return patterns.permute(0, 2, 1, 3).reshape(2 * side**2, -1).expand(1, 2, -1, -1).to(DEVICE)

    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_the_first_of_equals(self, memory_format, dtype):
        """Every pattern of four values in a window, also of windows without a positive one."""
        feature = self.windows_of([-1.0, 0.0, 1.0, 2.0]).to(dtype).contiguous(memory_format=memory_format)
        assert_same_bits([self.gradients(feature, "triton")], [self.gradients(feature, "reference")])

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_what_rounding_makes_equal_is_equal(self, memory_format):
        """The later pixel is larger, until the map holds it."""
        feature = torch.tensor([[1.0, 1.0], [1.001, 0.5]], device=DEVICE).half().expand(1, 2, 2, 2)
        feature = feature.contiguous(memory_format=memory_format)
        found = self.gradients(feature, "triton", bias=100.0)
        assert_same_bits([found], [self.gradients(feature, "reference", bias=100.0)])
        assert found[0, 0].tolist() == [[2.0, 2.0], [3.0, 4.0]]  # 1 + 1 at the first

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_what_is_no_number_wins_and_the_last_of_them(self, memory_format):
        feature = self.windows_of([-1.0, math.nan, math.inf]).contiguous(memory_format=memory_format)
        found, expected = (self.gradients(feature, name) for name in ("triton", "reference"))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    def test_odd_edges_are_in_no_window(self):
        feature = torch.zeros(1, 1, 5, 3, device=DEVICE)
        feature[..., 4, :], feature[..., 2] = 9.0, 9.0
        feature[..., 1, 1] = feature[..., 2, 0] = 1.0
        found = self.gradients(feature, "triton")
        expected = torch.tensor([[0, 0, 3], [0, 5 + 1, 6], [7 + 2, 0, 9], [0, 0, 12], [13, 14, 15]], device=DEVICE)
        assert torch.equal(found[0, 0], expected.float())


class TestGradientsThatAreNotThere:
    @pytest.mark.parametrize(("memory_format", "training"), list(zip(FORMATS, (False, True), strict=True)), ids=str)
    def test_of_one_map(self, memory_format, training):
        """A map that is not used is one whose gradient is zero."""
        inputs = inputs_of(SHAPE, torch.float32, memory_format)
        both = gradients_of(inputs)
        for place in (0, 1):
            only = [gradient if index == place else None for index, gradient in enumerate(both)]
            zeros = [gradient if index == place else torch.zeros_like(gradient) for index, gradient in enumerate(both)]
            with poisoned_allocations():
                found = results(inputs, only, training, **TRITON)
            torch.testing.assert_close(found, results(inputs, zeros, training, **TRITON))

    def test_of_both(self):
        inputs = [tensor.requires_grad_() for tensor in inputs_of(SHAPE)]
        running = running_statistics(inputs)
        for training in (True, False):
            output, _ = batch_norm_relu_pool(*inputs, *running, training=training, **TRITON)
            gradients = torch.autograd.grad(output.detach().requires_grad_().sum(), inputs, allow_unused=True)
            assert gradients == (None, None, None)


class TestMemory:
    @pytest.mark.parametrize("training", [True, False])
    def test_nothing_is_kept_but_the_feature(self, training):
        inputs = [tensor.requires_grad_() for tensor in inputs_of(SHAPE)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            batch_norm_relu_pool(*inputs, *running_statistics(inputs), training=training, **TRITON)
        assert [tensor.numel() for tensor in kept if tensor.ndim == 4] == [inputs[0].numel()]
        assert all(tensor.is_floating_point() and tensor.shape == (3,) for tensor in kept if tensor.ndim != 4)

    @pytest.mark.parametrize("has_map_gradient", [True, False])
    def test_backward_makes_one_map(self, has_map_gradient):
        """No indices, and no gradient of the pooled map in the size of the map."""
        feature, *others = (*inputs_of((4, 3, 8, 8)), *running_statistics(norm_inputs(dtype=torch.float32)))
        gradient, d_pooled = gradients_of([feature])
        made = []

        class Watched(TorchFunctionMode):
            def __torch_function__(self, function, types, arguments=(), options=None):
                made.append(function(*arguments, **(options or {})))
                return made[-1]

        with Watched():  # the launcher's own calls, without dispatcher and autograd around it
            triton.backward_of_pool(gradient if has_map_gradient else None, d_pooled, feature, *others, None, EPS, True)
        given = {tensor.data_ptr() for tensor in (feature, gradient, d_pooled)}
        made = [each for each in made if isinstance(each, torch.Tensor) and each.data_ptr() not in given]
        assert {each.dtype for each in made} == {torch.float32}
        large = {each.data_ptr(): each.untyped_storage().nbytes() for each in made}
        assert [size for size in large.values() if size >= d_pooled.nbytes] == [feature.nbytes]

    # How strides are read is shared, and tested with all views there are.
    @pytest.mark.parametrize("view", [channels_of_a_wider_map, every_other_column], ids=lambda view: view.__name__)
    def test_views_of_the_feature(self, view):
        inputs = inputs_of((2, 3, 2, 6), torch.float32, torch.channels_last)
        inputs[0] = view(inputs[0])
        found = results(inputs, **TRITON)
        inputs[0] = copied(inputs[0], memory_format_of(inputs[0]))
        assert_same_bits(found, results(inputs, **TRITON))

    @pytest.mark.parametrize("name", ["a sum", "a sum over rows", "channels of a wider map"])
    def test_views_of_the_gradients(self, name):
        """Views of the map's gradient in one format, and of the pooled map's in the other."""
        for place, memory_format in enumerate(FORMATS):
            inputs = inputs_of((1, 3, 4, 4), torch.float32, memory_format)
            upstream = [each.float().contiguous(memory_format=memory_format) for each in gradients_of(inputs)]
            upstream[place] = UPSTREAM[name](upstream[place])
            found = results(inputs, upstream, **TRITON)
            upstream[place] = copied(upstream[place], memory_format)
            assert_same_bits(found, results(inputs, upstream, **TRITON))


class TestBadInput:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("shape", [(2, 3, 1, 4), (2, 3, 4, 1), (0, 3, 1, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
    def test_no_window(self, shape, backend):
        """Where ``nn.MaxPool2d`` raises, and as it does."""
        inputs = norm_inputs(shape, torch.float32)
        with pytest.raises(RuntimeError):
            F.max_pool2d(inputs[0], 2)
        for training in (True, False):
            with pytest.raises(RuntimeError, match=r"pooled map would be empty, got a feature of \(\d, .*: give at"):
                results(inputs, training=training, backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_arguments_are_those_of_batch_norm_relu(self, backend):
        inputs = norm_inputs(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"running_mean must be \(3,\)"):
            results(inputs, running=[torch.zeros(2, device=DEVICE)] * 2, backend=backend)
        with pytest.raises(TypeError, match="share one dtype"):
            results([inputs[0], inputs[1].double(), inputs[2]], running=running_statistics(inputs), backend=backend)
        with pytest.raises(ValueError, match=f"unknown backend '{backend}s'"):
            results(inputs, backend=f"{backend}s")


@pytest.mark.gpu
class TestOnAGpu:
    """Sizes that networks have; the same bits in every run; CUDA graphs."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("batch", [1, 4, 32])
    def test_published_scales(self, batch, memory_format, dtype):
        for channels, side in ((64, 224), (128, 112), (256, 56), (512, 28), (32, 14)):
            inputs = inputs_of((batch, channels, side, side), dtype, memory_format)
            for training in (True, False):
                assert_as_exact_as_the_reference([inputs], training=training)
            torch.cuda.empty_cache()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_same_bits(self, memory_format, dtype):
        """In every run, and the winners that the pooled map shows: forward and backward compute alike."""
        inputs = inputs_of((4, 64, 112, 112), dtype, memory_format)
        first = results(inputs, **TRITON)
        kept = []
        for run in range(1, 10):
            # Memory of another size is taken and kept, so that no run works at the addresses of the one before.
            kept.append(torch.full((run * 4099,), math.nan, device=DEVICE))
            assert_same_bits(results(inputs, **TRITON), first)
        output, pooled = first[:2]
        expected, winners = F.max_pool2d(output, 2, return_indices=True)
        assert torch.equal(pooled, expected)
        upstream = [None, torch.ones_like(pooled)]
        _, _, d_feature, *_ = results([inputs[0], torch.ones_like(inputs[1]), inputs[2]], upstream, False, **TRITON)
        output, _ = batch_norm_relu_pool(
            inputs[0], torch.ones_like(inputs[1]), inputs[2], *running_statistics(inputs), training=False, **TRITON
        )
        _, winners = F.max_pool2d(output, 2, return_indices=True)
        reached = torch.zeros_like(output, memory_format=torch.contiguous_format).flatten(2)
        reached.scatter_(2, winners.flatten(2), 1.0)
        assert torch.equal(d_feature != 0, (reached.reshape(output.shape) != 0) & (output > 0))

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_more_elements_than_32_bits_count(self, memory_format):
        """By given statistics the last image has the very bits that it has alone; by those of the batch it is alike."""
        batch, channels, height, width = 41, 64, 1024, 800
        assert batch * channels * height * width > 2**31
        if torch.cuda.mem_get_info()[0] < 2**35:
            pytest.skip("needs 32 GiB of memory that is free")
        _, *parameters = inputs_of((1, channels, 2, 2), torch.bfloat16, memory_format)

        def drawn_map(scale):
            size = (batch, channels, height // scale, width // scale)
            return torch.empty(size, dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format).normal_()

        feature, upstream = drawn_map(1), [drawn_map(1), drawn_map(2)]
        output, pooled, d_feature, *_ = results([feature, *parameters], upstream, training=False, **TRITON)
        last = [each[-1:] for each in upstream]
        expected = results([feature[-1:], *parameters], last, training=False, **TRITON)
        assert_same_bits([output[-1:], pooled[-1:], d_feature[-1:]], expected[:3])
        output, pooled = batch_norm_relu_pool(feature, *parameters, None, None, training=True, **TRITON)
        assert output[-1].float().mean().item() == pytest.approx(output[0].float().mean().item(), rel=0.01)
        assert_same_bits([pooled[-1:]], [F.max_pool2d(output[-1:], 2)])

    def test_reduce_overhead(self):
        """The compiled operator goes into CUDA graphs."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        inputs = inputs_of((4, 64, 56, 56), torch.bfloat16, torch.channels_last)
        compiled = torch.compile(torch.ops.uctrans.batch_norm_relu_pool, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # one to warm up, one to record, two to replay
            torch.compiler.cudagraph_mark_step_begin()
            found = [tensor.clone() for tensor in compiled(*inputs, *running_statistics(inputs), None, EPS, False)]
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert_same_bits(found, results(inputs, training=False, **TRITON)[:2])
