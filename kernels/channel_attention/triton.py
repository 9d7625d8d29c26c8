"""Launchers of channel attention in Triton.

Half precision attends in two kernels that form no map, where the registers hold all tokens. Otherwise, and in backward,
maps lie in memory for a while: torch multiplies matrices, and one kernel after the other runs over the rows.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..backend import is_interpreting
from ..dropout import drop_threshold, keep_scale
from ..formats import empty_heads_inside, has_aligned_rows, key_and_value
from ..launch import SMALLEST_TILE, current_architecture
from .triton_fused import HeadMap, attention_kernel, score_statistics_kernel
from .triton_rows import (
    instance_norm_kernel,
    row_statistics_kernel,
    score_gradient_kernel,
    segment_mean_kernel,
    slope_kernel,
    softmax_kernel,
)

# The accumulator of 128 channels over 256 tokens takes half of the registers of a multiprocessor.
LONGEST_FUSED = 256
MOST_TOKEN_TILES = 3
WORTH_SPLITTING = 0.94  # several tiles along the tokens are taken where they cover less than this share of a single one

# Programs of 128 channels that fill an H100 or H200 (132 multiprocessors) once.
ENOUGH_PROGRAMS = 120

# Memory of two maps of a part of the images. Those of 32 images of the published widths take 472 MB in half precision:
# enough to fill the largest GPU, and little beside the features that a training step of as many images keeps.
MAP_BYTES = 2**29

# Entries of rows that a warp holds, 32 in the registers of a thread. Reductions then need no other warp.
ENTRIES_A_WARP = 1024
MOST_WARPS = 16
INTERPRETED_ENTRIES = 2**16  # the interpreter takes its time by the program


class Blocks(NamedTuple):
    """A program's own query channels, and the key channels that it steps by."""

    query_channels: int
    key_channels: int
    num_warps: int
    num_stages: int


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch (B, H, N, sum C), (B, H, N, S), (B, H, N, S) -> (B, N, sum C), and what backward needs.

    That is, for each row, the mean of the map that it belongs to, and one over its standard deviation: (B, H, sum C)
    float32 each.
    """
    blocks = fused_blocks(query, key, value) if len(query) > 0 else None
    if blocks is None:
        return _attend_over_maps(query, key, value, segments, dropout_p, eps, seed)
    return _attend_without_a_map(query, key, value, segments, dropout_p, eps, seed, blocks)


def forward_packed(query: Tensor, key_value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`forward` with key and value in one tensor (B, N, 2, H, S)."""
    return forward(query, *key_and_value(key_value), *settings)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *saved_and_settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, heads inside the tokens, for a gradient (B, N, sum C)."""
    gradients = empty_heads_inside(query), empty_heads_inside(key), empty_heads_inside(value)
    _write_gradients(gradient, query, key, value, *saved_and_settings, *gradients)
    return gradients


def backward_packed(
    gradient: Tensor, query: Tensor, key_value: Tensor, *saved_and_settings: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query, heads inside the tokens, and of key and value in one tensor (B, N, 2, H, S)."""
    grad_query, grad_key_value = empty_heads_inside(query), key_value.new_empty(key_value.shape)
    gradients = grad_query, *key_and_value(grad_key_value)
    _write_gradients(gradient, query, *key_and_value(key_value), *saved_and_settings, *gradients)
    return grad_query, grad_key_value


