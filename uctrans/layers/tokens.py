"""From features to tokens and back: patch embedding and reconstruction."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..kernels import check_backend, resolve_backend


class PatchEmbedding(nn.Module):
    """Non-overlapping patches of a feature become tokens of the same width, plus a learned position.

    Args:
        channels: width of the feature.
        patch_size: side of a patch in pixels of this scale.
        grid: rows and columns of the position embedding; features of another grid get it interpolated (bicubic).
        dropout: probability of dropping an entry.
    """

    def __init__(self, channels: int, patch_size: int, grid: tuple[int, int], dropout: float):
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, kernel_size=patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.zeros(1, channels, *grid))
        self.dropout = nn.Dropout(dropout)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, rows * patch_size, columns * patch_size) -> (B, rows * columns, C)."""
        patches = self.projection(feature)
        position = self.position
        if position.shape[-2:] != patches.shape[-2:]:
            position = F.interpolate(position, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        return self.dropout((patches + position).flatten(2).transpose(1, 2))


class Reconstruct(nn.Module):
    """1x1 convolution, batch norm and ReLU over tokens on their way back to full resolution.

    The three commute with nearest-neighbour upsampling, so the ``composed`` path runs them on the token grid and leaves
    upsampling to whoever reads the result; only the running variance knows the number of pixels, and is corrected. The
    ``reference`` path upsamples first, as published. Both results tile the feature.
    """

    def __init__(self, channels: int, patch_size: int, backend: str):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)
        self.patch_size = patch_size
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, C, rows, columns) -> (B, C, rows, columns), times ``patch_size`` on the reference path."""
        if resolve_backend(self.backend, tokens.device) == "reference":
            upsampled = F.interpolate(tokens.contiguous(), scale_factor=self.patch_size, mode="nearest")
            return F.relu(self.norm(self.conv(upsampled)))
        return F.relu(self._norm_as_if_upsampled(self.conv(tokens)))

    def _norm_as_if_upsampled(self, tokens: Tensor) -> Tensor:
        norm = self.norm
        if not (norm.training and norm.track_running_stats) or self.patch_size == 1:
            return norm(tokens)
        count = tokens.shape[0] * tokens.shape[2] * tokens.shape[3]
        if count <= 1 or norm.momentum is None:
            # No unbiased variance that could be corrected, or a cumulative average: normalise at full size.
            upsampled = norm(F.interpolate(tokens, scale_factor=self.patch_size, mode="nearest"))
            return upsampled[:, :, :: self.patch_size, :: self.patch_size]
        # Autograd holds on to the buffer that batch norm updates, so batch norm is given a copy of it. It writes
        # (1 - m) old + m v n/(n-1) there; upsampled maps would give n'/(n'-1) in place of n/(n-1).
        updated = norm.running_var.clone()
        normalised = functional_call(norm, {"running_var": updated}, (tokens,))
        count = count * _processes(norm)
        upsampled_count = count * self.patch_size**2
        correction = (count - 1) / count * upsampled_count / (upsampled_count - 1)
        norm.running_var.mul_((1 - norm.momentum) * (1 - correction)).add_(updated, alpha=correction)
        return normalised


def _processes(norm: nn.Module) -> int:
    """Processes whose tokens share the statistics of ``norm``; they are taken to hold equal batches."""
    if isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(norm.process_group)
    return 1
