"""The losses of the published protocol, of any logits and masks, and the Dice score of each image."""

import math

import pytest
import torch

from uctrans.kernels import segmentation_loss, segmentation_totals
from uctrans.training.losses import EpochTotals, image_dice, loss_and_dice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def written_out_loss(logits, masks):
    """The published formula, pixel by pixel in Python floats."""
    dice, positive, negative = [], [], []
    for image, mask in zip(logits.double()[:, 0].flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        product = probabilities = targets = 0.0
        for logit, target in zip(image, mask, strict=True):
            probability = 1 / (1 + math.exp(-logit))
            product += (probability / 2) * (target / 2)
            probabilities += (probability / 2) ** 2
            targets += (target / 2) ** 2
            (positive if target else negative).append(-math.log(probability if target else 1 - probability))
        dice.append(1 - (2 * product + 1e-5) / (probabilities + targets + 1e-5))
    cross_entropy = sum(0.5 * sum(part) / len(part) for part in (positive, negative) if part)
    return 0.5 * sum(dice) / len(dice) + 0.5 * cross_entropy


def random_case(batch=3, classes=1, size=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, size, size + 1, generator=generator, dtype=dtype)
    masks = torch.randint(0, max(classes, 2), (batch, size, size + 1), generator=generator, dtype=torch.uint8)
    return logits, masks


def test_binary_loss_is_the_published_formula():
    logits, masks = random_case()
    masks[1] = 0
    assert segmentation_loss(logits, masks).item() == pytest.approx(written_out_loss(logits, masks), rel=1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_masks_of_one_value_give_the_written_out_loss(value):
    logits, masks = random_case()
    masks.fill_(value)
    assert segmentation_loss(logits, masks).item() == pytest.approx(written_out_loss(logits, masks), rel=1e-12)


def test_loss_weights_scale_the_two_parts():
    logits, masks = random_case()
    dice = segmentation_loss(logits, masks, dice_weight=1, cross_entropy_weight=0)
    cross_entropy = segmentation_loss(logits, masks, dice_weight=0, cross_entropy_weight=1)
    both = segmentation_loss(logits, masks, dice_weight=0.2, cross_entropy_weight=0.7)
    torch.testing.assert_close(both, 0.2 * dice + 0.7 * cross_entropy)


def test_multi_class_loss_is_softmax_dice_and_cross_entropy():
    logits, masks = random_case(classes=4)
    probability = logits.softmax(1)
    one_hot = torch.nn.functional.one_hot(masks.long(), 4).movedim(-1, 1).double()
    dice = []
    for image in range(3):
        for label in range(4):
            p, t = probability[image, label] / 2, one_hot[image, label] / 2
            dice.append(1 - (2 * (p * t).sum() + 1e-5) / ((p * p).sum() + (t * t).sum() + 1e-5))
    expected = 0.5 * torch.stack(dice).mean() + 0.5 * torch.nn.functional.cross_entropy(logits, masks.long())
    torch.testing.assert_close(segmentation_loss(logits, masks), expected)


@pytest.mark.parametrize("classes", [1, 3])
def test_gradient_agrees_with_finite_differences(classes):
    logits, masks = random_case(batch=2, classes=classes, size=3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: segmentation_loss(z, masks), (logits,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("mask", ["random", "empty", "full"])
@pytest.mark.parametrize("logit", [-100.0, 100.0, "mixed"])
def test_extreme_logits_give_finite_loss_and_gradient(classes, mask, logit):
    logits, masks = random_case(classes=classes, dtype=torch.float32)
    logits = logits.sign() * 100 if logit == "mixed" else torch.full_like(logits, logit)
    if mask != "random":
        masks.fill_(0 if mask == "empty" else max(classes - 1, 1))
    logits.requires_grad_()
    loss = segmentation_loss(logits, masks)
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad.isfinite().all()


def test_certain_mistakes_cost_their_logit():
    masks = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    logits = torch.tensor([[[[100.0, -100.0]]]])
    loss = segmentation_loss(logits, masks, dice_weight=0, cross_entropy_weight=1)
    assert loss.item() == pytest.approx(100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 3])
def test_loss_is_float32_under_autocast(dtype, classes):
    logits, masks = random_case(classes=classes, dtype=torch.float32)
    logits = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = segmentation_loss(logits, masks)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, segmentation_loss(logits.float(), masks), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 1, 5, 6), (2, 5, 6), (3, 5, 5)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"masks must be \(3, 5, 6\)"):
        segmentation_loss(random_case()[0], torch.zeros(shape, dtype=torch.uint8))


def test_image_dice_counts_pixels_above_one_half():
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, -1.0], [-1.0] * 4, [0.0] * 4]).view(4, 1, 2, 2)
    masks = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0] * 4, [1] * 4], dtype=torch.uint8).view(4, 2, 2)
    assert image_dice(logits, masks).tolist() == [0.5, 0.0, 1.0, 0.0]


