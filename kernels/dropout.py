"""The dropout mask of the attention operators, a function of a seed and of an entry's place: every form has the same.

A 32-bit hash of (seed, row, column // 2) decides about two neighbours in a row: an entry is dropped when its half of
the hash falls below ``p * 2^16``. A hash costs a kernel about a dozen instructions, and forward and backward draw the
same mask with tiles of any shape. The two keys of a row are hashed from the seed and the row's number.

The mixing steps are multiply-xorshift rounds. Multipliers and shifts: C. Wellons, "Prospecting for hash functions"
(2018), the two-round function of lowest bias known there.
"""

import torch
from torch import Tensor

WORD = 2**32
LEVELS = 2**16  # of half a word
FIRST_MULTIPLIER = 0x21F0AAAD
SECOND_MULTIPLIER = 0xD35A2D97
GOLDEN_RATIO = 0x9E3779B9  # 2^32 / golden ratio, odd: consecutive numbers land far from each other


def drop_threshold(dropout_p: float) -> int:
    """Return how many of the 2^16 levels drop an entry: 1 to 2^16 - 1, or 0 where ``dropout_p`` is 0."""
    return min(max(round(dropout_p * LEVELS), 1), LEVELS - 1) if dropout_p > 0 else 0


def keep_scale(dropout_p: float) -> float:
    """Return the factor of kept entries that keeps the mean."""
    return LEVELS / (LEVELS - drop_threshold(dropout_p))


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's generator, (1,) int64 on ``device``; every replay of a CUDA graph draws another."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def row_keys(seed: Tensor, rows: int) -> Tensor:
    """Return two keys for each row, (2, rows) int32, from a ``seed`` of one int64."""
    low, high = seed & (WORD - 1), (seed >> 32) & (WORD - 1)
    mixed_seed = _mix(low ^ _mix(high))
    numbers = torch.arange(rows, device=seed.device)
    first = _mix((_mix(numbers % WORD) + mixed_seed) % WORD)
    return torch.stack([first, _mix((first + GOLDEN_RATIO) % WORD)]).to(torch.int32)


def keep_mask(keys: Tensor, columns: int, dropout_p: float) -> Tensor:
    """Return which entries stay: keys (2, *rows) int32 -> (*rows, columns) bool."""
    first, second = (key.long().unsqueeze(-1) & (WORD - 1) for key in keys)
    pair = torch.arange((columns + 1) // 2, device=keys.device) * GOLDEN_RATIO
    word = (pair + first) % WORD
    word = (word ^ (word >> 16)) * FIRST_MULTIPLIER % WORD
    word = (word ^ (word >> 15) ^ second) * SECOND_MULTIPLIER % WORD
    word = word ^ (word >> 16)
    halves = torch.stack([word % LEVELS, word // LEVELS], dim=-1).flatten(-2)[..., :columns]
    return halves >= drop_threshold(dropout_p)


def _mix(word: Tensor) -> Tensor:
    """Mix a 32-bit word, held in int64, by a bijection whose output bits each depend on all input bits."""
    word = (word ^ (word >> 16)) * FIRST_MULTIPLIER % WORD
    word = (word ^ (word >> 15)) * SECOND_MULTIPLIER % WORD
    return word ^ (word >> 15)
