"""Overlays, difference pictures and figures."""

import numpy as np
import pytest
from skimage.io import imread

from uctrans.inference.figures import (
    CLASS_COLOURS,
    DIFFERENCES,
    INSTANCE_COLOURS,
    ComparisonRow,
    InstanceRow,
    choose_rows,
    class_colours,
    comparison_figure,
    differences,
    instance_figure,
    instance_overlay,
    outlines,
    overlay,
)


def test_outlines_are_the_rim_of_each_class():
    labels = np.zeros((9, 12), dtype=np.uint8)
    labels[2:7, 2:6], labels[2:7, 6:10] = 1, 2
    rim = outlines(labels)
    assert rim[4].tolist() == [0, 0, 1, 0, 0, 1, 2, 0, 0, 2, 0, 0]
    assert (rim[labels == 0] == 0).all()


def test_outlines_widen_with_the_image():
    labels = np.zeros((1000, 1000), dtype=np.uint8)
    labels[300:700, 300:700] = 3
    assert np.flatnonzero(outlines(labels)[500]).tolist() == [299, 300, 301, 698, 699, 700]
    assert set(np.unique(outlines(labels))) == {0, 3}


@pytest.mark.parametrize("value", [0, 1])
def test_uniform_masks_have_no_outline(value):
    image = np.full((6, 7, 3), 9, dtype=np.uint8)
    assert np.array_equal(overlay(image, np.full((6, 7), value, dtype=np.uint8), class_colours(1)), image)


def test_overlay_colours_and_leaves_its_input():
    image, labels = np.zeros((5, 5, 3), dtype=np.uint8), np.zeros((5, 5), dtype=np.uint8)
    labels[2, 2] = 2
    picture = overlay(image, labels, class_colours(3))
    assert tuple(picture[2, 2]) == CLASS_COLOURS[1]
    assert picture.dtype == np.uint8
    assert not image.any()


def test_colours():
    assert class_colours(1).tolist() == [[0, 0, 0], list(CLASS_COLOURS[0])]
    assert class_colours(20).shape == (20, 3)
    assert class_colours(2, ["#000000", "#0a0b0c"]).tolist() == [[0, 0, 0], [10, 11, 12]]


def test_differences():
    truth, prediction = np.array([[0, 1, 0, 1, 1]], dtype=np.uint8), np.array([[0, 1, 1, 0, 2]], dtype=np.uint8)
    expected = [(0, 0, 0), *(DIFFERENCES[f"{kind}"] for kind in DIFFERENCES)]
    assert [tuple(pixel) for pixel in differences(prediction, truth)[0]] == expected


def drawn(picture, image):
    return (picture != image).any(-1)


def test_every_nucleus_has_its_own_outline():
    image = np.full((9, 12, 3), 7, dtype=np.uint8)
    instances = np.zeros((9, 12), dtype=np.int32)
    instances[2:7, 2:6], instances[2:7, 6:10] = 300, 306  # the colours repeat after six
    picture = instance_overlay(image, instances)
    assert np.flatnonzero(drawn(picture, image)[4]).tolist() == [2, 5, 6, 9]
    assert picture[4, 5].tolist() != picture[4, 6].tolist()
    for row, column in ((4, 5), (4, 6), (2, 3), (6, 8)):
        assert picture[row, column].tolist() in INSTANCE_COLOURS.tolist()
    assert (image == 7).all()


def test_nuclei_that_touch_differ_in_colour_whatever_their_numbers():
    rows, columns = np.mgrid[:40, :40]
    instances = np.random.default_rng(0).permutation(100)[(rows // 4) * 10 + columns // 4] * 6 + 6
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    picture = instance_overlay(image, instances).reshape(10, 4, 10, 4, 3)[:, 0, :, 0].astype(int)
    assert (picture[:, 1:] != picture[:, :-1]).any(-1).all()
    assert (picture[1:] != picture[:-1]).any(-1).all()


def test_instance_outlines_widen_with_the_image():
    instances = np.zeros((1000, 800), dtype=np.int32)
    instances[300:700, 300:700] = 1
    image = np.zeros((1000, 800, 3), dtype=np.uint8)
    assert np.flatnonzero(drawn(instance_overlay(image, instances), image)[500]).tolist() == [300, 301, 698, 699]


def test_a_nucleus_of_one_pixel_has_no_outline():
    image = np.full((5, 5, 3), 7, dtype=np.uint8)
    assert not drawn(instance_overlay(image, np.eye(5, dtype=np.int32) * np.arange(5)), image).any()


def test_an_instance_map_of_another_size():
    with pytest.raises(ValueError, match=r"differ in size from the image, \(7, 6\) and \(6, 7\)"):
        instance_overlay(np.zeros((6, 7, 3), dtype=np.uint8), np.zeros((7, 6), dtype=np.int32))


def test_rows_are_the_best_the_median_and_the_worst():
    dice = [place / 10 for place in range(9)]
    assert choose_rows(dice) == [(8, "best"), (7, "best"), (5, "median"), (4, "median"), (1, "worst"), (0, "worst")]
    assert choose_rows([0.1, 0.9, 0.5]) == [(1, "best"), (2, "median"), (0, "worst")]
    assert choose_rows([0.3]) == [(0, "")]
    assert [position for position, _ in choose_rows([0.5] * 4)] == [0, 1, 2, 3]
    assert choose_rows(dice, 3) == [(8, "best"), (4, "median"), (0, "worst")]
    assert choose_rows([]) == []


def row(height=20, width=30, **values):
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[: height // 2] = 1
    image = np.full((height, width, 3), 200, dtype=np.uint8)
    return ComparisonRow("name" * 20, image, labels, labels, 0.5)._replace(**values)


def test_figure(tmp_path):
    comparison_figure(tmp_path / "one.png", [row()], class_colours(1))
    comparison_figure(tmp_path / "two.png", [row(), row(50, 20)], class_colours(3), ["nucleus", "stroma"])
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] == one.shape[1]
    true_positive = (one[..., :3] == DIFFERENCES["true positive"]).all(-1)
    assert true_positive.mean() > 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
    with pytest.raises(ValueError, match="at least one row"):
        comparison_figure(tmp_path / "none.png", [], class_colours(1))


def test_figure_of_nuclei(tmp_path):
    image = np.full((40, 60, 3), 200, dtype=np.uint8)
    truth, prediction = np.zeros((40, 60), dtype=np.int32), np.zeros((40, 60), dtype=np.int32)
    truth[5:35, 5:25], prediction[5:35, 35:55] = 1, 1
    rows = [InstanceRow("name" * 20, image, truth, prediction, 0.5, "best")]
    rows.append(rows[0]._replace(image=image[:, :30], truth=truth[:, :30], prediction=prediction[:, :30]))
    instance_figure(tmp_path / "nuclei.png", rows[:1])
    single = imread(tmp_path / "nuclei.png")[..., :3]
    assert (single[:, :5] == 255).all()  # the label is not cut off
    assert (single[:, :80] < 128).any()
    columns = np.flatnonzero((single == INSTANCE_COLOURS[1]).all(-1).any(0)) / single.shape[1]
    assert len(columns) > 50
    assert columns.min() > 0.33  # nothing is drawn into the image, the truth's outline lies left in the second panel
    assert columns[np.diff(columns, prepend=columns[0]).argmax()] > 0.75  # and the prediction's right in the third
    instance_figure(tmp_path / "nuclei.png", rows)
    assert imread(tmp_path / "nuclei.png").shape[0] > 1.9 * single.shape[0]
    with pytest.raises(ValueError, match="at least one row"):
        instance_figure(tmp_path / "none.png", [])
