"""Tensors and Datasets of a program give what the same pixels give in files, or an error that names the item."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, StackDataset, TensorDataset

from tests.data.support import put, random_pixels
from uctrans.data import DataError, find_samples, fingerprint, get_protocol, load_native, load_tensors
from uctrans.data.pairs import pairs_of
from uctrans.data.read import IGNORED

IMAGE = torch.zeros(3, 4, 5)
MASK = torch.zeros(4, 5, dtype=torch.int64)
PROTOCOLS = {"resized": get_protocol(image_size=(6, 7)), "native": get_protocol("native")}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(IMAGE, MASK)])


def load(name, samples, classes=1):
    read = {"resized": load_tensors, "native": load_native}[name]
    return read(samples, protocol=PROTOCOLS[name], classes=classes)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("classes", [1, 3])
def test_pairs_are_their_files(tmp_path, name, classes):
    image, mask = random_pixels(9, 8, 3), random_pixels(9, 8) % max(classes, 2)
    put(tmp_path / "images/a.png", image)
    put(tmp_path / "masks/a.png", mask * (255 if classes == 1 else 1))
    files = load(name, find_samples(tmp_path), classes)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    for item in ((pixels, torch.from_numpy(mask).long()), (pixels.numpy(), mask)):
        pairs = load(name, pairs_of([item], "data"), classes)
        assert (pairs.digest, pairs.fingerprints) == (files.digest, files.fingerprints)
    of_floats = load(name, pairs_of([(pixels.double() / 255, torch.from_numpy(mask))], "data"), classes)
    index = torch.tensor([0])
    floats, labels = of_floats.batch(index)
    images, expected = files.batch(index)
    torch.testing.assert_close(floats, images / 255, rtol=0, atol=1.5 / 255 if name == "resized" else 0)
    assert floats.dtype == torch.float32
    assert torch.equal(labels, expected)
    assert of_floats.fingerprints == files.fingerprints


def test_two_tensors_a_dataset_and_a_list_hold_the_same_pairs():
    images, masks = torch.rand(3, 3, 4, 5), torch.randint(0, 2, (3, 4, 5), dtype=torch.uint8)
    as_list = list(zip(images, masks, strict=True))
    for data in ((images, masks), (images.numpy(), masks.numpy()), TensorDataset(images, masks), as_list):
        pairs = pairs_of(data, "val_data")
        assert [pair.name for pair in pairs] == ["val_data[0]", "val_data[1]", "val_data[2]"]
        loaded = load("native", pairs)
        assert torch.equal(loaded.batch(torch.arange(3))[0], images)


def test_pixels_to_ignore_and_sizes_that_differ():
    protocol = get_protocol("native", ignore_label=9)
    large = torch.tensor([[0, 9], [1, 1], [9, 0]])
    data = load_native(pairs_of([(IMAGE, MASK + 9), (torch.ones(3, 3, 2), large)], "data"), 1, protocol=protocol)
    assert data.sizes.T.tolist() == [[4, 5], [3, 2]]
    assert data.labels[:20].unique().tolist() == [IGNORED]
    assert data.labels[20:].tolist() == [0, IGNORED, 1, 1, IGNORED, 0]


def test_fingerprints_of_floats_are_those_of_their_bytes():
    image = random_pixels(5, 6, 3)
    assert fingerprint(np.float32(image / 255)) == fingerprint(image)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(2, 3, 4, 5), torch.zeros(3, 4, 5)), r"(2, 3, 4, 5), the masks (3, 4, 5); give (n, C, H, W)"),
        (IMAGE, "is a Tensor; give two tensors"),
        ({"images": IMAGE, "masks": MASK}, "is a dict; give"),
        ("folder", "is a str; give"),
        (Stream(), "is a Stream; give"),
        (DataLoader([(IMAGE, MASK)]), "is a DataLoader; give"),
        (7, "is a int; give"),
        ([], "is empty; give at least one"),
        ((torch.zeros(0, 3, 4, 5), torch.zeros(0, 4, 5)), "is empty; give at least one"),
    ],
    ids=["counts", "tensor", "dict", "path", "iterable", "loader", "number", "no items", "no images"],
)
def test_data_of_another_kind(data, message):
    with pytest.raises(DataError, match=rf"^train_data: .*{re.escape(message)}"):
        pairs_of(data, "train_data")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": IMAGE, "mask": MASK}, "is a dict; let the Dataset return two tensors, (image, mask)"),
        ((IMAGE, MASK, 3), "is a tuple of (Tensor, Tensor, int); let"),
        ((IMAGE, "mask.png"), "is a tuple of (Tensor, str); let"),
        ((IMAGE[:1], MASK), "the image has the shape (1, 4, 5); give (3, H, W), or set"),
        ((IMAGE.permute(1, 2, 0), MASK), "the image has the shape (4, 5, 3); give (3, H, W)"),
        ((IMAGE[:, :0], MASK[:0]), "the image has the shape (3, 0, 5); give"),
        ((IMAGE + torch.nan, MASK), "the image has values that are not finite; replace NaN"),
        ((IMAGE + 255, MASK), "the image has values from 255 to 255; bring all images to 0..1"),
        ((IMAGE - 0.5, MASK), "the image has values from -0.5 to -0.5; bring"),
        ((IMAGE.short(), MASK), "the image is int16; give uint8 from 0 to 255, or floating point"),
        ((IMAGE, MASK.float()), "the mask is float32; give whole labels, such as mask.long()"),
        ((IMAGE, MASK[:3]), "the mask has the shape (3, 5), the image (4, 5) pixels; give"),
        ((IMAGE, MASK[None]), "the mask has the shape (1, 4, 5), the image (4, 5) pixels; give"),
        ((IMAGE, MASK + 255), "the mask has the label 255, labels are 0 to 1; give the foreground as 1"),
        ((IMAGE, MASK - 1), "the mask has the label -1, labels are 0 to 1; give"),
        ((IMAGE.byte(), MASK), "is torch.uint8, and the first image is torch.float32; give all images one dtype"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_items_that_are_no_image_and_mask(name, item, message):
    with pytest.raises(DataError, match=rf"^data\[1\]: {re.escape(message)}"):
        load(name, pairs_of([(IMAGE, MASK), item], "data"))


def test_a_dataset_of_dictionaries_and_labels_beyond_the_classes():
    dataset = StackDataset(image=IMAGE[None], mask=MASK[None])
    with pytest.raises(DataError, match=r"^data\[0\]: is a dict; let the Dataset return"):
        load("native", pairs_of(dataset, "data"))
    with pytest.raises(
        DataError, match=r"^data\[0\]: the mask has the label 3, labels are 0 to 2; renumber it, or set"
    ):
        load("native", pairs_of([(IMAGE, MASK + 3)], "data"), classes=3)
