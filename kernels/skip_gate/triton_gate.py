"""Triton kernels of the gate itself: from means to the gate, and from the gate's gradient to weights and means.

The products are small: an image is one row of a matrix. Programs that read the parts of a sum add them themselves, in a
fixed order, which saves a kernel. All arithmetic is float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Linear(NamedTuple):
    """A weight (C, in_channels) and a bias (C,), or the gradients by them; contiguous."""

    weight_ptr: Tensor
    bias_ptr: Tensor
    in_channels: int


class Weight(NamedTuple):
    """A weight (C, in_channels) alone."""

    weight_ptr: Tensor
    in_channels: int


class Parts(NamedTuple):
    """Parts of sums, (B, count, columns), contiguous."""

    ptr: Tensor
    count: int
    columns: int


@triton.jit
def _sum_parts(parts, sample, offs, mask, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum columns ``offs`` of an image over its parts, always in the same order."""
    offs_part = tl.arange(0, BLOCK_PARTS)
    ptrs = parts.ptr + sample * parts.count * parts.columns
    ptrs += offs_part[:, None] * parts.columns + offs[None, :]
    total = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for first in range(0, parts.count, BLOCK_PARTS):
        total += tl.load(ptrs, mask=(first + offs_part < parts.count)[:, None] & mask[None, :], other=0.0)
        ptrs += BLOCK_PARTS * parts.columns
    return tl.sum(total, axis=0)  # [BLOCK]


@triton.jit
def _load_weight(linear, offs_out, mask_out, offs_in, mask_in):
    """Load a block of the weight as float32: [BLOCK_OUT, BLOCK_IN]."""
    ptrs = linear.weight_ptr + offs_out[:, None] * linear.in_channels + offs_in[None, :]
    return tl.load(ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0).to(tl.float32)


