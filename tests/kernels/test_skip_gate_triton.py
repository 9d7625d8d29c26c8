"""The skip path as an operator of torch: its Triton kernels.

Without a GPU the kernels run in Triton's interpreter: maps are as small as they can be and still be awkward.
"""

import math
from functools import lru_cache, partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.support import (
    DEVICE,
    EXPANDED,
    FORMATS,
    OTHER_PAIRS,
    PAIRS,
    TRITON_DTYPES,
    UPSTREAM,
    VIEWS,
    alternately,
    assert_same_bits,
    assert_within_budget_of,
    change_constants,
    copied,
    drawn,
    gate_inputs,
    gate_results,
    normal,
    over_pairs,
    watch_launches,
)
from uctrans.kernels import skip_gate
from uctrans.kernels.formats import memory_format_of
from uctrans.kernels.skip_gate import reference
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")

from uctrans.kernels.skip_gate import triton, triton_gate, triton_maps

SHAPES = {
    "published": {"channels": 8, "decoder_channels": 8, "grid": (1, 2), "patch": (4, 4)},
    "several samples": {"batch": 3, "grid": (2, 2), "patch": (2, 1), "factor": (2, 2)},
    "patch of one": {"patch": (1, 1), "grid": (2, 6), "channels": 3},
    "patch of one, odd sides": {"patch": (1, 1), "grid": (5, 3), "factor": (1, 3)},
    "patches of 3 x 5": {"patch": (3, 5), "grid": (1, 3), "factor": (3, 5)},
    "patches of 2 x 7": {"patch": (2, 7), "grid": (1, 2), "factor": (1, 7)},
    "upright patches": {"patch": (6, 1), "grid": (1, 5), "factor": (3, 5)},
    "more cells than a tile has pixels": {"channels": 2, "patch": (1, 2), "grid": (1, 260), "factor": (1, 4)},
    "cells read in steps": {"channels": 2, "patch": (1, 48), "grid": (1, 2), "factor": (1, 96)},
    "one token for the whole map": {"patch": (7, 5), "grid": (1, 1), "factor": (7, 5)},
    "decoder at full size": {"factor": (1, 1), "grid": (1, 3), "patch": (3, 2)},
    "decoder three times smaller": {"factor": (3, 3), "patch": (2, 3), "grid": (3, 2)},
    "decoder four times smaller": {"factor": (4, 4), "patch": (4, 8), "grid": (1, 1)},
    "one channel": {"channels": 1, "decoder_channels": 1, "grid": (1, 2), "patch": (2, 2)},
    "few channels beside many": {"channels": 3, "decoder_channels": 130, "grid": (1, 2), "patch": (2, 1)},
    "many channels beside few": {"channels": 130, "decoder_channels": 5, "grid": (1, 1), "patch": (2, 2)},
    "24 channels, 65 of the decoder": {"channels": 24, "decoder_channels": 65, "grid": (1, 1), "patch": (2, 2)},
    "no tokens": {"has_tokens": False, "grid": (1, 1), "patch": (18, 10)},
    "no tokens, odd sides": {"has_tokens": False, "grid": (1, 1), "patch": (3, 7), "factor": (3, 1)},
    "no decoder": {"decoder_channels": None, "patch": (2, 3)},
    "neither": {"decoder_channels": None, "has_tokens": False, "grid": (1, 1), "patch": (5, 11)},
    "empty batch": {"batch": 0},
}
SHAPES = {name: {"batch": 1} | shape for name, shape in SHAPES.items()}
FEW_NUMBERS = {"one channel": 4}  # draws that are taken together

