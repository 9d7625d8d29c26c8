"""Resizing, channel order, and datasets as tensors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from tests.data.support import put, random_pixels
from uctrans.data import (
    DataError,
    Sample,
    find_samples,
    get_protocol,
    list_protocols,
    load_tensors,
    protocol_of,
    read_image,
)
from uctrans.data.protocols import resize_bilinear


def test_protocol_names_and_sizes():
    assert list_protocols() == ["augmented-224", "native", "uctransnet-224"]
    assert get_protocol("native").image_size == (256, 256)
    assert get_protocol().image_size == (224, 224)
    assert get_protocol("uctransnet-224", 96).image_size == (96, 96)
    assert get_protocol(image_size=[96, 64]).image_size == (96, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nativ"}, "protocol: 'nativ' is unknown; choose one of augmented-224, native, uctransnet-224"),
        ({"crops_per_image": 2}, "crops_per_image: the protocol uctransnet-224 has no such option"),
        ({"name": "native", "crops_per_image": 0}, "crops_per_image=0"),
        ({"image_size": 0}, "of 1 pixel or more"),
        ({"image_size": (8, 8, 3)}, "give height and width"),
        ({"channel_order": "gbr"}, "choose one of rgb, bgr"),
    ],
)
def test_protocol_that_does_not_exist(arguments, message):
    with pytest.raises(DataError, match=message):
        get_protocol(**arguments)


def test_protocol_of_a_model_follows_its_metadata():
    def protocol(metadata=None, channel_order=None, **config):
        return protocol_of(SimpleNamespace(metadata=metadata or {}, config=config), channel_order)

    assert protocol({"image_size": [32, 48], "channel_order": "bgr"}) == get_protocol("uctransnet-224", (32, 48), "bgr")
    assert protocol({"channel_order": "bgr"}, "rgb").channel_order == "rgb"
    assert protocol({"protocol": "native", "image_size": 64}) == get_protocol("native", 64)
    assert protocol(image_size=96).image_size == (96, 96)
    assert protocol(image_size=None).image_size == (224, 224)
    with pytest.raises(DataError, match="channel_order"):
        protocol(channel_order="grb")
    with pytest.raises(DataError, match="protocol"):
        protocol({"protocol": "unheard-of"})


def test_resize_has_the_bits_of_opencv():
    """Expected values: cv2.resize(pixels, (4, 3)) of OpenCV 5.0.0."""
    pixels = ((np.arange(35) * 37 + 11) % 256).astype(np.uint8).reshape(5, 7)
    assert resize_bilinear(pixels, (3, 4)).tolist() == [[26, 90, 155, 220], [31, 96, 160, 225], [36, 100, 165, 230]]


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(*[st.integers(1, 40)] * 4), channels=st.sampled_from([(), (3,)]))
def test_resize_is_bilinear_within_one_gray_level(size, channels):
    pixels = random_pixels(*size[:2], *channels)
    resized = resize_bilinear(pixels, size[2:])
    planes = torch.from_numpy(pixels.reshape(*size[:2], -1)).permute(2, 0, 1)[None].double()
    exact = interpolate(planes, size=size[2:], mode="bilinear", align_corners=False, antialias=False)
    assert (resized.dtype, resized.shape) == (np.uint8, (*size[2:], *channels))
    assert np.abs(resized.reshape(*size[2:], -1) - exact[0].permute(1, 2, 0).numpy()).max() < 1.0


def test_resize_to_the_same_size_changes_nothing():
    pixels = random_pixels(9, 7, 3)
    np.testing.assert_array_equal(get_protocol(image_size=(9, 7)).resize_image(pixels), pixels)


def test_resize_keeps_extremes():
    assert (resize_bilinear(np.full((30, 20), 255, dtype=np.uint8), (7, 50)) == 255).all()


def test_binary_masks_are_foreground_wherever_any_is_left():
    mask = np.kron(random_pixels(10, 10) // 128, np.ones((10, 10), dtype=np.uint8))
    protocol = get_protocol(image_size=45)
    resized = protocol.resize_mask(mask, 1)
    as_image = protocol.resize_image(np.dstack([mask * 255] * 3))[..., 0]
    np.testing.assert_array_equal(resized, as_image > 0)
    assert set(np.unique(resized)) == {0, 1}
    assert resized.mean() > mask.mean()


def test_label_masks_are_sampled_at_the_nearest_pixel():
    labels = random_pixels(12, 9) % 7
    resized = get_protocol(image_size=(4, 3)).resize_mask(labels, 7)
    np.testing.assert_array_equal(resized, labels[1::3, 1::3])


def test_to_input():
    images = torch.from_numpy(random_pixels(2, 3, 4, 5))
    result = get_protocol().to_input(images)
    assert result.dtype == torch.float32
    assert torch.equal(result, images.float() / 255)
    assert torch.equal(get_protocol(channel_order="bgr").to_input(images), images[:, [2, 1, 0]].float() / 255)


@pytest.fixture
def dataset(tmp_path):
    for name, size in {"a": (20, 30), "b": (16, 16)}.items():
        for kind, pixels in {"images": random_pixels(*size, 3), "masks": random_pixels(*size) // 128 * 255}.items():
            put(tmp_path / kind / f"{name}.png", pixels)
    return tmp_path


def test_load_tensors(dataset):
    protocol = get_protocol(image_size=(8, 12))
    tensors = load_tensors(find_samples(dataset), protocol, 1)
    assert (len(tensors), tensors.names, tensors.original_sizes) == (2, ["a", "b"], [(20, 30), (16, 16)])
    assert (tensors.images.dtype, tensors.images.shape) == (torch.uint8, (2, 3, 8, 12))
    assert (tensors.masks.dtype, tensors.masks.shape) == (torch.uint8, (2, 8, 12))
    assert tensors.masks.unique().tolist() == [0, 1]
    expected = protocol.resize_image(read_image(dataset / "images" / "a.png"))
    np.testing.assert_array_equal(tensors.images[0].permute(1, 2, 0), expected)


def test_tensors_move_together(dataset):
    moved = load_tensors(find_samples(dataset), get_protocol(image_size=8), 1).to("meta")
    assert (moved.images.device.type, moved.masks.device.type, moved.names) == ("meta", "meta", ["a", "b"])


def test_load_tensors_of_nothing(dataset):
    with pytest.raises(DataError, match="there are none to load"):
        load_tensors([], get_protocol(), 1)


def test_load_tensors_without_a_mask(dataset):
    sample = Sample("a", dataset / "images" / "a.png", None)
    with pytest.raises(DataError, match=r"a\.png: has no mask"):
        load_tensors([sample], get_protocol(), 1)


def test_load_tensors_names_the_damaged_file(dataset):
    path = dataset / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        load_tensors(find_samples(dataset), get_protocol(image_size=8), 1)
