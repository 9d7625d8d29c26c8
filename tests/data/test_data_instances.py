"""Instance maps are found, read and refused; the boundary target of one has background, interior and border."""

import numpy as np
import pytest
import skimage.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from uctrans.data import DataError, Sample, boundary_target, find_samples
from uctrans.data.instances import (
    BACKGROUND,
    BORDER,
    INTERIOR,
    check_truth,
    find_instances,
    read_instances,
    write_instances,
)
from uctrans.writing import write_png

MAP = np.array([[0, 300, 300], [65535, 0, 1]])


def write_dataset(root, *names):
    for name in names:
        write_png(root / "images" / f"{name}.png", np.zeros((2, 3, 3), dtype=np.uint8))
        write_png(root / "masks" / f"{name}.png", np.zeros((2, 3), dtype=np.uint8))
    return root


def test_numbers_survive_a_file(tmp_path):
    write_instances(tmp_path / "instances" / "a.png", MAP)
    instances = read_instances(tmp_path / "instances" / "a.png", MAP > 0)
    assert instances.dtype == np.int32
    np.testing.assert_array_equal(instances, MAP)
    assert skimage.io.imread(tmp_path / "instances" / "a.png").dtype == np.uint16


def test_eight_bits_and_empty_maps_are_read(tmp_path):
    write_png(tmp_path / "a.png", np.array([[0, 255, 7]], dtype=np.uint8))
    assert read_instances(tmp_path / "a.png").tolist() == [[0, 255, 7]]
    write_instances(tmp_path / "b.png", np.zeros((2, 3), dtype=int))
    assert read_instances(tmp_path / "b.png").tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("split", [None, "test"])
def test_maps_lie_beside_the_masks(tmp_path, split, recwarn):
    folder = write_dataset(tmp_path / split if split else tmp_path, "a", "b", "c")
    samples = find_samples(tmp_path, split)
    assert find_instances(samples) == {}
    for name in ("b", "c", "other"):
        write_instances(folder / "instances" / f"{name}.png", MAP)
    (folder / "instances" / "b.txt").write_text("nothing is missing for b")
    assert find_instances(samples) == {name: folder / "instances" / f"{name}.png" for name in ("b", "c")}
    assert list(find_instances(samples[:2])) == ["b"]
    assert not recwarn.list


def test_samples_without_masks_have_no_maps(tmp_path):
    assert find_instances([Sample("a", tmp_path / "images" / "a.png", None)]) == {}


def test_two_maps_of_one_image(tmp_path):
    samples = find_samples(write_dataset(tmp_path, "a"))
    write_instances(tmp_path / "instances" / "a.png", MAP)
    skimage.io.imsave(tmp_path / "instances" / "a.tif", MAP.astype(np.uint16), check_contrast=False)
    with pytest.raises(DataError, match=r"a\.tif: is an instance map of the same image as .*a\.png; remove one"):
        find_instances(samples)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (MAP.T.astype(np.uint16), r"is 3 x 2 pixels \(height x width\), but its image is 2 x 3"),
        (np.zeros((2, 3, 3), dtype=np.uint8), "has colours, alpha or a palette; save an instance map with one number"),
        (np.array([[0, 255, 0]] * 2, dtype=np.uint8), "is a mask, not an instance map; number the nuclei"),
        (np.full((2, 3), 255, dtype=np.uint8), "is a mask, not an instance map"),
    ],
)
def test_files_that_are_no_instance_map_of_the_image(tmp_path, pixels, message):
    write_png(tmp_path / "a.png", pixels)
    with pytest.raises(DataError, match=rf"a\.png: {message}"):
        read_instances(tmp_path / "a.png", np.ones((2, 3), dtype=np.uint8))


def nuclei(shift=0, size=40):
    """Four square nuclei of 10 x 10 pixels, moved to the right."""
    instances = np.zeros((size, size), dtype=np.uint16)
    for number, (row, column) in enumerate(((2, 2), (2, 18), (22, 2), (22, 18)), start=1):
        instances[row : row + 10, column + shift : column + shift + 10] = number
    return instances


@pytest.mark.parametrize("shift", [0, 2, 5])
def test_a_map_of_the_same_nuclei_may_differ_from_the_mask(tmp_path, shift):
    """Outlines and stored masks of MoNuSeg overlap to a Dice of 0.92 to 0.95."""
    write_instances(tmp_path / "a.png", nuclei())
    np.testing.assert_array_equal(read_instances(tmp_path / "a.png", nuclei(shift)), nuclei())


@pytest.mark.parametrize(
    ("instances", "mask"),
    [(nuclei(), nuclei(6)), (nuclei(), 0 * nuclei()), (0 * nuclei(), nuclei()), (nuclei(), nuclei().T * 0 + 1)],
    ids=["moved", "empty mask", "empty map", "mask all foreground"],
)
def test_a_map_of_another_image_is_refused(tmp_path, instances, mask):
    write_instances(tmp_path / "a.png", instances)
    with pytest.raises(DataError, match=r"a\.png: is not the instance map of its image.* 0\.\d\d, below 0\.5; put"):
        read_instances(tmp_path / "a.png", mask)


def test_an_empty_map_is_that_of_an_empty_mask(tmp_path):
    write_instances(tmp_path / "a.png", 0 * nuclei())
    assert not read_instances(tmp_path / "a.png", 0 * nuclei()).any()


@pytest.fixture
def pairs(tmp_path):
    """Images "a" and "b" with masks and instance maps of four nuclei."""
    for name in "ab":
        write_png(tmp_path / "images" / f"{name}.png", np.zeros((40, 40, 3), dtype=np.uint8))
        write_png(tmp_path / "masks" / f"{name}.png", (nuclei() > 0) * np.uint8(255))
        write_instances(tmp_path / "instances" / f"{name}.png", nuclei())
    return tmp_path


