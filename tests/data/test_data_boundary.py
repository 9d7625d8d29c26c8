"""The boundary-aware target: background, interior and border of nuclei."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from uctrans.data.instances import BACKGROUND, BORDER, INTERIOR, boundary_target


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


@settings(max_examples=100, deadline=None)
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
