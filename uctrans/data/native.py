"""Images and labels at full resolution, each at its own size, in two flat tensors on one device, and crops of them.

An image of 1000 x 1000 pixels takes 4 MB.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uctrans.data.boundary import BOUNDARY_TARGET, boundary_target
from uctrans.data.errors import DataError, shorten
from uctrans.data.files import Sample
from uctrans.data.images import decode_mask, read_image, warn_of_doubts
from uctrans.data.instances import (
    INSTANCES,
    doubt_of,
    find_instances,
    read_instances,
    warn_of_doubtful_instances,
)
from uctrans.data.tensors import refuse_missing

MASK_TARGET = "mask"
TARGETS = (MASK_TARGET, BOUNDARY_TARGET)


@dataclass(frozen=True)
class NativeImages:
    """Images and labels of any sizes.

    Attributes:
        names: n sample names.
        pixels: (3, P) uint8 RGB, the rows of all images one after the other.
        labels: (P,) uint8 label indexes, likewise.
        starts: (n,) int64, where in P each image begins.
        sizes: (2, n) int64, heights and widths.
    """

    names: list[str]
    pixels: Tensor
    labels: Tensor
    starts: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> "NativeImages":
        """Return the same data on another device."""
        return replace(
            self, **{name: getattr(self, name).to(device) for name in ("pixels", "labels", "starts", "sizes")}
        )

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Whole images and labels at ``index``, int64 (B,), all of one size: (B, 3, H, W) and (B, H, W) uint8.

        Unlike crops, whole images wait for the device, which holds their sizes.

        Raises:
            DataError: the images differ in size.
        """
        size, *others = sizes = self.sizes.index_select(1, index).T.tolist()
        if any(other != size for other in others):
            images = [
                f"{self.names[position]} ({height} x {width})"
                for position, (height, width) in zip(index.tolist(), sizes, strict=True)
            ]
            raise DataError(
                f"Images of different sizes are no batch: {shorten(images)} pixels (height x width). Take one at a "
                "time, or crops."
            )
        corner = torch.zeros_like(index)
        return self.crops(index, corner, corner, size)

    def crops(self, index: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cut one crop out of each image at ``index``.

        What lies outside of an image is its reflection, the edge itself not repeated, as often as it takes.

        Args:
            index: (B,) int64 positions of images.
            top: (B,) int64 first row of each crop, may be negative.
            left: (B,) int64 first column.
            size: (h, w) of the crops.

        Returns:
            (B, 3, h, w) and (B, h, w), uint8.
        """
        heights, widths = self.sizes.index_select(1, index)
        steps = [torch.arange(length, device=index.device) for length in size]
        rows = reflect(top[:, None] + steps[0], heights[:, None])
        columns = reflect(left[:, None] + steps[1], widths[:, None])
        row_starts = self.starts.index_select(0, index)[:, None] + rows * widths[:, None]
        position = (row_starts[:, :, None] + columns[:, None, :]).flatten()  # B h w
        shape = (len(index), *size)
        images = self.pixels.index_select(1, position).unflatten(1, shape)
        return images.transpose(0, 1), self.labels.index_select(0, position).unflatten(0, shape)

    def random_corners(self, index: Tensor, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """First rows and columns of random crops of the images at ``index``, two (B,) int64.

        A crop lies inside its image wherever that is large enough, anywhere with equal probability; an image that is
        smaller lies inside its crop, anywhere likewise.
        """
        heights, widths = self.sizes.index_select(1, index)
        free = torch.stack([heights - size[0], widths - size[1]])
        draw = torch.rand(2, len(index), device=index.device, generator=generator)
        shift = torch.floor(draw * (free.abs() + 1)).long().minimum(free.abs())
        top, left = torch.where(free < 0, -shift, shift)
        return top, left


def reflect(positions: Tensor, length: Tensor) -> Tensor:
    """Bring positions into 0 .. length - 1 by reflection at both ends, which are not repeated; int64, broadcast."""
    period = (2 * (length - 1)).clamp(min=1)
    inside = positions % period
    return torch.minimum(inside, period - inside).minimum(length - 1)


def load_native(
    samples: Sequence[Sample],
    classes: int,
    palette: str | Sequence | None = None,
    device: torch.device | str = "cpu",
    target: str = MASK_TARGET,
) -> NativeImages:
    """Read all samples at the size of their files and put them on a device.

    Args:
        samples: images with masks.
        classes: 1, or the number of label values with the background; 1 where the target is "boundary".
        palette: colours of colour-coded masks, see :func:`uctrans.data.read_mask`.
        device: where the tensors live.
        target: "mask": the labels are those of the masks. "boundary": they are
            :func:`uctrans.data.boundary_target` of the whole instance map in ``instances`` beside ``masks``, which is
            held against the mask (see :func:`uctrans.data.instances.read_instances`).

    Raises:
        DataError: no samples, a sample without a mask or, for "boundary", without an instance map, an unknown target,
            an instance map of another image, or a file that cannot be used.
    """
    if target not in TARGETS:
        raise DataError(f"target={target!r}: choose one of {', '.join(TARGETS)}.")
    refuse_missing(samples)
    instance_maps = find_instances(samples) if target == BOUNDARY_TARGET else {}
    without = [sample for sample in samples if target == BOUNDARY_TARGET and sample.name not in instance_maps]
    if without:
        folders = sorted({sample.mask.parent.parent / INSTANCES for sample in without})
        raise DataError(
            f"The target {BOUNDARY_TARGET} needs an instance map, one number a nucleus, for every image; none for "
            f"{shorten([sample.name for sample in without])} in {shorten(folders)}: put them there (uctrans prepare "
            "monuseg makes them of outlines in XML), or train with target mask."
        )
    pixels, labels, sizes = [], [], []
    paths_by_doubt: dict[str, list[str | os.PathLike]] = {}
    maps_by_doubt: dict[str, list[Path]] = {}
    for sample in samples:
        image = read_image(sample.image)
        label, doubt = decode_mask(sample.mask, classes, palette, image.shape[:2])
        if doubt is not None:
            paths_by_doubt.setdefault(doubt, []).append(sample.mask)
        if target == BOUNDARY_TARGET:
            instances = read_instances(instance_maps[sample.name], label)
            if map_doubt := doubt_of(instances, label):
                maps_by_doubt.setdefault(map_doubt, []).append(instance_maps[sample.name])
            label = boundary_target(instances)
        pixels.append(torch.from_numpy(np.array(image)).flatten(0, 1).T)
        labels.append(torch.from_numpy(label).flatten())
        sizes.append(image.shape[:2])
    warn_of_doubts(paths_by_doubt)
    warn_of_doubtful_instances(maps_by_doubt)
    counts = torch.tensor([len(label) for label in labels])
    return NativeImages(
        names=[sample.name for sample in samples],
        pixels=torch.cat(pixels, dim=1).contiguous(),
        labels=torch.cat(labels),
        starts=counts.cumsum(0) - counts,
        sizes=torch.tensor(sizes).T.contiguous(),
    ).to(device)
