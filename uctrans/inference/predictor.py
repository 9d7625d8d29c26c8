"""From an image to class probabilities: channel order, resizing, tiles, test-time transforms, mixed precision.

`Predictor` is what evaluate and predict share. Its two entrances are `Predictor.probabilities` (a batch that is already
at the size the network sees) and `Predictor.probabilities_of_image` (one image of any size, back at that size).
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import uctrans
from uctrans.data import protocol_of
from uctrans.devices import find_device
from uctrans.graphs import CapturedForward, CudaRecorder
from uctrans.inference.files import InferenceError
from uctrans.kernels import resolve_backend
from uctrans.layers.backend import layers_with_backend
from uctrans.models.base import probabilities
from uctrans.tiling import OVERLAP, tiled
from uctrans.weight_casts import keep_weights_cast

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of red, green, blue
RESOLUTIONS = ("protocol", "native")
AMP = ("no", "bf16")
SETTINGS = ("device", "resolution", "tile", "overlap", "tta", "amp", "batch_size", "channel_order", "graph")

# A test-time transform: quarter turns counter-clockwise, after a flip of the columns where the second value is True.
TRANSFORMS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, flip) for flip in (False, True) for turns in range(4)),
}


def transforms_in_words(tta: str) -> str:
    """What is averaged over, "the mean over 8 flips and rotations"; "" where it is one prediction."""
    count = len(TRANSFORMS[tta])
    return "" if count == 1 else f"the mean over {count} {'flips' if tta == 'flips' else 'flips and rotations'}"


def transform(images: Tensor, turns: int, flip: bool) -> Tensor:
    """Flip the columns of ``(..., H, W)`` where ``flip``, then turn counter-clockwise by ``turns`` quarters."""
    return torch.rot90(images.flip(-1) if flip else images, turns, (-2, -1))


def inverse_transform(images: Tensor, turns: int, flip: bool) -> Tensor:
    """Undo `transform`."""
    images = torch.rot90(images, -turns, (-2, -1))
    return images.flip(-1) if flip else images


def resolve_device(device: str) -> torch.device:
    """Return the device called ``device``, see `uctrans.devices.find_device`.

    Raises:
        InferenceError: There is no such device.
    """
    try:
        return find_device(device)
    except ValueError as error:
        raise InferenceError(str(error)) from error


def to_model_channels(images: Tensor, in_channels: int, channel_order: str) -> Tensor:
    """Colour images ``(B, 3, H, W)`` as a model with ``in_channels`` takes them.

    Three channels stay as they are; one channel is the luma ``0.299 R + 0.587 G + 0.114 B``.

    Raises:
        InferenceError: The model takes neither one nor three channels.
    """
    if in_channels == 3:
        return images
    if in_channels == 1:
        weights = GRAY_WEIGHTS if channel_order == "rgb" else GRAY_WEIGHTS[::-1]
        return torch.einsum("bchw,c->bhw", images, images.new_tensor(weights)).unsqueeze(1)
    raise InferenceError(
        f"The model takes {in_channels} channels, but image files are read as RGB: only models with 3 channels, "
        "or with 1 (the image is turned to gray), can be used on image files."
    )


def enlarge(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of ``(B, P, h, w)`` to ``size``; pixel centres are kept in place, nothing is smoothed."""
    if probabilities.shape[-2:] == size:
        return probabilities
    return nn.functional.interpolate(probabilities, size, mode="bilinear", align_corners=False)


def to_labels(probabilities: Tensor, threshold: float = 0.5) -> Tensor:
    """uint8 label maps ``(B, H, W)`` of ``(B, P, H, W)``.

    One channel: 1 where the probability is above ``threshold``. More: the most probable class, whatever the threshold.
    """
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] > threshold).to(torch.uint8)
    return probabilities.argmax(1).to(torch.uint8)


def probabilities_of(model: nn.Module, amp: str) -> Callable[[Tensor], Tensor]:
    """What makes probabilities of network inputs, ``(B, C, H, W)`` to float32 ``(B, P, H, W)``, P = 1 for one class.

    ``amp`` is ``"no"`` or ``"bf16"``.
    """

    def forward(inputs: Tensor) -> Tensor:
        autocast = contextlib.nullcontext()
        if amp == "bf16":  # without the cache of casts, which must not outlive the capture of a CUDA graph
            autocast = torch.autocast(inputs.device.type, torch.bfloat16, cache_enabled=False)
        with autocast:
            logits = model(inputs).float()
        return probabilities(logits)

    return forward


