"""Nuclei from probabilities by watershed, on drawn disks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from uctrans.data import fill_polygons
from uctrans.data.instances import BACKGROUND, BORDER, INTERIOR, boundary_target
from uctrans.inference.instances import SMALLEST_OBJECT, nucleus_probability, to_instances
from uctrans.inference.metrics import score_instances


def disks(*centres, radius=10, size=(60, 60)):
    """Disks numbered from 1, each pixel with the nearest centre where they overlap."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    distances = np.stack([np.hypot(rows - row, columns - column) for row, column in centres])
    return np.where(distances.min(0) <= radius, distances.argmin(0) + 1, 0).astype(np.int32)


def one_hot(target):
    return np.stack([(target == label).astype(np.float32) for label in (BACKGROUND, INTERIOR, BORDER)])


TOUCHING = disks((20, 16), (20, 33), (46, 40))


def test_touching_nuclei_are_parted():
    instances = to_instances((TOUCHING > 0).astype(np.float32))
    assert instances.dtype == np.int32
    assert np.unique(instances).tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(instances > 0, TOUCHING > 0)
    assert score_instances(instances, TOUCHING).aji > 0.97


def test_an_uneven_nucleus_stays_whole():
    """A disk with bites out of its outline: unsmoothed, the distance inside it has several peaks."""
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    rows, columns = np.mgrid[:60, :60]
    nucleus = disks((30, 30), radius=14) > 0
    for angle in angles:
        nucleus &= np.hypot(rows - 30 - 15 * np.sin(angle), columns - 30 - 15 * np.cos(angle)) > 3
    assert to_instances(nucleus.astype(float)).max() == 1


def test_seeds_lie_further_apart_than_the_seed_distance():
    mask = (disks((20, 16), (20, 33)) > 0).astype(float)
    assert [to_instances(mask, seed_distance=distance).max() for distance in (8, 15, 20)] == [2, 2, 1]


def test_the_threshold_is_exclusive_and_cuts():
    probabilities = np.where(TOUCHING == 3, 0.9, np.where(TOUCHING > 0, 0.5, 0))
    np.testing.assert_array_equal(to_instances(probabilities) > 0, TOUCHING == 3)
    np.testing.assert_array_equal(to_instances(probabilities, 0.4) > 0, TOUCHING > 0)
    assert to_instances(probabilities, 0.95).max() == 0


def test_small_objects_are_left_out_and_numbers_have_no_gaps():
    mask = (TOUCHING > 0).astype(float)
    mask[0, 0:5] = 1
    instances = to_instances(mask, smallest_object=6)
    assert np.unique(instances).tolist() == [0, 1, 2, 3]
    assert not instances[0].any()
    kept = to_instances(mask, smallest_object=5)
    assert np.unique(kept).tolist() == [0, 1, 2, 3, 4]
    assert len(np.unique(kept[0, :5])) == 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_uniform_maps(value):
    assert np.unique(to_instances(np.full((50, 40), value))).tolist() == [value]


def test_a_part_without_a_peak_is_one_nucleus():
    """A bar of one pixel's width has the same distance everywhere."""
    mask = np.zeros((9, 60))
    mask[4] = 1
    assert np.unique(to_instances(mask)).tolist() == [0, 1]


def test_every_connected_part_has_its_own_nucleus():
    """Two parts nearer to each other than the seed distance."""
    mask = np.zeros((20, 20))
    mask[2:12, 2:8], mask[2:12, 9:15] = 1, 1
    instances = to_instances(mask, seed_distance=12)
    assert instances.max() == 2
    assert (instances[2:12, 2:8] == 1).all()


def test_a_nucleus_at_the_edge_of_the_image():
    labels = disks((0, 20), (30, 59), (59, 0))
    assert score_instances(to_instances((labels > 0).astype(float)), labels).aji == 1


def test_the_result_depends_on_the_input_alone():
    probabilities = np.random.default_rng(0).uniform(0, 1, (80, 80))
    before = probabilities.copy()
    first = to_instances(probabilities, smallest_object=0)
    np.testing.assert_array_equal(first, to_instances(probabilities, smallest_object=0))
    np.testing.assert_array_equal(probabilities, before)


def test_the_boundary_parts_what_distance_cannot():
    """Two nuclei that touch along a whole side: as a mask they are one square."""
    labels = np.zeros((50, 50), dtype=np.int32)
    labels[10:40, 10:25], labels[10:40, 25:40] = 1, 2
    probabilities = one_hot(boundary_target(labels))
    np.testing.assert_array_equal(to_instances(probabilities), labels)
    assert to_instances(nucleus_probability(probabilities)).max() == 1
    np.testing.assert_array_equal(nucleus_probability(probabilities) > 0.5, labels > 0)


def test_a_small_nucleus_does_not_merge_into_its_neighbour():
    """The interior of the second has fewer pixels than the smallest object, as its border is taken off."""
    rows, columns = np.mgrid[:60, :60]
    small = np.hypot(rows - 30, columns - 38) <= 5.6
    labels = np.where(np.hypot(rows - 30, columns - 20) <= 12, 1, 2 * small)
    target = boundary_target(labels)
    assert ((target == INTERIOR) & (labels == 2)).sum() < SMALLEST_OBJECT < (labels == 2).sum()
    assert score_instances(to_instances(one_hot(target)), labels).aji == 1


