"""The sums of segmentation losses, loss and Dice in plain PyTorch, and bad input of the public functions.

``test_segmentation_loss_triton.py`` tests the Triton operators.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.kernels.support import (
    BACKENDS,
    DEVICE,
    FORMATS,
    IGNORED,
    SUMS_SHAPES,
    assert_sums_as_exact_as_the_reference,
    drawn,
    partly_ignored,
    sums_inputs,
    sums_results,
    upstream_of_sums,
)
from uctrans.kernels import segmentation_loss, segmentation_scores, segmentation_sums, segmentation_totals
from uctrans.kernels.segmentation_loss import composed, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SUMS_SHAPES.values(), ids=SUMS_SHAPES.keys())
def test_composed_stays_within_the_error_budget(shape, memory_format, dtype):
    draws = [sums_inputs(*shape, dtype, memory_format, seed) for seed in range(4)]
    assert_sums_as_exact_as_the_reference(composed.sums_by_image, draws)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("classes", [1, 3])
def test_composed_ignores_a_label_within_the_error_budget(classes, memory_format):
    for dtype in DTYPES:
        draws = [partly_ignored(*sums_inputs(3, classes, 9, 14, dtype, memory_format, seed)) for seed in range(2)]
        assert_sums_as_exact_as_the_reference(composed.sums_by_image, draws, ignore_label=IGNORED)


@drawn(
    25,
    lambda st: {
        "shape": st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 7), st.integers(0, 7)),
        "channels_last": st.booleans(),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(shape, channels_last, seed):
    inputs = sums_inputs(*shape, torch.float64, FORMATS[channels_last], seed)
    torch.testing.assert_close(
        sums_results(composed.sums_by_image, *inputs), sums_results(reference.segmentation_sums, *inputs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    def test_one_class(self, backend):
        """Two images of two pixels; sigmoid(log 3) = 3/4."""
        logits = torch.tensor([[math.log(3), -math.log(3)], [0.0, math.log(3)]], device=DEVICE).view(2, 1, 1, 2)
        masks = torch.tensor([[1, 1], [1, 0]], device=DEVICE).view(2, 1, 2)
        sums, counts = segmentation_sums(logits, masks, backend=backend)
        expected = [
            [3 / 4 + 1 / 4, 1 / 2],
            [9 / 16 + 1 / 16 + 2, 1 / 4 + 9 / 16 + 1],
            [math.log(4 / 3) + math.log(4), math.log(2)],
            [0, math.log(4)],
        ]
        torch.testing.assert_close(sums, torch.tensor(expected, device=DEVICE)[..., None])
        expected = torch.tensor([[1.0, 0], [1, 1], [2, 1]], device=DEVICE)
        assert torch.equal(counts, expected[..., None])  # a logit of 0 is not predicted

    def test_several_classes(self, backend):
        """One image of two pixels: softmax(0, log 2, 0) = (1, 2, 1) / 4."""
        logits = torch.tensor([[0.0, math.log(2), 0], [0, 0, 0]], device=DEVICE).T.reshape(1, 3, 1, 2)
        masks = torch.tensor([[[1, 2]]], device=DEVICE)
        sums, counts = segmentation_sums(logits, masks, backend=backend)
        expected = [
            [0, 1 / 2, 1 / 3],
            [1 / 16 + 1 / 9, 1 / 4 + 1 / 9 + 1, 1 / 16 + 1 / 9 + 1],
            [0, math.log(2), math.log(3)],
        ]
        torch.testing.assert_close(sums, torch.tensor(expected, device=DEVICE)[:, None])
        expected = torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 1, 1]], device=DEVICE)
        assert torch.equal(counts, expected[:, None])  # of three equal logits the first is predicted

    @pytest.mark.parametrize("classes", [1, 2, 4])
    def test_ignored_pixels_are_as_if_they_were_not_there(self, backend, classes):
        """Cutting the ignored columns off gives the same sums and counts, and their gradient is exactly 0."""
        logits, masks = sums_inputs(2, classes, 4, 5, torch.float32)
        expected, expected_counts = sums_results(
            segmentation_sums, logits[..., 1:4].contiguous(), masks[..., 1:4].contiguous(), backend=backend
        )
        masks[..., 0] = masks[..., 4] = IGNORED
        logits[..., 0] = math.nan
        found, counts = sums_results(segmentation_sums, logits, masks, backend=backend, ignore_label=IGNORED)
        torch.testing.assert_close(found[:-1], expected[:-1])
        torch.testing.assert_close(found[-1][..., 1:4], expected[-1])
        assert torch.equal(counts, expected_counts)
        assert torch.equal(found[-1][..., [0, 4]], torch.zeros_like(logits[..., [0, 4]]))

    @pytest.mark.parametrize("classes", [1, 3])
    def test_nothing_but_ignored_pixels(self, backend, classes):
        logits, masks = sums_inputs(2, classes, 4, 5, torch.float32)
        found, counts = sums_results(
            segmentation_sums, logits, torch.full_like(masks, IGNORED), backend=backend, ignore_label=IGNORED
        )
        assert not any(part.any() for part in (*found, counts))

    def test_scores(self, backend):
        """Dice loss of each image 1 - 2 overlap/area, but for the smoothing; Dice 2/3, and 1 where nobody is."""
        sums = torch.tensor([[1.0, 2], [4, 5], [3, 0], [4, 8]], device=DEVICE)[..., None]
        counts = torch.tensor([[2.0, 0], [3, 0], [3, 0]], device=DEVICE)[..., None]
        loss, dice = segmentation_scores(sums, counts, 4, dice_weight=0.75, cross_entropy_weight=2, backend=backend)
        expected = 0.75 * (1 / 2 + 1 / 5) / 2 + 2 * (0.5 * 3 / 3 + 0.5 * 12 / 5)
        assert loss.item() == pytest.approx(expected, abs=3e-5)
        torch.testing.assert_close(dice, torch.tensor([2 / 3, 1], device=DEVICE))


WEIGHTS = {"dice_weight": 0.3, "cross_entropy_weight": 0.9}


def written_out_loss(logits, masks, totals=None):
    """The published formulas in PyTorch's own words: Dice of halved probabilities, mean cross entropies."""
    classes = logits.shape[1]
    if classes == 1:
        probability, target = logits.sigmoid(), masks[:, None].to(logits.dtype)
        pixels = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        positives, negatives = (target.sum(), (1 - target).sum()) if totals is None else totals[1:]
        cross_entropy = 0.5 * (pixels * target).sum() / positives + 0.5 * (pixels * (1 - target)).sum() / negatives
    else:
        probability, target = logits.softmax(1), F.one_hot(masks.long(), classes).movedim(-1, 1).to(logits.dtype)
        cross_entropy = F.cross_entropy(logits, masks.long(), reduction="sum") / masks[0].numel()
        cross_entropy = cross_entropy / (len(masks) if totals is None else totals[0])
    p, t = probability / 2, target / 2
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1e-5) / ((p * p).sum((2, 3)) + (t * t).sum((2, 3)) + 1e-5)
    return 0.3 * dice.mean(1).sum() / (len(masks) if totals is None else totals[0]) + 0.9 * cross_entropy


