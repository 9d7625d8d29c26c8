"""A whole dataset as two uint8 tensors on one device; 30 images of 224 x 224 pixels take 6 MB."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uctrans.data.errors import DataError, shorten
from uctrans.data.files import Sample
from uctrans.data.images import decode_mask, read_image, warn_of_doubts
from uctrans.data.protocols import Protocol


@dataclass(frozen=True)
class SegmentationTensors:
    """Images and masks of one size.

    Attributes:
        names: n sample names.
        images: (n, 3, h, w) uint8 RGB.
        masks: (n, h, w) uint8 label indexes.
        original_sizes: n (height, width) in pixels, as the files have them.
    """

    names: list[str]
    images: Tensor
    masks: Tensor
    original_sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> "SegmentationTensors":
        """Return the same data on another device."""
        return replace(self, images=self.images.to(device), masks=self.masks.to(device))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images and masks at ``index``, int64 (B,): (B, 3, h, w) and (B, h, w) uint8."""
        return self.images.index_select(0, index), self.masks.index_select(0, index)


def refuse_missing(samples: Sequence[Sample]) -> None:
    """Raise DataError where there are no samples, or one has no mask."""
    if not samples:
        raise DataError("There are no samples to load: check the dataset folder and the split.")
    unmasked = [sample.image for sample in samples if sample.mask is None]
    if unmasked:
        raise DataError(f"No mask for {shorten(unmasked)}: training and scores need one for each image.")


def load_tensors(
    samples: Sequence[Sample],
    protocol: Protocol,
    classes: int,
    palette: str | Sequence | None = None,
    device: torch.device | str = "cpu",
) -> SegmentationTensors:
    """Read all samples, resize them by the protocol, and put them on a device.

    Args:
        samples: images with masks.
        protocol: decides the size and how it is reached.
        classes: 1, or the number of label values with the background.
        palette: colours of colour-coded masks, see :func:`uctrans.data.read_mask`.
        device: where the tensors live.

    Raises:
        DataError: no samples, a sample without a mask, or a file that :func:`uctrans.data.read_image` or
            :func:`uctrans.data.read_mask` refuses.
    """
    refuse_missing(samples)
    images = torch.empty(len(samples), 3, *protocol.image_size, dtype=torch.uint8)
    masks = torch.empty(len(samples), *protocol.image_size, dtype=torch.uint8)
    original_sizes = []
    paths_by_doubt: dict[str, list[str | os.PathLike]] = {}
    for index, sample in enumerate(samples):
        image = read_image(sample.image)
        mask, doubt = decode_mask(sample.mask, classes, palette, image.shape[:2])
        if doubt is not None:
            paths_by_doubt.setdefault(doubt, []).append(sample.mask)
        images[index] = torch.from_numpy(protocol.resize_image(image)).permute(2, 0, 1)
        masks[index] = torch.from_numpy(protocol.resize_mask(mask, classes))
        original_sizes.append(image.shape[:2])
    warn_of_doubts(paths_by_doubt)
    return SegmentationTensors([sample.name for sample in samples], images.to(device), masks.to(device), original_sizes)
