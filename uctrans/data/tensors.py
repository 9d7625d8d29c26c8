"""Whole datasets as uint8 tensors on one device: resized to one size, or at full resolution for crops.

30 images of 224 x 224 pixels take 6 MB, one image of 1000 x 1000 pixels 4 MB.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .find import DataError, Sample, shorten
from .fingerprints import fingerprint
from .instances import BOUNDARY_TARGET, INSTANCES, boundary_target, find_doubt, find_instances, read_instances
from .pairs import Samples
from .protocols import PROTOCOLS, Protocol
from .read import Doubts

MASK_TARGET = "mask"
TARGETS = (MASK_TARGET, BOUNDARY_TARGET)


@dataclass(frozen=True)
class SegmentationTensors:
    """Images and masks of one size.

    Attributes:
        names: n sample names.
        images: (n, C, h, w) uint8, or float32 in 0..1; three channels are RGB.
        masks: (n, h, w) uint8 label indexes.
        original_sizes: n (height, width) of the files in pixels.
        fingerprints: n fingerprints of the images as they were read, see :func:`uctrans.data.fingerprint`.
    """

    names: list[str]
    images: Tensor
    masks: Tensor
    original_sizes: list[tuple[int, int]]
    fingerprints: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> "SegmentationTensors":
        """Return the same data on another device."""
        return replace(self, images=self.images.to(device), masks=self.masks.to(device))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images and masks."""
        return _digest(self.images, self.masks)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and masks at ``index``, int64 (B,): (B, C, h, w) and (B, h, w)."""
        return self.images.index_select(0, index), self.masks.index_select(0, index)


@dataclass(frozen=True)
class NativeImages:
    """Images and labels of any sizes.

    Attributes:
        names: n sample names.
        pixels: (C, P) uint8, or float32 in 0..1, the rows of all images one after the other.
        labels: (P,) uint8 label indexes, in the same order.
        starts: (n,) int64, position in P where each image begins.
        sizes: (2, n) int64, heights and widths.
        fingerprints: n fingerprints of the images, see :func:`uctrans.data.fingerprint`.
    """

    names: list[str]
    pixels: Tensor
    labels: Tensor
    starts: Tensor
    sizes: Tensor
    fingerprints: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> "NativeImages":
        """Return the same data on another device."""
        return replace(
            self, **{name: getattr(self, name).to(device) for name in ("pixels", "labels", "starts", "sizes")}
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        return _digest(self.pixels, self.labels, self.sizes)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole images and labels at ``index``, int64 (B,), all of one size.

        Whole images, unlike crops, wait for the device, which holds their sizes.

        Returns:
            (B, C, H, W) and (B, H, W).

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
                f"batch: its images differ in size: {shorten(images)} pixels (height x width); take one image at a "
                "time, or crops"
            )
        corner = torch.zeros_like(index)
        return self.crops(index, corner, corner, size)

    def crops(self, index: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cut one crop out of each image at ``index``; outside of an image is its reflection, without the edge.

        Args:
            index: (B,) int64 positions of images.
            top: (B,) int64 first row of each crop, may be negative.
            left: (B,) int64 first column.
            size: (h, w) of the crops.

        Returns:
            (B, C, h, w) and (B, h, w).
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
        """Return first rows and first columns of random crops of the images at ``index``, two (B,) int64.

        All places have equal probability at which the crop lies inside its image or, in an image smaller than the crop,
        the image lies inside the crop.
        """
        heights, widths = self.sizes.index_select(1, index)
        free = torch.stack([heights - size[0], widths - size[1]])
        draw = torch.rand(2, len(index), device=index.device, generator=generator)
        shift = torch.floor(draw * (free.abs() + 1)).long().minimum(free.abs())
        top, left = torch.where(free < 0, -shift, shift)
        return top, left


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def load_tensors(
    samples: Samples,
    protocol: Protocol,
    classes: int,
    palette: str | Sequence | None = None,
    device: torch.device | str = "cpu",
    doubts: Doubts | None = None,
) -> SegmentationTensors:
    """Read all samples, resize them by the protocol, and put them on a device.

    Args:
        samples: images with masks.
        protocol: decides channels and values, the size and the method.
        classes: 1, or the number of label values including the background.
        palette: colours of colour-coded masks, see :func:`uctrans.data.read_mask`.
        device: device of the tensors.
        doubts: collects doubts about the files; None warns of them.

    Raises:
        DataError: there are no samples, a sample has no mask, or :func:`uctrans.data.read_image` or
            :func:`uctrans.data.read_mask` refuses a file.
    """
    _check_samples(samples)
    masks = torch.empty(len(samples), *protocol.image_size, dtype=torch.uint8)
    original_sizes, fingerprints = [], []
    collected = Doubts() if doubts is None else doubts
    for index, sample in enumerate(samples):
        image, mask = sample.read(protocol, classes, palette, collected)
        resized = torch.from_numpy(protocol.resize_image(image)).permute(2, 0, 1)
        if index == 0:
            images = torch.empty(len(samples), *resized.shape, dtype=resized.dtype)
        _check_dtype(sample.name, resized, images)
        images[index] = resized
        masks[index] = torch.from_numpy(protocol.resize_mask(mask, classes))
        original_sizes.append(image.shape[:2])
        fingerprints.append(fingerprint(image))
    if doubts is None:
        collected.warn()
    names = [sample.name for sample in samples]
    return SegmentationTensors(names, images.to(device), masks.to(device), original_sizes, fingerprints)


def load_native(
    samples: Samples,
    classes: int,
    palette: str | Sequence | None = None,
    device: torch.device | str = "cpu",
    target: str = MASK_TARGET,
    protocol: Protocol = PROTOCOLS["native"],
    doubts: Doubts | None = None,
) -> NativeImages:
    """Read all samples at the size of their files and put them on a device.

    Args:
        samples: images with masks.
        classes: 1, or the number of label values including the background; 1 for the target "boundary".
        palette: colours of colour-coded masks, see :func:`uctrans.data.read_mask`.
        device: device of the tensors.
        target: "mask": the labels are those of the masks. "boundary": they are
            :func:`uctrans.data.boundary_target` of the instance map in ``instances`` beside ``masks``, which must agree
            with the mask (see :func:`uctrans.data.instances.read_instances`).
        protocol: decides channels and values.
        doubts: collects doubts about the files; None warns of them.

    Raises:
        DataError: there are no samples, a sample has no mask or, for "boundary", no instance map, the target is
            unknown, an instance map belongs to another image, or a file cannot be used.
    """
    if target not in TARGETS:
        raise DataError(f"target: {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    _check_samples(samples)
    instance_maps = _find_all_instances(samples) if target == BOUNDARY_TARGET else {}
    pixels, labels, sizes, fingerprints = [], [], [], []
    collected = Doubts() if doubts is None else doubts
    for sample in samples:
        image, label = sample.read(protocol, classes, palette, collected)
        if path := instance_maps.get(sample.name):
            ignored = protocol.ignored(label)
            instances = read_instances(path, label, ignored)
            collected.add(find_doubt(instances, label, ignored), path)
            # Of whole nuclei, because an ignored pixel is no outline.
            target_labels = boundary_target(instances)
            label = target_labels if ignored is None else np.where(ignored, label, target_labels)
        pixels.append(torch.from_numpy(np.array(image)).flatten(0, 1).T)
        _check_dtype(sample.name, pixels[-1], pixels[0])
        labels.append(torch.from_numpy(label).flatten())
        sizes.append(image.shape[:2])
        fingerprints.append(fingerprint(image))
    if doubts is None:
        collected.warn()
    counts = torch.tensor([len(label) for label in labels])
    return NativeImages(
        names=[sample.name for sample in samples],
        pixels=torch.cat(pixels, dim=1).contiguous(),
        labels=torch.cat(labels),
        starts=counts.cumsum(0) - counts,
        sizes=torch.tensor(sizes).T.contiguous(),
        fingerprints=fingerprints,
    ).to(device)


def reflect(positions: Tensor, length: Tensor) -> Tensor:
    """Bring positions into 0 .. length - 1 by reflection at both ends, which are not repeated; int64, broadcast."""
    period = (2 * (length - 1)).clamp(min=1)
    inside = positions % period
    return torch.minimum(inside, period - inside).minimum(length - 1)


def _check_samples(samples: Samples) -> None:
    if not samples:
        raise DataError("samples: there are none to load; check the dataset folder and the split")


def _check_dtype(name: str, image: Tensor, first: Tensor) -> None:
    if image.dtype != first.dtype:
        raise DataError(f"{name}: is {image.dtype}, and the first image is {first.dtype}; give all images one dtype")


def _find_all_instances(samples: Sequence[Sample]) -> dict[str, Path]:
    instance_maps = find_instances(samples)
    without = [sample for sample in samples if sample.name not in instance_maps]
    if without:
        folders = sorted({sample.mask.parent.parent / INSTANCES for sample in without})
        raise DataError(
            f"{shorten(folders)}: no instance map, one number for each nucleus, for "
            f"{shorten(sample.name for sample in without)}, which the target {BOUNDARY_TARGET} needs; put them there "
            "(uctrans prepare monuseg makes them from outlines in XML), or train with target mask"
        )
    return instance_maps
