"""Protocols: how an image and its mask become network input, and how they are augmented.

A protocol is part of what a score means, so its name is stored with the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from uctrans.data.augmentation import turn_flip_rotate
from uctrans.data.errors import DataError
from uctrans.data.native_augmentation import NativeAugmentation, augment_strongly
from uctrans.data.resizing import resize_bilinear

DEFAULT_PROTOCOL = "uctransnet-224"
CHANNEL_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class Protocol:
    """Preparation of images and masks for training and for scores.

    Attributes:
        name: registered name.
        image_size: (height, width) of the network input in pixels, in training and of a tile.
        channel_order: "rgb", or "bgr" for weights that were trained on images read in that order.
        keeps_resolution: whether the network sees the pixels of the files; then ``image_size`` is that of the crops and
            tiles that it sees at once, and scores are taken at the size of the files.
        crops_per_image: how often an epoch takes each image.
        resizes_as: name of the protocol that resizes images and masks in the same way, so that scores compare.
    """

    name: str
    image_size: tuple[int, int]
    channel_order: str = "rgb"
    resizes_as: ClassVar[str] = DEFAULT_PROTOCOL
    keeps_resolution: ClassVar[bool] = False
    crops_per_image: ClassVar[int] = 1

    def __post_init__(self):
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise DataError(f"image_size={self.image_size}: give height and width, 1 or more pixels each.")
        if self.channel_order not in CHANNEL_ORDERS:
            raise DataError(f"channel_order={self.channel_order!r}: choose one of {', '.join(CHANNEL_ORDERS)}.")

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (h, w, 3) uint8: bilinear, half-pixel centres, no anti-aliasing."""
        return resize_bilinear(image, self.image_size)

    def resize_mask(self, mask: np.ndarray, classes: int) -> np.ndarray:
        """(H, W) uint8 label indexes to (h, w) uint8.

        ``classes=1``: resized as an 8-bit image of 0 and 255, bilinearly like the image, then every value above 0 is
        foreground, which widens objects. ``classes>=2``: nearest neighbour, half-pixel centres.
        """
        if classes == 1:
            black_and_white = np.where(mask > 0, np.uint8(255), np.uint8(0))
            return (resize_bilinear(black_and_white, self.image_size) > 0).astype(np.uint8)
        labels = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
        return interpolate(labels, size=self.image_size, mode="nearest-exact")[0, 0].numpy()

    def to_input(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 RGB, on any device, to float32 0..1 in the protocol's channel order."""
        return self._in_order(images).float() / 255

    def augment(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment a batch, (B, 3, h, w) and (B, h, w); see :func:`uctrans.data.augmentation.turn_flip_rotate`."""
        return turn_flip_rotate(images, masks, generator)

    def training_batch(self, data: Any, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented network input and masks of the images at ``index``, int64 (B,), of the loaded ``data``."""
        images, masks = data.batch(index)
        return self.augment(self.to_input(images), masks, generator)

    def _in_order(self, images: Tensor) -> Tensor:
        return images.flip(1) if self.channel_order == "bgr" else images


@dataclass(frozen=True)
class AugmentedProtocol(Protocol):
    """Images and masks resized as the published protocol does, and scored alike, but changed more in training.

    Attributes:
        augmentation: how strongly images are changed.
    """

    augmentation: NativeAugmentation = field(default_factory=NativeAugmentation)

    def training_batch(self, data: Any, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented network input and masks of the images at ``index``, int64 (B,), of the loaded ``data``."""
        images, masks = data.batch(index)
        images, masks = self.augment(images.float() / 255, masks, generator)
        return self._in_order(images), masks

    def augment(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Warp images, (B, 3, h, w) RGB in 0..1 and (B, h, w); change their colours. Beyond an edge is a reflection."""
        return augment_strongly(images, masks, self.augmentation, self.image_size, generator)


@dataclass(frozen=True)
class NativeProtocol(Protocol):
    """Images and masks as the files have them: the network is trained on random crops and sees whole images in tiles.

    Attributes:
        crops_per_image: crops that an epoch takes of each image, every one at a place of its own. 16 crops of 256 x 256
            have as many pixels as an image of 1000 x 1000.
        augmentation: how strongly crops are changed.
    """

    keeps_resolution: ClassVar[bool] = True

    crops_per_image: int = 16
    augmentation: NativeAugmentation = field(default_factory=NativeAugmentation)

    def __post_init__(self):
        super().__post_init__()
        if self.crops_per_image < 1:
            raise DataError(f"crops_per_image={self.crops_per_image}: an epoch takes 1 crop of each image or more.")

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """The image as it is."""
        return image

    def resize_mask(self, mask: np.ndarray, classes: int) -> np.ndarray:
        """The mask as it is."""
        return mask

    def training_batch(self, data: Any, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented random crops of the images at ``index``, int64 (B,), of a :class:`uctrans.data.NativeImages`.

        Returns:
            float32 (B, 3, h, w) and uint8 (B, h, w).
        """
        size = self.image_size
        top, left = data.random_corners(index, size, generator)
        # A rotated crop shows pixels beyond its corners, so they are cut out with it.
        margin = self.augmentation.margin(size)
        wide = (size[0] + 2 * margin[0], size[1] + 2 * margin[1])
        crops, labels = data.crops(index, top - margin[0], left - margin[1], wide)
        images, labels = self.augment(crops.float() / 255, labels, generator)
        return self._in_order(images), labels

    def augment(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Warp crops with their margins, (B, 3, H, W) RGB and (B, H, W), to ``image_size``; change their colours."""
        return augment_strongly(images, masks, self.augmentation, self.image_size, generator)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(DEFAULT_PROTOCOL, (224, 224)),
        AugmentedProtocol("augmented-224", (224, 224)),
        NativeProtocol("native", (256, 256)),
    )
}


def list_protocols() -> list[str]:
    """Names that :func:`get_protocol` takes."""
    return sorted(PROTOCOLS)


def get_protocol(
    name: str = DEFAULT_PROTOCOL,
    image_size: int | Sequence[int] | None = None,
    channel_order: str = "rgb",
    **options: Any,
) -> Protocol:
    """A protocol by name.

    Args:
        name: one of :func:`list_protocols`.
        image_size: pixels, one number for a square or (height, width); None keeps the protocol's own.
        channel_order: "rgb" or "bgr".
        options: further attributes of the protocol.

    Raises:
        DataError: an unknown name, channel order or option, or a size that is not positive.
    """
    if name not in PROTOCOLS:
        raise DataError(f"Unknown protocol {name!r}: choose one of {', '.join(list_protocols())}.")
    protocol = PROTOCOLS[name]
    if image_size is None:
        image_size = protocol.image_size
    elif isinstance(image_size, int):
        image_size = (image_size, image_size)
    known = [attribute.name for attribute in fields(protocol)]
    if unknown := [option for option in options if option not in known]:
        raise DataError(f"The protocol {name} has no {unknown[0]}: leave it out, or choose another protocol.")
    return replace(protocol, image_size=tuple(image_size), channel_order=channel_order, **options)


def protocol_of(model: nn.Module, channel_order: str | None = None) -> Protocol:
    """Return the protocol a model was trained under, by its ``metadata``, or else its ``config``.

    Weights without metadata get ``uctransnet-224`` at the model's own image size.

    Args:
        model: has the dicts ``metadata`` and ``config``.
        channel_order: "rgb" or "bgr", replaces the order that the metadata name.

    Raises:
        DataError: an unknown protocol or channel order.
    """
    return get_protocol(
        model.metadata.get("protocol") or DEFAULT_PROTOCOL,
        image_size=model.metadata.get("image_size") or model.config.get("image_size"),
        channel_order=channel_order or model.metadata.get("channel_order") or CHANNEL_ORDERS[0],
    )
