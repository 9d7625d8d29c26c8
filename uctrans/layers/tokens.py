"""From features to tokens and back: padding, patch embedding and reconstruction."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..kernels import batch_norm_relu, check_backend, resolve_backend
from ..kernels.checks import check_sizes, is_open
from .blocks import FoldedNorm, convolve_and_normalise, convolve_and_rectify, cudnn_rectifies
from .plain import is_plain, is_plain_batch_norm

POINTWISE = ((1, 1), (1, 1), (0, 0))  # kernel size, stride and padding


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of an image up to multiples of ``multiple``: (B, C, H, W) -> (B, C, H', W').

    A network that halves its map three times takes multiples of 8 pixels; so does a :class:`ChannelTransformer` whose
    finest feature has the size of the image and patches of 8 pixels. ``logits[..., :height, :width]`` crops the result.

    Raises:
        TypeError: ``multiple`` is not a whole number.
        ValueError: ``multiple`` is below 1.
    """
    check_sizes(multiple=multiple)
    # torch.compile cannot trace the shorter -side % multiple where sizes change and become symbols.
    missing_rows, missing_columns = ((side + multiple - 1) // multiple * multiple - side for side in image.shape[-2:])
    if missing_rows == 0 and missing_columns == 0:
        return image
    return F.pad(image, (0, missing_columns, 0, missing_rows), mode="replicate")


class PatchEmbedding(nn.Module):
    """Non-overlapping patches of a feature become tokens of the same width, plus a learned position.

    Args:
        channels: width of the feature.
        patch_size: side of a patch in pixels of this scale.
        grid: rows and columns of the position embedding; for features of another grid it is interpolated (bicubic).
        dropout: probability of dropping an entry.
    """

    def __init__(self, channels: int, patch_size: int, grid: tuple[int, int], dropout: float):
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, kernel_size=patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.zeros(1, channels, *grid))
        self.dropout = nn.Dropout(dropout)

    def forward(self, feature: Tensor) -> Tensor:
        """Embed a feature: (B, C, rows * patch_size, columns * patch_size) -> (B, rows * columns, C)."""
        patches, position = self.projection(feature), self.position
        grid = patches.shape[-2:]
        if any(map(is_open, grid)) or grid != position.shape[-2:]:
            # On the grid that it was learned for, the interpolation returns the position as it is.
            position = F.interpolate(position, size=grid, mode="bicubic", align_corners=False)
        return self.dropout(rearrange(patches + position, "b c rows columns -> b (rows columns) c"))


class Reconstruct(nn.Module):
    """1x1 convolution, batch norm and ReLU of tokens before they are added to the feature.

    The published network upsamples the tokens first, and so does ``reference``. The three operations commute with
    nearest-neighbour upsampling, so the other backends run them on the token grid and leave upsampling to the reader of
    the result. Only the running variance depends on the number of pixels; it is corrected. On Triton, batch norm and
    ReLU are one operator where they are in :class:`ConvNormAct`. A convolution or norm of another kind, or with hooks
    or parametrisations, need not commute: with one of these every backend upsamples first.
    """

    def __init__(self, channels: int, patch_size: int, backend: str):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)
        self.patch_size = patch_size
        self.backend = check_backend(backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, C, rows, columns), or ``patch_size`` times as many rows and columns if upsampled first."""
        backend = resolve_backend(self.backend, tokens.device)
        if backend == "reference" or not self._commutes_with_upsampling():
            upsampled = F.interpolate(tokens.contiguous(), scale_factor=self.patch_size, mode="nearest")
            return F.relu(self.norm(self.conv(upsampled)))
        if backend == "triton" and is_plain_batch_norm(self.norm):
            copies = self.patch_size**2
            return convolve_and_normalise(batch_norm_relu, self.conv, self.norm, tokens, self.backend, copies=copies)
        if backend == "triton" and is_plain(self.norm, FoldedNorm) and cudnn_rectifies(self.conv, tokens):
            return convolve_and_rectify(self.conv, tokens)
        return F.relu(self._norm_as_if_upsampled(self.conv(tokens)))

    def _commutes_with_upsampling(self) -> bool:
        conv, norm = self.conv, self.norm
        is_pointwise = is_plain(conv, nn.Conv2d) and (conv.kernel_size, conv.stride, conv.padding) == POINTWISE
        return is_pointwise and any(is_plain(norm, kind) for kind in (nn.BatchNorm2d, nn.SyncBatchNorm, FoldedNorm))

    def _norm_as_if_upsampled(self, tokens: Tensor) -> Tensor:
        norm = self.norm
        is_updated = norm.training and getattr(norm, "track_running_stats", False) and norm.running_var is not None
        if not is_updated or self.patch_size == 1:
            return norm(tokens)
        count = tokens.shape[0] * tokens.shape[2] * tokens.shape[3]
        if count <= 1 or norm.momentum is None:
            # A single token has no unbiased variance to correct, nor has a cumulative average: normalise at full size.
            upsampled = norm(F.interpolate(tokens, scale_factor=self.patch_size, mode="nearest"))
            return upsampled[:, :, :: self.patch_size, :: self.patch_size]
        # Autograd keeps the buffer that batch norm updates, so batch norm gets a copy. It writes
        # (1 - m) old + m v n/(n-1) to it; upsampled maps would have n'/(n'-1) in place of n/(n-1).
        updated = norm.running_var.clone()
        normalised = functional_call(norm, {"running_var": updated}, (tokens,))
        count = count * _processes(norm)
        upsampled_count = count * self.patch_size**2
        correction = (count - 1) / count * upsampled_count / (upsampled_count - 1)
        norm.running_var.mul_((1 - norm.momentum) * (1 - correction)).add_(updated, alpha=correction)
        return normalised


def _processes(norm: nn.Module) -> int:
    """Return the number of processes that share the statistics of ``norm``; their batches are assumed to be equal."""
    if isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(norm.process_group)
    return 1