def _chosen(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise InferenceError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


class Predictor:
    """A model with everything between an image and its class probabilities.

    Args:
        model: Takes ``(B, in_channels, H, W)`` and gives logits ``(B, classes, H, W)``; has ``in_channels``,
            ``classes``, ``config`` and ``metadata``. It is moved to ``device`` and set to eval.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        resolution: ``"protocol"``: the network sees the image as its protocol resizes it, and the probabilities are
            enlarged to the image. ``"native"``: it sees the pixels of the image. Under a protocol that keeps the
            resolution it sees them in either case.
        tile: Side in pixels of the square tiles that images at native resolution are cut into; None takes the
            model's image size. Smaller images are seen whole.
        overlap: Share of a tile that overlaps with the next, in 0 <= overlap < 1. Tiles are blended with a Gaussian.
        tta: ``"none"``, ``"flips"`` (4 transforms) or ``"d4"`` (the 8 flips and rotations of the square): the mean of
            the probabilities over the transforms.
        amp: ``"no"`` or ``"bf16"`` (autocast).
        batch_size: Tiles in one forward pass.
        channel_order: ``"rgb"`` or ``"bgr"`` in place of the protocol's.
        graph: On CUDA, replay the network as a CUDA graph for every shape of input that comes again. The weights may
            change in place; a model that is moved or set to another backend needs another predictor.

    Raises:
        InferenceError: A setting out of its range, a device that is not there, or a model of neither 1 nor 3 channels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str = "auto",
        resolution: str = "protocol",
        tile: int | None = None,
        overlap: float = OVERLAP,
        tta: str = "none",
        amp: str = "no",
        batch_size: int = 4,
        channel_order: str | None = None,
        graph: bool = True,
    ) -> None:
        _chosen("resolution", resolution, RESOLUTIONS)
        _chosen("tta", tta, tuple(TRANSFORMS))
        _chosen("amp", amp, AMP)
        if tile is not None and tile < 1:
            raise InferenceError(f"tile must be at least 1 pixel, got {tile}.")
        if not 0 <= overlap < 1:
            raise InferenceError(f"overlap must lie in 0 <= overlap < 1, got {overlap}.")
        if batch_size < 1:
            raise InferenceError(f"batch_size must be at least 1, got {batch_size}.")
        self.device = resolve_device(device)
        self.protocol = protocol_of(model, channel_order)
        to_model_channels(torch.zeros(1, 3, 1, 1), model.in_channels, self.protocol.channel_order)
        # Measured on the CPU at 224 pixels: 1.04 to 1.26 times as fast as contiguous; not measured on CUDA.
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.resolution, self.tta, self.amp = resolution, tta, amp
        self.overlap, self.batch_size = overlap, batch_size
        self.tile = self.protocol.image_size if tile is None else (tile, tile)
        self._network = probabilities_of(self.model, amp)
        if graph and self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._network = CapturedForward(self._network, CudaRecorder())

    def _forward(self, inputs: Tensor) -> Tensor:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            return self._network(inputs.contiguous(memory_format=torch.channels_last))

    def _forward_tiled(self, inputs: Tensor) -> Tensor:
        return tiled(self._forward, inputs, self.tile, self.batch_size, self.overlap)

    def _averaged(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        transforms = TRANSFORMS[self.tta]
        total = inverse_transform(forward(transform(inputs, *transforms[0])), *transforms[0])
        for turns, flip in transforms[1:]:
            total = total + inverse_transform(forward(transform(inputs, turns, flip)), turns, flip)
        return total / len(transforms)

    @torch.inference_mode()
    def probabilities(self, images: Tensor, *, tiled: bool = False) -> Tensor:
        """Class probabilities of a batch at the size the network sees.

        Args:
            images: uint8 ``(B, 3, H, W)``, RGB.
            tiled: Cut images larger than the tile into tiles (needs MONAI).

        Returns:
            float32 ``(B, P, H, W)`` on the predictor's device; P is 1 (sigmoid) or the number of classes (softmax).
        """
        inputs = self.protocol.to_input(images.to(self.device))
        inputs = to_model_channels(inputs, self.model.in_channels, self.protocol.channel_order)
        return self._averaged(self._forward_tiled if tiled else self._forward, inputs)

    @torch.inference_mode()
    def probabilities_of_image(self, image: np.ndarray) -> Tensor:
        """Class probabilities of one image of any size.

        Args:
            image: uint8 ``(H, W, 3)``, RGB.

        Returns:
            float32 ``(P, H, W)`` on the predictor's device.
        """
        is_resized = self.resolution == "protocol" and not self.protocol.keeps_resolution
        seen = self.protocol.resize_image(image) if is_resized else image
        pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1).unsqueeze(0)
        return enlarge(self.probabilities(pixels, tiled=not is_resized), image.shape[:2])[0]


def load_predictor(path: str | Path, backend: str = "auto", **settings: Any) -> Predictor:
    """A `Predictor` of the model at ``path``: everything `uctrans.load_model` reads, or several as ``a,b``, averaged.

    Raises:
        ModelFileError: ``path`` is no model file.
        InferenceError: See `Predictor`, and `uctrans.inference.ensemble.Ensemble`.
        ValueError: There is no such backend, or one is named and no layer of the model has any.
        NotImplementedError: The backend cannot run on the device.
    """
    from uctrans.inference.ensemble import load_model_or_ensemble  # it knows the protocols of models from here

    device = resolve_device(settings.get("device", "auto"))
    model = load_model_or_ensemble(path)
    if backend != "auto" or layers_with_backend(model):
        resolve_backend(backend, device)  # it raises here, and not in the midst of the images
        uctrans.set_backend(model, backend)
    if settings.get("amp") == "bf16":
        keep_weights_cast(model, torch.bfloat16)
    return Predictor(model, **settings)


def predictor_of(config: Any) -> Predictor:
    """The `Predictor` that the settings of an evaluation or a prediction ask for; raises as `load_predictor`."""
    return load_predictor(config.model, config.backend, **{name: getattr(config, name) for name in SETTINGS})
