"""Bilinear resizing of 8-bit images in fixed point, the same bits as OpenCV's ``INTER_LINEAR``.

The published networks were trained on images resized by that function. Plain floating-point interpolation, rounded,
differs from it by one gray level in one pixel of eight, because the fixed-point form drops bits between its two passes.
"""

import numpy as np

WEIGHT_BITS = 11
# Each pass multiplies by 2^11. Four bits are dropped after the first, sixteen in the second; the last two are rounded.
FIRST_SHIFT, SECOND_SHIFT, LAST_SHIFT = 4, 16, 2


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) or (H, W, C) uint8 to (h, w) or (h, w, C): half-pixel centres, no anti-aliasing, edges repeated."""
    planes = pixels.reshape(*pixels.shape[:2], -1).astype(np.int32)
    top, bottom, top_weight, bottom_weight = _taps(pixels.shape[0], size[0])
    left, right, left_weight, right_weight = _taps(pixels.shape[1], size[1])
    rows = planes[:, left] * left_weight[:, None] + planes[:, right] * right_weight[:, None]  # (H, w, C)
    rows >>= FIRST_SHIFT
    above = (rows[top] * top_weight[:, None, None]) >> SECOND_SHIFT
    below = (rows[bottom] * bottom_weight[:, None, None]) >> SECOND_SHIFT
    resized = (above + below + (1 << (LAST_SHIFT - 1))) >> LAST_SHIFT
    return resized.astype(np.uint8).reshape(*size, *pixels.shape[2:])


def _taps(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the two neighbours of each new pixel along one axis, then their integer weights, which sum to 2^11."""
    centres = ((np.arange(new_length) + 0.5) * (length / new_length) - 0.5).astype(np.float32)
    first = np.floor(centres)
    fraction = centres - first
    weights = [np.rint(part * np.float32(1 << WEIGHT_BITS)).astype(np.int32) for part in (1 - fraction, fraction)]
    neighbours = [(first.astype(np.int64) + step).clip(0, length - 1) for step in (0, 1)]
    return *neighbours, *weights
