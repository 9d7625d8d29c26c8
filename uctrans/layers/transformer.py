"""The channel transformer (CCT): encoder features of all scales, mixed channel by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cross_layer_norm
from .attention import ChannelAttention
from .packed import LAYER_NORM_EPS, PackedLayerNorm, PackedMlp
from .tokens import PatchEmbedding, Reconstruct


class TransformerLayer(nn.Module):
    """Channel attention and an MLP for each scale, both with a residual: (B, N, sum C) -> (B, N, sum C)."""

    def __init__(
        self,
        channels: Sequence[int],
        num_heads: int,
        mlp_ratio: int,
        attention_dropout: float,
        mlp_dropout: float,
        backend: str,
    ):
        super().__init__()
        self.query_norm = PackedLayerNorm(channels, backend)
        self.context_norm = nn.LayerNorm(sum(channels), eps=LAYER_NORM_EPS)
        self.attention = ChannelAttention(channels, num_heads, attention_dropout, backend)
        self.mlp_norm = PackedLayerNorm(channels, backend)
        self.mlp = PackedMlp(channels, mlp_ratio, mlp_dropout, backend)
        self.backend = backend

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend, then mix within each scale."""
        tokens = tokens + self.attention(*self._normalise(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))

    def attention_maps(self, tokens: Tensor) -> list[Tensor]:
        """One (B, C, sum C) a scale, for the tokens this layer receives."""
        return self.attention.attention_maps(*self._normalise(tokens))

    def _normalise(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of each scale by themselves, for the queries, and of all together, for keys and values."""
        return cross_layer_norm(
            tokens,
            self.query_norm.channels,
            self.query_norm.weight,
            self.query_norm.bias,
            self.context_norm.weight,
            self.context_norm.bias,
            eps=LAYER_NORM_EPS,
            backend=self.backend,
        )


class ChannelTransformer(nn.Module):
    """Skip features of any encoder in, the same features enriched by all scales out.

    Args:
        channels: width of each scale, finest first. ``None`` switches a scale off: it takes no part and has no weights.
        patch_sizes: side of a patch at each scale, in pixels of that scale. All scales must come to one token grid, so
            with features at 1, 1/2, 1/4, 1/8 of the image these are p, p/2, p/4, p/8.
        grid: rows and columns of tokens that the position embeddings are learned for; others are interpolated.
        num_layers: transformer layers.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over their width.
        embedding_dropout: dropout after the patch embedding.
        attention_dropout: dropout of attention maps and output projections.
        mlp_dropout: dropout inside the MLPs.
        backend: see :func:`uctrans.kernels.resolve_backend`.

    Source: UCTransNet (AAAI 2022), channel-wise cross fusion transformer (CCT).
    """

    def __init__(
        self,
        channels: Sequence[int | None],
        patch_sizes: Sequence[int],
        grid: tuple[int, int],
        *,
        num_layers: int = 4,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        embedding_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        mlp_dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        if len(channels) != len(patch_sizes):
            raise ValueError(f"{len(channels)} scales need as many patch sizes; got {list(patch_sizes)}")
        self.is_active = [width is not None for width in channels]
        self.channels = [width for width in channels if width is not None]
        if not self.channels:
            raise ValueError("at least one scale must be switched on; all channels are None")
        active_patches = [patch for patch, active in zip(patch_sizes, self.is_active, strict=True) if active]
        self.embeddings = nn.ModuleList(
            PatchEmbedding(width, patch, grid, embedding_dropout)
            for width, patch in zip(self.channels, active_patches, strict=True)
        )
        self.layers = nn.ModuleList(
            TransformerLayer(self.channels, num_heads, mlp_ratio, attention_dropout, mlp_dropout, backend)
            for _ in range(num_layers)
        )
        self.norm = PackedLayerNorm(self.channels, backend)
        self.reconstructions = nn.ModuleList(
            Reconstruct(width, patch, backend) for width, patch in zip(self.channels, active_patches, strict=True)
        )

    def forward(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """[(B, C_i, H_i, W_i)] -> [(B, C_i, H_i, W_i)]: each feature plus its reconstructed tokens."""
        enriched = []
        for feature, tokens in zip(features, self.token_maps(features), strict=True):
            if feature is not None:
                feature = feature + F.interpolate(tokens, size=feature.shape[-2:], mode="nearest")
            enriched.append(feature)
        return enriched

    def token_maps(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """[(B, C_i, H_i, W_i)] -> [(B, C_i, h, w)]: what :meth:`forward` adds, before its nearest upsampling."""
        tokens, grid = self._embed(features)
        for layer in self.layers:
            tokens = layer(tokens)
        return self._reconstruct(self.norm(tokens), grid)

    def token_maps_with_attention(
        self, features: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[list[Tensor]]]:
        """:meth:`token_maps`, and ``maps[layer][scale]``: (B, C, sum C), mean over heads, before dropout."""
        tokens, grid = self._embed(features)
        maps = []
        for layer in self.layers:
            maps.append(layer.attention_maps(tokens))
            tokens = layer(tokens)
        return self._reconstruct(self.norm(tokens), grid), maps

    def _embed(self, features: Sequence[Tensor | None]) -> tuple[Tensor, tuple[int, int]]:
        if [feature is not None for feature in features] != self.is_active:
            raise ValueError(
                f"this transformer has scales {['on' if active else 'off' for active in self.is_active]}; "
                f"got {['feature' if feature is not None else 'None' for feature in features]}"
            )
        active = [feature for feature in features if feature is not None]
        grids = []
        for scale, (feature, embedding) in enumerate(zip(active, self.embeddings, strict=True)):
            patch = embedding.projection.kernel_size[0]
            if feature.shape[-2] % patch or feature.shape[-1] % patch:
                raise ValueError(
                    f"feature {scale} is {feature.shape[-2]}x{feature.shape[-1]} pixels, no multiple of its patch size "
                    f"{patch}: pad the image so that every scale is"
                )
            grids.append((feature.shape[-2] // patch, feature.shape[-1] // patch))
        if any(grid != grids[0] for grid in grids):
            raise ValueError(f"all scales must come to one token grid; these features come to {grids}")
        tokens = torch.cat(
            [embedding(feature) for embedding, feature in zip(self.embeddings, active, strict=True)], dim=-1
        )
        return tokens, grids[0]

    def _reconstruct(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor | None]:
        token_maps = tokens.transpose(1, 2).unflatten(2, grid).split(self.channels, dim=1)
        reconstructed = iter(
            [reconstruct(tokens) for reconstruct, tokens in zip(self.reconstructions, token_maps, strict=True)]
        )
        return [next(reconstructed) if active else None for active in self.is_active]
