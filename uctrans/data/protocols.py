"""Protocols: how an image and its mask become network input, and how they are augmented.

A protocol is part of what a score means, so its name is stored with the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from uctrans.data.augmentation import turn_flip_rotate
from uctrans.data.errors import DataError
from uctrans.data.resizing import resize_bilinear

CHANNEL_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class Protocol:
    """Preparation of images and masks for training and for scores.

    Attributes:
        name: registered name.
        image_size: (height, width) of the network input in pixels.
        channel_order: "rgb", or "bgr" for weights that were trained on images read in that order.
    """

    name: str
    image_size: tuple[int, int]
    channel_order: str = "rgb"

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
        if self.channel_order == "bgr":
            images = images.flip(1)
        return images.float() / 255

    def augment(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment a batch, (B, 3, h, w) and (B, h, w); see :func:`uctrans.data.augmentation.turn_flip_rotate`."""
        return turn_flip_rotate(images, masks, generator)


PROTOCOLS = {protocol.name: protocol for protocol in (Protocol("uctransnet-224", (224, 224)),)}


def list_protocols() -> list[str]:
    """Names that :func:`get_protocol` takes."""
    return sorted(PROTOCOLS)


def get_protocol(
    name: str = "uctransnet-224", image_size: int | Sequence[int] | None = None, channel_order: str = "rgb"
) -> Protocol:
    """A protocol by name.

    Args:
        name: one of :func:`list_protocols`.
        image_size: pixels, one number for a square or (height, width); None keeps the protocol's own.
        channel_order: "rgb" or "bgr".

    Raises:
        DataError: an unknown name or channel order, or a size that is not positive.
    """
    if name not in PROTOCOLS:
        raise DataError(f"Unknown protocol {name!r}: choose one of {', '.join(list_protocols())}.")
    protocol = PROTOCOLS[name]
    if image_size is None:
        image_size = protocol.image_size
    elif isinstance(image_size, int):
        image_size = (image_size, image_size)
    return replace(protocol, image_size=tuple(image_size), channel_order=channel_order)