def check(root):
    samples = find_samples(root)
    check_truth(samples, find_instances(samples))


def test_masks_and_maps_that_fit_give_no_warning(pairs, recwarn):
    check(pairs)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("file", "pixels", "message"),
    [
        ("masks/b.png", np.zeros((40, 30), dtype=np.uint8), r"masks/b\.png: is 40 x 30 pixels"),
        ("instances/b.png", nuclei(size=50), r"instances/b\.png: is 50 x 50 pixels .* its image is 40 x 40"),
        ("instances/b.png", nuclei(8), r"instances/b\.png: is not the instance map of its image"),
        ("instances/b.png", (nuclei() > 0) * np.uint8(255), r"instances/b\.png: is a mask"),
    ],
)
def test_masks_and_maps_that_are_wrong_are_refused(pairs, file, pixels, message):
    write_png(pairs / file, pixels)
    with pytest.raises(DataError, match=message):
        check(pairs)


def test_a_mask_of_0_and_1_in_place_of_a_map_gives_a_warning(pairs):
    """One number in four places warns; a single nucleus in one piece does not."""
    one = np.where(nuclei() == 1, np.uint8(255), np.uint8(0))
    write_png(pairs / "masks/a.png", one)
    write_png(pairs / "instances/a.png", one // 255)
    write_png(pairs / "instances/b.png", (nuclei() > 0).astype(np.uint8))
    with pytest.warns(
        UserWarning, match=r"^1 instance maps hold one number alone, in several .*instances/b\.png"
    ) as caught:
        check(pairs)
    assert len(caught) == 1


def test_a_map_that_fits_loosely_gives_a_warning(pairs):
    write_instances(pairs / "instances/a.png", nuclei(1))
    write_instances(pairs / "instances/b.png", nuclei(3))
    with pytest.warns(UserWarning, match=r"^1 instance maps fit their masks with a Dice below 0\.8: .*b\.png"):
        check(pairs)


@pytest.mark.parametrize("name", ["b.npy", "B.png", "b.TXT"])
def test_files_that_may_be_meant_for_a_sample_without_a_map_give_a_warning(pairs, name):
    (pairs / "instances/b.png").rename(pairs / "instances" / name)
    with pytest.warns(UserWarning, match=rf"Ignored .*instances/{name}: .*the name of its mask, capitals included"):
        assert list(find_instances(find_samples(pairs))) == ["a"]


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_instances(tmp_path / "nowhere.png")


@pytest.mark.parametrize("number", [-1, 65536])
def test_numbers_that_16_bits_cannot_hold(tmp_path, number):
    with pytest.raises(DataError, match=r"a\.png: would hold numbers from .*16-bit PNG holds 0 to 65535"):
        write_instances(tmp_path / "a.png", np.array([[0, number]]))
    assert not (tmp_path / "a.png").exists()


def test_target_by_hand():
    labels = np.array(
        [[int(pixel) for pixel in row] for row in ("0000000000", "0111112220", "0111112220", "0111112220")]
    )
    target = boundary_target(labels, border_width=1)
    # the lower edge of the image is no outline
    assert ["".join(map(str, row)) for row in target.tolist()] == [
        "0000000000",
        "0222222220",
        "0211122120",
        "0211122120",
    ]
    assert target.dtype == np.uint8


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_border_is_as_wide_as_asked(width):
    labels = np.zeros((40, 40), dtype=np.uint16)
    labels[5:35, 5:35] = 500
    target = boundary_target(labels, width)
    expected = np.zeros((40, 40), dtype=np.uint8)
    expected[5:35, 5:35] = BORDER
    expected[5 + width : 35 - width, 5 + width : 35 - width] = INTERIOR
    np.testing.assert_array_equal(target, expected)


def test_thin_nuclei_keep_their_innermost_pixels():
    labels = np.zeros((20, 20), dtype=np.int32)
    labels[2:7, 2:7], labels[12, 4] = 1, 2
    target = boundary_target(labels, border_width=4)
    assert np.argwhere(target == INTERIOR).tolist() == [[4, 4], [12, 4]]


@pytest.mark.parametrize("value", [0, 3])
def test_target_of_uniform_maps(value):
    assert np.unique(boundary_target(np.full((5, 6), value))).tolist() == [INTERIOR if value else BACKGROUND]


@settings(max_examples=50, deadline=None)
@given(arrays(np.int64, (8, 9), elements=st.integers(0, 4)), st.integers(1, 4), st.permutations(range(1, 5)))
def test_target_of_any_map(labels, width, numbers):
    target = boundary_target(labels, width)
    np.testing.assert_array_equal(target == BACKGROUND, labels == 0)
    for label in np.unique(labels[labels > 0]):
        assert (target[labels == label] == INTERIOR).any()
    np.testing.assert_array_equal(boundary_target(np.array([0, *numbers])[labels] * 1000, width), target)
    np.testing.assert_array_equal(boundary_target(labels.T, width), target.T)


@pytest.mark.parametrize(
    ("labels", "width", "message"),
    [
        (np.zeros((4, 4)), 1, "is not a map of integers"),
        (np.zeros((4, 4), dtype=bool), 1, "is not a map of integers"),
        (np.zeros((1, 4, 4), dtype=int), 1, "is not a map of integers"),
        (np.full((4, 4), -1), 1, "holds -1"),
        (np.zeros((4, 4), dtype=int), 0, "border_width=0"),
    ],
)
def test_bad_instance_maps_for_the_target(labels, width, message):
    with pytest.raises(ValueError, match=message):
        boundary_target(labels, width)