# Changes of the constants in triton.py. A matrix product takes tiles of 16 on a GPU, and any in the interpreter.
SMALL_TILES = {"TILE": 4, "MOST_CHANNELS": 2, "MOST_PIXELS": 2}
MANY_PARTS = SMALL_TILES | {"PROGRAM_ELEMENTS": 1, "PART_ELEMENTS": 1}
SMALLEST_PRODUCT = 16 if DEVICE == "cuda" else 2
PRODUCT_BLOCKS = ("BLOCK_BATCH", "BLOCK_OUT", "BLOCK_IN")
SMALL_GATE_TILES = {
    "GATE_RESULTS": 2,
    "LONGEST_GATE_STEP": 2,
    "PARTS_ELEMENTS": 4,
    "WEIGHT_GRADIENT_TILES": dict.fromkeys(PRODUCT_BLOCKS, SMALLEST_PRODUCT),
}
CONFIGURATIONS = {
    "small tiles": SMALL_TILES,
    "one channel a tile": {"MOST_CHANNELS": 1},
    "one pixel of a row": {"MOST_PIXELS": 1},
    "large tiles": {"TILE": 4096, "MOST_CHANNELS": 512, "MOST_PIXELS": 1024},
    "one row a program": {"PROGRAM_ELEMENTS": 1},
    "two rows a program": {"PROGRAM_ELEMENTS": 2 * 8 * 8},
    "five parts": MANY_PARTS | {"MOST_PARTS": 5},
    "one part": MANY_PARTS | {"MOST_PARTS": 1},
    "small tiles of the gate": SMALL_GATE_TILES,
    "one result of the gate a program": {"GATE_RESULTS": 1, "LONGEST_GATE_STEP": 1, "PARTS_ELEMENTS": 1},
    "large tiles of the gate": {
        "GATE_RESULTS": 64,
        "PARTS_ELEMENTS": 8192,
        "WEIGHT_GRADIENT_TILES": dict.fromkeys(PRODUCT_BLOCKS, 64),
    },
    "other warps": {"NUM_WARPS": 8, "GATE_WARPS": 4},
}


def kernels(*inputs, **options):
    return skip_gate(*inputs, **options, backend="triton")


results = partial(gate_results, function=kernels)


def operator(inputs, concatenate=True, dtype=None):
    """Return the output, the gate, and the means that it is made of."""
    return torch.ops.uctrans.skip_gate(*inputs, concatenate, dtype or inputs[0].dtype)


def inputs_of(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    return gate_inputs(**shape, dtype=dtype, memory_format=memory_format, seed=seed)


def assert_as_exact_as_the_reference(draws, **options):
    assert_within_budget_of(gate_results, results, draws, **options)


class TestErrorBudget:
    @over_pairs(SHAPES)
    def test_kernels(self, name, memory_format, dtype):
        draws = [inputs_of(SHAPES[name], dtype, memory_format, seed) for seed in range(FEW_NUMBERS.get(name, 1))]
        with poisoned_allocations():
            assert_as_exact_as_the_reference(draws)

    @pytest.mark.parametrize(("memory_format", "dtype"), OTHER_PAIRS, ids=str)
    def test_kernels_in_the_other_format(self, memory_format, dtype):
        assert_as_exact_as_the_reference([inputs_of(SHAPES["patches of 3 x 5"], dtype, memory_format)])

    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_decoder_feature_that_only_gates(self, memory_format, dtype):
        """Not concatenated, it learns through the gate alone."""
        draws = [inputs_of({"batch": 1, "patch": (2, 2), "factor": (4, 2)}, dtype, memory_format)]
        with poisoned_allocations():
            assert_as_exact_as_the_reference(draws, concatenate=False)


class TestLaunchConfigurations:
    @over_pairs(CONFIGURATIONS)
    def test_error_budget(self, name, memory_format, dtype, monkeypatch):
        change_constants(monkeypatch, [triton], CONFIGURATIONS[name])
        shape = {"batch": 1, "decoder_channels": 6, "grid": (1, 2), "patch": (3, 3), "factor": (3, 2)}
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of(shape, dtype, memory_format)])

    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_many_programs_and_parts(self, memory_format, dtype, monkeypatch):
        launched = watch_launches(monkeypatch, triton_gate, triton_maps)
        change_constants(monkeypatch, [triton], MANY_PARTS | SMALL_GATE_TILES)
        shape = {"batch": 1, "channels": 3, "grid": (1, 2), "patch": (3, 2), "factor": (3, 2)}
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of(shape, dtype, memory_format)])
        assert len(launched) == 9
        for name, (programs, _) in launched.items():
            assert math.prod(programs) > 1, name
        for name in ("gate_kernel", "mean_gradient_kernel"):
            _, arguments = launched[name]
            assert arguments["parts"].count > 2 * arguments["BLOCK_PARTS"]

    def test_more_samples_than_a_product_takes_at_once(self):
        shape = {"batch": 18, "channels": 1, "grid": (1, 1), "patch": (1, 2), "decoder_channels": None}
        assert_as_exact_as_the_reference([inputs_of(shape | {"has_tokens": False})])


