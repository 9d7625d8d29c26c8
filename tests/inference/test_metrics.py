"""Dice, IoU and HD95 against cases worked out by hand and against MONAI."""

import math
import sys

import numpy as np
import pytest
import torch

from uctrans.inference.metrics import dice, hd95, iou, mean_and_deviation, mean_over_classes


def blob(*rows):
    return torch.tensor([[int(pixel) for pixel in row] for row in rows])


def test_binary_by_hand():
    truth = blob("1100", "1100", "0000")
    prediction = blob("0110", "0110", "0000")  # 2 pixels shared, 4 + 4 set, 6 in the union
    assert dice(prediction, truth).tolist() == [0.5]
    assert iou(prediction, truth).tolist() == pytest.approx([1 / 3])


def test_classes_by_hand():
    truth = blob("0012", "0012")
    prediction = blob("0011", "0022")
    # class 1: shared 1, sizes 2 and 2; class 2: the same
    assert dice(prediction, truth, classes=3).tolist() == [0.5, 0.5]
    assert iou(prediction, truth, classes=3).tolist() == pytest.approx([1 / 3, 1 / 3])
    # class 3 appears in neither map
    assert dice(prediction, truth, classes=4).tolist() == [0.5, 0.5, 1.0]


def test_255_counts_as_foreground_and_numpy_is_taken():
    truth = np.array([[0, 255]], dtype=np.uint8)
    assert dice(np.array([[0, 1]], dtype=np.uint8), truth).tolist() == [1.0]
    assert dice(np.array([[True, True]]), truth).tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize(
    ("prediction", "truth", "overlap", "distance"),
    [(0, 0, 1.0, 0.0), (1, 0, 0.0, math.nan), (0, 1, 0.0, math.nan), (1, 1, 1.0, 0.0)],
)
def test_empty_maps(prediction, truth, overlap, distance):
    prediction, truth = torch.full((5, 4), prediction), torch.full((5, 4), truth)
    assert dice(prediction, truth).tolist() == [overlap]
    assert iou(prediction, truth).tolist() == [overlap]
    assert hd95(prediction, truth).tolist() == pytest.approx([distance], nan_ok=True)


def test_hd95_of_two_pixels_is_their_distance():
    truth, prediction = torch.zeros(9, 9, dtype=torch.uint8), torch.zeros(9, 9, dtype=torch.uint8)
    truth[2, 2] = 1
    prediction[5, 6] = 1
    assert hd95(prediction, truth).item() == pytest.approx(5.0)


def test_hd95_of_a_shifted_square():
    truth, prediction = torch.zeros(30, 30, dtype=torch.uint8), torch.zeros(30, 30, dtype=torch.uint8)
    truth[10:20, 5:15] = 1
    prediction[10:20, 8:18] = 1
    assert hd95(prediction, truth).item() == pytest.approx(3.0)


def test_hd95_at_the_border_and_in_one_pixel():
    assert hd95(torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.uint8)).item() == 0
    truth, prediction = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 8, dtype=torch.uint8)
    truth[0, 0] = prediction[0, 7] = 1
    assert hd95(prediction, truth).item() == pytest.approx(7.0)


def test_batches_equal_single_images_and_keep_leading_axes():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 3, (2, 3, 7, 5), generator=generator)
    truth = torch.randint(0, 3, (2, 3, 7, 5), generator=generator)
    for score in (dice, iou, hd95):
        together = score(prediction, truth, classes=3)
        assert together.shape == (2, 3, 2)
        assert together[1, 2].tolist() == score(prediction[1, 2], truth[1, 2], classes=3).tolist()


def test_agrees_with_monai():
    monai_metrics = pytest.importorskip("monai.metrics")
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randint(0, 3, (4, 24, 20), generator=generator)
    truth = torch.randint(0, 3, (4, 24, 20), generator=generator)

    def one_hot(labels):
        return torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)

    predicted, true = one_hot(prediction), one_hot(truth)
    expected = monai_metrics.compute_dice(predicted, true, include_background=False)
    torch.testing.assert_close(dice(prediction, truth, 3), expected.double())
    expected = monai_metrics.compute_iou(predicted, true, include_background=False)
    torch.testing.assert_close(iou(prediction, truth, 3), expected.double())


def test_dice_needs_no_monai(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    full, empty = torch.ones(3, 3, dtype=torch.uint8), torch.zeros(3, 3, dtype=torch.uint8)
    assert dice(full, full).item() == iou(full, full).item() == 1
    assert hd95(empty, empty).item() == 0
    with pytest.raises(ImportError, match=r'pip install "uctrans\[training\]"'):
        hd95(full, full)


def test_bad_maps():
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="threshold probabilities first"):
        dice(labels.float(), labels)
    with pytest.raises(ValueError, match="differ in shape"):
        iou(labels, labels[:3])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        dice(labels + 2, labels, classes=2)
    with pytest.raises(ValueError, match="height, width"):
        dice(labels[0], labels[0])
    with pytest.raises(ValueError, match="at least 1"):
        dice(labels, labels, classes=0)


def test_means_leave_undefined_scores_out():
    scores = torch.tensor([[1.0, math.nan], [2.0, 4.0], [math.nan, math.nan]])
    assert mean_over_classes(scores).tolist() == pytest.approx([1.0, 3.0, math.nan], nan_ok=True)
    assert mean_and_deviation([1.0, math.nan, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert mean_and_deviation([2.0])[0::2] == (2.0, 1)
    assert math.isnan(mean_and_deviation([2.0])[1])
    assert math.isnan(mean_and_deviation([math.nan])[0])
