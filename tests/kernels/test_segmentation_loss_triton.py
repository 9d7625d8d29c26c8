"""The sums of segmentation losses, and loss and Dice made of them, as operators of torch: their Triton kernels.

Without a GPU the kernels run in Triton's interpreter: maps are as small as they can be and still be awkward.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.support import (
    DEVICE,
    FORMATS,
    IGNORED,
    OTHER_PAIRS,
    SUMS_SHAPES,
    alternately,
    assert_sums_as_exact_as_the_reference,
    change_constants,
    drawn,
    over_pairs,
    partly_ignored,
    sums_inputs,
    sums_results,
    upstream_of_sums,
)
from uctrans.kernels import segmentation_scores, segmentation_sums
from uctrans.kernels.segmentation_loss import composed, reference
from uctrans.kernels.testing import assert_within_budget, poisoned_allocations

pytest.importorskip("triton")

from uctrans.kernels import launch
from uctrans.kernels.segmentation_loss import triton, triton_scores

MASK_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]

# Changes of the constants in triton.py and triton_scores.py.
MANY_PARTS = {"TILE": 8, "CLASS_TILE": 8}
CONFIGURATIONS = {
    "small tiles": MANY_PARTS,
    "one pixel a tile": {"TILE": 1, "CLASS_TILE": 4},
    "large tiles": {"TILE": 4096, "CLASS_TILE": 2048},
    "one part": MANY_PARTS | {"MOST_PARTS": 1},
    "three parts": MANY_PARTS | {"MOST_PARTS": 3},
    "more parts than are added at once": {"TILE": 2, "CLASS_TILE": 8, "MOST_PARTS": 1000},
    "other warps": {"NUM_WARPS": 8},
    "one warp": {"NUM_WARPS": 1},
}
SCORES_CONFIGURATIONS = {"one image a tile": {"TILE": 4}, "two warps": {"NUM_WARPS": 2}, "large": {"TILE": 4096}}


def kernels(logits, masks, **options):
    return segmentation_sums(logits, masks, backend="triton", **options)


class TestErrorBudget:
    @over_pairs(SUMS_SHAPES)
    def test_kernels(self, name, memory_format, dtype):
        draws = [sums_inputs(*SUMS_SHAPES[name], dtype, memory_format, seed) for seed in range(2)]
        with poisoned_allocations():
            assert_sums_as_exact_as_the_reference(kernels, draws)

    @pytest.mark.parametrize(("memory_format", "dtype"), OTHER_PAIRS, ids=str)
    def test_kernels_in_the_other_format(self, memory_format, dtype):
        shape = SUMS_SHAPES["three classes, odd sides"]
        assert_sums_as_exact_as_the_reference(kernels, [sums_inputs(*shape, dtype, memory_format)])

    @over_pairs(["one class", "three classes, odd sides", "seventeen classes"])
    def test_ignored_pixels(self, name, memory_format, dtype):
        draws = [partly_ignored(*sums_inputs(*SUMS_SHAPES[name], dtype, memory_format))]
        with poisoned_allocations():
            assert_sums_as_exact_as_the_reference(kernels, draws, ignore_label=IGNORED)

    @pytest.mark.parametrize("dtype", MASK_DTYPES[1:], ids=str)
    @pytest.mark.parametrize("classes", [1, 2])
    def test_ignored_labels_of_any_dtype(self, classes, dtype):
        logits, masks = sums_inputs(2, classes, 5, 7, torch.float32)
        label = torch.iinfo(dtype).max
        masks = masks.to(dtype)
        masks[:, 2] = label
        found, expected = (
            sums_results(f, logits, masks, ignore_label=label) for f in (kernels, reference.segmentation_sums)
        )
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
    @pytest.mark.parametrize("classes", [1, 2])
    def test_masks_of_any_dtype(self, classes, dtype):
        logits, masks = sums_inputs(2, classes, 5, 7, torch.float32)
        found, expected = sums_results(kernels, logits, masks.to(dtype)), sums_results(kernels, logits, masks)
        assert all(map(torch.equal, [*found[0], found[1]], [*expected[0], expected[1]]))

    @pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
    @pytest.mark.parametrize(("classes", "memory_format"), [(1, FORMATS[0]), (3, FORMATS[1])], ids=str)
    def test_launch_configurations(self, classes, memory_format, configuration, monkeypatch):
        change_constants(monkeypatch, [triton], configuration)
        draws = [sums_inputs(2, classes, 5, 7, torch.float32, memory_format)]
        with poisoned_allocations():
            assert_sums_as_exact_as_the_reference(kernels, draws)

    def test_more_parts_than_are_added_at_once(self, monkeypatch):
        """That the configuration does what its name says."""
        change_constants(monkeypatch, [triton], CONFIGURATIONS["more parts than are added at once"])
        added = []
        monkeypatch.setattr(triton, "add_parts", lambda parts, dtype: added.append(parts) or parts.sum(0))
        kernels(*sums_inputs(1, 1, 9, 11, torch.float32))
        assert [parts.shape for parts in added] == [(50, 4), (50, 3)]
        assert len(added[0]) > launch.LARGEST_BLOCK_PARTS

    @pytest.mark.parametrize("classes", [1, 4])
    def test_few_mistakes_and_many_certain_pixels(self, classes):
        """A trained network has losses a ten-thousandth of the logits, which logarithms near 1 would round."""
        logits, masks = sums_inputs(2, classes, 8, 8, torch.float32)
        labels = torch.arange(max(classes, 2), device=DEVICE).view(1, -1, 1, 1)
        certain = torch.where(masks[:, None] == labels, 9.0, -1.0)
        logits = 0.3 * logits + (certain if classes > 1 else certain[:, 1:] - certain[:, :1])
        for scale in (1.0, 2.0):  # beyond, the oracle's 1 - p is rounded too
            assert_sums_as_exact_as_the_reference(kernels, [(logits * scale, masks)])


@drawn(
    8,
    lambda st: {
        "shape": st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6)),
        "channels_last": st.booleans(),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(shape, channels_last, seed):
    inputs = sums_inputs(*shape, torch.float32, FORMATS[channels_last], seed)
    found, expected = (sums_results(function, *inputs) for function in (kernels, reference.segmentation_sums))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestStrides:
    @staticmethod
    def strided(tensor, kind):
        """The same numbers at other places, without the last axis's neighbours next to it or in gaps of others'."""
        if kind == "transposed":
            return tensor.mT.contiguous().mT
        if kind == "cropped":
            shape = (*tensor.shape[:-2], tensor.shape[-2] + 3, tensor.shape[-1] + 2)
            return tensor.new_full(shape, 1)[..., 1:-2, 2:].copy_(tensor)
        if kind == "every other":
            return tensor.repeat_interleave(2, dim=-1)[..., ::2]
        if kind == "batch last":
            return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
        raise ValueError(kind)

    @pytest.mark.parametrize("kind", ["transposed", "cropped", "every other", "batch last"])
    @pytest.mark.parametrize("classes", [1, 3])
    def test_inputs(self, classes, kind):
        logits, masks = sums_inputs(2, classes, 4, 5, torch.float32)
        expected = sums_results(kernels, logits, masks)
        for inputs in ((self.strided(logits, kind), masks), (logits, self.strided(masks, kind))):
            assert any(not tensor.is_contiguous() for tensor in inputs)
            torch.testing.assert_close(sums_results(kernels, *inputs), expected)

    @pytest.mark.parametrize("classes", [1, 3])
    def test_one_image_for_all(self, classes):
        logits, masks = sums_inputs(1, classes, 4, 5, torch.float32)
        logits, masks = logits.expand(3, -1, -1, -1), masks.expand(3, -1, -1)
        torch.testing.assert_close(
            sums_results(kernels, logits, masks), sums_results(reference.segmentation_sums, logits, masks)
        )

    @pytest.mark.parametrize("classes", [1, 3])
    def test_logits_in_either_format_are_not_copied(self, classes):
        for memory_format in FORMATS:
            logits, masks = sums_inputs(2, classes, 4, 5, torch.float32, memory_format)
            assert triton._pixels(logits).ptr is logits
            assert sums_results(kernels, logits, masks)[0][-1].stride() == logits.stride()


class TestNumbersThatAreHardToHold:
    def check(self, logits, masks):
        """Exactly as the present steps: what is no number and what is infinite is so in the same places."""
        for dtype in (torch.float32, torch.float16):
            values = logits.to(dtype)
            found, counts = sums_results(kernels, values, masks)
            expected, expected_counts = sums_results(reference.segmentation_sums, values, masks)
            torch.testing.assert_close(
                found, expected, equal_nan=True, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-6
            )
            assert torch.equal(counts, expected_counts)
            found, counts = sums_results(composed.segmentation_sums, values, masks)
            torch.testing.assert_close(found, expected, equal_nan=True)
            assert torch.equal(counts, expected_counts)

    @pytest.mark.parametrize(
        ("value", "classes"), alternately([6e4, 88.0, 104.0, 1e-4, 0.0, 17.0, 1e4], [1, 3]), ids=str
    )
    def test_large_and_small_logits(self, value, classes):
        logits, masks = sums_inputs(2, classes, 3, 4, torch.float32)
        self.check(logits.sign() * value, masks)
        self.check(torch.full_like(logits, value), masks)
        self.check(torch.full_like(logits, -value), masks)

    @pytest.mark.parametrize("classes", [1, 3])
    @pytest.mark.parametrize(("value", "label"), alternately([math.nan, math.inf, -math.inf], [0, 1]), ids=str)
    def test_what_is_no_number(self, value, label, classes):
        for place in range(classes):
            logits, masks = sums_inputs(2, classes, 3, 4, torch.float32)
            logits[0, place, 1, 2] = value
            masks[0, 1, 2] = label
            self.check(logits, masks)

    def test_nothing_but_infinities(self):
        for values in ((-math.inf,) * 3, (math.inf,) * 3, (-math.inf, math.inf, 0), (math.nan, math.inf, math.nan)):
            logits = torch.tensor(values, device=DEVICE).view(1, 3, 1, 1)
            for label in range(3):
                self.check(logits, torch.full((1, 1, 1), label, device=DEVICE))

    def test_largest_of_equal_logits_is_the_first(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randint(0, 2, (2, 5, 6, 7), generator=generator).float().to(DEVICE)
        self.check(logits, sums_inputs(2, 5, 6, 7)[1])

    @pytest.mark.parametrize("classes", [1, 3])
    def test_masks_that_are_no_labels(self, classes):
        logits, masks = sums_inputs(2, classes, 3, 4, torch.float32)
        masks = masks.long()
        masks[0, 0] = torch.tensor([255, -1, 2**32, 5], device=DEVICE)
        found, counts = sums_results(kernels, logits, masks)
        expected, expected_counts = sums_results(reference.segmentation_sums, logits, masks)
        torch.testing.assert_close(found, expected)
        assert torch.equal(counts, expected_counts)
        torch.testing.assert_close(sums_results(composed.segmentation_sums, logits, masks)[0], expected)

    def test_upstream_that_is_no_number(self):
        for classes in (1, 3):
            logits, masks = sums_inputs(2, classes, 3, 4, torch.float32)
            gradient = upstream_of_sums(logits)
            gradient[0, 1] = math.nan
            gradient[1, 0] = math.inf
            found, expected = (
                sums_results(f, logits, masks, gradient)[0][-1] for f in (kernels, reference.segmentation_sums)
            )
            torch.testing.assert_close(found, expected, equal_nan=True)


def scores_inputs(batch, classes, dtype=torch.float32):
    pixels = 20
    sums, counts = reference.segmentation_sums(*sums_inputs(batch, classes, 4, 5))
    if batch > 1:
        counts[:, 1, classes // 2] = 0  # neither predicted nor actual
    return sums.to(dtype), counts, pixels


class TestScores:
    @pytest.fixture(params=[{}, *SCORES_CONFIGURATIONS.values()], ids=["as it is", *SCORES_CONFIGURATIONS])
    def configuration(self, request, monkeypatch):
        change_constants(monkeypatch, [triton_scores], request.param)

    @pytest.mark.usefixtures("configuration")
    @pytest.mark.parametrize("given_totals", [False, True])
    @pytest.mark.parametrize("classes", [1, 2, 3, 17])
    @pytest.mark.parametrize("batch", [5])
    def test_error_budget(self, batch, classes, given_totals):
        totals = torch.tensor([2.5, 31.0, 44.0], device=DEVICE) if given_totals else None
        outcomes = []
        for backend, dtype in (("triton", torch.float32), ("composed", torch.float32), ("composed", torch.float64)):
            sums, counts, pixels = scores_inputs(batch, classes, dtype)
            sums.requires_grad_()
            options = {"dice_weight": 0.3, "cross_entropy_weight": 0.9, "totals": totals, "backend": backend}
            with poisoned_allocations():
                loss, dice = segmentation_scores(sums, counts, pixels, **options)
                (slopes,) = torch.autograd.grad(1.7 * loss, sums)
            assert (loss.dtype, dice.dtype, slopes.dtype) == (dtype, torch.float32, dtype)
            outcomes.append([loss.detach(), *slopes.unbind(), dice])
        assert_within_budget(*outcomes)

    @pytest.mark.parametrize("classes", [1, 3])
    def test_empty_batch(self, classes):
        """A mean over nothing is no number, as in the plain steps."""
        sums, counts, pixels = scores_inputs(0, classes)
        for backend in ("triton", "composed"):
            loss, dice = segmentation_scores(sums.requires_grad_(), counts, pixels, backend=backend)
            assert loss.isnan()
            assert dice.shape == (0,)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("classes", [1, 3])
    def test_what_is_no_number(self, classes, value):
        sums, counts, pixels = scores_inputs(3, classes)
        for row in range(len(sums)):
            spoilt = sums.clone()
            spoilt[row, 1, 0] = value
            found = torch.ops.uctrans.segmentation_scores(spoilt, counts, None, pixels, 0.5, 0.5)
            leaf = spoilt.requires_grad_()
            loss, dice = reference.segmentation_scores(leaf, counts, None, pixels, 0.5, 0.5)
            expected = (loss.detach(), dice, *torch.autograd.grad(loss, leaf))
            torch.testing.assert_close(found, expected, equal_nan=True)

    @pytest.mark.parametrize("classes", [1, 3])
    def test_masks_of_one_value(self, classes):
        """No positives or no negatives: nothing is divided by zero."""
        logits, masks = sums_inputs(2, classes, 4, 5, torch.float32)
        for value in (0, 1):
            sums, counts = kernels(logits.requires_grad_(), masks.fill_(value))
            losses = [segmentation_scores(sums, counts, 20, backend=backend)[0] for backend in ("triton", "composed")]
            torch.testing.assert_close(*losses)
            assert losses[0].isfinite()

    def test_strided_inputs(self):
        sums, counts, pixels = scores_inputs(4, 3)
        expected = segmentation_scores(sums, counts, pixels, backend="triton")
        sums, counts = (tensor.movedim(0, 2).contiguous().movedim(2, 0) for tensor in (sums, counts))
        torch.testing.assert_close(segmentation_scores(sums, counts, pixels, backend="triton"), expected)

    def test_dice_alone_passes_no_gradient(self):
        sums, counts, pixels = scores_inputs(2, 1)
        _, dice = segmentation_scores(sums.requires_grad_(), counts, pixels, backend="triton")
        assert not dice.requires_grad


class TestOperatorsOfTorch:
    @pytest.mark.parametrize("classes", [1, 3])
    def test_compiles_once_for_any_size(self, classes):
        def loss(z, t):
            return segmentation_scores(*kernels(z, t), z.shape[2] * z.shape[3], backend="triton")

        torch.compiler.reset()  # a limit on compilations counts those of other tests
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(loss, fullgraph=True, backend=graphs, dynamic=True)
        for batch, height, width in ((2, 4, 7), (5, 6, 9)):
            logits, masks = sums_inputs(batch, classes, height, width, torch.float32)
            outcomes = []
            for function in (compiled, loss):
                leaf = logits.clone().requires_grad_()
                outcome = function(leaf, masks)
                outcomes.append((*outcome, *torch.autograd.grad(outcome[0], leaf)))
            torch.testing.assert_close(*outcomes)
        assert sum("segmentation_sums" in graph.code for graph in graphs.graphs) == 1

    @pytest.mark.parametrize("classes", [1, 3])
    def test_autocast_changes_nothing(self, classes):
        logits, masks = sums_inputs(2, classes, 4, 5, torch.float16)
        expected = sums_results(kernels, logits, masks)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = sums_results(kernels, logits, masks)
            composed_results = sums_results(composed.segmentation_sums, logits, masks)
        assert all(map(torch.equal, [*found[0], found[1]], [*expected[0], expected[1]]))
        assert all(map(torch.equal, composed_results[0], sums_results(composed.segmentation_sums, logits, masks)[0]))


class TestLimits:
    def test_more_classes_than_a_tile_holds(self, monkeypatch):
        logits, masks = sums_inputs(1, 65, 2, 2, torch.float32)
        with pytest.raises(NotImplementedError, match=r"takes up to 64 classes, not 65; use backend='composed'"):
            kernels(logits, masks)
        monkeypatch.setenv("UCTRANS_BACKEND", "triton")
        torch.testing.assert_close(segmentation_sums(logits, masks), composed.segmentation_sums(logits, masks))
        assert_sums_as_exact_as_the_reference(kernels, [sums_inputs(1, 64, 3, 3, torch.float32)])

    def test_more_pixels_than_kernels_count(self):
        """The map is one number, read again and again."""
        logits = torch.ones((), device=DEVICE).expand(1, 1, 2**15 + 1, 2**15)
        masks = torch.ones((), device=DEVICE, dtype=torch.uint8).expand(1, 2**15 + 1, 2**15)
        with pytest.raises(
            NotImplementedError, match=r"takes images of up to 1073741824 pixels, not 32769 x 32768; use"
        ):
            kernels(logits, masks)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("memory_format", FORMATS, ids=str)
    @pytest.mark.parametrize("classes", [1, 2, 3, 16, 64])
    @pytest.mark.parametrize(("batch", "side"), [(4, 224), (3, 225), (1, 1000)])
    def test_sizes_of_networks(self, batch, side, classes, memory_format, dtype):
        assert_sums_as_exact_as_the_reference(kernels, [sums_inputs(batch, classes, side, side, dtype, memory_format)])

    @pytest.mark.parametrize("classes", [1, 3])
    def test_replayed_as_a_graph(self, classes):
        """Loss, Dice and gradient of other numbers than those that were captured, to the last bit."""

        def run(logits, masks):
            leaf = logits.detach().requires_grad_()
            pixels = masks.shape[1] * masks.shape[2]
            loss, dice = segmentation_scores(*kernels(leaf, masks), pixels, backend="triton")
            return loss.detach(), dice, *torch.autograd.grad(loss, leaf)

        logits, masks = sums_inputs(4, classes, 224, 224, torch.bfloat16, torch.channels_last)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(logits, masks)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(logits, masks)
        for seed in (1, 2):
            others = sums_inputs(4, classes, 224, 224, torch.bfloat16, torch.channels_last, seed)
            logits.copy_(others[0]), masks.copy_(others[1])
            graph.replay()
            for found, expected in zip(captured, run(*others), strict=True):
                assert torch.equal(found, expected)