class TestWhatIsReturned:
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_gate_and_means(self, memory_format):
        """Backward reads them: they are written whole, and right."""
        inputs = inputs_of({"batch": 2, "patch": (3, 2)}, torch.float32, memory_format)
        with poisoned_allocations():
            output, gate, means = operator(inputs)
        feature, tokens, decoder_feature, weight, bias, weight_decoder, bias_decoder = (
            tensor.double() for tensor in inputs
        )
        skip_mean = feature.mean((2, 3)) + tokens.mean((2, 3))
        decoder_mean = decoder_feature.mean((2, 3))
        logits = skip_mean @ weight.T + bias + decoder_mean @ weight_decoder.T + bias_decoder
        torch.testing.assert_close(gate, torch.sigmoid(logits / 2).float())
        torch.testing.assert_close(means, torch.cat([skip_mean, decoder_mean], dim=1).float())
        assert output.dtype == gate.dtype == means.dtype == torch.float32

    def test_gate_alone_has_no_gradient(self):
        inputs = [tensor.requires_grad_() for tensor in inputs_of({"batch": 1, "patch": (2, 2)})]
        output, gate, means = operator(inputs)
        assert (output.requires_grad, gate.requires_grad, means.requires_grad) == (True, False, False)


class TestSameBits:
    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_whatever_else_is_in_the_batch(self, memory_format, dtype):
        shape = {"batch": 2, "channels": 3, "grid": (1, 2), "patch": (3, 2), "factor": (1, 2)}
        inputs = inputs_of(shape, dtype, memory_format)
        gradient = normal(2, 6, 3, 4, dtype=dtype)
        together = results(inputs, gradient)
        for image in (slice(0, 1), slice(1, 2)):
            alone = results([*(feature[image] for feature in inputs[:3]), *inputs[3:]], gradient[image])
            # The output and the gradients by maps: those by the weights are of the whole batch.
            assert_same_bits(alone[:4], [tensor[image] for tensor in together[:4]])


