"""Scores against cases worked out by hand, plain loops, MONAI, and properties of any map."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from uctrans.inference.metrics import (
    aggregated_jaccard_index,
    dice,
    hd95,
    iou,
    mean_and_deviation,
    mean_over_classes,
    object_f1,
    panoptic_quality,
    score_instances,
)

NAN = math.nan


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


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_ignored_pixels_are_as_if_they_were_not_there(classes):
    generator = torch.Generator().manual_seed(classes)
    prediction, truth = torch.randint(0, max(classes, 2), (2, 3, 8, 9), generator=generator)
    truth[..., 6:] = 255
    for score in (dice, iou):
        expected = score(prediction[..., :6], truth[..., :6], classes)
        torch.testing.assert_close(score(prediction, truth, classes, ignore_label=255), expected)
    if classes > 1:
        with pytest.raises(ValueError, match=r"truth: it holds labels from 0 to 255"):
            dice(prediction, truth, classes)


def test_outlines_follow_ignored_pixels_in_both_maps():
    truth, prediction = torch.zeros(9, 9, dtype=torch.uint8), torch.zeros(9, 9, dtype=torch.uint8)
    truth[2:4, 2:5] = prediction[2:4, 2:9] = 1
    assert hd95(prediction, truth).item() > 2
    truth[:, 5:] = 255
    assert hd95(prediction, truth, ignore_label=255).item() == 0


def test_where_all_is_ignored_nothing_is_defined():
    truth = torch.stack([torch.full((4, 5), 255), torch.zeros(4, 5, dtype=torch.int64)])
    for score, empty in ((dice, 1.0), (iou, 1.0), (hd95, 0.0)):
        found = score(torch.zeros_like(truth), truth, ignore_label=255)
        assert found.flatten().tolist() == pytest.approx([NAN, empty], nan_ok=True)


def test_255_counts_as_foreground_and_numpy_is_taken():
    truth = np.array([[0, 255]], dtype=np.uint8)
    assert dice(np.array([[0, 1]], dtype=np.uint8), truth).tolist() == [1.0]
    assert dice(np.array([[True, True]]), truth).tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize(
    ("prediction", "truth", "overlap", "distance"),
    [(0, 0, 1.0, 0.0), (1, 0, 0.0, NAN), (0, 1, 0.0, NAN), (1, 1, 1.0, 0.0)],
)
def test_empty_and_full_label_maps(prediction, truth, overlap, distance):
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


def test_bad_label_maps():
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="threshold probabilities first"):
        dice(labels.float(), labels)
    with pytest.raises(ValueError, match="differs in shape"):
        iou(labels, labels[:3])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        dice(labels + 2, labels, classes=2)
    with pytest.raises(ValueError, match=r"prediction: got the shape \(4,\)"):
        dice(labels[0], labels[0])
    with pytest.raises(ValueError, match="classes: 0 is too small"):
        dice(labels, labels, classes=0)


def test_means_leave_undefined_scores_out():
    scores = torch.tensor([[1.0, NAN], [2.0, 4.0], [NAN, NAN]])
    assert mean_over_classes(scores).tolist() == pytest.approx([1.0, 3.0, NAN], nan_ok=True)
    assert mean_and_deviation([1.0, NAN, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert mean_and_deviation([2.0])[0::2] == (2.0, 1)
    assert math.isnan(mean_and_deviation([2.0])[1])
    assert math.isnan(mean_and_deviation([NAN])[0])


def numbered(*rows):
    return np.array([[int(pixel) for pixel in row] for row in rows])


def squares(*corners, side=4, size=20):
    """Squares numbered from 1, by their upper left corner."""
    labels = np.zeros((size, size), dtype=np.int32)
    for number, (row, column) in enumerate(corners, start=1):
        labels[row : row + side, column : column + side] = number
    return labels


def random_map(generator, size=40, count=12):
    """Disks of random place and radius, the later ones over the earlier ones."""
    rows, columns = np.mgrid[:size, :size]
    labels = np.zeros((size, size), dtype=np.int64)
    for number in range(1, count + 1):
        row, column, radius = (*generator.uniform(0, size, 2), generator.uniform(1, 6))
        labels[np.hypot(rows - row, columns - column) <= radius] = number
    return labels


def shaken(generator, labels):
    """The map moved by up to one pixel, with an object lost, two merged and one of its own."""
    moved = np.roll(labels, generator.integers(-1, 2, 2), (0, 1))
    numbers = np.unique(moved[moved > 0])
    if len(numbers) > 3:
        lost, *merged = generator.choice(numbers, 3, replace=False)
        moved = np.where(moved == lost, 0, np.where(moved == merged[0], merged[1], moved))
    moved[:3, :3] = 99
    return moved


def aji_by_loops(prediction, truth):
    """Algorithm 1 of Kumar et al. 2017, line by line; equal IoUs go to the object met first, row by row."""

    def in_reading_order(labels):
        return list(dict.fromkeys(label for label in labels.ravel().tolist() if label))

    shared_total = united_total = 0
    used = set()
    for true in in_reading_order(truth):
        best, best_iou = None, 0.0
        for predicted in in_reading_order(prediction):
            shared = ((truth == true) & (prediction == predicted)).sum()
            iou = shared / ((truth == true) | (prediction == predicted)).sum()
            if iou > best_iou:
                best, best_iou = predicted, iou
        if best is None:
            united_total += (truth == true).sum()
            continue
        shared_total += ((truth == true) & (prediction == best)).sum()
        united_total += ((truth == true) | (prediction == best)).sum()
        used.add(best)
    for predicted in in_reading_order(prediction):
        if predicted not in used:
            united_total += (prediction == predicted).sum()
    return shared_total / united_total if united_total else 1.0


def pq_by_loops(prediction, truth):
    trues, predictions = [np.unique(labels[labels > 0]) for labels in (truth, prediction)]
    ious = []
    for true in trues:
        for predicted in predictions:
            iou = ((truth == true) & (prediction == predicted)).sum() / (
                (truth == true) | (prediction == predicted)
            ).sum()
            if iou > 0.5:
                ious.append(iou)
    missed, invented = len(trues) - len(ious), len(predictions) - len(ious)
    return sum(ious) / (len(ious) + missed / 2 + invented / 2)


def test_one_hit_one_miss_one_invention():
    truth = squares((0, 0), (10, 10))
    prediction = squares((0, 1), (0, 12))
    # the hit: 12 of 16 pixels shared, 20 united; a missed and an invented object of 16 pixels each
    assert aggregated_jaccard_index(prediction, truth) == pytest.approx(12 / (20 + 16 + 16))
    assert panoptic_quality(prediction, truth) == pytest.approx((0.6 / 2, 0.6, 0.5))
    assert object_f1(prediction, truth) == pytest.approx(0.5)
    assert score_instances(prediction, truth).ap == pytest.approx(1 / 3)


def test_two_nuclei_merged_into_one():
    truth = numbered("11122", "11122")
    prediction = numbered("77777", "77777")
    # both true objects take the merged one: 6 of 10 and 4 of 10 pixels; only the larger has an IoU above 0.5
    assert aggregated_jaccard_index(prediction, truth) == pytest.approx((6 + 4) / (10 + 10))
    assert panoptic_quality(prediction, truth) == pytest.approx((0.6 / 1.5, 0.6, 2 / 3))


def test_one_nucleus_split_into_two():
    truth = numbered("11111", "11111")
    prediction = numbered("33388", "33388")
    assert aggregated_jaccard_index(prediction, truth) == pytest.approx(6 / (10 + 4))
    assert panoptic_quality(prediction, truth) == pytest.approx((0.6 / 1.5, 0.6, 2 / 3))


def test_an_iou_of_one_half_is_no_match():
    truth, prediction = numbered("1111", "0000"), numbered("1100", "0000")
    assert panoptic_quality(prediction, truth) == pytest.approx((0.0, NAN, 0.0), nan_ok=True)
    assert object_f1(prediction, truth) == 0
    assert aggregated_jaccard_index(prediction, truth) == 0.5


def test_the_best_object_is_that_of_the_highest_iou_not_of_the_most_shared_pixels():
    truth = numbered("111110000000")
    prediction = numbered("223333333333")
    # object 2: 2 of 5 pixels; object 3: shares 3 of 12. The first is taken, the second left over.
    assert aggregated_jaccard_index(prediction, truth) == pytest.approx(2 / (5 + 10))


def test_f1_at_higher_thresholds():
    truth = squares((0, 0), (10, 10))
    prediction = squares((0, 0), (10, 11))  # IoU 1 and 0.6
    assert [object_f1(prediction, truth, threshold) for threshold in (0.5, 0.59, 0.61, 0.9)] == [1, 1, 0.5, 0.5]
    for threshold in (0.4, 1.0, NAN):
        with pytest.raises(ValueError, match="where matches are unique"):
            object_f1(prediction, truth, threshold)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (0, 0, (1, 1, 1, 1, 1, 1)),
        (1, 0, (0, 0, NAN, 0, 0, 0)),
        (0, 1, (0, 0, NAN, 0, 0, 0)),
        (1, 1, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_empty_and_full_instance_maps(prediction, truth, expected):
    scores = score_instances(np.full((5, 4), prediction), np.full((5, 4), truth))
    assert tuple(scores) == pytest.approx(expected, nan_ok=True)


def test_a_map_without_pixels_is_empty():
    assert tuple(score_instances(np.zeros((0, 4), int), np.zeros((0, 4), int))) == (1, 1, 1, 1, 1, 1)


def test_objects_may_come_in_pieces():
    truth, prediction = numbered("1010", "0000"), numbered("1000", "0000")
    assert aggregated_jaccard_index(prediction, truth) == 0.5
    assert aggregated_jaccard_index(numbered("2020", "0000"), truth) == 1


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_plain_loops(seed):
    generator = np.random.default_rng(seed)
    truth = random_map(generator)
    for prediction in (random_map(generator), shaken(generator, truth)):
        assert aggregated_jaccard_index(prediction, truth) == pytest.approx(aji_by_loops(prediction, truth), abs=1e-12)
        assert panoptic_quality(prediction, truth)[0] == pytest.approx(pq_by_loops(prediction, truth), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_quality_agrees_with_monai(seed):
    compute_panoptic_quality = pytest.importorskip("monai.metrics").compute_panoptic_quality
    generator = np.random.default_rng(seed)
    truth = random_map(generator)
    prediction = shaken(generator, truth)
    ours = dict(zip(("pq", "sq", "rq"), panoptic_quality(prediction, truth), strict=True))
    assert 0 < ours["pq"] < 1
    for name, value in ours.items():
        theirs = compute_panoptic_quality(
            torch.from_numpy(prediction), torch.from_numpy(truth), name, match_iou_threshold=0.5, smooth_numerator=1e-9
        )
        assert value == pytest.approx(theirs.item(), abs=1e-6), name


small_maps = arrays(np.int64, (6, 7), elements=st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(small_maps, small_maps)
def test_any_map_agrees_with_the_loops_and_lies_in_0_to_1(prediction, truth):
    scores = score_instances(prediction, truth)
    assert scores.aji == pytest.approx(aji_by_loops(prediction, truth), abs=1e-12)
    assert all(0 <= score <= 1 for score in scores if not math.isnan(score))
    assert scores.pq == pytest.approx(0 if math.isnan(scores.sq) else scores.sq * scores.rq)
    assert scores.f1 == scores.rq


@settings(max_examples=60, deadline=None)
@given(small_maps, small_maps, st.permutations(range(1, 6)), st.permutations(range(1, 6)))
def test_numbers_of_objects_do_not_matter(prediction, truth, predicted_numbers, true_numbers):
    other_prediction = np.array([0, *predicted_numbers])[prediction]
    other_truth = 10**9 * np.array([0, *true_numbers])[truth]
    expected = tuple(score_instances(prediction, truth))
    assert tuple(score_instances(other_prediction, other_truth)) == pytest.approx(expected, nan_ok=True, abs=0)


@settings(max_examples=30, deadline=None)
@given(small_maps)
def test_identical_maps_score_1(labels):
    assert tuple(score_instances(labels, labels.copy())) == (1, 1, 1, 1, 1, 1)


@settings(max_examples=30, deadline=None)
@given(small_maps, small_maps)
def test_panoptic_quality_is_symmetric(prediction, truth):
    expected = panoptic_quality(prediction, truth)
    assert panoptic_quality(truth, prediction) == pytest.approx(expected, nan_ok=True)


def test_single_scores_are_those_of_score_instances():
    generator = np.random.default_rng(3)
    truth = random_map(generator)
    prediction = shaken(generator, truth)
    single = (
        aggregated_jaccard_index(prediction, truth),
        *panoptic_quality(prediction, truth),
        object_f1(prediction, truth),
    )
    assert tuple(score_instances(prediction, truth))[:5] == single


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_types(dtype):
    truth, prediction = squares((0, 0), (10, 10)), squares((0, 1), (10, 10))
    expected = score_instances(prediction, truth)
    assert score_instances(prediction.astype(dtype), truth.astype(dtype)) == expected
    assert score_instances(torch.from_numpy(prediction.astype(dtype)), torch.from_numpy(truth)) == expected


def test_maps_are_left_as_they_are():
    truth, prediction = squares((0, 0), (10, 10)), squares((0, 1), (10, 10))
    truth.flags.writeable = prediction.flags.writeable = False
    score_instances(prediction, truth)


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 4), int), "prediction: an instance map holds integers, got float64"),
        (np.zeros((4, 4), int), np.zeros((4, 4), bool), "truth: an instance map holds integers, got bool"),
        (np.zeros((4, 4), int), np.zeros((4, 5), int), r"differs in shape from the truth, \(4, 4\) and \(4, 5\)"),
        (np.zeros((1, 4, 4), int), np.zeros((4, 4), int), r"got the shape \(1, 4, 4\); give \(height, width\)"),
        (np.zeros((4, 4), int), np.full((4, 4), -1), "truth: it holds the number -1"),
    ],
)
def test_bad_instance_maps(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        score_instances(prediction, truth)
