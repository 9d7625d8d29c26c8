"""Palettes have one form, and colours become labels and labels colours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from uctrans.data import DataError, colours_to_labels, labels_to_colours, parse_palette

COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ("#000000", "has 1 colours; give 2 to 256"),
        ("#000000,#000000", "more than once"),
        ("#000000,red", "'red' is not a colour"),
        ([(0, 0, 0), (0, 0, 256)], "is not a colour"),
        ([(0, 0, 0), (0, 0)], "is not a colour"),
    ],
)
def test_palette_that_cannot_be_read(palette, message):
    with pytest.raises(DataError, match=f"palette: .*{message}"):
        parse_palette(palette)


def test_palette_has_one_form():
    assert parse_palette("#000000, #FF8000") == parse_palette([(0, 0, 0), (255, 128, 0)]) == ("#000000", "#ff8000")


def test_label_without_a_colour():
    with pytest.raises(DataError, match="palette: has 2 colours, but the labels are 0 to 3"):
        labels_to_colours(np.array([[0, 3]], dtype=np.uint8), "#000000,#ff0000")


@settings(max_examples=30, deadline=None)
@given(data=st.data(), palette=st.lists(COLOURS, min_size=2, max_size=256, unique=True))
def test_palettes_round_trip(data, palette):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
    labels = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, len(palette) - 1)))
    result = colours_to_labels(labels_to_colours(labels, palette), palette)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, labels)