class TestHowTensorsLieInMemory:
    """However tensors lie, the same bits come out; results lie as the encoder feature does, or as their own input."""

    @staticmethod
    def inputs(memory_format):
        shape = {"channels": 3, "decoder_channels": 4, "grid": (2, 2), "patch": (1, 3), "factor": (1, 3)}
        return inputs_of(shape, torch.float32, memory_format)

    @staticmethod
    def gradient():
        return normal(2, 7, 2, 6)

    @classmethod
    @lru_cache
    def expected(cls, memory_format):
        return results(cls.inputs(memory_format), cls.gradient())

    @staticmethod
    def assert_that_they_lie_as_they_should(found, inputs):
        encoder_feature, tokens, *_ = inputs
        for tensor, like in zip(found, (encoder_feature, encoder_feature, tokens, encoder_feature), strict=False):
            assert tensor.is_contiguous(memory_format=memory_format_of(like))
            assert memory_format_of(tensor) == memory_format_of(like)

    # Views of the encoder feature in both formats, and of the other maps in one.
    @pytest.mark.parametrize(
        ("view", "place_and_format"),
        alternately(VIEWS, [(0, FORMATS[0]), (0, FORMATS[1]), (1, FORMATS[1]), (2, FORMATS[1])]),
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_views(self, view, place_and_format):
        place, memory_format = place_and_format
        inputs = self.inputs(memory_format)
        inputs[place] = view(inputs[place])
        assert not inputs[place].is_contiguous(memory_format=memory_format) or inputs[place].storage_offset()
        if place == 0 and memory_format_of(inputs[0]) != memory_format:
            memory_format = torch.contiguous_format  # sums are taken in another order
            inputs[1:3] = self.inputs(memory_format)[1:3]
        found = results(inputs, self.gradient())
        assert_same_bits(found, self.expected(memory_format))
        self.assert_that_they_lie_as_they_should(found, inputs)

    @pytest.mark.parametrize(("name", "memory_format"), alternately(EXPANDED, FORMATS), ids=str)
    def test_expanded_encoder_feature(self, name, memory_format):
        inputs = self.inputs(memory_format)
        inputs[0] = EXPANDED[name](inputs[0])
        found = results(inputs, self.gradient())
        inputs[0] = copied(inputs[0], memory_format_of(inputs[0]))
        assert_same_bits(found, results(inputs, self.gradient()))
        self.assert_that_they_lie_as_they_should(found, inputs)

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_maps_in_the_other_format(self, memory_format):
        inputs = self.inputs(memory_format)
        other = next(other for other in FORMATS if other != memory_format)
        inputs[1:3] = self.inputs(other)[1:3]
        found = results(inputs, self.gradient())
        assert_same_bits(found, self.expected(memory_format))
        self.assert_that_they_lie_as_they_should(found, inputs)

    def test_weights(self):
        inputs = self.inputs(torch.contiguous_format)
        apart = [torch.stack([tensor, -tensor], dim=-1)[..., 0] for tensor in inputs[3:]]
        apart[0] = apart[0].t().contiguous().t()
        assert not any(tensor.is_contiguous() for tensor in apart)
        found = results([*inputs[:3], *apart], self.gradient())
        assert_same_bits(found, self.expected(torch.contiguous_format))

    @pytest.mark.parametrize(("name", "memory_format"), alternately(UPSTREAM, FORMATS), ids=str)
    def test_gradients(self, name, memory_format):
        inputs = self.inputs(memory_format)
        gradient = UPSTREAM[name](self.gradient().contiguous(memory_format=memory_format))
        found = results(inputs, gradient)
        is_changed = not torch.equal(gradient, self.gradient())
        expected = results(inputs, copied(gradient, memory_format)) if is_changed else self.expected(memory_format)
        assert_same_bits(found, expected)
        self.assert_that_they_lie_as_they_should(found, inputs)

    @pytest.mark.parametrize("sizes", [(3, 1, 4), (3, 4, 1), (1, 3, 4), (3, 1, 1), (1, 1, 1)], ids=str)
    def test_channels_last_with_an_axis_of_one(self, sizes):
        """Strides of such maps do not say in which format they are: results agree, in whichever they are taken."""
        channels, height, width = sizes
        shape = {"batch": 2, "channels": channels, "grid": (1, 1), "patch": (height, width), "factor": (1, 1)}
        inputs, others = (inputs_of(shape, torch.float32, memory_format) for memory_format in FORMATS)
        found = results(others)
        torch.testing.assert_close(found, gate_results(inputs), rtol=1e-5, atol=1e-5)
        self.assert_that_they_lie_as_they_should(found, others)

    @pytest.mark.parametrize(
        ("feature", "expected"),
        [
            (torch.empty(2, 3, 4, 5), torch.contiguous_format),
            (torch.empty(2, 3, 1, 1), torch.contiguous_format),
            (torch.empty(2, 1, 4, 5), torch.contiguous_format),
            (torch.empty(2, 3, 1, 1).expand(2, 3, 4, 5), torch.contiguous_format),
            (torch.empty(2, 3, 4, 5, memory_format=torch.channels_last), torch.channels_last),
            (torch.empty(2, 3, 4, 1, memory_format=torch.channels_last), torch.channels_last),
            (torch.empty(2, 1, 4, 5, memory_format=torch.channels_last), torch.contiguous_format),  # it is both
            (torch.empty(2, 4, 5, 8)[..., 2:5].permute(0, 3, 1, 2), torch.channels_last),
        ],
    )
    def test_format(self, feature, expected):
        assert memory_format_of(feature) == expected


def test_compiles_once_for_any_size():
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernels, fullgraph=True, backend=graphs, dynamic=True)
    for batch, grid in ((2, (3, 4)), (3, (2, 5))):  # sizes that are equal would be taken for one size
        shape = {"batch": batch, "channels": 7, "decoder_channels": 5, "grid": grid, "patch": (2, 2)}
        inputs = inputs_of(shape, torch.float32, torch.channels_last)
        gradient = normal(batch, 12, 2 * grid[0], 2 * grid[1])
        found = gate_results(inputs, gradient, compiled)
        torch.testing.assert_close(found, results(inputs, gradient))
    assert graphs.frame_count == 1