def _attend_without_a_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    blocks: Blocks,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, channels = query.shape
    means, variances, maxima = (_empty_row_numbers(query) for _ in range(3))
    head_outputs = query.new_empty(batch, heads, tokens, channels)
    grid = (batch * heads * triton.cdiv(channels, blocks.query_channels),)
    arguments = {
        "queries": HeadMap.of(query),
        "keys": HeadMap.of(key),
        "row_maximum_ptr": maxima,
        "heads": heads,
        "tokens": tokens,
        "scale": _score_scale(key),
        "CHANNELS": channels,
        "KEY_CHANNELS": key.shape[-1],
        "TOKEN_TILES": token_tiles(tokens),
        "BLOCK_C": blocks.query_channels,
        "BLOCK_S": blocks.key_channels,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    # 1. Statistics of the rows of scores, and from them of each map.
    score_statistics_kernel[grid](row_mean_ptr=means, row_variance_ptr=variances, **arguments)
    temperatures = _normalise(means, variances, segments, eps)
    # 2. Attention of each head, and the mean over heads.
    attention_kernel[grid](
        values=HeadMap.of(value),
        temperature_ptr=temperatures,
        seed_ptr=seed if dropout_p > 0 else None,
        head_output_ptr=head_outputs,
        threshold=drop_threshold(dropout_p),
        keep_factor=keep_scale(dropout_p),
        **arguments,
    )
    return head_outputs.mean(dim=1), means, temperatures


def _attend_over_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, channels = query.shape
    output = query.new_empty(batch, tokens, channels)
    means, variances = (_empty_row_numbers(query) for _ in range(2))
    for images in _parts(query, key):
        # 1. Scores, statistics of their rows, and from them of each map.
        scores = _scores(query[images], key[images])
        _launch_rows(row_statistics_kernel, scores, means[images], variances[images])
        temperatures = _normalise(means[images], variances[images], segments, eps)
        # 2. Attention in the place of the scores. The product sums over the key channels of all heads.
        _launch_rows(softmax_kernel, scores, temperatures, **_dropout_arguments(query, images, dropout_p, seed))
        attention = scores.flatten(2).transpose(1, 2)
        _write_product(output[images], _side_by_side(value[images]), attention, keep_scale(dropout_p) / heads)
    return output, means, variances


def _write_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    temperatures: Tensor,
    seed: Tensor | None,
    segments: Sequence[int],
    dropout_p: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Write the gradients into tensors whose channels are adjacent."""
    heads = query.shape[1]
    score_scale, attention_scale = _score_scale(key), keep_scale(dropout_p) / heads
    for images in _parts(query, key):
        # 1. The scores again, and the gradient of attention, of all heads in one product.
        scores = _scores(query[images], key[images])
        map_gradient = torch.empty_like(scores)
        values = _side_by_side(value[images])
        _write_product(map_gradient.flatten(2), gradient[images].transpose(1, 2), values, attention_scale)
        # 2. Scores become attention, its gradient becomes that of the scores. Instance norm needs a mean over each map.
        slopes = _empty_row_numbers(query[images])
        maps_and_rows = scores, map_gradient, means[images], temperatures[images], slopes
        dropout = _dropout_arguments(query, images, dropout_p, seed)
        _launch_rows(slope_kernel, *maps_and_rows, **dropout)
        segment_mean_kernel[(slopes.shape[0] * heads,)](slopes, **_segment_constants(segments), num_warps=4)
        _launch_rows(score_gradient_kernel, *maps_and_rows, **dropout)
        # 3. Products with what each side was multiplied by.
        _write_product(_side_by_side(grad_value[images]), gradient[images], scores.flatten(2), attention_scale)
        for head in range(heads):
            score_gradient = map_gradient[:, :, head]
            _write_product(grad_query[images, head], key[images, head], score_gradient.transpose(1, 2), score_scale)
            _write_product(grad_key[images, head], query[images, head], score_gradient, score_scale)


def _parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Cut the images into equal parts, two maps of which take no more than `MAP_BYTES`, or into single images."""
    batch, heads, _, channels = query.shape
    most = max(MAP_BYTES // (2 * heads * channels * key.shape[-1] * query.itemsize), 1)
    parts = max(triton.cdiv(batch, most), 1)
    images = max(triton.cdiv(batch, parts), 1)
    for start in range(0, batch, images):
        yield slice(start, start + images)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Return the scaled scores of all heads: (B, H, N, sum C), (B, H, N, S) -> (B, sum C, H, S)."""
    batch, heads, _, channels = query.shape
    scores = query.new_empty(batch, channels, heads, key.shape[-1])
    for head in range(heads):
        _write_product(scores[:, :, head], query[:, head].transpose(1, 2), key[:, head], _score_scale(key))
    return scores


def _score_scale(key: Tensor) -> float:
    return 1 / math.sqrt(key.shape[-1])


def _write_product(output: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Write ``factor * left @ right``, a product for each image; operands with dense rows or columns are not copied."""
    torch.baddbmm(output, left, right, beta=0, alpha=factor, out=output)


def _side_by_side(value: Tensor) -> Tensor:
    """Put the channels of all heads side by side, (B, H, N, S) -> (B, N, H S): a view, as the projections lay them."""
    return value.transpose(1, 2).flatten(2)


def _empty_row_numbers(query: Tensor) -> Tensor:
    """Return a number without value for each row, (B, H, sum C) float32."""
    batch, heads, _, channels = query.shape
    return query.new_empty(batch, heads, channels, dtype=torch.float32)


def _normalise(means: Tensor, variances: Tensor, segments: Sequence[int], eps: float) -> Tensor:
    """Turn means and variances of rows, in place, into means of their maps and temperatures; return the latter."""
    heads_of_all_images = means.shape[0] * means.shape[1]
    constants = _segment_constants(segments)
    instance_norm_kernel[(heads_of_all_images,)](means, variances, eps, **constants, num_warps=4)
    return variances


def _segment_constants(segments: Sequence[int]) -> dict[str, Any]:
    channels = sum(segments)
    return {"CHANNELS": channels, "SEGMENTS": tuple(segments), "BLOCK_C": triton.next_power_of_2(channels)}


def _launch_rows(kernel: Any, scores: Tensor, *arguments: Tensor, **dropout: Any) -> None:
    """Launch a kernel over the rows of maps (B, sum C, H, S)."""
    rows, key_channels = scores.shape[:3].numel(), scores.shape[3]
    block = triton.next_power_of_2(key_channels)
    block_rows = max((INTERPRETED_ENTRIES if is_interpreting() else ENTRIES_A_WARP) // block, 1)
    kernel[(triton.cdiv(rows, block_rows),)](
        scores,
        *arguments,
        **dropout,
        heads=scores.shape[2],
        rows=rows,
        CHANNELS=scores.shape[1],
        KEY_CHANNELS=key_channels,
        BLOCK_ROWS=block_rows,
        BLOCK_S=block,
        num_warps=min(max(block // ENTRIES_A_WARP, 1), MOST_WARPS),
    )


def _dropout_arguments(query: Tensor, images: slice, dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    return {
        "seed_ptr": seed if dropout_p > 0 else None,
        "first_row": images.start * query.shape[1] * query.shape[-1],
        "threshold": drop_threshold(dropout_p),
    }


def fused_blocks(query: Tensor, *others: Tensor) -> Blocks | None:
    """Return the tiles of the kernels that form no map; None where they do not hold the tokens, dtype or layout.

    Exact products of float32 take no matrix instructions, and rows that do not start on 16 bytes are read entry by
    entry: both would leave registers for small tiles only.
    """
    batch, heads, tokens, channels = query.shape
    if query.dtype == torch.float32 or tokens > LONGEST_FUSED or not has_aligned_rows(query, *others):
        return None
    if any(tensor.stride(2) * LONGEST_FUSED >= 2**31 for tensor in (query, *others)):  # offsets in a head are int32
        return None
    architecture = current_architecture()
    if architecture.family == "interpreter":
        return Blocks(64, 64, 4, 1)  # it has no registers to spill, and takes its time by the program
    choices = [Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 1)]
    # A program reads 64 FLOP a byte from the L2 cache with 64 rows, twice as many with 128.
    if batch * heads * triton.cdiv(channels, 128) >= ENOUGH_PROGRAMS:
        choices.insert(0, Blocks(128, 64, 8, 2))
    for blocks in choices:
        if shared_memory_of(blocks, query) <= architecture.shared_memory:
            return blocks
    return None


def shared_memory_of(blocks: Blocks, query: Tensor) -> int:
    """Return the bytes that a program takes: its queries, and keys and values for each stage, over all tokens."""
    rows = blocks.query_channels + 2 * blocks.num_stages * blocks.key_channels
    return sum(token_tiles(query.shape[2])) * query.itemsize * rows


def token_tiles(tokens: int, most: int = MOST_TOKEN_TILES) -> tuple[int, ...]:
    """Return falling powers of two that cover the tokens: 196 -> (128, 64, 16), 250 -> (256,)."""
    single = max(triton.next_power_of_2(tokens), SMALLEST_TILE)
    if most == 1 or single == SMALLEST_TILE:
        return (single,)
    split = (single // 2, *token_tiles(tokens - single // 2, most - 1))
    return split if sum(split) < WORTH_SPLITTING * single else (single,)
