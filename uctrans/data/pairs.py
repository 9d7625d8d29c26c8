"""Images and masks that a program holds itself, as two tensors or a Dataset of pairs, in place of a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, TensorDataset

from .find import DataError, Sample
from .protocols import Protocol
from .read import IGNORED, Doubts

ARRAYS = (torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class Pair:
    """One item of a Dataset, which is read like a :class:`uctrans.data.Sample`; ``name`` is such as "train_data[3]"."""

    name: str
    dataset: Any
    position: int

    def read(
        self, protocol: Protocol, classes: int, palette: str | Sequence | None, doubts: Doubts
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the image, (H, W, C) uint8 or float32, and the mask, (H, W) uint8; palette and doubts are of files.

        Raises:
            DataError: the item is no pair of an image and a mask that :func:`pairs_of` describes.
        """
        item = self.dataset[self.position]
        if not (isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, ARRAYS) for part in item)):
            given = type(item).__name__
            if isinstance(item, tuple | list):
                given = f"{given} of ({', '.join(type(part).__name__ for part in item)})"
            raise DataError(f"{self.name}: is a {given}; let the Dataset return two tensors, (image, mask)")
        image, mask = (torch.as_tensor(part).detach().cpu() for part in item)
        return self._image(image, protocol.channels), self._mask(mask, image.shape[1:], classes, protocol.ignore_label)

    def _image(self, image: torch.Tensor, channels: int) -> np.ndarray:
        if image.ndim != 3 or image.shape[0] != channels or not image.numel():
            raise DataError(
                f"{self.name}: the image has the shape {tuple(image.shape)}; give ({channels}, H, W), or set the "
                "channels of the network (in_channels)"
            )
        if image.is_floating_point():
            image = image.float()
            if not image.isfinite().all():
                raise DataError(f"{self.name}: the image has values that are not finite; replace NaN and infinity")
            low, high = (value.item() for value in image.aminmax())
            if low < 0 or high > 1:
                raise DataError(
                    f"{self.name}: the image has values from {low:g} to {high:g}; bring all images to 0..1 with the "
                    "same factor, such as image / 255, or give uint8"
                )
        elif image.dtype != torch.uint8:
            raise DataError(
                f"{self.name}: the image is {_name(image)}; give uint8 from 0 to 255, or floating point in 0..1"
            )
        return image.permute(1, 2, 0).contiguous().numpy()

    def _mask(self, mask: torch.Tensor, size: torch.Size, classes: int, ignore_label: int | None) -> np.ndarray:
        if mask.shape != size:
            raise DataError(
                f"{self.name}: the mask has the shape {tuple(mask.shape)}, the image {tuple(size)} pixels; give one "
                "label a pixel, (H, W)"
            )
        if mask.is_floating_point() or mask.is_complex():
            raise DataError(f"{self.name}: the mask is {_name(mask)}; give whole labels, such as mask.long()")
        labels = mask.numpy()
        ignored = np.zeros_like(labels, bool) if ignore_label is None else labels == ignore_label
        highest = max(classes, 2) - 1
        if (strange := ((labels < 0) | (labels > highest)) & ~ignored).any():
            remedy = "give the foreground as 1, such as mask > 0" if classes == 1 else "renumber it, or set classes"
            raise DataError(
                f"{self.name}: the mask has the label {labels[strange][0]}, labels are 0 to {highest}; {remedy}, or "
                "set ignore_label if it marks pixels to ignore"
            )
        return np.where(ignored, IGNORED, labels).astype(np.uint8)


Samples = Sequence[Sample | Pair]


def pairs_of(data: Any, name: str) -> list[Pair]:
    """Return the pairs of an image and a mask that ``data`` holds.

    Args:
        data: two tensors, images (n, C, H, W) and masks (n, H, W), or a ``torch.utils.data.Dataset``, or a list, of
            pairs (C, H, W) and (H, W), whose sizes may differ. Images are uint8, or floating point in 0..1. Masks are
            bool or integer: 0 and 1 for ``classes=1``, else labels from 0; or ``ignore_label``. NumPy arrays count as
            tensors.
        name: of the data, for messages.

    Raises:
        DataError: ``data`` is of another kind, empty, or has more images than masks or fewer.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, ARRAYS) for part in data):
        images, masks = map(torch.as_tensor, data)
        if images.ndim != 4 or masks.ndim != 3 or len(images) != len(masks):
            raise DataError(
                f"{name}: the images have the shape {tuple(images.shape)}, the masks {tuple(masks.shape)}; give "
                "(n, C, H, W) and (n, H, W)"
            )
        data = TensorDataset(images, masks)
    is_sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not is_sized or isinstance(data, (IterableDataset, Mapping, str, *ARRAYS)):
        raise DataError(
            f"{name}: is a {type(data).__name__}; give two tensors, (images, masks), or a Dataset with a length that "
            "returns (image, mask) for a position"
        )
    if not len(data):
        raise DataError(f"{name}: is empty; give at least one image and mask")
    return [Pair(f"{name}[{position}]", data, position) for position in range(len(data))]


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