@triton.jit
def _project(
    linear,
    parts,
    pooled_ptr,
    sample,
    first_column,
    offs_out,
    mask_out,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Return ``weight @ mean + bias`` for a block of rows; the first program of an image also writes the means."""
    is_first = tl.full([BLOCK_IN], tl.program_id(1), tl.int32) == 0
    pooled_ptr += sample * parts.columns
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in range(0, linear.in_channels, BLOCK_IN):
        offs_in = first + tl.arange(0, BLOCK_IN)
        mask_in = offs_in < linear.in_channels
        mean = _sum_parts(parts, sample, first_column + offs_in, mask_in, BLOCK_PARTS, BLOCK_IN)  # [BLOCK_IN]
        tl.store(pooled_ptr + first_column + offs_in, mean, mask=mask_in & is_first)
        sums += _load_weight(linear, offs_out, mask_out, offs_in, mask_in) * mean[None, :]  # [BLOCK_OUT, BLOCK_IN]
    bias = tl.load(linear.bias_ptr + offs_out, mask=mask_out, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=1) + bias  # [BLOCK_OUT]


@triton.jit
def gate_kernel(
    parts,
    skip,
    decoder,
    gate_ptr,
    pooled_ptr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Write the gate (B, C) and the means (B, C + D) that it is made of. The grid is (B, blocks of C)."""
    sample = tl.program_id(0).to(tl.int64)
    channels = skip.in_channels
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = offs_out < channels
    logits = _project(skip, parts, pooled_ptr, sample, 0, offs_out, mask_out, BLOCK_PARTS, BLOCK_OUT, BLOCK_IN)
    if decoder is not None:
        logits += _project(
            decoder, parts, pooled_ptr, sample, channels, offs_out, mask_out, BLOCK_PARTS, BLOCK_OUT, BLOCK_IN
        )
    tl.store(gate_ptr + sample * channels + offs_out, tl.sigmoid(0.5 * logits), mask=mask_out)


@triton.jit
def _through_weight(
    linear,
    parts,
    gate_ptr,
    slope_ptr,
    d_mean_ptr,
    sample,
    pid_in,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Write ``weight^T @ slope`` for a block of columns; the first program of an image also writes the slopes."""
    is_first = tl.full([BLOCK_OUT], tl.program_id(1), tl.int32) == 0
    channels = parts.columns
    offs_in = pid_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    mask_in = offs_in < linear.in_channels
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in range(0, channels, BLOCK_OUT):
        offs_out = first + tl.arange(0, BLOCK_OUT)
        mask_out = offs_out < channels
        gate = tl.load(gate_ptr + sample * channels + offs_out, mask=mask_out, other=0.0)  # [BLOCK_OUT]
        d_gate = _sum_parts(parts, sample, offs_out, mask_out, BLOCK_PARTS, BLOCK_OUT)
        slope = 0.5 * gate * (1.0 - gate) * d_gate
        tl.store(slope_ptr + sample * channels + offs_out, slope, mask=mask_out & is_first)
        sums += _load_weight(linear, offs_out, mask_out, offs_in, mask_in) * slope[:, None]  # [BLOCK_OUT, BLOCK_IN]
    tl.store(d_mean_ptr + offs_in, tl.sum(sums, axis=0), mask=mask_in)


@triton.jit
def mean_gradient_kernel(
    parts,
    skip,
    decoder,
    gate_ptr,
    slope_ptr,
    d_mean_ptr,
    columns,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Write the slopes (B, C), gradients by the gate's logits, and the gradients by the means (B, C + D).

    The grid is (B, blocks of C and of D).
    """
    sample = tl.program_id(0).to(tl.int64)
    pid_in = tl.program_id(1)
    skip_blocks = tl.cdiv(skip.in_channels, BLOCK_IN)
    d_mean_ptr += sample * columns
    if pid_in < skip_blocks:
        _through_weight(skip, parts, gate_ptr, slope_ptr, d_mean_ptr, sample, pid_in, BLOCK_PARTS, BLOCK_OUT, BLOCK_IN)
    elif decoder is not None:
        d_mean_ptr += skip.in_channels
        pid_in -= skip_blocks
        _through_weight(
            decoder, parts, gate_ptr, slope_ptr, d_mean_ptr, sample, pid_in, BLOCK_PARTS, BLOCK_OUT, BLOCK_IN
        )


@triton.jit
def _outer_products(
    linear,
    slope_ptr,
    pooled_ptr,
    batch,
    channels,
    columns,
    pid_in,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Write a block of the gradient by one weight, and with its first columns that of the gradient by the bias."""
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    offs_in = pid_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    offs_batch = tl.arange(0, BLOCK_BATCH)
    mask_out = offs_out < channels
    mask_in = offs_in < linear.in_channels
    slope_ptrs = slope_ptr + offs_batch[None, :] * channels + offs_out[:, None]
    pooled_ptrs = pooled_ptr + offs_batch[:, None] * columns + offs_in[None, :]
    d_weight = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    d_bias = tl.zeros([BLOCK_OUT], tl.float32)
    for first in range(0, batch, BLOCK_BATCH):
        mask_batch = first + offs_batch < batch
        slope = tl.load(slope_ptrs, mask=mask_out[:, None] & mask_batch[None, :], other=0.0)  # [BLOCK_OUT, BLOCK_BATCH]
        mean = tl.load(pooled_ptrs, mask=mask_batch[:, None] & mask_in[None, :], other=0.0)  # [BLOCK_BATCH, BLOCK_IN]
        d_weight = tl.dot(slope, mean, d_weight, input_precision="ieee")
        d_bias += tl.sum(slope, axis=1)
        slope_ptrs += BLOCK_BATCH * channels
        pooled_ptrs += BLOCK_BATCH * columns
    ptrs = linear.weight_ptr + offs_out[:, None] * linear.in_channels + offs_in[None, :]
    mask = mask_out[:, None] & mask_in[None, :]
    tl.store(ptrs, d_weight.to(linear.weight_ptr.dtype.element_ty), mask=mask)
    bias = d_bias.to(linear.bias_ptr.dtype.element_ty)
    is_first = tl.full([BLOCK_OUT], pid_in, tl.int32) == 0
    tl.store(linear.bias_ptr + offs_out, bias, mask=mask_out & is_first)


@triton.jit
def weight_gradient_kernel(
    d_skip,
    d_decoder,
    slope_ptr,
    pooled_ptr,
    batch,
    columns,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Write the gradients by both weights and biases: outer products of slopes and means, summed over the batch."""
    channels = d_skip.in_channels
    skip_blocks = tl.cdiv(channels, BLOCK_IN)
    pid_in = tl.program_id(0)
    if pid_in < skip_blocks:
        _outer_products(
            d_skip, slope_ptr, pooled_ptr, batch, channels, columns, pid_in, BLOCK_BATCH, BLOCK_OUT, BLOCK_IN
        )
    elif d_decoder is not None:
        pooled_ptr += channels
        pid_in -= skip_blocks
        _outer_products(
            d_decoder, slope_ptr, pooled_ptr, batch, channels, columns, pid_in, BLOCK_BATCH, BLOCK_OUT, BLOCK_IN
        )
