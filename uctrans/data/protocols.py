"""Protocols: how an image and its mask become network input, and how they are augmented.

A protocol is part of the meaning of a score, so its name is stored with the weights.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .augmentation import NativeAugmentation, augment_strongly, turn_flip_rotate
from .find import DataError
from .read import IGNORED, RGB_CHANNELS, Doubts, check_intensity_range, decode_image, decode_mask

DEFAULT_PROTOCOL = "uctransnet-224"
CHANNEL_ORDERS = ("rgb", "bgr")
BY_AREA = "area"
WEIGHT_BITS = 11
# Both passes of resizing multiply by 2^11, so 22 bits must go: 4 after the first pass, 16 in the second, 2 by rounding.
FIRST_SHIFT, SECOND_SHIFT, LAST_SHIFT = 4, 16, 2


@dataclass(frozen=True)
class Protocol:
    """Preparation of images and masks for training and for scores, as published with UCTransNet.

    Attributes:
        name: registered name.
        image_size: (height, width) of the network input in pixels, in training and of a tile.
        channel_order: "rgb", or "bgr" for weights that were trained on images read in that order.
        channels: number of channels of the images; 3 are RGB.
        intensity_range: values of the files that become 0 and 255, see :func:`uctrans.data.read_image`.
        ignore_label: value of pixels to ignore in mask files, see :func:`uctrans.data.read_mask`.
        transform: takes the place of the augmentation: a function from a batch of images, (B, C, h, w) float32 in 0..1
            (three channels are RGB), and masks, (B, h, w) uint8, to another. It may draw from PyTorch's generators.
        keeps_resolution: whether the network sees the pixels of the files. Then ``image_size`` is the size of the crops
            and tiles that it sees at once, and scores are taken at the size of the files.
        resizes_as: name of the protocol that resizes images and masks in the same way, so that scores compare.
    """

    name: str
    image_size: tuple[int, int]
    channel_order: str = "rgb"
    channels: int = RGB_CHANNELS
    intensity_range: tuple[int, int] | None = None
    ignore_label: int | None = None
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    resizes_as: ClassVar[str] = DEFAULT_PROTOCOL
    keeps_resolution: ClassVar[bool] = False

    def __post_init__(self):
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise DataError(f"image_size={self.image_size}: is no size; give height and width of 1 pixel or more")
        if self.channel_order not in CHANNEL_ORDERS:
            raise DataError(
                f"channel_order: {self.channel_order!r} is unknown; choose one of {', '.join(CHANNEL_ORDERS)}"
            )
        if self.channel_order != CHANNEL_ORDERS[0] and self.channels not in (1, RGB_CHANNELS):
            raise DataError(
                f"channel_order: {self.channel_order} is an order of three colours, but there are {self.channels} "
                "channels; leave it out"
            )
        if self.intensity_range is not None:
            check_intensity_range(self.intensity_range)

    def read_image(self, path: str | os.PathLike, doubts: Doubts) -> np.ndarray:
        """Read an image as (H, W, channels) uint8, see :func:`uctrans.data.read_image`; collect its doubts."""
        return decode_image(path, self.channels, self.intensity_range, doubts)

    def read_mask(
        self,
        path: str | os.PathLike,
        classes: int,
        palette: str | Sequence | None,
        shape: tuple[int, int] | None,
        doubts: Doubts,
    ) -> np.ndarray:
        """Read a mask as (H, W) uint8, see :func:`uctrans.data.read_mask`; collect its doubts."""
        return decode_mask(path, classes, palette, shape, doubts, self.ignore_label)

    def ignored(self, mask: np.ndarray) -> np.ndarray | None:
        """Return where a mask that was read is to be ignored, bool of its shape, or None without a label to ignore."""
        return None if self.ignore_label is None else mask == IGNORED

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """Resize (H, W, C), uint8 or float32, to (h, w, C): bilinear, half-pixel centres, no anti-aliasing."""
        if image.dtype == np.uint8:
            return resize_bilinear(image, self.image_size)
        planes = torch.from_numpy(image).permute(2, 0, 1)[None]
        return interpolate(planes, self.image_size, mode="bilinear")[0].permute(1, 2, 0).numpy()

    def resize_mask(self, mask: np.ndarray, classes: int) -> np.ndarray:
        """Resize (H, W) uint8 label indexes to (h, w) uint8.

        ``classes=1``: the mask is resized as an 8-bit image of 0 and 255, bilinearly like the image, and every value
        above 0 is foreground, which widens objects. ``classes>=2``: nearest neighbour, half-pixel centres.

        Ignored pixels of a binary mask are background while the foreground is resized, and are widened like it:
        every pixel that they have a share in is ignored, and not foreground. Those of several classes are a label like
        the others.
        """
        if classes == 1:
            ignored = self.ignored(mask)
            if ignored is not None:
                resized = self._touched(np.where(ignored, np.uint8(0), mask))
                return np.where(self._touched(ignored), np.uint8(IGNORED), resized).astype(np.uint8)
            return self._touched(mask).astype(np.uint8)
        labels = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
        return interpolate(labels, size=self.image_size, mode="nearest-exact")[0, 0].numpy()

    def _touched(self, mask: np.ndarray) -> np.ndarray:
        """Return the pixels of the resized mask that some pixel above 0 has a share in, bool (h, w)."""
        black_and_white = np.where(mask > 0, np.uint8(255), np.uint8(0))
        return resize_bilinear(black_and_white, self.image_size) > 0

    def to_input(self, images: Tensor) -> Tensor:
        """Convert (B, C, h, w), uint8 or float32 in 0..1, to float32 in 0..1 in the protocol's channel order."""
        return self._in_order(_to_unit(images))

    def augment(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment a batch, (B, C, h, w) and (B, h, w); see :func:`uctrans.data.augmentation.turn_flip_rotate`."""
        return turn_flip_rotate(images, masks, generator)

    def epoch(self, data: Any) -> Tensor:
        """Return the positions of the images that an epoch takes, each as often as it takes it, int64 on the CPU."""
        return torch.arange(len(data))

    def training_batch(self, data: Any, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return augmented network input and masks.

        Args:
            data: a :class:`uctrans.data.SegmentationTensors`, or :class:`uctrans.data.NativeImages` for crops.
            index: (B,) int64 positions of images.
            generator: source of randomness, on the device of the data.

        Returns:
            float32 (B, C, h, w) and uint8 (B, h, w).
        """
        images, masks = self.cut(data, index, generator)
        change = self.transform or functools.partial(self.augment, generator=generator)
        images, masks = change(_to_unit(images), masks)
        return self._in_order(images), masks

    def cut(self, data: Any, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images and masks of a batch as they are before augmentation, see `training_batch`."""
        return data.batch(index)

    def _in_order(self, images: Tensor) -> Tensor:
        return images.flip(1) if self.channel_order == "bgr" else images


@dataclass(frozen=True)
class AugmentedProtocol(Protocol):
    """Images and masks resized and scored as in the published protocol, but changed more in training.

    Attributes:
        augmentation: strengths of the changes.
    """

    augmentation: NativeAugmentation = field(default_factory=NativeAugmentation)

    def augment(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Warp images, (B, C, H, W) in 0..1, and masks, (B, H, W), to ``image_size``; change the colours.

        The input may have margins beyond ``image_size``, which rotations show; beyond the input is its reflection.
        """
        return augment_strongly(images, masks, self.augmentation, self.image_size, generator)


@dataclass(frozen=True)
class NativeProtocol(AugmentedProtocol):
    """Images and masks as in the files: the network is trained on random crops and sees whole images in tiles.

    Attributes:
        crops_per_image: crops that an epoch takes of each image, each at a place of its own; 16 crops of 256 x 256 have
            as many pixels as an image of 1000 x 1000. "area" takes as many as have the pixels of the image, one at
            least, so that images of several sizes are seen equally often at every place.
        augmentation: strengths of the changes.
    """

    keeps_resolution: ClassVar[bool] = True

    crops_per_image: int | str = 16

    def __post_init__(self):
        super().__post_init__()
        if self.crops_per_image != BY_AREA and not (isinstance(self.crops_per_image, int) and self.crops_per_image > 0):
            raise DataError(f"crops_per_image: {self.crops_per_image!r} is no number of crops; give 1 or more, or area")

    def epoch(self, data: Any) -> Tensor:
        """Return the positions of the images of :class:`uctrans.data.NativeImages`, one for each crop, int64 (n,)."""
        if self.crops_per_image == BY_AREA:
            areas = data.sizes.cpu().prod(0) / math.prod(self.image_size)
            return torch.arange(len(data)).repeat_interleave(areas.round().long().clamp(min=1))
        return torch.arange(len(data)).repeat(self.crops_per_image)

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """Return the image unchanged."""
        return image

    def resize_mask(self, mask: np.ndarray, classes: int) -> np.ndarray:
        """Return the mask unchanged."""
        return mask

    def cut(self, data: Any, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random crops of a :class:`uctrans.data.NativeImages`.

        The augmentation rotates them and shows pixels beyond their corners, so it gets a margin.
        """
        size = self.image_size
        top, left = data.random_corners(index, size, generator)
        margin = self.augmentation.margin(size) if self.transform is None else (0, 0)
        wide = (size[0] + 2 * margin[0], size[1] + 2 * margin[1])
        return data.crops(index, top - margin[0], left - margin[1], wide)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(DEFAULT_PROTOCOL, (224, 224)),
        AugmentedProtocol("augmented-224", (224, 224)),
        NativeProtocol("native", (256, 256)),
    )
}


def list_protocols() -> list[str]:
    """Return the names that :func:`get_protocol` takes."""
    return sorted(PROTOCOLS)


def get_protocol(
    name: str = DEFAULT_PROTOCOL,
    image_size: int | Sequence[int] | None = None,
    channel_order: str = "rgb",
    **options: Any,
) -> Protocol:
    """Return a protocol by name.

    Args:
        name: one of :func:`list_protocols`.
        image_size: pixels, one number for a square or (height, width); None keeps the protocol's own.
        channel_order: "rgb" or "bgr".
        options: further attributes of the protocol.

    Raises:
        DataError: the name, channel order or an option is unknown, or a size is not positive.
    """
    if name not in PROTOCOLS:
        raise DataError(f"protocol: {name!r} is unknown; choose one of {', '.join(list_protocols())}")
    protocol = PROTOCOLS[name]
    if image_size is None:
        image_size = protocol.image_size
    elif isinstance(image_size, int):
        image_size = (image_size, image_size)
    known = [attribute.name for attribute in fields(protocol)]
    if unknown := [option for option in options if option not in known]:
        raise DataError(
            f"{unknown[0]}: the protocol {name} has no such option; leave it out, or choose another protocol"
        )
    return replace(protocol, image_size=tuple(image_size), channel_order=channel_order, **options)


def protocol_of(
    model: nn.Module, channel_order: str | None = None, intensity_range: Sequence[int] | None = None
) -> Protocol:
    """Return the protocol a model was trained under, by its ``metadata`` or else its ``config``.

    Weights without metadata get ``uctransnet-224`` at the model's own image size.

    Args:
        model: has the dicts ``metadata`` and ``config``, and ``in_channels``, which is 3 if it has not.
        channel_order: "rgb" or "bgr", replaces the order in the metadata.
        intensity_range: replaces the range in the metadata.

    Raises:
        DataError: the protocol or channel order is unknown, or the range is not two increasing values.
    """
    intensity_range = intensity_range or model.metadata.get("intensity_range")
    return get_protocol(
        model.metadata.get("protocol") or DEFAULT_PROTOCOL,
        image_size=model.metadata.get("image_size") or model.config.get("image_size"),
        channel_order=channel_order or model.metadata.get("channel_order") or CHANNEL_ORDERS[0],
        channels=getattr(model, "in_channels", RGB_CHANNELS),
        intensity_range=None if intensity_range is None else tuple(intensity_range),
        ignore_label=model.metadata.get("ignore_label"),
    )


def _to_unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) or (H, W, C) uint8 to (h, w) or (h, w, C): half-pixel centres, no anti-aliasing, edges repeated.

    The result has the bits of OpenCV's ``INTER_LINEAR``, with which the published networks were trained. It computes in
    fixed point and drops bits between its two passes, so floating-point interpolation, rounded, differs from it by one
    gray level in one pixel of eight.
    """
    planes = pixels.reshape(*pixels.shape[:2], -1)
    top, bottom, top_weight, bottom_weight = _neighbours_and_weights(pixels.shape[0], size[0])
    left, right, left_weight, right_weight = _neighbours_and_weights(pixels.shape[1], size[1])
    rows = planes[:, left].astype(np.int32) * left_weight[:, None]  # (H, w, C)
    rows += planes[:, right].astype(np.int32) * right_weight[:, None]
    rows >>= FIRST_SHIFT
    above = (rows[top] * top_weight[:, None, None]) >> SECOND_SHIFT
    below = (rows[bottom] * bottom_weight[:, None, None]) >> SECOND_SHIFT
    resized = (above + below + (1 << (LAST_SHIFT - 1))) >> LAST_SHIFT
    return resized.astype(np.uint8).reshape(*size, *pixels.shape[2:])


def _neighbours_and_weights(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the two neighbours of each new pixel along one axis, then their integer weights, which sum to 2^11."""
    centres = ((np.arange(new_length) + 0.5) * (length / new_length) - 0.5).astype(np.float32)
    first = np.floor(centres)
    fraction = centres - first
    weights = [np.rint(part * np.float32(1 << WEIGHT_BITS)).astype(np.int32) for part in (1 - fraction, fraction)]
    neighbours = [(first.astype(np.int64) + step).clip(0, length - 1) for step in (0, 1)]
    return *neighbours, *weights
