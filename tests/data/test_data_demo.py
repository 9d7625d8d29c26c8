"""The demonstration dataset: complete, disjoint, repeatable, honest about its labels."""

import socket

import numpy as np
import pytest
from skimage.data import immunohistochemistry

from uctrans.data import DataError, find_samples, get_protocol, load_tensors, read_image, write_demo_dataset
from uctrans.data.demo import label_nuclei
from uctrans.writing import write_png

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo_dataset(tmp_path_factory.mktemp("demo") / "new" / "folder")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_is_a_dataset_folder(demo):
    samples = {split: find_samples(demo, split) for split in SPLITS}
    assert {split: len(found) for split, found in samples.items()} == {"train": 10, "val": 3, "test": 3}
    for found in samples.values():
        tensors = load_tensors(found, get_protocol(image_size=32), 1)
        shares = tensors.masks.float().mean(dim=(1, 2))
        assert shares.min() > 0.05
        assert shares.max() < 0.7


def test_tiles_are_disjoint_and_cover_the_photograph(demo):
    whole = np.zeros((512, 512, 3), dtype=np.uint8)
    names = [sample.name for split in SPLITS for sample in find_samples(demo, split)]
    assert len(names) == len(set(names)) == 16
    for split in SPLITS:
        for sample in find_samples(demo, split):
            row, column = (128 * int(digit) for digit in sample.name[-2:])
            whole[row : row + 128, column : column + 128] = read_image(sample.image)
    np.testing.assert_array_equal(whole, immunohistochemistry())


def test_labels_are_the_blue_nuclei():
    image = immunohistochemistry()
    labels = label_nuclei(image)
    assert set(np.unique(labels)) == {0, 1}
    red, blue = image[..., 0].astype(int), image[..., 2].astype(int)
    assert 0.2 < labels.mean() < 0.35
    assert (blue - red)[labels == 1].mean() > (blue - red)[labels == 0].mean() + 15
    assert labels[420:500, 0:40].mean() == 0  # the empty lumen of a gland


def test_readme_names_source_and_labels(demo):
    text = (demo / "README.txt").read_text()
    for phrase in ("immunohistochemistry()", "not by a pathologist", "rgb2hed", "Otsu", "do not overlap"):
        assert phrase in text


def test_needs_no_network_and_repeats_bit_for_bit(demo, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert contents(write_demo_dataset(tmp_path)) == contents(demo)
    (tmp_path / "run").mkdir()
    assert contents(write_demo_dataset(tmp_path)) == contents(demo)


def test_folder_with_other_images_is_left_alone(tmp_path):
    write_png(tmp_path / "train" / "images" / "mine.png", np.zeros((4, 4), dtype=np.uint8))
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"holds other images \(train/images/mine\.png\); choose a new"):
        write_demo_dataset(tmp_path)
    assert contents(tmp_path) == before


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: is a file"):
        write_demo_dataset(tmp_path / "file")
