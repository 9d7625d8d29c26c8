"""Batch norm and ReLU as operators of torch: their Triton kernels.

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
    UPSTREAM,
    VIEWS,
    alternately,
    assert_same_bits,
    assert_within_budget_of,
    change_constants,
    copied,
    drawn,
    norm_inputs,
    norm_results,
    normal,
    over_pairs,
    published_norm_results,
    running_statistics,
    watch_launches,
)
from uctrans.kernels import batch_norm_relu
from uctrans.kernels.batch_norm_relu import operator as batch_norm_operator
from uctrans.kernels.formats import memory_format_of
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")

from uctrans.kernels.batch_norm_relu import triton, triton_channels, triton_layout, triton_maps

EPS, MOMENTUM = 1e-5, 0.1

SHAPES = {
    "even": (2, 16, 6, 8),
    "odd": (3, 5, 3, 7),
    "one pixel high": (3, 8, 1, 7),
    "one pixel wide": (2, 3, 9, 1),
    "one pixel": (9, 4, 1, 1),
    "two values a channel": (2, 3, 1, 1),
    "one channel": (4, 1, 5, 3),
    "one channel, one image": (1, 1, 5, 3),
    "3 channels": (2, 3, 5, 5),
    "65 channels": (1, 65, 3, 5),
    "130 channels": (2, 130, 1, 3),
    "512 channels": (2, 512, 2, 1),
    "many small images": (36, 2, 2, 2),
    "more pixels than a tile": (2, 2, 33, 64),
    "more pixels than several tiles": (1, 130, 9, 9),
    "empty batch": (0, 3, 4, 5),
}

FEW_NUMBERS = {"one channel, one image": 3, "two values a channel": 3}  # draws that are taken together

# Changes of the constants in triton.py and triton_layout.py.
MANY_PARTS = {"TILE": 4, "MOST_CHANNELS": 2, "STEPS": 1, "MOST_PARTS_AT_ONCE": 2, "CHANNEL_BLOCK": 2}
CONFIGURATIONS = {
    "small tiles": {"TILE": 4, "MOST_CHANNELS": 2},
    "one channel a tile": {"MOST_CHANNELS": 1},
    "large tiles": {"TILE": 8192, "MOST_CHANNELS": 512},
    "one step": {"TILE": 16, "STEPS": 1},
    "eight steps": {"TILE": 16, "STEPS": 8},
    "as many parts as tiles": MANY_PARTS,
    "five parts": MANY_PARTS | {"MOST_PARTS": 5 * 4},  # of 4 blocks of channels
    "one part": MANY_PARTS | {"MOST_PARTS": 1},
    "three parts at once": MANY_PARTS | {"MOST_PARTS_AT_ONCE": 4, "MOST_PARTS": 3 * 4},
    "one tile a program": {"TILE": 16, "PROGRAM_TILES": 1},
    "few programs": {"TILE": 16, "PROGRAM_TILES": 3, "ENOUGH_PROGRAMS": 1},
    "one channel a program": {"CHANNEL_BLOCK": 1},
    "many channels a program": {"CHANNEL_BLOCK": 128},
    "other warps": {"NUM_WARPS": 8, "SUM_WARPS": 4, "CHANNEL_WARPS": 2},
}


results = partial(norm_results, backend="triton")


def inputs_of(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    return norm_inputs(shape, dtype, memory_format, seed)


def operators(inputs):
    """Return output, mean and variance of a batch without running statistics."""
    statistics = torch.ops.uctrans.batch_norm_statistics(inputs[0], None, None, None, None, MOMENTUM, 1)
    return torch.ops.uctrans.batch_norm_relu(*inputs, *statistics, None, EPS, True), *statistics


def assert_as_exact_as_the_reference(draws, **options):
    assert_within_budget_of(published_norm_results, results, draws, **options)


class TestErrorBudget:
    @over_pairs(SHAPES)
    def test_kernels(self, name, memory_format, dtype):
        draws = [inputs_of(SHAPES[name], dtype, memory_format, seed) for seed in range(FEW_NUMBERS.get(name, 1))]
        with poisoned_allocations():
            assert_as_exact_as_the_reference(draws)

    @over_pairs(["odd", "one pixel", "one channel", "65 channels", "empty batch"])
    def test_kernels_in_evaluation(self, name, memory_format, dtype):
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of(SHAPES[name], dtype, memory_format)], training=False)

    @pytest.mark.parametrize(("memory_format", "dtype"), OTHER_PAIRS, ids=str)
    def test_kernels_in_the_other_format(self, memory_format, dtype):
        assert_as_exact_as_the_reference([inputs_of(SHAPES["odd"], dtype, memory_format)])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_parameters_in_half_precision(self, dtype):
        """A model converted as a whole: parameters and running statistics are half precision too."""
        for memory_format in FORMATS:
            inputs = inputs_of((2, 5, 3, 4), dtype, memory_format)
            assert_as_exact_as_the_reference([[tensor.to(dtype) for tensor in inputs]])


def conv_bias_inputs(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    return [*inputs_of(shape, dtype, memory_format, seed), 3 * normal(shape[1], dtype=dtype, seed=seed)]


def with_conv_bias(feature, weight, bias, conv_bias, running_mean, running_var, **options):
    return batch_norm_relu(feature, weight, bias, running_mean, running_var, conv_bias=conv_bias, **options)


class TestConvBias:
    @pytest.mark.parametrize("training", [True, False])
    @over_pairs(["odd", "one pixel", "130 channels", "empty batch"])
    def test_error_budget(self, name, memory_format, dtype, training):
        """As exact as adding the bias to the map."""
        draws = [conv_bias_inputs(SHAPES[name], dtype, memory_format)]
        found, expected = (partial(norm_results, function=with_conv_bias, backend=b) for b in ("triton", "reference"))
        with poisoned_allocations():
            assert_within_budget_of(expected, found, draws, training=training)

    def test_in_training_only_the_running_mean_depends_on_it(self):
        inputs = conv_bias_inputs((2, 5, 3, 4))
        output, *gradients, d_conv_bias, _, running_var = results(inputs, function=with_conv_bias)
        *plain, _, plain_running_var = results(inputs[:3])
        assert_same_bits([output, *gradients, running_var], [*plain, plain_running_var])
        assert not d_conv_bias.any()

    def test_it_may_learn_alone(self):
        """A frozen norm: weight, bias and feature need no gradient."""
        *inputs, conv_bias = conv_bias_inputs((2, 5, 3, 4))
        running, found = running_statistics(inputs), []
        for backend in ("triton", "reference"):
            leaf = conv_bias.clone().requires_grad_()
            output = with_conv_bias(*inputs, leaf, *running, training=False, backend=backend)
            found += torch.autograd.grad(output, leaf, normal(2, 5, 3, 4))
        torch.testing.assert_close(*found)


class TestLaunchConfigurations:
    @over_pairs(CONFIGURATIONS)
    def test_error_budget(self, name, memory_format, dtype, monkeypatch):
        change_constants(monkeypatch, [triton, triton_layout], CONFIGURATIONS[name])
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of((4, 7, 1, 3), dtype, memory_format)])

    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_many_programs_and_parts(self, memory_format, dtype, monkeypatch):
        launched = watch_launches(monkeypatch, triton_channels, triton_maps)
        change_constants(monkeypatch, [triton, triton_layout], MANY_PARTS | {"PROGRAM_TILES": 1})
        with poisoned_allocations():
            assert_as_exact_as_the_reference([inputs_of((3, 3, 2, 3), dtype, memory_format)])
        assert len(launched) == 6
        assert all(math.prod(programs) > 1 for programs, _ in launched.values())
        for name in ("statistics_kernel", "gradient_sums_kernel"):
            assert len(launched[name][1]["parts_ptr"]) > 2 * MANY_PARTS["MOST_PARTS_AT_ONCE"]

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize(
        "shape",
        [shape for shape in [*SHAPES.values(), (2, 7, 50, 50), (3000, 2, 1, 3), (32, 64, 224, 224)] if 0 not in shape],
        ids=str,
    )
    def test_parts_cover_every_pixel_once(self, shape, memory_format):
        """Cuts are small arithmetic: of large maps, too, and without running anything."""
        _, layout = triton_layout.maps_of(torch.empty(shape, device="meta").contiguous(memory_format=memory_format))
        for cut, tiles in (triton_layout.cut_into_parts(layout), triton_layout.cut_evenly(layout)):
            groups = [
                (first, min(first + cut.images_a_part, cut.images)) for first in range(0, cut.images, cut.images_a_part)
            ]
            chunks = [
                (first, min(first + cut.pixels_a_part, cut.pixels)) for first in range(0, cut.pixels, cut.pixels_a_part)
            ]
            assert len(chunks) == cut.chunks and len(groups) * len(chunks) == triton_layout.count_parts(cut)
            assert cut.pixels_a_part % tiles.BLOCK_PIXELS == 0
            assert cut.images * cut.pixels * layout.channels == math.prod(shape)
            assert cut.channel_units * layout.unit == shape[1]
        cut, tiles = triton_layout.cut_into_parts(layout)
        blocks = -(-shape[1] // tiles.BLOCK_C)
        assert triton_layout.count_parts(cut) <= max(triton_layout.MOST_PARTS // blocks, 1)

    def test_more_pixels_than_kernels_count(self):
        """``composed`` takes over; the map is one number, read again and again."""
        feature = torch.ones((), device=DEVICE).expand(1, 1, 2**15, 2**16)
        assert not batch_norm_operator._fits_kernels(feature)
        assert batch_norm_operator._fits_kernels(feature[:, :, 1:])


class TestStatistics:
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_of_the_batch(self, memory_format):
        inputs = inputs_of((2, 5, 3, 4), torch.float32, memory_format)
        with poisoned_allocations():
            _, mean, variance = operators(inputs)
        exact = inputs[0].double()
        torch.testing.assert_close(mean, exact.mean((0, 2, 3)).float())
        torch.testing.assert_close(variance, exact.var((0, 2, 3), correction=0).float())

    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_running_ones_and_the_count_are_updated_in_place(self, memory_format):
        """However they lie; with ``copies``, as if the map were that much larger."""
        inputs = inputs_of((2, 5, 3, 4), torch.float32, memory_format)
        for copies in (1, 4):
            before = running_statistics(inputs)
            running = [torch.stack([tensor, -tensor], dim=-1)[..., 0] for tensor in before]
            count = torch.tensor(7, device=DEVICE)
            options = {"training": True, "num_batches_tracked": count, "copies": copies}
            with poisoned_allocations():
                batch_norm_relu(*inputs, *running, **options, backend="triton")
            repeated = inputs[0].double().repeat_interleave(copies, 3)
            batch = torch.stack([repeated.mean((0, 2, 3)), repeated.var((0, 2, 3))])
            expected = MOMENTUM * batch + (1 - MOMENTUM) * torch.stack(before).double()
            torch.testing.assert_close(torch.stack(running), expected.float())
            assert count.item() == 8
            batch_norm_relu(*inputs, *running, **options | {"training": False}, backend="triton")
            assert count.item() == 8

    def test_backward_notices_that_running_ones_were_written(self):
        """As PyTorch does: without training, backward needs the running statistics of the forward pass."""
        inputs = [tensor.requires_grad_() for tensor in inputs_of((2, 3, 4, 5))]
        running = running_statistics([tensor.detach() for tensor in inputs])
        output = batch_norm_relu(*inputs, *running, training=False, backend="triton")
        batch_norm_relu(*inputs, *running, training=True, backend="triton")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_running_statistics_may_change_before_backward(self):
        """Two forward passes, then the gradients of both: what the first one kept is not the running statistics."""
        inputs = [tensor.requires_grad_() for tensor in inputs_of((2, 3, 4, 5))]
        running = running_statistics([tensor.detach() for tensor in inputs])
        outputs = [batch_norm_relu(*inputs, *running, training=True, backend="triton") for _ in range(2)]
        gradients = [torch.autograd.grad(output, inputs, normal(2, 3, 4, 5)) for output in outputs]
        assert_same_bits(*gradients)


class TestSameBits:
    def test_whatever_other_channels_there_are(self):
        """A channel depends on itself alone."""
        inputs = inputs_of((2, 5, 3, 4))
        gradient = normal(2, 5, 3, 4)
        whole = results(inputs, gradient)
        spoilt = [tensor.clone() for tensor in inputs]
        spoilt[0][:, 2] = math.nan
        for result, expected in zip(results(spoilt, gradient), whole, strict=True):
            axis = 1 if result.ndim == 4 else 0
            others = torch.tensor([0, 1, 3, 4], device=DEVICE)
            assert torch.equal(result.index_select(axis, others), expected.index_select(axis, others))


class TestHowTensorsLieInMemory:
    """However tensors lie, the same bits come out; results lie as the feature does."""

    SHAPE = (2, 3, 2, 6)

    @classmethod
    def inputs(cls, memory_format):
        return inputs_of(cls.SHAPE, torch.float32, memory_format)

    @classmethod
    def gradient(cls):
        return normal(*cls.SHAPE)

    @classmethod
    @lru_cache
    def expected(cls, memory_format):
        return results(cls.inputs(memory_format), cls.gradient())

    @staticmethod
    def assert_that_they_lie_as_they_should(found, feature):
        for tensor in found[:2]:
            assert tensor.is_contiguous(memory_format=memory_format_of(feature))

    @pytest.mark.parametrize(
        ("view", "memory_format"),
        alternately(VIEWS, FORMATS),
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_views(self, view, memory_format):
        inputs = self.inputs(memory_format)
        inputs[0] = view(inputs[0])
        found = results(inputs, self.gradient())
        assert_same_bits(found, self.expected(memory_format_of(inputs[0])))  # sums of another format have another order
        self.assert_that_they_lie_as_they_should(found, inputs[0])

    @pytest.mark.parametrize(("name", "memory_format"), alternately(EXPANDED, FORMATS), ids=str)
    def test_expanded_feature(self, name, memory_format):
        inputs = self.inputs(memory_format)
        inputs[0] = EXPANDED[name](inputs[0])
        found = results(inputs, self.gradient())
        inputs[0] = copied(inputs[0], memory_format_of(inputs[0]))
        assert_same_bits(found, results(inputs, self.gradient()))

    @pytest.mark.parametrize(("name", "memory_format"), alternately(UPSTREAM, FORMATS), ids=str)
    def test_gradients(self, name, memory_format):
        inputs = self.inputs(memory_format)
        gradient = UPSTREAM[name](self.gradient().contiguous(memory_format=memory_format))
        found = results(inputs, gradient)
        assert_same_bits(found, results(inputs, copied(gradient, memory_format)))
        self.assert_that_they_lie_as_they_should(found, inputs[0])

    def test_a_gradient_of_one_number_is_not_copied(self):
        for memory_format in FORMATS:
            feature, *_ = self.inputs(memory_format)
            gradient = torch.ones((), device=DEVICE).expand(self.SHAPE)
            (_, upstream), _ = triton_layout.maps_of(feature, gradient)
            assert upstream.ptr.data_ptr() == gradient.data_ptr()

    def test_parameters(self):
        inputs = self.inputs(torch.contiguous_format)
        apart = [torch.stack([tensor, -tensor], dim=-1)[..., 0] for tensor in inputs[1:]]
        assert not any(tensor.is_contiguous() for tensor in apart)
        found = results([inputs[0], *apart], self.gradient())
        assert_same_bits(found, self.expected(torch.contiguous_format))

    @pytest.mark.parametrize("sizes", [(3, 1, 4), (3, 4, 1), (1, 3, 4), (3, 1, 1), (1, 1, 1)], ids=str)
    def test_channels_last_with_an_axis_of_one(self, sizes):
        """Strides of such maps do not say in which format they are: results agree, in whichever they are taken."""
        inputs = inputs_of((2, *sizes), torch.float32, torch.channels_last)
        found, expected = (form(inputs) for form in (results, published_norm_results))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_channels_that_lie_far_apart(self):
        """Distances within a tile are 32 bits: what lies further apart is copied."""
        storage = torch.empty(
            3 * 2**30 + 2, dtype=torch.float16, device=DEVICE
        )  # pages that are not touched take no memory
        far = storage.as_strided((1, 4, 1, 2), (4 * 2**30, 2**30, 1, 1))
        inputs = inputs_of((1, 4, 1, 2), torch.float16)
        far.copy_(inputs[0])
        gradient = normal(1, 4, 1, 2, dtype=torch.float16)
        assert_same_bits(results([far, *inputs[1:]], gradient), results(inputs, gradient))


def test_compiles_once_for_any_size():
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(batch_norm_relu, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for batch, height, width in ((2, 3, 4), (3, 5, 7)):  # sizes that are equal would be taken for one size
        inputs = inputs_of((batch, 6, height, width), torch.float32, torch.channels_last)
        gradient = normal(batch, 6, height, width)
        found = results(inputs, gradient, function=compiled)
        torch.testing.assert_close(found, results(inputs, gradient))
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]  # the first call may analyse the function twice, for its floats


class TestNumbersThatAreHardToHold:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(("memory_format", "dtype"), PAIRS, ids=str)
    def test_zero_is_not_positive(self, memory_format, dtype, training):
        """A value normalised to zero passes no gradient, neither to the sums nor to itself."""
        inputs = inputs_of((2, 3, 2, 4), dtype, memory_format)
        pattern = torch.tensor([-1.0, 0.0, 1.0, 0.0], device=DEVICE)  # its mean is zero, to the last bit
        inputs[0].copy_(pattern.expand(2, 3, 2, 4))
        inputs[2].fill_(0.0)
        feature, weight, bias = inputs
        running = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        gradient = normal(2, 3, 2, 4, dtype=dtype)
        found = []
        for backend in ("triton", "reference"):
            leaves = [tensor.clone().requires_grad_() for tensor in (feature, weight, bias)]
            output = batch_norm_relu(*leaves, *running, training=training, momentum=0.0, backend=backend)
            found.append(torch.autograd.grad(output, leaves, gradient))
        for result, expected in zip(*found, strict=True):
            torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
        if not training:
            passes = (feature * weight[:, None, None].to(dtype)) > 0
            assert torch.equal(found[0][0] != 0, passes & (gradient != 0))

    @pytest.mark.parametrize(("offset", "memory_format"), alternately([-1e3, 1e6], FORMATS), ids=str)
    @pytest.mark.parametrize("configuration", [{}, MANY_PARTS | {"TILE": 16}], ids=["one part", "many parts"])
    def test_common_offset(self, configuration, memory_format, offset, monkeypatch):
        """Values far from zero and close together: their squares would cancel."""
        change_constants(monkeypatch, [triton, triton_layout], configuration)
        draws = []
        for seed in range(3):  # of fewer numbers the reference has the mean exact by luck
            inputs = inputs_of((3, 4, 3, 5), torch.float32, memory_format, seed)
            inputs[0] += offset
            draws.append(inputs)
        assert_as_exact_as_the_reference(draws)

    @pytest.mark.parametrize(("place", "memory_format"), alternately([(0, 0, 0), (1, 1, 2)], FORMATS), ids=str)
    def test_variance_beside_an_outlier(self, place, memory_format, monkeypatch):
        """The variance of values that lie together, but for one of them, is as exact as any."""
        change_constants(monkeypatch, [triton_layout], {"TILE": 32, "MOST_CHANNELS": 2})
        inputs = inputs_of((2, 2, 12, 12), torch.float32, memory_format)
        inputs[0] += 300.0
        image, row, column = place
        inputs[0][image, :, row, column] = 0.0
        _, mean, variance = operators(inputs)
        exact = inputs[0].double().var(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(variance.double(), exact, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(mean.double(), inputs[0].double().mean(dim=(0, 2, 3)), rtol=2.4e-7, atol=0.0)

    def test_means_of_parts_that_lie_far_apart(self, monkeypatch):
        """Every image has its own offset: what lies between parts counts, and does not cancel."""
        change_constants(monkeypatch, [triton, triton_layout], MANY_PARTS | {"TILE": 16})
        for memory_format in FORMATS:
            inputs = inputs_of((4, 3, 3, 3), torch.float32, memory_format)
            inputs[0] += 1e3 * torch.arange(4, device=DEVICE)[:, None, None, None]
            assert_as_exact_as_the_reference([inputs])

    @pytest.mark.parametrize("value", [0.0, -3.0, 1000.3])
    def test_constant_map(self, value):
        """The variance is zero to the last bit."""
        for memory_format in FORMATS:
            inputs = inputs_of((2, 3, 3, 5), torch.float32, memory_format)
            inputs[0].fill_(value)
            output, mean, variance = operators(inputs)
            assert not variance.any()
            torch.testing.assert_close(mean, torch.full_like(mean, value))
            torch.testing.assert_close(output, inputs[2].relu()[:, None, None].expand_as(output))

    @pytest.mark.parametrize(("size", "dtype"), [(1e-7, torch.float32), (1e-20, torch.float32), (1e-6, torch.float16)])
    def test_small_numbers(self, size, dtype):
        inputs = inputs_of((2, 3, 3, 5))
        inputs[0] *= size
        assert_as_exact_as_the_reference([[inputs[0].to(dtype), *inputs[1:]]])

    def test_sums_beyond_the_range_of_float16(self):
        """Every value is near the largest number: their squares fit only float32."""
        feature, *parameters = inputs_of((2, 3, 3, 5))
        draws = [[(3e4 * feature.sign() + 100 * feature).half(), *parameters]]
        assert_as_exact_as_the_reference(draws)

    @pytest.mark.parametrize(
        ("value", "training"), alternately([math.nan, math.inf, -math.inf], [True, False]), ids=str
    )
    def test_what_is_no_number_does_not_vanish(self, value, training):
        """One pixel spoils its channel where the batch has the statistics, itself otherwise; as in the reference."""
        for memory_format in FORMATS:
            inputs = inputs_of((2, 3, 3, 4), torch.float32, memory_format)
            inputs[0][0, 1, 2, 3] = value
            found, expected = (form(inputs, normal(2, 3, 3, 4), training) for form in (results, published_norm_results))
            output, d_feature, *_ = found
            torch.testing.assert_close(output, expected[0], equal_nan=True)
            torch.testing.assert_close(d_feature.isfinite(), expected[1].isfinite())
            assert output[:, [0, 2]].isfinite().all()
            if training:
                assert output[:, 1].isnan().all()
                assert not found[-1][1].isfinite() and not found[-2][1].isfinite()


@drawn(
    6,
    lambda st: {
        "shape": st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
        "training": st.booleans(),
        "memory_format": st.sampled_from(FORMATS),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(shape, training, memory_format, seed):
    if training and shape[0] * shape[2] * shape[3] <= 4:  # so few values that rounding decides
        training = False
    inputs = inputs_of(shape, torch.float32, memory_format, seed)
    found, expected = (form(inputs, training=training) for form in (results, published_norm_results))
    for result, close in zip(found, expected, strict=True):
        bound = 1e-4 * max(1.0, close.abs().max().item() if close.numel() else 0.0)
        torch.testing.assert_close(result, close, rtol=1e-4, atol=bound)


@pytest.mark.gpu
class TestOnAGpu:
    """Sizes that networks have; the same bits in every run; CUDA graphs."""

    SCALES = ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("batch", [1, 4, 32])
    def test_published_scales(self, batch, memory_format, dtype):
        for channels, side in self.SCALES:
            inputs = inputs_of((batch, channels, side, side), dtype, memory_format)
            for training in (True, False):
                assert_as_exact_as_the_reference([inputs], training=training)
            torch.cuda.empty_cache()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    def test_same_bits_in_every_run(self, memory_format, dtype):
        inputs = inputs_of((4, 64, 224, 224), dtype, memory_format)
        first = results(inputs)
        kept = []
        for run in range(1, 10):
            # Memory of another size is taken and kept, so that no run works at the addresses of the one before.
            kept.append(torch.full((run * 4099,), math.nan, device=DEVICE))
            assert_same_bits(results(inputs), first)

    def test_cuda_graph(self):
        """Every replay of a captured step writes outputs, gradients and running statistics."""
        inputs = [tensor.requires_grad_() for tensor in inputs_of((4, 64, 56, 56), torch.bfloat16, torch.channels_last)]
        gradient = normal(4, 64, 56, 56, dtype=torch.bfloat16)
        running = running_statistics([tensor.detach() for tensor in inputs])
        expected = [tensor.clone() for tensor in running]

        def step(statistics):
            output = batch_norm_relu(*inputs, *statistics, training=True, backend="triton")
            return [output, *torch.autograd.grad(output, inputs, gradient)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step([tensor.clone() for tensor in running])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(running)
        for seed in range(3):
            with torch.no_grad():
                inputs[0].copy_(inputs_of((4, 64, 56, 56), torch.bfloat16, seed=seed)[0])
            graph.replay()
            assert_same_bits(captured, step(expected))
            assert_same_bits(running, expected)

    def test_reduce_overhead(self):
        """The compiled operator goes into CUDA graphs."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        inputs = inputs_of((4, 64, 56, 56), torch.bfloat16, torch.channels_last)
        compiled = torch.compile(torch.ops.uctrans.batch_norm_relu, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # one to warm up, one to record, two to replay
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(*inputs, *running_statistics(inputs), None, EPS, False).clone()
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert_same_bits([found], [results(inputs, training=False)[0]])