@pytest.mark.parametrize("given_totals", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_loss_is_the_published_formula(classes, given_totals):
    logits, masks = sums_inputs(3, classes, 5, 6)
    totals = torch.tensor([2.5, 31.0, 44.0], device=DEVICE) if given_totals else None
    sums, counts = segmentation_sums(logits, masks)
    loss, _ = segmentation_scores(sums, counts, 30, totals=totals, **WEIGHTS)
    expected = written_out_loss(logits, masks, None if totals is None else totals.double())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 3])
class TestLoss:
    def inputs(self, classes):
        logits, masks = sums_inputs(3, classes, 4, 5, torch.float32)
        return logits.requires_grad_(), masks

    def test_is_the_published_formula(self, classes, backend):
        logits, masks = self.inputs(classes)
        loss = segmentation_loss(logits, masks, **WEIGHTS, backend=backend)
        torch.testing.assert_close(loss, written_out_loss(logits, masks))
        (found,) = torch.autograd.grad(loss, logits)
        (expected,) = torch.autograd.grad(written_out_loss(logits, masks), logits)
        torch.testing.assert_close(found, expected)

    def test_leaves_pixels_out(self, classes, backend):
        """Those of a column in each image, and one image whole."""
        logits, masks = self.inputs(classes)
        expected = written_out_loss(logits[:2, ..., 1:], masks[:2, :, 1:])
        (gradient,) = torch.autograd.grad(expected, logits)
        masks[2] = masks[..., 0] = IGNORED
        loss = segmentation_loss(logits, masks, ignore_index=IGNORED, **WEIGHTS, backend=backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient)
        assert segmentation_loss(logits, torch.full_like(masks, IGNORED), ignore_index=IGNORED, backend=backend) == 0

    def test_is_averaged_over_given_totals(self, classes, backend):
        """The mean of the losses of two shares of a batch is that of the batch."""
        logits, masks = self.inputs(classes)
        shares = [slice(0, 1), slice(1, 3)]
        totals = torch.stack([segmentation_totals(masks[share]) for share in shares]).mean(0)
        losses = [segmentation_loss(logits[share], masks[share], totals=totals, backend=backend) for share in shares]
        torch.testing.assert_close(torch.stack(losses).mean(), segmentation_loss(logits, masks, backend=backend))

    def test_compiles_in_one_graph(self, classes, backend):
        torch.compiler.reset()
        logits, masks = self.inputs(classes)
        masks[0] = IGNORED
        call = partial(segmentation_loss, masks=masks, ignore_index=IGNORED, backend=backend)
        found, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(logits), call(logits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


class TestDerivatives:
    @pytest.mark.parametrize("classes", [1, 3])
    def test_first_and_second(self, classes):
        logits, masks = sums_inputs(2, classes, 2, 3)
        masks[0, 0] = 7  # no label
        logits.requires_grad_()
        for ignore_label in (None, 7):
            sums = partial(composed.sums_by_image, masks=masks, ignore_label=ignore_label)
            assert torch.autograd.gradcheck(lambda z, sums=sums: sums(z)[0], (logits,))
            assert torch.autograd.gradgradcheck(lambda z, sums=sums: sums(z)[0], (logits,))

    @pytest.mark.parametrize("classes", [1, 3])
    def test_functional_transforms(self, classes):
        logits, masks = sums_inputs(2, classes, 2, 3)
        gradient = upstream_of_sums(logits)

        def weighted(z):
            return (segmentation_sums(z, masks)[0] * gradient).sum()

        _, (expected, _) = None, sums_results(composed.sums_by_image, logits, masks, gradient)
        expected = expected[-1]
        torch.testing.assert_close(torch.func.grad(weighted)(logits), expected)
        _, slope = torch.func.jvp(weighted, (logits,), (torch.ones_like(logits),))
        torch.testing.assert_close(slope, expected.sum())
        one_by_one = torch.func.vmap(lambda z, t: segmentation_sums(z[None], t[None])[0][:, 0])(logits, masks)
        torch.testing.assert_close(one_by_one.movedim(0, 1), segmentation_sums(logits, masks)[0])

    def test_counts_have_none(self):
        logits, masks = sums_inputs(2, 1, 2, 3)
        for backend in ("reference", "composed"):
            sums, counts = segmentation_sums(logits.requires_grad_(), masks, backend=backend)
            assert sums.requires_grad
            assert not counts.requires_grad


@pytest.mark.parametrize(("classes", "small", "large"), [(1, 150, 190), (3, 30, 40)])
def test_composed_runs_image_by_image_on_large_images_and_a_cpu_only(classes, small, large, monkeypatch):
    by_image = []
    monkeypatch.setattr(composed, "sums_by_image", lambda *inputs: by_image.append(inputs) or (None, None))
    for side in (small, large):
        maps = [tensor.cpu() for tensor in sums_inputs(1, classes, side, side, torch.float32)]
        segmentation_sums(*maps, backend="composed")
        assert len(by_image) == (side == large)
        sums, _ = segmentation_sums(*(tensor.to("meta") for tensor in maps), backend="composed")
        assert sums.shape == (4 if classes == 1 else 3, 1, classes)


@pytest.mark.parametrize("backend", BACKENDS)
class TestBadInput:
    def inputs(self):
        return sums_inputs(2, 1, 3, 4, torch.float32)

    def test_shapes(self, backend):
        logits, masks = self.inputs()
        with pytest.raises(ValueError, match=r"logits must be \(B, classes, H, W\).*got \(1, 3, 4\)"):
            segmentation_sums(logits[0], masks, backend=backend)
        with pytest.raises(ValueError, match=r"at least one class; got \(2, 0, 3, 4\)"):
            segmentation_sums(logits[:, :0], masks, backend=backend)
        for wrong in (masks[:1], masks[:, None], masks[:, :2], masks.mT):
            with pytest.raises(ValueError, match=r"masks must be \(2, 3, 4\) for logits \(2, 1, 3, 4\)"):
                segmentation_sums(logits, wrong, backend=backend)

    def test_dtypes(self, backend):
        logits, masks = self.inputs()
        for wrong in (masks.float(), masks.bool().to(torch.complex64), [[1]], None):
            with pytest.raises(TypeError, match="masks must be a tensor of bool or integers; got"):
                segmentation_sums(logits, wrong, backend=backend)
        for wrong in (logits.long(), logits.to(torch.float8_e4m3fn)):
            with pytest.raises(TypeError, match="logits must be floating point"):
                segmentation_sums(wrong, masks, backend=backend)
        with pytest.raises(TypeError, match="logits must be a tensor; got list"):
            segmentation_sums([[0.0]], masks, backend=backend)

    def test_ignored_labels(self, backend):
        logits, masks = self.inputs()
        for dtype, label in ((torch.bool, 1), (torch.uint8, -1), (torch.uint8, 256), (torch.int8, 255)):
            with pytest.raises(ValueError, match=f"masks of {dtype} cannot hold {label}; convert them"):
                segmentation_sums(logits, masks.to(dtype), ignore_label=label, backend=backend)
        for label in (True, 255.0):
            with pytest.raises(TypeError, match=f"ignore_label must be a whole number.*{type(label).__name__}"):
                segmentation_sums(logits, masks, ignore_label=label, backend=backend)

    def test_devices(self, backend):
        logits, masks = self.inputs()
        with pytest.raises(ValueError, match=f"one device; got logits {DEVICE}.*, masks meta"):
            segmentation_sums(logits, masks.to("meta"), backend=backend)

    def test_scores(self, backend):
        sums, counts = (tensor.detach() for tensor in segmentation_sums(*self.inputs()))
        with pytest.raises(ValueError, match=r"sums must be \(4, B, 1\) or \(3, B, K\); got \(3, 2, 1\)"):
            segmentation_scores(sums[:3], counts, 12, backend=backend)
        with pytest.raises(ValueError, match=r"sums must be .*; got \(4, 2, 2\)"):
            segmentation_scores(sums.expand(4, 2, 2), counts.expand(3, 2, 2), 12, backend=backend)
        with pytest.raises(ValueError, match=r"counts must be \(3, 2, 1\); got \(3, 1, 1\)"):
            segmentation_scores(sums, counts[:, :1], 12, backend=backend)
        with pytest.raises(ValueError, match=r"totals must be \(3,\).*got \(2,\)"):
            segmentation_scores(sums, counts, 12, totals=counts[:2, 0, 0], backend=backend)
        with pytest.raises(ValueError, match=f"one device; got sums {DEVICE}.*, totals meta"):
            segmentation_scores(sums, counts, 12, totals=torch.ones(3, device="meta"), backend=backend)
        with pytest.raises(TypeError, match="counts must be floating point"):
            segmentation_scores(sums, counts.long(), 12, backend=backend)
        with pytest.raises(TypeError, match="dice_weight must be a number; got str"):
            segmentation_scores(sums, counts, 12, dice_weight="1", backend=backend)
        for wrong in (12.0, True, None, torch.tensor(12)):
            with pytest.raises(TypeError, match=f"pixels must be a whole number; got {type(wrong).__name__}"):
                segmentation_scores(sums, counts, wrong, backend=backend)
        assert torch.equal(*(segmentation_scores(sums, counts, n, backend=backend)[0] for n in (12, np.int64(12))))
        for wrong in (0, -12):
            with pytest.raises(ValueError, match=f"pixels must be at least 1; got {wrong}"):
                segmentation_scores(sums, counts, wrong, backend=backend)

    def test_loss(self, backend):
        logits, masks = self.inputs()
        losses = [segmentation_loss(logits, masks, ignore_index=n, backend=backend) for n in (1, np.uint8(1))]
        assert torch.equal(*losses)
        with pytest.raises(ValueError, match=f"ignore_index: masks of {masks.dtype} cannot hold"):
            segmentation_loss(logits, masks, ignore_index=2**70, backend=backend)
        with pytest.raises(TypeError, match="ignore_index must be a whole number or None; got float"):
            segmentation_loss(logits, masks, ignore_index=255.0, backend=backend)
        with pytest.raises(TypeError, match=r"masks must be a tensor of bool or integers; got torch\.float32"):
            segmentation_loss(logits, masks.float(), ignore_index=255, backend=backend)
        with pytest.raises(TypeError, match="cross_entropy_weight must be a number; got str"):
            segmentation_loss(logits, masks, cross_entropy_weight="1", backend=backend)


def test_totals_of_bad_input():
    masks = torch.zeros(2, 3, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"masks must be \(B, H, W\); got \(3, 4\)"):
        segmentation_totals(masks[0])
    with pytest.raises(TypeError, match=r"masks must be a tensor of bool or integers; got torch\.float32"):
        segmentation_totals(masks.float())
    with pytest.raises(ValueError, match=r"ignore_label: masks of torch\.uint8 cannot hold 256"):
        segmentation_totals(masks, ignore_label=256)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'fastest'"):
        segmentation_sums(*sums_inputs(2, 1, 3, 4), backend="fastest")