def test_image_dice_of_classes_is_their_mean_without_background():
    labels = torch.tensor([[[0, 1, 1, 2]]])
    masks = torch.tensor([[[0, 1, 0, 0]]], dtype=torch.uint8)
    logits = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    # class 1: 2/3; class 2: predicted but not there; class 3: in neither
    assert image_dice(logits, masks).item() == pytest.approx((2 / 3 + 0 + 1) / 3)


@pytest.mark.parametrize("classes", [1, 3])
def test_image_dice_agrees_with_the_metric_of_evaluation(classes):
    metrics = pytest.importorskip("uctrans.inference.metrics")
    logits, masks = random_case(batch=4, classes=classes, dtype=torch.float32)
    labels = (logits[:, 0] > 0).long() if classes == 1 else logits.argmax(1)
    expected = metrics.dice(labels, masks.long(), classes).mean(-1)
    torch.testing.assert_close(image_dice(logits, masks).double(), expected, rtol=1e-6, atol=0)


def test_loss_and_dice_together_are_those_of_their_functions():
    logits, masks = random_case(classes=3, dtype=torch.float32)
    loss, dice = loss_and_dice(logits.requires_grad_(), masks, dice_weight=0.2, cross_entropy_weight=0.7)
    assert not dice.requires_grad
    expected = segmentation_loss(logits, masks, dice_weight=0.2, cross_entropy_weight=0.7)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(dice, image_dice(logits, masks), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("classes", [1, 3])
def test_mean_over_shares_on_every_backend(classes, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    logits, masks = random_case(batch=4, classes=classes, dtype=torch.float32)
    logits, masks = logits.to(DEVICE), masks.to(DEVICE)
    shares = [slice(0, 1), slice(1, 4)]
    mean = torch.stack([segmentation_totals(masks[share]) for share in shares]).mean(0)
    losses = [segmentation_loss(logits[share], masks[share], totals=mean, backend=backend) for share in shares]
    torch.testing.assert_close(torch.stack(losses).mean(), segmentation_loss(logits, masks, backend="reference"))


@pytest.mark.parametrize("classes", [1, 3])
def test_ignored_pixels_have_no_loss_and_no_score(classes):
    logits, masks = random_case(classes=classes)
    expected = segmentation_loss(logits[..., 1:], masks[..., 1:])
    dice = image_dice(logits[..., 1:], masks[..., 1:])
    masks[..., 0] = 255
    logits[..., 0] = math.nan
    torch.testing.assert_close(segmentation_loss(logits, masks, ignore_index=255), expected)
    torch.testing.assert_close(image_dice(logits, masks, ignore_label=255), dice)


@pytest.mark.parametrize("classes", [1, 3])
def test_images_of_ignored_pixels_count_in_no_mean(classes):
    logits, masks = random_case(batch=3, classes=classes)
    expected = segmentation_loss(logits[:2], masks[:2])
    masks[2] = 255
    torch.testing.assert_close(segmentation_loss(logits, masks, ignore_index=255), expected)
    dice = image_dice(logits, masks, ignore_label=255)
    assert dice.isnan().tolist() == [False, False, True]
    totals = EpochTotals(torch.device("cpu"), ignores=True)
    totals.add(expected.float(), dice)
    assert totals.images.item() == 2
    assert totals.dice.item() == pytest.approx(dice[:2].sum().item())
    logits.requires_grad_()
    loss = segmentation_loss(logits, masks.fill_(255), ignore_index=255)
    loss.backward()
    assert (loss.item(), logits.grad.abs().max().item()) == (0, 0)


def test_classes_to_score_are_chosen():
    labels = torch.tensor([[[0, 1, 1, 2]]])
    masks = torch.tensor([[[0, 1, 0, 0]]], dtype=torch.uint8)
    logits = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert image_dice(logits, masks, scored_classes=[1]).item() == pytest.approx(2 / 3)
    assert image_dice(logits, masks, scored_classes=[1, 2, 3]).item() == pytest.approx(image_dice(logits, masks).item())


def test_masks_of_numbers_between_labels_are_refused():
    logits, masks = random_case()
    with pytest.raises(TypeError, match=r"masks must be a tensor of bool or integers; got torch.float32"):
        segmentation_loss(logits, masks.float())
