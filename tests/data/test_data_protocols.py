"""Resizing, channel order, and the batches that the protocols make for training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from tests.data.support import NO_CHANGES, generator, native_images, random_pixels
from uctrans.data import (
    DataError,
    NativeAugmentation,
    NativeProtocol,
    SegmentationTensors,
    get_protocol,
    list_protocols,
    protocol_of,
)
from uctrans.data.protocols import resize_bilinear


def numbered(height, width):
    """Return a map without symmetry that changes by 2 from row to row and by 1 from column to column."""
    return (np.arange(height)[:, None] * 2 + np.arange(width)).astype(np.uint8)


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
        ({"name": "native", "crops_per_image": 0}, "crops_per_image: 0 is no number of crops"),
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


def test_crops_follow_the_generator():
    protocol, data = get_protocol("native", 16), native_images(random_pixels(40, 30), random_pixels(12, 50))
    index = torch.tensor([0, 1, 0, 1])
    one, again, other = (protocol.training_batch(data, index, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])
    assert not torch.equal(one[1][0], one[1][2])  # two crops of one image
    assert (one[0].shape, one[0].dtype, one[1].shape, one[1].dtype) == (
        (4, 3, 16, 16), torch.float32, (4, 16, 16), torch.uint8,
    )  # fmt: skip
    assert one[0].min() >= 0
    assert one[0].max() <= 1


def test_without_strengths_crops_are_turned_and_flipped_only():
    protocol = get_protocol("native", (9, 9), augmentation=NativeAugmentation(**NO_CHANGES))
    assert protocol.augmentation.margin((9, 9)) == (0, 0)
    label = random_pixels(9, 9)
    data = native_images(label)
    images, labels = protocol.training_batch(data, torch.zeros(200, dtype=torch.int64), generator())
    images = (images * 255).round().to(torch.uint8)
    assert torch.equal(images, labels[:, None].expand(-1, 3, -1, -1))
    seen = {crop.numpy().tobytes() for crop in labels}
    symmetries = {np.ascontiguousarray(np.rot90(part, k)).tobytes() for part in (label, label[::-1]) for k in range(4)}
    assert seen == symmetries


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_resized_images_are_augmented_as_crops_are(order):
    """Image and mask by the same map, colours as those of crops, in the order that the network sees."""
    settings = {"image_size": (9, 9), "channel_order": order}
    still = get_protocol("augmented-224", augmentation=NativeAugmentation(**NO_CHANGES), **settings)
    label = torch.from_numpy(random_pixels(9, 9))
    pixels = torch.stack([label, label // 2, label // 4])
    data = SegmentationTensors(["a"], pixels[None], label[None], [(9, 9)])
    index = torch.zeros(200, dtype=torch.int64)
    images, labels = still.training_batch(data, index, generator())
    expected = torch.stack([labels, labels // 2, labels // 4], 1)
    assert torch.equal((images * 255).round().to(torch.uint8), expected if order == "rgb" else expected.flip(1))
    assert len({crop.numpy().tobytes() for crop in labels}) == 8  # the symmetries of the square
    protocol = get_protocol("augmented-224", **settings)
    changed, masks = protocol.training_batch(data, index, generator())
    assert (changed.shape, changed.dtype, masks.dtype) == ((200, 3, 9, 9), torch.float32, torch.uint8)
    assert len({image.numpy().tobytes() for image in changed}) == 200
    again, _ = protocol.training_batch(data, index, generator())
    assert torch.equal(changed, again)


def test_resized_images_are_scored_as_those_of_the_published_protocol():
    published, augmented = get_protocol("uctransnet-224", 20), get_protocol("augmented-224", 20)
    image, mask = random_pixels(50, 40)[..., None].repeat(3, -1), random_pixels(50, 40) % 2
    np.testing.assert_array_equal(augmented.resize_image(image), published.resize_image(image))
    np.testing.assert_array_equal(augmented.resize_mask(mask, 1), published.resize_mask(mask, 1))


@pytest.mark.parametrize("size", [(24, 24), (18, 30)])
@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"warp_probability": 1, "rotation": 180},
        {"warp_probability": 1, "scale": 1.0},
        {"warp_probability": 1, "rotation": 45, "scale": 0.25},
    ],
)
def test_labels_stay_with_their_images(size, strengths):
    """The map is linear, so what is interpolated differs from the nearest pixel by half of both steps at most."""
    augmentation = NativeAugmentation(**NO_CHANGES | strengths)
    protocol = get_protocol("native", size, augmentation=augmentation)
    data = native_images(numbered(60, 100), numbered(70, 70)[::-1].copy(), numbered(10, 12))
    images, labels = protocol.training_batch(data, torch.arange(60) % 2, generator())
    differences = (images * 255 - labels[:, None]).abs()
    assert differences.max() <= (1.51 if strengths else 0.01)
    if strengths:
        assert differences.max() > 0.3
    images, labels = protocol.training_batch(data, torch.full((20,), 2), generator())
    assert (images * 255 - labels[:, None]).abs().max() <= (1.51 if strengths else 0.01)


def test_channel_order_is_that_of_the_input():
    augmentation = NativeAugmentation(**NO_CHANGES)
    data = native_images(random_pixels(8, 8))
    data.pixels[:2] = 0  # blue alone
    rgb, bgr = (
        get_protocol("native", 8, order, augmentation=augmentation).training_batch(data, torch.tensor([0]), generator())
        for order in ("rgb", "bgr")
    )
    assert torch.equal(bgr[0], rgb[0].flip(1))
    assert rgb[0][0, 2].max() > 0.5
    assert rgb[0][0, 0].max() < 1e-5


def test_the_protocol_keeps_images_and_masks():
    protocol = get_protocol("native", 64)
    assert isinstance(protocol, NativeProtocol)
    image, mask = random_pixels(9, 7)[..., None].repeat(3, -1), random_pixels(9, 7)
    assert protocol.resize_image(image) is image
    assert protocol.resize_mask(mask, 1) is mask


@pytest.mark.gpu
def test_crops_are_made_on_the_gpu_without_waiting_for_it():
    protocol, data = get_protocol("native", 32), native_images(random_pixels(40, 60), random_pixels(20, 90)).to("cuda")
    index, on_gpu = torch.tensor([0, 1, 1], device="cuda"), torch.Generator("cuda").manual_seed(0)
    protocol.training_batch(data, index, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = protocol.training_batch(data, index, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.device.type == labels.device.type == "cuda"
    assert (images.shape, labels.shape) == ((3, 3, 32, 32), (3, 32, 32))