class TestAutocast:
    """Maps are read in any dtype, and the output has the widest of theirs and autocast's: nothing is cast in memory."""

    @pytest.mark.parametrize(("in_float32", "memory_format"), alternately([(), (0,), (0, 1, 2)], FORMATS), ids=str)
    def test_error_budget(self, in_float32, memory_format):
        inputs = inputs_of({"batch": 2, "patch": (2, 2)}, torch.float32, memory_format)
        for place in {0, 1, 2}.difference(in_float32):
            inputs[place] = inputs[place].to(torch.bfloat16)

        def under_autocast(inputs, function, rounded):
            is_cast = inputs[0].dtype != torch.float64

            def call(*tensors):
                with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=is_cast):
                    return function(*tensors)

            return gate_results(inputs, normal(2, 8, 4, 6, dtype=torch.bfloat16), call)

        function, baseline = (partial(under_autocast, function=form) for form in (kernels, reference.skip_gate))
        assert_within_budget_of(baseline, function, [inputs])
        assert function(inputs, rounded=None)[0].dtype == baseline(inputs, rounded=None)[0].dtype

    def test_dtypes(self):
        inputs = [tensor.requires_grad_() for tensor in inputs_of({"batch": 1, "patch": (2, 2)})]
        inputs[2] = inputs[2].detach().to(torch.bfloat16).requires_grad_()
        torch.compiler.reset()
        compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output, same = kernels(*inputs), compiled(*inputs)
        assert output.dtype == same.dtype == torch.float32
        assert torch.equal(output, same)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in inputs]


