"""Multi-head channel cross attention over packed tokens, with its projections."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels import check_backend, projected_attention_maps, projected_channel_attention
from .arguments import check_counts, check_probabilities
from .packed import PackedLinear, linear_weights


class ChannelAttention(nn.Module):
    """Queries from each scale attend, channel by channel, to the channels of all scales together.

    Args:
        channels: width of each scale.
        num_heads: heads; every head projects to the full width, and the heads are averaged.
        dropout: probability of dropping an entry of the attention maps and of the output.
        backend: see :func:`uctrans.kernels.resolve_backend`.
    """

    def __init__(self, channels: Sequence[int], num_heads: int, dropout: float, backend: str):
        super().__init__()
        check_counts(num_heads=num_heads)
        check_probabilities(dropout=dropout)
        self.query = nn.ParameterList(linear_weights(num_heads, width) for width in channels)
        self.key_value = linear_weights(2, num_heads, sum(channels))
        self.output = PackedLinear(channels, backend)
        self.output_dropout = nn.Dropout(dropout)
        self.map_dropout = dropout
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Attend from ``tokens`` to ``context``: two (B, N, sum C) -> (B, N, sum C)."""
        mixed = projected_channel_attention(
            tokens,
            context,
            self.query,
            self.key_value,
            dropout_p=self.map_dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.output_dropout(self.output(mixed))

    def attention_maps(self, tokens: Tensor, context: Tensor) -> list[Tensor]:
        """Return one (B, C, sum C) a scale: the softmax maps before dropout, averaged over the heads."""
        return projected_attention_maps(tokens, context, self.query, self.key_value, backend=self.backend)