def test_a_boundary_model_without_interior_still_finds_nuclei():
    probabilities = one_hot(np.where(TOUCHING > 0, BORDER, BACKGROUND))
    instances = to_instances(probabilities)
    assert instances.max() == 2  # those that touch are one
    np.testing.assert_array_equal(instances > 0, TOUCHING > 0)


@pytest.mark.parametrize(("valley", "nuclei"), [(0.9, 1), (0.5, 2)])
def test_a_valley_in_the_probability_of_interior_parts_nuclei(valley, nuclei):
    """Where more than a tenth is missing, nuclei touch, although their border is nowhere more probable."""
    interior = np.zeros((40, 60), dtype=np.float32)
    interior[10:30, 10:50] = 0.95
    interior[10:30, 28:32] = valley
    probabilities = np.stack([1 - (interior > 0), interior, (interior > 0) - interior]).astype(np.float32)
    assert to_instances(probabilities).max() == nuclei


@pytest.mark.parametrize(("probability", "threshold", "nuclei"), [(0.7, 0.5, 0), (0.8, 0.5, 1), (0.7, 0.3, 1)])
def test_doubtful_objects_of_a_boundary_model_are_left_out(probability, threshold, nuclei):
    interior = (probability * disks((30, 30))).astype(np.float32)
    probabilities = np.stack([1 - interior, interior, np.zeros_like(interior)])
    assert to_instances(probabilities, threshold).max() == nuclei
    assert to_instances(nucleus_probability(probabilities), threshold).max() == 1


def test_tensors_and_channels():
    mask = (TOUCHING > 0).astype(np.float32)
    expected = to_instances(mask)
    for probabilities in (mask[None], torch.from_numpy(mask), torch.from_numpy(mask[None]).to(torch.bfloat16)):
        np.testing.assert_array_equal(to_instances(probabilities), expected)
    rounded = torch.from_numpy(mask) * 1.0000005
    assert nucleus_probability(rounded).max() == 1
    channels = np.stack([1 - mask, 0.75 * mask, 0.25 * mask])
    np.testing.assert_array_equal(nucleus_probability(channels), mask)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (12, 13), elements=st.floats(0, 1, width=32)), st.integers(0, 6), st.integers(1, 5))
def test_any_map_gives_instances_of_its_foreground(probabilities, smallest, distance):
    instances = to_instances(probabilities, 0.5, smallest, distance)
    areas = np.bincount(instances.ravel())[1:]
    assert (areas >= max(smallest, 1)).all()
    assert not instances[probabilities <= 0.5].any()
    if smallest == 0:
        assert (instances[probabilities > 0.5] > 0).all()


def crowded_nuclei(seed, size=240, pitch=20):
    """Uneven nuclei of about 60 to 500 pixels, most of which touch others or lie a little under them."""
    generator = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 60)[:-1]
    outlines = []
    for place in np.ndindex(size // pitch, size // pitch):
        row, column = (np.array(place) + 0.5) * pitch + generator.uniform(-3, 3, 2)
        radius = generator.uniform(5, 12.5) * (1 + 0.1 * np.cos(3 * angles + generator.uniform(0, 6)))
        outlines.append(np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], axis=1))
    return fill_polygons(outlines, (size, size)).astype(np.int32)


@pytest.mark.parametrize("seed", range(3))
def test_a_perfect_boundary_target_gives_the_nuclei_back(seed):
    truth = crowded_nuclei(seed)
    assert ndimage.label(truth)[1] < 0.6 * truth.max()  # they touch
    target = boundary_target(truth)
    scores = score_instances(to_instances(one_hot(target)), truth)
    assert min(scores.aji, scores.pq) > 0.99, scores
    assert score_instances(to_instances((truth > 0).astype(np.float32)), truth).aji < 0.9  # which the mask does not


@pytest.mark.parametrize(
    ("probabilities", "settings", "message"),
    [
        (
            np.zeros((2, 8, 8)),
            {},
            r"got the shape \(2, 8, 8\); give .* \(3, H, W\) for background, interior and border",
        ),
        (np.zeros((1, 1, 8, 8)), {}, r"got the shape \(1, 1, 8, 8\)"),
        (np.zeros((0, 8)), {}, r"got the shape \(1, 0, 8\)"),
        (np.zeros((8, 8), dtype=np.uint8), {}, "got uint8; give floating-point numbers"),
        (np.full((8, 8), 3.0), {}, "apply the sigmoid or softmax first"),
        (np.full((8, 8), np.nan), {}, "apply the sigmoid or softmax first"),
        (np.zeros((8, 8)), {"threshold": 1.0}, "threshold: 1.0 is out of range"),
        (np.zeros((8, 8)), {"smallest_object": -1}, "smallest_object: -1 is negative"),
        (np.zeros((8, 8)), {"seed_distance": 0}, "seed_distance: 0 is too small"),
    ],
)
def test_bad_probabilities_and_settings(probabilities, settings, message):
    with pytest.raises(ValueError, match=message):
        to_instances(probabilities, **settings)
