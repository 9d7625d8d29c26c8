"""What the preparation of masks does to a square whose pixels can be counted."""

import re

import numpy as np
import pytest

from benchmarks.mask_conventions import at_least_half, main, nearest, published, table, there_and_back
from uctrans.writing import write_png


def square(side, low, high):
    mask = np.zeros((side, side), np.uint8)
    mask[low:high, low:high] = 1
    return mask


def test_a_square_at_half_the_size():
    """From 448 pixels, 1 of 224 is 2 x 2: the square 101..299 covers half of a pixel at the upper left, a quarter at
    the corner. The nearest to a centre is the lower right of the four."""
    mask = square(448, 101, 300)
    assert nearest(mask).sum() == 100**2
    assert at_least_half(mask).sum() == 100**2 - 1  # the corner has a quarter
    assert published(mask).sum() == 100**2
    np.testing.assert_array_equal(there_and_back(at_least_half)(square(448, 100, 300)), square(448, 100, 300))


def test_scores_of_what_is_exact_are_one():
    lines = table([square(224, 10, 200)] * 2).splitlines()
    assert [line.split("|")[2].strip() for line in lines if "1.0000" in line] == ["1.0000 ± 0.0000"] * 4
    assert f"{100 * 190**2 / 224**2:.1f} ± 0.0" in lines[2]


def test_the_command_reads_a_split(tmp_path, capsys):
    for name, high in (("a", 300), ("b", 200)):
        write_png(tmp_path / "test/images" / f"{name}.png", np.zeros((448, 448, 3), np.uint8))
        write_png(tmp_path / "test/masks" / f"{name}.png", 255 * square(448, 101, high))
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "over 2 images" in out
    exact, *scores = (float(score) for score in re.findall(r"\| ([01]\.\d{4}) ±", out))
    assert exact == 1 and len(scores) == 3 and all(0.9 < score < 1 for score in scores)
    with pytest.raises(SystemExit):
        main([])
