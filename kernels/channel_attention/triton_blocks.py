"""How channel attention is cut into tiles, by shape, dtype and architecture. Nothing is tuned at run time.

What decides, in this order:

- Shared memory. A program holds tiles of one side over all tokens, and two of the other side for each stage.
- Registers. Accumulators take ``channels x tokens`` float32, spread over 32 threads a warp with at most 255 registers
  each; the compiled kernels are checked for spills (docs/kernel-resources.md).
- The L2 cache. A program of 64 rows reads 64 FLOP a byte from it, one of 128 rows twice as many, so the taller tile is
  taken as soon as there are enough programs to fill the GPU without it.

Two kinds of inputs take small tiles and no pipeline, for their registers: float32, whose exact products are not made by
matrix instructions but by multiply-adds on operands that all sit in registers; and tensors whose rows do not start on
16 bytes, which are read entry by entry, each with an address of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from ..launch import SMALLEST_TILE, current_architecture

MOST_TOKEN_TILES = 3
FULL_ENOUGH = 0.94  # share of a tile; to leave out less than the rest is not worth a matrix instruction of its own
TOKEN_TILE_OF_FLOAT32 = 32
TOKEN_TILE_OF_UNALIGNED = 64
SPILLING_TILES = {(512,): (256, 256), (512, 16): (512, 32)}  # on sm_90, alone of all; and what is taken for them

# The forward's accumulator over more tokens leaves no registers for a step of 32 channels.
LONGEST_WIDE_STEP_OF_FORWARD = 512

# Two accumulators over more tokens leave no registers for a step of 32 channels.
LONGEST_WIDE_STEP = 208

# Programs of 128 rows that fill an H100 or H200 (132 multiprocessors) twice.
ENOUGH_PROGRAMS = 264


class Problem(NamedTuple):
    """Sizes, dtype and alignment that the tiles depend on."""

    heads: int  # of all images together
    tokens: int
    channels: int  # of the queries
    dtype: torch.dtype
    is_aligned: bool  # whether every row starts on 16 bytes


class AttentionBlocks(NamedTuple):
    """A program's own channels, and the channels of the other side that it steps by."""

    own: int
    step: int
    num_warps: int
    num_stages: int


class GramBlocks(NamedTuple):
    """A program's tile of a Gram matrix (``tokens`` squared), and the channels that it steps by."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int


def token_tiles(problem: Problem) -> tuple[int, ...]:
    """Return falling powers of two that cover the tokens: 196 -> (128, 64, 16), 250 -> (256,), 500 -> (256, 256)."""
    if problem.dtype == torch.float32:
        return _equal_tiles(problem.tokens, TOKEN_TILE_OF_FLOAT32)
    if not problem.is_aligned:
        return _equal_tiles(problem.tokens, TOKEN_TILE_OF_UNALIGNED)
    tiles = _falling_tiles(problem.tokens, MOST_TOKEN_TILES)
    return SPILLING_TILES.get(tiles, tiles)


def forward_blocks(problem: Problem) -> AttentionBlocks:
    """Return the tiles of the forward kernel, which holds the query and streams key and value."""
    if problem.dtype == torch.float32:
        choices = [AttentionBlocks(16, 16, 4, 1)]
    elif not problem.is_aligned:
        choices = [AttentionBlocks(64, 16, 8, 1)]
    elif problem.tokens > 256:
        choices = [AttentionBlocks(64, 16, 8, 2), AttentionBlocks(64, 16, 8, 1)]
        choices += [AttentionBlocks(32, 16, 8, 1), AttentionBlocks(16, 16, 4, 1)]
        if sum(token_tiles(problem)) <= LONGEST_WIDE_STEP_OF_FORWARD:
            choices.insert(0, AttentionBlocks(64, 32, 8, 2))
    else:
        choices = [AttentionBlocks(64, 32, 4, 2), AttentionBlocks(64, 32, 4, 1), AttentionBlocks(32, 16, 4, 1)]
        if problem.heads * triton.cdiv(problem.channels, 128) >= ENOUGH_PROGRAMS:
            choices.insert(0, AttentionBlocks(128, 64, 8, 2))
    return _first_that_fits(choices, problem, held=1)


def query_gradient_blocks(problem: Problem) -> AttentionBlocks:
    """Return the tiles of the query's gradient, whose kernel holds query and gradient and streams key and value."""
    if problem.dtype == torch.float32 or not problem.is_aligned:
        choices = [AttentionBlocks(16, 16, 8, 1)]
    else:
        choices = [AttentionBlocks(64, 32, 8, 2), AttentionBlocks(64, 32, 8, 1), AttentionBlocks(32, 16, 8, 1)]
    return _first_that_fits(choices, problem, held=2)


