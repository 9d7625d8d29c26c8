"""Datasets as tensors: resized or at full resolution, crops of them, and what cannot be loaded."""

import functools

import imageio.v3
import numpy as np
import pytest
import torch

from tests.data.support import generator, native_images, put, random_pixels
from uctrans.data import (
    DataError,
    Sample,
    boundary_target,
    find_samples,
    get_protocol,
    load_native,
    load_tensors,
    read_image,
)
from uctrans.data.tensors import reflect

load_small = functools.partial(load_tensors, protocol=get_protocol(image_size=(8, 12)))
load_boundary = functools.partial(load_native, target="boundary")


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_reflection_is_that_of_numpy(length):
    expected = np.pad(np.arange(length), 20, mode="reflect")
    assert reflect(torch.arange(-20, length + 20), torch.tensor(length)).tolist() == expected.tolist()


def test_crops_are_cut_out_of_their_images_and_reflected_beyond():
    first, second = random_pixels(9, 14), random_pixels(5, 4)
    data = native_images(first, second)
    corners = torch.tensor([2, -3]), torch.tensor([5, -1])
    images, labels = data.crops(torch.tensor([0, 1]), *corners, (6, 8))
    padded = np.pad(second, ((3, 6), (1, 6)), mode="reflect")
    expected = np.stack([first[2:8, 5:13], padded[:6, :8]])
    np.testing.assert_array_equal(labels, expected)
    assert torch.equal(images, labels[:, None].expand(-1, 3, -1, -1))
    assert images.dtype == labels.dtype == torch.uint8


def test_whole_images_are_batches():
    first, second = random_pixels(9, 14), random_pixels(5, 4)
    images, labels = native_images(first, second).batch(torch.tensor([1]))
    np.testing.assert_array_equal(labels[0], second)
    np.testing.assert_array_equal(images[0, 1], second)


def test_images_of_different_sizes_are_no_batch():
    data = native_images(random_pixels(9, 14), random_pixels(5, 4), random_pixels(9, 14))
    _, labels = data.batch(torch.tensor([2, 0]))
    assert labels.shape == (2, 9, 14)
    with pytest.raises(DataError, match=r"0 \(9 x 14\), 1 \(5 x 4\) pixels .*take one image at a time"):
        data.batch(torch.tensor([0, 1]))


def test_random_crops_reach_every_place_and_no_other():
    """The image of 7 x 12 is larger than the crop of 4 x 9 by 3 each way; that of 2 x 10 is 2 rows smaller."""
    data = native_images(random_pixels(7, 12), random_pixels(2, 10))
    index = torch.arange(4000) % 2
    top, left = data.random_corners(index, (4, 9), generator())
    for image, rows, columns in ((0, range(4), range(4)), (1, range(-2, 1), range(2))):
        corners = set(zip(top[index == image].tolist(), left[index == image].tolist(), strict=True))
        assert corners == {(row, column) for row in rows for column in columns}
    counts = torch.bincount(top[index == 0] * 4 + left[index == 0])
    assert counts.min() > 60  # of 125 expected


@pytest.fixture
def dataset(tmp_path):
    """Two images of different sizes with one or two square nuclei."""
    instances = {"a": np.zeros((20, 30), np.uint16), "b": np.zeros((16, 18), np.uint16)}
    instances["a"][2:12, 3:13], instances["a"][2:12, 13:23], instances["b"][4:14, 4:14] = 1, 2, 300
    for name, numbers in instances.items():
        put(tmp_path / "images" / f"{name}.png", random_pixels(*numbers.shape, 3))
        put(tmp_path / "masks" / f"{name}.png", (numbers > 0).astype(np.uint8) * 255)
        put(tmp_path / "instances" / f"{name}.png", numbers)
    return tmp_path


def test_load_tensors(dataset):
    tensors = load_small(find_samples(dataset), classes=1)
    assert (len(tensors), tensors.names, tensors.original_sizes) == (2, ["a", "b"], [(20, 30), (16, 18)])
    assert (tensors.images.dtype, tensors.images.shape) == (torch.uint8, (2, 3, 8, 12))
    assert (tensors.masks.dtype, tensors.masks.shape) == (torch.uint8, (2, 8, 12))
    assert tensors.masks.unique().tolist() == [0, 1]
    expected = get_protocol(image_size=(8, 12)).resize_image(read_image(dataset / "images" / "a.png"))
    np.testing.assert_array_equal(tensors.images[0].permute(1, 2, 0), expected)
    moved = tensors.to("meta")
    assert (moved.images.device.type, moved.masks.device.type, moved.names) == ("meta", "meta", ["a", "b"])


def test_load_native(dataset):
    data = load_native(find_samples(dataset), 1)
    assert (len(data), data.names, data.sizes.tolist()) == (2, ["a", "b"], [[20, 16], [30, 18]])
    for position, name in enumerate("ab"):
        images, labels = data.batch(torch.tensor([position]))
        np.testing.assert_array_equal(images[0].permute(1, 2, 0), imageio.v3.imread(dataset / f"images/{name}.png"))
        np.testing.assert_array_equal(labels[0], imageio.v3.imread(dataset / f"masks/{name}.png") > 0)


def test_boundary_target_is_that_of_the_whole_map(dataset):
    data = load_boundary(find_samples(dataset), 1)
    for position, name in enumerate("ab"):
        expected = boundary_target(imageio.v3.imread(dataset / f"instances/{name}.png").astype(np.int32))
        np.testing.assert_array_equal(data.batch(torch.tensor([position]))[1][0], expected)
        assert set(np.unique(expected)) == {0, 1, 2}


def test_a_mask_of_0_and_1_in_place_of_a_map_gives_a_warning(dataset):
    parts = imageio.v3.imread(dataset / "instances/a.png")
    parts[:, 12:14] = 0
    put(dataset / "instances/a.png", (parts > 0).astype(np.uint16))
    with pytest.warns(UserWarning, match=r"^1 instance maps hold one number alone, in several places.*a\.png"):
        load_boundary(find_samples(dataset), 1)


@pytest.mark.parametrize("load", [load_small, load_native])
def test_samples_that_cannot_be_loaded(dataset, load):
    with pytest.raises(DataError, match="there are none to load"):
        load([], classes=1)
    with pytest.raises(DataError, match=r"a\.png: has no mask"):
        load([Sample("a", dataset / "images" / "a.png", None)], classes=1)
    path = dataset / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        load(find_samples(dataset), classes=1)


def test_instance_maps_that_cannot_be_a_target(dataset):
    samples = find_samples(dataset)
    with pytest.raises(DataError, match="choose one of mask, boundary"):
        load_native(samples, 1, target="border")
    for pixels, message in (
        (np.eye(16, 18, dtype=np.uint16), "is not the instance map of its image"),
        (np.ones((4, 4), np.uint16), "is 4 x 4 pixels .*image is 16 x 18"),
    ):
        put(dataset / "instances/b.png", pixels)
        with pytest.raises(DataError, match=rf"instances/b\.png: {message}"):
            load_boundary(samples, 1)
    (dataset / "instances/b.png").unlink()
    with pytest.raises(DataError, match=r"instances: no instance map.*for b, which the target boundary needs; put"):
        load_boundary(samples, 1)
    assert len(load_native(samples, 1)) == 2
