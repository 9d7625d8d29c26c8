"""Pixels to ignore, from the mask file through resizing and augmentation to the labels that are trained on."""

import numpy as np
import pytest
import torch
from skimage.io import imsave

from tests.data.support import NO_CHANGES, put
from uctrans.data import (
    DataError,
    NativeAugmentation,
    boundary_target,
    find_samples,
    get_protocol,
    load_native,
    load_tensors,
    read_mask,
)
from uctrans.data.augmentation import augment_strongly, turn_flip_rotate
from uctrans.data.instances import check_truth, find_instances, write_instances
from uctrans.data.read import IGNORED

LABELS = np.array([[0, 1, 2, 7], [7, 2, 1, 0], [0, 0, 7, 7]], dtype=np.uint8)
EXPECTED = np.where(LABELS == 7, IGNORED, LABELS)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_values_to_ignore(suffix, tmp_path, recwarn):
    path = put(tmp_path / f"a.{suffix}", LABELS)
    np.testing.assert_array_equal(read_mask(path, 3, ignore_label=7), EXPECTED)
    gray = put(tmp_path / f"b.{suffix}", np.where(LABELS == 7, 7, 255 * (LABELS > 0)).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(gray, 1, ignore_label=7), np.where(LABELS == 7, IGNORED, LABELS > 0))
    colours = put(tmp_path / f"c.{suffix}", np.dstack([LABELS] * 3))
    np.testing.assert_array_equal(read_mask(colours, 3, ignore_label=7), EXPECTED)
    assert not recwarn.list
    with pytest.raises(DataError, match="label values 7"):
        read_mask(path, 3)


def test_16_bit_values_and_the_background_can_be_ignored(tmp_path):
    deep = put(tmp_path / "a.png", np.where(LABELS == 7, 65535, LABELS.astype(np.uint16)))
    np.testing.assert_array_equal(read_mask(deep, 3, ignore_label=65535), EXPECTED)
    without_background = np.where(LABELS == 7, 1, LABELS)
    path = put(tmp_path / "b.png", without_background)
    expected = np.where(without_background == 0, IGNORED, without_background)
    np.testing.assert_array_equal(read_mask(path, 3, ignore_label=0), expected)


def test_a_colour_to_ignore_is_a_position_in_the_palette(tmp_path):
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (224, 224, 192)], dtype=np.uint8)
    path = put(tmp_path / "a.png", colours[np.where(LABELS == 7, 3, LABELS)])
    palette = "#000000,#ff0000,#00ff00,#e0e0c0"
    np.testing.assert_array_equal(read_mask(path, 3, palette, ignore_label=3), EXPECTED)
    expected = np.where(LABELS == 1, IGNORED, np.where(LABELS == 7, 3, LABELS))
    np.testing.assert_array_equal(read_mask(path, 4, palette, ignore_label=1), expected)
    with pytest.raises(DataError, match="palette: has 4 colours, but classes=3 needs 3"):
        read_mask(path, 3, palette)
    with pytest.raises(DataError, match=r"ignore_label: 255 is no position in the palette of 4 colours.* set .* to 4"):
        read_mask(path, 4, palette, ignore_label=255)


def test_resized_pixels_with_an_ignored_share_are_ignored():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 3], mask[:, 4] = 1, IGNORED
    protocol = get_protocol(image_size=(4, 16), ignore_label=7)
    resized = protocol.resize_mask(mask, 1)
    assert resized[0].tolist() == [0] * 5 + [1, 1] + [IGNORED] * 4 + [0] * 5
    np.testing.assert_array_equal(
        resized == IGNORED, get_protocol(image_size=(4, 16)).resize_mask((mask == IGNORED).astype(np.uint8), 1)
    )
    as_labels = protocol.resize_mask(mask, 2)
    assert as_labels[0].tolist() == [0] * 6 + [1] * 2 + [IGNORED] * 2 + [0] * 6


@pytest.mark.parametrize("way", ["published", "native"])
def test_augmentation_makes_no_label_of_ignored_pixels(way):
    """Images carry their masks, so that a label from another place would be seen; the centre is always inside."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(16, 21, 21, dtype=torch.uint8)
    masks[:, 8:13, 8:13] = IGNORED
    images = (masks[:, None] / 255).expand(-1, 3, -1, -1)
    if way == "published":
        moved, labels = turn_flip_rotate(images, masks, generator)
    else:
        strengths = NativeAugmentation(**NO_CHANGES | {"warp_probability": 1.0, "rotation": 180.0, "scale": 1.0})
        moved, labels = augment_strongly(images, masks, strengths, (21, 21), generator)
    assert labels.unique().tolist() == [0, IGNORED]
    assert (labels[:, 10, 10] == IGNORED).all()
    certain = (moved[:, 0] < 0.01) | (moved[:, 0] > 0.99)
    assert torch.equal(labels[certain] == IGNORED, moved[:, 0][certain] > 0.5)


@pytest.fixture
def dataset(tmp_path):
    """One image of two nuclei, of which the right half of the right one and the lower rows are ignored."""
    instances = np.zeros((32, 32), dtype=np.uint16)
    instances[4:16, 2:14], instances[4:16, 16:28] = 5, 255
    mask = np.where(instances > 0, 255, 0).astype(np.uint8)
    mask[:, 22:] = mask[20:] = 9
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    imsave(tmp_path / "images/a.png", np.dstack([mask] * 3), check_contrast=False)
    imsave(tmp_path / "masks/a.png", mask, check_contrast=False)
    write_instances(tmp_path / "instances/a.png", instances)
    return tmp_path, instances, mask == 9


def test_the_boundary_target_is_that_of_whole_nuclei_where_it_is_not_ignored(dataset):
    folder, instances, ignored = dataset
    samples = find_samples(folder)
    protocol = get_protocol("native", ignore_label=9)
    check_truth(samples, find_instances(samples), protocol=protocol)
    labels = load_native(samples, 1, target="boundary", protocol=protocol).labels.view(32, 32).numpy()
    np.testing.assert_array_equal(labels, np.where(ignored, IGNORED, boundary_target(instances)))


def test_masks_of_a_dataset(dataset):
    folder, instances, ignored = dataset
    samples = find_samples(folder)
    expected = np.where(ignored, IGNORED, instances > 0)
    tensors = load_tensors(samples, get_protocol(image_size=32, ignore_label=9), 1)
    np.testing.assert_array_equal(tensors.masks[0].numpy(), expected)
    native = load_native(samples, 1, protocol=get_protocol("native", ignore_label=9))
    np.testing.assert_array_equal(native.labels.view(32, 32).numpy(), expected)
