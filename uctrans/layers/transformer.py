"""The channel transformer (CCT) mixes the encoder features of all scales, channel by channel."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import check_backend, cross_layer_norm
from ..kernels.checks import check_dtypes_and_devices
from .arguments import check_counts, check_probabilities, check_sequence
from .attention import ChannelAttention
from .checkpointing import Stage
from .packed import LAYER_NORM_EPS, PackedLayerNorm, PackedMlp
from .plain import is_plain
from .tokens import PatchEmbedding, Reconstruct


class TransformerLayer(Stage):
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
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend to the channels of all scales, then mix within each scale."""
        tokens = tokens + self.attention(*self._normalise(tokens))
        return self.mlp(self.mlp_norm(tokens), residual=tokens)

    def attention_maps(self, tokens: Tensor) -> list[Tensor]:
        """Return one (B, C, sum C) a scale for the tokens (B, N, sum C) that this layer receives."""
        return self.attention.attention_maps(*self._normalise(tokens))

    def _normalise(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens normalised within each scale, for the queries, and over all scales, for keys and values."""
        if not self._norms_are_plain():
            return self.query_norm(tokens), self.context_norm(tokens)
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

    def _norms_are_plain(self) -> bool:
        norm = self.context_norm
        is_default = is_plain(norm, nn.LayerNorm) and norm.eps == LAYER_NORM_EPS
        return is_default and norm.bias is not None and is_plain(self.query_norm, PackedLayerNorm)


class ChannelTransformer(nn.Module):
    """Enrich the skip features of any encoder by the features of all other scales.

    Args:
        channels: width of each scale, finest first. ``None`` switches a scale off: it takes no part and has no weights.
        patch_sizes: side of a patch at each scale, in pixels of that scale. All scales must have the same token grid,
            so with features at 1, 1/2, 1/4, 1/8 of the image these are p, p/2, p/4, p/8.
        grid: rows and columns of tokens that the position embeddings are learned for; for other grids they are
            interpolated.
        num_layers: transformer layers.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs, as a multiple of their width.
        embedding_dropout: dropout after the patch embedding.
        attention_dropout: dropout of attention maps and output projections.
        mlp_dropout: dropout inside the MLPs.
        backend: see :func:`uctrans.kernels.resolve_backend`.

    Raises:
        ValueError: an argument or a feature does not fit; the message names it.
        TypeError: an argument or a feature is of the wrong type, or dtypes are mixed outside autocast.

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
        _check_scales(channels, patch_sizes, grid)
        check_counts(num_layers=num_layers, num_heads=num_heads, mlp_ratio=mlp_ratio)
        check_probabilities(
            embedding_dropout=embedding_dropout, attention_dropout=attention_dropout, mlp_dropout=mlp_dropout
        )
        self.is_active = [width is not None for width in channels]
        self.channels = [width for width in channels if width is not None]
        if not self.channels:
            raise ValueError("at least one scale must be switched on; all channels are None")
        self.patch_sizes = [patch for patch, active in zip(patch_sizes, self.is_active, strict=True) if active]
        self.embeddings = nn.ModuleList(
            PatchEmbedding(width, patch, grid, embedding_dropout)
            for width, patch in zip(self.channels, self.patch_sizes, strict=True)
        )
        self.layers = nn.ModuleList(
            TransformerLayer(self.channels, num_heads, mlp_ratio, attention_dropout, mlp_dropout, backend)
            for _ in range(num_layers)
        )
        self.norm = PackedLayerNorm(self.channels, backend)
        self.reconstructions = nn.ModuleList(
            Reconstruct(width, patch, backend) for width, patch in zip(self.channels, self.patch_sizes, strict=True)
        )

    def forward(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Add its reconstructed tokens to each feature: [(B, C_i, H_i, W_i)] -> [(B, C_i, H_i, W_i)]."""
        enriched = []
        for feature, tokens in zip(features, self.token_maps(features), strict=True):
            if feature is not None:
                feature = feature + F.interpolate(tokens, size=feature.shape[-2:], mode="nearest")
            enriched.append(feature)
        return enriched

    def token_maps(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return what :meth:`forward` adds, before upsampling: [(B, C_i, H_i, W_i)] -> [(B, C_i, h, w)]."""
        tokens, grid = self._embed(features)
        for layer in self.layers:
            tokens = layer(tokens)
        return self._reconstruct(self.norm(tokens), grid)

    def token_maps_with_attention(
        self, features: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[list[Tensor]]]:
        """Return :meth:`token_maps`, and ``maps[layer][scale]``: (B, C, sum C), before dropout, mean over the heads."""
        tokens, grid = self._embed(features)
        maps = []
        for layer in self.layers:
            maps.append(layer.attention_maps(tokens))
            tokens = layer(tokens)
        return self._reconstruct(self.norm(tokens), grid), maps

    def _embed(self, features: Sequence[Tensor | None]) -> tuple[Tensor, tuple[int, int]]:
        grid = self._check_features(features)
        active = [feature for feature in features if feature is not None]
        tokens = torch.cat(
            [embedding(feature) for embedding, feature in zip(self.embeddings, active, strict=True)], dim=-1
        )
        return tokens, grid

    def _check_features(self, features: Sequence[Tensor | None]) -> tuple[int, int]:
        """Return the token grid of the features; raise if they do not fit this transformer."""
        check_sequence("features", features, "one (B, C, H, W) a scale, finest first")
        if [feature is not None for feature in features] != self.is_active:
            raise ValueError(
                f"this transformer has scales {['on' if active else 'off' for active in self.is_active]}; "
                f"got {['feature' if feature is not None else 'None' for feature in features]}"
            )
        named = {f"feature {scale}": feature for scale, feature in enumerate(features) if feature is not None}
        check_dtypes_and_devices(weights=next(self.parameters()), **named)
        batch, grids = next(iter(named.values())).shape[0], []
        for (name, feature), width, patch in zip(named.items(), self.channels, self.patch_sizes, strict=True):
            if feature.ndim != 4 or feature.shape[1] != width or 0 in feature.shape[2:]:
                raise ValueError(f"{name} must be (B, {width}, height, width); got {tuple(feature.shape)}")
            if feature.shape[0] != batch:
                raise ValueError(
                    f"all features must have the same batch size: {name} holds {feature.shape[0]}, not {batch}"
                )
            height, width = feature.shape[2:]
            if height % patch or width % patch:
                raise ValueError(
                    f"{name} is {height}x{width} pixels, no multiple of its patch size {patch}: pad the image"
                )
            grids.append((height // patch, width // patch))
        if any(grid != grids[0] for grid in grids):
            raise ValueError(f"all scales must have one token grid; these features have {grids}")
        return grids[0]

    def _reconstruct(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor | None]:
        rows, columns = grid
        token_maps = rearrange(tokens, "b (rows columns) c -> b c rows columns", rows=rows, columns=columns)
        scales = zip(self.reconstructions, token_maps.split(self.channels, dim=1), strict=True)
        reconstructed = iter([reconstruct(token_map) for reconstruct, token_map in scales])
        return [next(reconstructed) if is_active else None for is_active in self.is_active]


def _check_scales(channels: Sequence[int | None], patch_sizes: Sequence[int], grid: tuple[int, int]) -> None:
    check_sequence("channels", channels, "one width a scale, None for a scale that is off")
    check_sequence("patch_sizes", patch_sizes, "one side a scale")
    check_sequence("grid", grid, "rows and columns of tokens")
    if len(channels) != len(patch_sizes):
        raise ValueError(f"{len(channels)} scales need as many patch sizes; got {list(patch_sizes)}")
    if len(grid) != 2:
        raise ValueError(f"grid must be rows and columns of tokens; got {grid}")
    check_counts(rows=grid[0], columns=grid[1])
    for scale, (width, patch) in enumerate(zip(channels, patch_sizes, strict=True)):
        if width is not None:
            check_counts(**{f"channels[{scale}]": width, f"patch_sizes[{scale}]": patch})
