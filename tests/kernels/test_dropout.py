"""The dropout mask: its rate, and that no entry tells anything about another."""

import math

import pytest
import torch

from uctrans.kernels.dropout import LEVELS, draw_seed, drop_threshold, keep_mask, keep_scale, row_keys

ROWS, COLUMNS = 2048, 960
DEVIATIONS = 5.0  # of a fair draw; hundreds of comparisons are made


def mask(seed, dropout_p=0.5, rows=ROWS):
    return keep_mask(row_keys(torch.tensor([seed]), rows), COLUMNS, dropout_p)


def signs(kept):
    """Entries of a mask at probability one half as +1 and -1, which have mean 0 and deviation 1."""
    return kept.float() * 2 - 1


def assert_uncorrelated(left, right):
    count = left.numel()
    assert abs((left * right).sum().item()) < DEVIATIONS * math.sqrt(count)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_rate(dropout_p, seed):
    dropped = ~mask(seed, dropout_p)
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert abs(dropped.double().mean() - dropout_p) < DEVIATIONS * deviation / math.sqrt(dropped.numel())
    # Rows and columns scatter as fair draws do: no more, and no less.
    for axis, count in ((1, COLUMNS), (0, ROWS)):
        spread = dropped.double().mean(dim=axis).var() * count / deviation**2
        assert abs(spread - 1) < DEVIATIONS * math.sqrt(2 / dropped.shape[1 - axis])


@pytest.mark.parametrize("seed", [0, 12345])
def test_neighbours_are_independent(seed):
    entries = signs(mask(seed))
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 480):
        assert_uncorrelated(entries[:, lag:], entries[:, :-lag])
        assert_uncorrelated(entries[lag:], entries[:-lag])
        assert_uncorrelated(entries[lag:, lag:], entries[:-lag, :-lag])


def test_pairs_of_rows_are_independent():
    entries = signs(mask(7))
    products = entries @ entries.T / math.sqrt(COLUMNS)
    others = products[~torch.eye(ROWS, dtype=torch.bool)]
    assert abs(others.var() - 1) < 0.01
    assert others.abs().max() < 7  # about 2 million pairs of a normal distribution stay below 5.5


def test_patterns_of_eight_neighbours_are_uniform():
    kept = mask(3)[:, : COLUMNS // 8 * 8].reshape(-1, 8).long()
    counts = torch.bincount((kept << torch.arange(8)).sum(dim=1), minlength=256).double()
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < DEVIATIONS * math.sqrt(2 * 255)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (0, 2**32), (5, 5 + 2**33), (-1, 0)])
def test_seeds_give_independent_masks(first, second):
    entries = [signs(mask(seed)) for seed in (first, second)]
    assert_uncorrelated(*entries)
    assert_uncorrelated(entries[0][1:], entries[1][:-1])
    assert_uncorrelated(entries[0][:, 1:], entries[1][:, :-1])


def test_rows_differ():
    keys = row_keys(torch.tensor([11]), 100_000)
    assert keys.dtype == torch.int32
    assert len(torch.unique(keys[0])) == 100_000  # a bijection of the row number
    assert len(torch.unique(keys[1])) == 100_000


@pytest.mark.parametrize("dropout_p", [1e-12, 0.1, 1 - 1e-12])
def test_threshold_and_scale_fit_each_other(dropout_p):
    threshold = drop_threshold(dropout_p)
    assert 1 <= threshold <= LEVELS - 1
    assert keep_scale(dropout_p) * (LEVELS - threshold) == pytest.approx(LEVELS)
    assert drop_threshold(0.0) == 0 and keep_scale(0.0) == 1.0


def test_seeds_are_drawn_from_the_generator():
    torch.manual_seed(0)
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (1,)
