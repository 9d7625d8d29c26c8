"""Triton kernels of the gate itself: from means to the gate, and from the gate's gradient to weights and means.

The products are small: an image is one row of a matrix. Whoever reads what other kernels summed adds their parts, in a
fixed order, instead of waiting for one more kernel. All arithmetic is float32.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_parts(parts_ptr, parts, columns, offs, mask, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``offs`` of (parts, columns), summed over the parts, always in the same order."""
    offs_part = tl.arange(0, BLOCK_PARTS)
    ptrs = parts_ptr + offs_part[:, None] * columns + offs[None, :]
    total = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        total += tl.load(ptrs, mask=(first + offs_part < parts)[:, None] & mask[None, :], other=0.0)
        ptrs += BLOCK_PARTS * columns
    return tl.sum(total, axis=0)  # [BLOCK]


@triton.jit
def _project(
    weight_ptr,
    bias_ptr,
    parts_ptr,
    pooled_ptr,
    parts,
    columns,
    in_channels,
    offs_out,
    mask_out,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``weight @ mean + bias`` for a block of rows; the first program of an image also writes the means."""
    is_first = tl.program_id(0) == 0
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in range(0, in_channels, BLOCK_IN):
        offs_in = first + tl.arange(0, BLOCK_IN)
        mask_in = offs_in < in_channels
        mean = _sum_parts(parts_ptr, parts, columns, offs_in, mask_in, BLOCK_PARTS, BLOCK_IN)  # [BLOCK_IN]
        tl.store(pooled_ptr + offs_in, mean, mask=mask_in & is_first)
        weight_ptrs = weight_ptr + offs_out[:, None] * in_channels + offs_in[None, :]
        weight = tl.load(weight_ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0)  # [BLOCK_OUT, BLOCK_IN]
        sums += weight.to(tl.float32) * mean[None, :]
    bias = tl.load(bias_ptr + offs_out, mask=mask_out, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=1) + bias  # [BLOCK_OUT]


@triton.jit
def gate_kernel(
    parts_ptr,
    weight_skip_ptr,
    bias_skip_ptr,
    weight_decoder_ptr,
    bias_decoder_ptr,
    gate_ptr,
    pooled_ptr,
    parts,
    channels,
    columns,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The gate (B, C), and the means (B, C + D) that it is of."""
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = offs_out < channels
    sample = tl.program_id(1).to(tl.int64)
    parts_ptr += sample * parts * columns
    pooled_ptr += sample * columns
    logits = _project(
        weight_skip_ptr,
        bias_skip_ptr,
        parts_ptr,
        pooled_ptr,
        parts,
        columns,
        channels,
        offs_out,
        mask_out,
        BLOCK_PARTS,
        BLOCK_OUT,
        BLOCK_IN,
    )
    if weight_decoder_ptr is not None:
        logits += _project(
            weight_decoder_ptr,
            bias_decoder_ptr,
            parts_ptr + channels,
            pooled_ptr + channels,
            parts,
            columns,
            columns - channels,
            offs_out,
            mask_out,
            BLOCK_PARTS,
            BLOCK_OUT,
            BLOCK_IN,
        )
    tl.store(gate_ptr + sample * channels + offs_out, tl.sigmoid(0.5 * logits), mask=mask_out)


@triton.jit
def _through_weight(
    weight_ptr,
    parts_ptr,
    gate_ptr,
    slope_ptr,
    d_mean_ptr,
    parts,
    channels,
    in_channels,
    pid_in,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """``weight^T @ slope`` for a block of columns; the first program of an image also writes the slopes."""
    offs_in = pid_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    mask_in = offs_in < in_channels
    is_first = tl.program_id(0) == 0
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in range(0, channels, BLOCK_OUT):
        offs_out = first + tl.arange(0, BLOCK_OUT)
        mask_out = offs_out < channels
        gate = tl.load(gate_ptr + offs_out, mask=mask_out, other=0.0)  # [BLOCK_OUT]
        d_gate = _sum_parts(parts_ptr, parts, channels, offs_out, mask_out, BLOCK_PARTS, BLOCK_OUT)
        slope = 0.5 * gate * (1.0 - gate) * d_gate
        tl.store(slope_ptr + offs_out, slope, mask=mask_out & is_first)
        weight_ptrs = weight_ptr + offs_out[:, None] * in_channels + offs_in[None, :]
        weight = tl.load(weight_ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0)  # [BLOCK_OUT, BLOCK_IN]
        sums += weight.to(tl.float32) * slope[:, None]
    tl.store(d_mean_ptr + offs_in, tl.sum(sums, axis=0), mask=mask_in)


@triton.jit
def mean_gradient_kernel(
    parts_ptr,
    gate_ptr,
    weight_skip_ptr,
    weight_decoder_ptr,
    slope_ptr,
    d_mean_ptr,
    parts,
    channels,
    columns,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Slopes (B, C), the gradients by what the weights make of the means, and gradients by the means (B, C + D)."""
    skip_blocks = tl.cdiv(channels, BLOCK_IN)
    pid_in = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    parts_ptr += sample * parts * channels
    gate_ptr += sample * channels
    slope_ptr += sample * channels
    d_mean_ptr += sample * columns
    if pid_in < skip_blocks:
        _through_weight(
            weight_skip_ptr,
            parts_ptr,
            gate_ptr,
            slope_ptr,
            d_mean_ptr,
            parts,
            channels,
            channels,
            pid_in,
            BLOCK_PARTS,
            BLOCK_OUT,
            BLOCK_IN,
        )
    elif weight_decoder_ptr is not None:
        _through_weight(
            weight_decoder_ptr,
            parts_ptr,
            gate_ptr,
            slope_ptr,
            d_mean_ptr + channels,
            parts,
            channels,
            columns - channels,
            pid_in - skip_blocks,
            BLOCK_PARTS,
            BLOCK_OUT,
            BLOCK_IN,
        )


@triton.jit
def _outer_products(
    slope_ptr,
    pooled_ptr,
    d_weight_ptr,
    d_bias_ptr,
    batch,
    channels,
    columns,
    in_channels,
    pid_in,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """A block of the gradient by one weight, and with its first columns of the gradient by the bias."""
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    offs_in = pid_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    offs_batch = tl.arange(0, BLOCK_BATCH)
    mask_out = offs_out < channels
    mask_in = offs_in < in_channels
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
    d_weight_ptrs = d_weight_ptr + offs_out[:, None] * in_channels + offs_in[None, :]
    tl.store(d_weight_ptrs, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask_out[:, None] & mask_in[None, :])
    tl.store(d_bias_ptr + offs_out, d_bias.to(d_bias_ptr.dtype.element_ty), mask=mask_out & (pid_in == 0))


@triton.jit
def weight_gradient_kernel(
    slope_ptr,
    pooled_ptr,
    d_weight_skip_ptr,
    d_bias_skip_ptr,
    d_weight_decoder_ptr,
    d_bias_decoder_ptr,
    batch,
    channels,
    columns,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Gradients by both weights and biases: outer products of slopes and means, summed over the batch."""
    skip_blocks = tl.cdiv(channels, BLOCK_IN)
    pid_in = tl.program_id(0)
    if pid_in < skip_blocks:
        _outer_products(
            slope_ptr,
            pooled_ptr,
            d_weight_skip_ptr,
            d_bias_skip_ptr,
            batch,
            channels,
            columns,
            channels,
            pid_in,
            BLOCK_BATCH,
            BLOCK_OUT,
            BLOCK_IN,
        )
    elif d_weight_decoder_ptr is not None:
        _outer_products(
            slope_ptr,
            pooled_ptr + channels,
            d_weight_decoder_ptr,
            d_bias_decoder_ptr,
            batch,
            channels,
            columns,
            columns - channels,
            pid_in - skip_blocks,
            BLOCK_BATCH,
            BLOCK_OUT,
            BLOCK_IN,
        )