def key_value_gradient_blocks(problem: Problem) -> AttentionBlocks:
    """Return the tiles of the gradients of key and value, which the kernel holds; query and gradient stream."""
    if problem.dtype == torch.float32 or not problem.is_aligned:
        choices = [AttentionBlocks(16, 16, 8, 1)]
    else:
        choices = [AttentionBlocks(64, 16, 8, 2), AttentionBlocks(64, 16, 8, 1), AttentionBlocks(32, 16, 8, 1)]
        if sum(token_tiles(problem)) <= LONGEST_WIDE_STEP:
            choices.insert(0, AttentionBlocks(64, 32, 8, 2))
    return _first_that_fits(choices, problem, held=2)


def gram_blocks(problem: Problem) -> GramBlocks:
    """Return the tiles of the kernels that make Gram matrices."""
    if current_architecture().family == "interpreter":
        return GramBlocks(64, 64, 4, 1)
    if problem.dtype == torch.float32 or not problem.is_aligned:
        return GramBlocks(64, 32, 8, 1)
    # Tiles of 128 tokens would read half as much from the L2 cache, but spill beside the centring.
    return GramBlocks(64, 64, 4, 3)


def correction_blocks(problem: Problem) -> GramBlocks:
    """Return the tiles of the products with Gram matrices, which are float32 for float16."""
    if current_architecture().family == "interpreter":
        return GramBlocks(64, 64, 4, 1)
    if problem.dtype == torch.float32:
        return GramBlocks(32, 32, 4, 2)
    if not problem.is_aligned:
        return GramBlocks(64, 32, 8, 1)
    if problem.dtype == torch.float16:
        return GramBlocks(64, 64, 8, 2)
    return GramBlocks(128, 128, 8, 2) if problem.heads >= ENOUGH_PROGRAMS // 4 else GramBlocks(64, 64, 4, 3)


def _equal_tiles(tokens: int, largest: int) -> tuple[int, ...]:
    tile = min(max(triton.next_power_of_2(tokens), SMALLEST_TILE), largest)
    return (tile,) * triton.cdiv(tokens, tile)


def _falling_tiles(tokens: int, most: int) -> tuple[int, ...]:
    single = max(triton.next_power_of_2(tokens), SMALLEST_TILE)
    if most == 1 or single == SMALLEST_TILE:
        return (single,)
    split = (single // 2, *_falling_tiles(tokens - single // 2, most - 1))
    return split if sum(split) < FULL_ENOUGH * single else (single,)


def shared_memory_of(blocks: AttentionBlocks, problem: Problem, held: int) -> int:
    """Return the most bytes that a program takes: ``held`` tiles of its channels, two of the other side a stage."""
    rows = held * blocks.own + 2 * blocks.num_stages * blocks.step
    return sum(token_tiles(problem)) * problem.dtype.itemsize * rows


def _first_that_fits(choices: Sequence[AttentionBlocks], problem: Problem, held: int) -> AttentionBlocks:
    architecture = current_architecture()
    if architecture.family == "interpreter":
        return AttentionBlocks(64, 64, 4, 1)  # it has no registers to spill, and takes its time by the program
    for blocks in choices:
        if shared_memory_of(blocks, problem, held) <= architecture.shared_memory:
            return blocks
    raise ValueError(f"no tiles of {problem} fit {architecture}")  # operator.py sends none of these
