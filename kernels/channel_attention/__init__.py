"""Channel-wise cross attention over the packed encoder scales."""

from .operator import (
    channel_attention,
    correlating_is_cheaper,
    fewest_tokens_to_correlate,
    projected_attention_maps,
    projected_channel_attention,
)

__all__ = [
    "channel_attention",
    "correlating_is_cheaper",
    "fewest_tokens_to_correlate",
    "projected_attention_maps",
    "projected_channel_attention",
]
