"""The dropout mask in Triton: the hashes of kernels/dropout.py, drawn where they are needed."""

import triton
import triton.language as tl


@triton.jit
def row_keys(seed_ptr, row):
    """Return both keys of the dropout mask of each row; see kernels/dropout.py."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    mixed_seed = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32)))
    first = _mix(_mix(row.to(tl.uint32)) + mixed_seed)
    return first, _mix(first + 0x9E3779B9)


@triton.jit
def keep_mask(first_key, second_key, column, threshold):
    """Return which entries stay. Both columns of a pair hold the same hash, which the compiler computes once."""
    word = (column >> 1).to(tl.uint32) * 0x9E3779B9 + first_key
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15) ^ second_key) * 0xD35A2D97
    word = word ^ (word >> 16)
    half = tl.where(column & 1 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0xD35A2D97
    return word ^ (word >> 15)