class TestNumbersThatAreHardToHold:
    @staticmethod
    def inputs(dtype=torch.float32):
        return gate_inputs(1, 3, 2, grid=(1, 2), patch=(2, 2), dtype=dtype)

    def test_zero_is_not_positive(self):
        """Feature and tokens that cancel, and zeros of both signs, pass no gradient to the gate nor to themselves."""
        inputs = self.inputs()
        inputs[0][..., :2] = -inputs[1][..., :1]
        inputs[0][:, 0], inputs[1][:, 0] = -0.0, 0.0
        inputs[0][:, 1], inputs[1][:, 1] = -0.0, -0.0
        found, expected = (form(inputs) for form in (results, gate_results))
        torch.testing.assert_close(found, expected)
        weights = [torch.zeros_like(tensor) for tensor in inputs[3:]]  # what is left is the ReLU's
        _, d_encoder_feature, d_tokens, *_ = results([*inputs[:3], *weights])
        skip = inputs[0] + inputs[1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert (skip == 0).sum() >= 18
        assert torch.equal(d_encoder_feature != 0, skip > 0)
        assert not d_tokens[:, :2].any()

    @pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
    @pytest.mark.parametrize("bias", [-1e4, 60.0])
    def test_gates_that_are_shut_or_open(self, bias, dtype):
        inputs = self.inputs(dtype)
        inputs[4].fill_(bias)
        assert_as_exact_as_the_reference([inputs])

    @pytest.mark.parametrize("value", [0.0, 1000.3])
    def test_constant_maps(self, value):
        inputs = self.inputs()
        inputs[0].fill_(value), inputs[1].fill_(0.25), inputs[2].fill_(value)
        assert_as_exact_as_the_reference([inputs])

    @pytest.mark.parametrize("places", [(0,), (0, 1), (2,)], ids=str)
    def test_common_offset(self, places):
        """Every pixel is a thousand deviations from zero; the gate neither shut nor open."""
        inputs = self.inputs()
        for place in places:
            inputs[place] += 1e3
        for place in (3, 5):
            inputs[place] *= 1e-3
        assert_as_exact_as_the_reference([inputs])

    @pytest.mark.parametrize(("size", "dtype"), [(1e-7, torch.float32), (1e-30, torch.float32), (1e-4, torch.float16)])
    def test_small_numbers(self, size, dtype):
        inputs = self.inputs()
        inputs = [*(feature * size for feature in inputs[:3]), *inputs[3:]]
        assert_as_exact_as_the_reference([[tensor.to(dtype) for tensor in inputs]])

    def test_sums_beyond_the_range_of_float16(self):
        """Every pixel is near the largest number: their sums fit only float32, and so do sums of gradients."""
        inputs = self.inputs(torch.float16)
        for feature in inputs[:3]:
            feature.mul_(100).add_(6e4 if feature is not inputs[1] else -3e4)
        for place in (3, 5):
            inputs[place] *= 1e-5
        gradient = torch.full((1, 5, 2, 4), 2.0**-17, dtype=torch.float64, device=DEVICE)
        found = results(inputs, gradient)
        exact = gate_results([tensor.double() for tensor in inputs], gradient)
        for result, expected in zip(found, exact, strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=2e-3, atol=6e-8)

    def test_gradients_beyond_the_range_of_float16(self):
        """Their sum over a cell fits, and what is added up on the way does not."""
        inputs = self.inputs(torch.float16)
        weights = [torch.zeros_like(tensor) for tensor in inputs[3:]]
        inputs[0].abs_(), inputs[1].abs_()
        gradient = torch.tensor([6e4, 6e4, -6e4, -59008], device=DEVICE).half().view(2, 2).repeat(1, 2)
        _, _, d_tokens, d_decoder_feature, *_ = results([*inputs[:3], *weights], gradient.expand(1, 5, 2, 4))
        assert torch.equal(d_tokens, torch.full_like(d_tokens, 496.0))
        assert torch.equal(d_decoder_feature, torch.full_like(d_decoder_feature, 992.0))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_no_number_does_not_vanish(self, value):
        """One pixel spoils its image, as it does in the reference, and no other."""
        inputs = inputs_of({"channels": 3, "patch": (2, 2)})
        inputs[0][0, 1, 2, 3] = value
        inputs[3].fill_(-math.copysign(1, value))  # shuts the gates, and an infinity times zero is no number
        output, expected = kernels(*inputs), reference.skip_gate(*inputs)
        assert output[0].isnan().any()
        assert output[1].isfinite().all()
        torch.testing.assert_close(output, expected, equal_nan=True)


def test_channels_that_lie_far_apart():
    """Distances between the channels of a tile are 32 bits, so that here a tile has two of the four."""
    dtype = torch.float16
    storage = torch.empty(3 * 2**30 + 1, dtype=dtype, device=DEVICE)  # on a CPU only pages that are written take memory
    far = storage.as_strided((1, 4, 1, 1), (4 * 2**30, 2**30, 1, 1))
    inputs = inputs_of({"batch": 1, "channels": 4, "grid": (1, 1), "patch": (1, 1), "factor": (1, 1)}, dtype)
    far.copy_(inputs[0])
    assert torch.equal(kernels(far, *inputs[1:]), kernels(*inputs))


@drawn(
    4,
    lambda st: {
        "batch": st.integers(0, 2),
        "channels": st.integers(1, 9),
        "decoder_channels": st.none() | st.integers(1, 9),
        "grid": st.tuples(st.integers(1, 2), st.integers(1, 4)),
        "patch": st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 5)),
        "has_tokens": st.booleans(),
        "whole_cells": st.tuples(st.booleans(), st.booleans()),
        "memory_format": st.sampled_from(FORMATS),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(
    batch, channels, decoder_channels, grid, patch, has_tokens, whole_cells, memory_format, seed
):
    factor = tuple(cells if whole else 1 for cells, whole in zip(grid, whole_cells, strict=True))
    sizes = (batch, channels, decoder_channels, grid, patch, factor)
    inputs = gate_inputs(*sizes, torch.float32, seed, has_tokens, memory_format)
    found, expected = (form(inputs) for form in (results, gate_results))
    for result, close in zip(found, expected, strict=True):
        # Relative to the largest entry, because gradients by a gate are sums that may cancel.
        bound = 1e-5 * max(1.0, close.abs().max().item() if close.numel() else 0.0)
        torch.testing.assert_close(result, close, rtol=1e-5, atol=bound)


@pytest.mark.gpu
class TestOnAGpu:
    """Sizes that networks have: many programs, parts beyond what is added at once, vectors of every width."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("size", [224, 240, 512, 1000])
    def test_published_scales(self, size, memory_format, dtype):
        for scale, (channels, decoder_channels) in enumerate(((64, 64), (128, 128), (256, 256), (512, 512))):
            side, patch = size >> scale, 16 >> scale
            shape = {"channels": channels, "decoder_channels": decoder_channels, "patch": (patch, patch)}
            if side % patch or side % 2:
                shape |= {"has_tokens": False, "grid": (1, 1), "patch": (side, side), "factor": (1, side)}
            else:
                shape |= {"grid": (side // patch, side // patch)}
            assert_as_exact_as_the_reference([inputs_of(shape, dtype, memory_format)])
            torch.cuda.empty_cache()

    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("batch", [33])
    def test_larger_batch(self, name, batch):
        assert_as_exact_as_the_reference([inputs_of(SHAPES[name] | {"batch": batch})])
