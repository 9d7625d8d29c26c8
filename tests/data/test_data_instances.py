"""Instance maps are found beside the masks, read with their numbers, and refused where they cannot be what they say."""

import numpy as np
import pytest
import skimage.io

from uctrans.data import DataError, Sample, find_samples
from uctrans.data.instances import find_instances, read_instances, write_instances
from uctrans.data.writing import write_png

MAP = np.array([[0, 300, 300], [65535, 0, 1]])


def write_dataset(root, *names):
    for name in names:
        write_png(root / "images" / f"{name}.png", np.zeros((2, 3, 3), dtype=np.uint8))
        write_png(root / "masks" / f"{name}.png", np.zeros((2, 3), dtype=np.uint8))
    return root


def test_numbers_survive_a_file(tmp_path):
    write_instances(tmp_path / "instances" / "a.png", MAP)
    instances = read_instances(tmp_path / "instances" / "a.png", (2, 3))
    assert instances.dtype == np.int32
    np.testing.assert_array_equal(instances, MAP)
    assert skimage.io.imread(tmp_path / "instances" / "a.png").dtype == np.uint16


def test_eight_bits_and_empty_maps_are_read(tmp_path):
    write_png(tmp_path / "a.png", np.array([[0, 255, 7]], dtype=np.uint8))
    assert read_instances(tmp_path / "a.png").tolist() == [[0, 255, 7]]
    write_instances(tmp_path / "b.png", np.zeros((2, 3), dtype=int))
    assert read_instances(tmp_path / "b.png").tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("split", [None, "test"])
def test_maps_lie_beside_the_masks(tmp_path, split):
    folder = write_dataset(tmp_path / split if split else tmp_path, "a", "b", "c")
    samples = find_samples(tmp_path, split)
    assert find_instances(samples) == {}
    for name in ("b", "c", "other"):
        write_instances(folder / "instances" / f"{name}.png", MAP)
    (folder / "instances" / "a.txt").write_text("no map")
    assert find_instances(samples) == {name: folder / "instances" / f"{name}.png" for name in ("b", "c")}
    assert list(find_instances(samples[:2])) == ["b"]


def test_samples_without_masks_have_no_maps(tmp_path):
    assert find_instances([Sample("a", tmp_path / "images" / "a.png", None)]) == {}


def test_two_maps_of_one_image(tmp_path):
    samples = find_samples(write_dataset(tmp_path, "a"))
    write_instances(tmp_path / "instances" / "a.png", MAP)
    skimage.io.imsave(tmp_path / "instances" / "a.tif", MAP.astype(np.uint16), check_contrast=False)
    with pytest.raises(DataError, match=r"a\.png and .*a\.tif are instance maps of one image: remove one"):
        find_instances(samples)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (MAP.T.astype(np.uint16), r"is 3 x 2 pixels \(height x width\), but its image is 2 x 3"),
        (np.zeros((2, 3, 3), dtype=np.uint8), "has colours: save one number a nucleus"),
        (np.array([[0, 255, 0]] * 2, dtype=np.uint8), "is a mask, not an instance map: number the nuclei"),
        (np.full((2, 3), 255, dtype=np.uint8), "is a mask, not an instance map"),
    ],
)
def test_files_that_are_no_instance_map_of_the_image(tmp_path, pixels, message):
    write_png(tmp_path / "a.png", pixels)
    with pytest.raises(DataError, match=rf"a\.png {message}"):
        read_instances(tmp_path / "a.png", (2, 3))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_instances(tmp_path / "nowhere.png")


@pytest.mark.parametrize("number", [-1, 65536])
def test_numbers_that_16_bits_cannot_hold(tmp_path, number):
    with pytest.raises(DataError, match=r"a\.png would hold numbers from .*16-bit PNG holds 0 to 65535"):
        write_instances(tmp_path / "a.png", np.array([[0, number]]))
    assert not (tmp_path / "a.png").exists()
