"""From an image to class probabilities: channel order, resizing, tiles, test-time transforms, mixed precision.

`Predictor` is what evaluation and prediction share. It has two entry points: `Predictor.probabilities` takes a batch at
the size that the network sees, `Predictor.probabilities_of_image` takes one image of any size. `Ensemble` makes one
model of several.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import protocol_of
from ..data.fingerprints import join_records
from ..data.read import GRAY_WEIGHTS, RGB_CHANNELS
from ..devices import explaining_short_memory, find_device
from ..graphs import CapturedForward, CudaRecorder
from ..kernels import resolve_backend
from ..layers import fold_batch_norms, set_backend
from ..layers.switching import layers_with_backend
from ..models import load_model
from ..models.base import probabilities
from ..tiling import OVERLAP, mean_of_rows, tiled, tiled_rows
from ..weight_casts import keep_weights_cast
from .engines import forward_of, runs_in_torch
from .onnx_model import SUFFIX, OnnxModel
from .programs import size_multiple
from .settings import InferenceError, check_choice
from .transforms import TRANSFORMS, enlarge, inverse_transform, resize_smoothly, transform, untransformed_tiles

RESOLUTIONS = ("protocol", "native")
AMP = ("no", "bf16")
SETTINGS = ("device", "resolution", "tile", "overlap", "tta", "amp", "batch_size", "channel_order", "graph")
SETTINGS += ("intensity_range", "scale", "engine")
SMALLEST_SCALE, LARGEST_SCALE = 0.1, 10

# Equal in all members of an ensemble.
SHARED_METADATA = ("target", "intensity_range", "palette", "ignore_label", "class_names")
SMALLEST_PROBABILITY = 1e-7  # the logits of this and of 1 - 1e-7 are finite in float32


@dataclass
class PredictionSettings:
    """Settings that `evaluate` and `predict` share.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), a published .pth.tar, a model.onnx of uctrans
            export, or the name of a model that comes with the package: nuclei. Several as a,b, whose probabilities are
            averaged.
        threshold: Probability above which a pixel is foreground, for binary models.
        tta: Test-time transforms over which probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        tile: Side of the tiles in pixels; none takes the model's image size.
        overlap: Share of a tile that overlaps with the next.
        batch_size: Images, or tiles, in one forward pass.
        channel_order: Order in which the network sees the colour channels: rgb or bgr; none takes the model's.
        intensity_range: Lowest and highest value of the image files: 0,4095; none takes the model's.
        scale: Factor by which images are enlarged before the network sees their pixels, 0.1 to 10; masks and scores
            stay at the size of the images. Raise it if small nuclei are merged or missed, lower it if large ones are
            split.
        network: Networks that the model may hold: package.module:Class for one of another package, which loads only
            where it is named here; several as a,b. none allows all of uctrans.
        backend: Implementation of the network's operators: auto, triton, composed or reference.
        device: auto, cpu, cuda, cuda:1 or mps.
        amp: bf16 runs the network under bfloat16 autocast, no leaves it in float32.
        graph: Replay the network as a CUDA graph, on CUDA.
        engine: What runs the network. torch. compile: torch.compile, which takes minutes before the first image. onnx:
            ONNX Runtime, on an export that is made at the first image and cached. auto: torch; on a CPU onnx, if the
            extra export is installed and an export is cached or pays.
        progress: Show a progress bar.
    """

    model: str
    _: KW_ONLY
    threshold: float = 0.5
    tta: str = "none"
    tile: int | None = None
    overlap: float = OVERLAP
    batch_size: int = 4
    channel_order: str | None = None
    intensity_range: tuple[int, int] | None = None
    scale: float = 1.0
    network: str | tuple[str, ...] | None = None
    backend: str = "auto"
    device: str = "auto"
    amp: str = "no"
    graph: bool = True
    engine: str = "auto"
    progress: bool = True


class Predictor:
    """A model with everything between an image and its class probabilities.

    Args:
        model: Takes ``(B, in_channels, H, W)`` and returns logits ``(B, classes, H, W)``; has ``in_channels``,
            ``classes``, ``config`` and ``metadata``. It is moved to ``device`` and set to evaluation mode.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.
        resolution: ``"protocol"`` shows the network the image as its protocol resizes it, and enlarges the
            probabilities to the image. ``"native"`` shows it the pixels of the image. A protocol that keeps the
            resolution always shows the pixels of the image.
        tile: Side in pixels of the square tiles that images at native resolution are cut into; None takes the
            model's image size. The network sees smaller images whole.
        overlap: Share of a tile that overlaps with the next, 0 <= overlap < 1. Tiles are blended with a Gaussian.
        tta: Test-time transforms over which probabilities are averaged: ``"none"``, ``"flips"`` (4 transforms) or
            ``"d4"`` (the 8 flips and rotations of the square).
        amp: ``"no"`` or ``"bf16"`` (autocast).
        batch_size: Tiles in one forward pass.
        channel_order: ``"rgb"`` or ``"bgr"`` to replace the order that the model's metadata name.
        intensity_range: Lowest and highest value of image files, to replace the range that the metadata name.
        scale: Factor by which `probabilities_of_image` enlarges an image before the network sees it, 0.1..10; the
            probabilities come back at the size of the image. It needs the resolution or the protocol ``"native"``.
        graph: On CUDA, replay the network as a CUDA graph for every shape of input that comes again.
        engine: What runs the network: ``"torch"``, ``"compile"`` (`torch.compile`), ``"onnx"`` (ONNX Runtime) or
            ``"auto"``; see `uctrans.inference.engines`.

    Attributes:
        network: The model as it runs, with its batch norms folded into its convolutions. It has the weights of when the
            predictor was made: a model that is changed, moved or set to another backend needs another predictor.

    Raises:
        InferenceError: A setting is out of its range.
        ImportError: A package that the engine needs is not installed.
        DataError: The protocol or channel order is unknown, or the intensity range is not two increasing values.
        ValueError: There is no such device.
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
        intensity_range: tuple[int, int] | None = None,
        scale: float = 1.0,
        graph: bool = True,
        engine: str = "auto",
    ) -> None:
        check_choice("resolution", resolution, RESOLUTIONS)
        check_choice("tta", tta, tuple(TRANSFORMS))
        check_choice("amp", amp, AMP)
        if tile is not None and tile < 1:
            raise InferenceError(f"tile: {tile} is too small; give 1 pixel or more")
        if not 0 <= overlap < 1:
            raise InferenceError(f"overlap: {overlap} is out of range; give 0 or more and less than 1")
        if batch_size < 1:
            raise InferenceError(f"batch_size: {batch_size} is too small; give 1 or more")
        if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            raise InferenceError(f"scale: {scale} is out of range; give {SMALLEST_SCALE} to {LARGEST_SCALE}")
        self.device = _device(device)
        self.protocol = protocol_of(model, channel_order, intensity_range)
        # On the CPU, at 224 pixels, channels-last was measured 1.04 to 1.26 times as fast as contiguous.
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.resolution, self.tta, self.amp = resolution, tta, amp
        self.overlap, self.batch_size, self.scale = overlap, batch_size, scale
        self._is_resized = resolution == "protocol" and not self.protocol.keeps_resolution
        if self._is_resized and scale != 1:
            height, width = self.protocol.image_size
            raise InferenceError(
                f"scale: the protocol {self.protocol.name} shows the network every image at {height} x {width} pixels, "
                "whatever its scale; set resolution to native, or leave scale out"
            )
        self.tile = self.protocol.image_size if tile is None else (tile, tile)
        self.network = fold_batch_norms(self.model)
        usual_size = self.protocol.image_size if self._is_resized else self.tile
        forward = forward_of(engine, self.network, usual_size, self.device, amp)
        self._network = _with_probabilities(forward, amp)
        if graph and self.device.type == "cuda" and runs_in_torch(forward):
            with torch.cuda.device(self.device):
                self._network = CapturedForward(self._network, CudaRecorder())

    @torch.inference_mode()
    def probabilities(self, images: Tensor, *, tiled: bool = False) -> Tensor:
        """Return class probabilities of a batch at the size that the network sees.

        Args:
            images: uint8, or float32 in 0..1, ``(B, in_channels, H, W)``; or RGB, of which a model of one channel sees
                the luma.
            tiled: Cut images larger than the tile into tiles (needs MONAI).

        Returns:
            float32 ``(B, P, H, W)`` on the predictor's device; P is 1 (sigmoid) or the number of classes (softmax).

        Raises:
            torch.OutOfMemoryError: Memory ran out, on any device; the message names settings that need less.
        """
        forward = self._forward_tiled if tiled else self._forward
        transforms = TRANSFORMS[self.tta]
        height, width = self.tile
        with explaining_short_memory(f"lower batch_size (now {self.batch_size}) or tile (now {height} x {width})"):
            inputs = self._to_inputs(images)
            outputs = (inverse_transform(forward(transform(inputs, *step)), *step) for step in transforms)
            return sum(outputs) / len(transforms)

    @torch.inference_mode()
    def probabilities_of_image(self, image: np.ndarray) -> Tensor:
        """Return class probabilities of one image of any size.

        Args:
            image: uint8, or float32 in 0..1, ``(H, W, C)``, channels as for `probabilities`; ``protocol.read_image``
                reads it.

        Returns:
            float32 ``(P, H, W)`` on the predictor's device.
        """
        size = image.shape[:2]
        seen = self.protocol.resize_image(image) if self._is_resized else image
        pixels = torch.from_numpy(np.array(seen)).permute(2, 0, 1).unsqueeze(0)
        if self.scale == 1:
            return enlarge(self.probabilities(pixels, tiled=not self._is_resized), size)[0]
        scaled_size = tuple(max(round(side * self.scale), 1) for side in size)
        scaled = resize_smoothly(pixels.float(), scaled_size)
        scaled = scaled if pixels.is_floating_point() else scaled.round().byte()
        return resize_smoothly(self.probabilities(scaled, tiled=True), size)[0]

    @torch.inference_mode()
    def probabilities_by_rows(self, read: Callable[[int, int], np.ndarray], size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield what `probabilities_of_image` returns for an image that is seen in tiles, a few rows at a time.

        Args:
            read: Takes the first row and the one after the last, and returns uint8 ``(rows, W, C)``.
            size: Height H and width W of the image.

        Yields:
            float32 ``(P, rows, W)`` on the predictor's device, from top to bottom, H rows in all.

        Raises:
            InferenceError: The network sees the image resized, by its protocol or by a scale.
        """
        if self._is_resized:
            raise InferenceError("resolution: protocol resizes the image as a whole; set it to native")
        if self.scale != 1:
            raise InferenceError(f"scale: {self.scale} resizes the image as a whole; resize the file instead")

        def rows_of(turns: int, flip: bool) -> Iterator[Tensor]:
            def forward(images: Tensor) -> Tensor:
                outputs = self._forward(transform(self._to_inputs(images), turns, flip))
                return inverse_transform(outputs, turns, flip)

            tile, mirrored = untransformed_tiles(self.tile, turns, flip)
            return tiled_rows(forward, read_tensor, size, tile, self.batch_size, self.overlap, mirrored)

        def read_tensor(top: int, bottom: int) -> Tensor:
            return torch.from_numpy(np.array(read(top, bottom))).permute(2, 0, 1)

        yield from mean_of_rows([rows_of(*step) for step in TRANSFORMS[self.tta]])

    def _to_inputs(self, images: Tensor) -> Tensor:
        inputs = self.protocol.to_input(images.to(self.device))
        return to_model_channels(inputs, self.model.in_channels, self.protocol.channel_order)

    def _forward(self, inputs: Tensor) -> Tensor:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            return self._network(inputs.contiguous(memory_format=torch.channels_last))

    def _forward_tiled(self, inputs: Tensor) -> Tensor:
        return tiled(self._forward, inputs, self.tile, self.batch_size, self.overlap)


def _device(name: str | torch.device) -> torch.device:
    try:
        return find_device(name)
    except ValueError as error:
        raise InferenceError(str(error)) from error


def load_predictor(
    path: str | Path, backend: str = "auto", network: str | Sequence[str] | None = None, **settings: Any
) -> Predictor:
    """Load a model and return its `Predictor`.

    Args:
        path: Anything that `uctrans.load_model` reads, or a model.onnx that `uctrans.inference.export` wrote; several
            as ``a,b``, whose probabilities are averaged.
        backend: See `uctrans.set_backend`.
        network: See `uctrans.load_model`.
        settings: Keyword arguments of `Predictor`.

    Raises:
        ModelFileError: There is no model at ``path``.
        InferenceError: See `Predictor` and `Ensemble`.
        InferenceError: There is no such device.
        ValueError: The backend is unknown, or it is named and no layer of the model has one; or there is no such
            ``network``.
        NotImplementedError: The backend cannot run on the device.
    """
    device = _device(settings.get("device", "auto"))
    model = _load_model_or_ensemble(path, network, device)
    if backend != "auto" or layers_with_backend(model):
        resolve_backend(backend, device)  # raises here, before the first image
        set_backend(model, backend)
    predictor = Predictor(model, **settings)
    if settings.get("amp") == "bf16":
        keep_weights_cast(predictor.network, torch.bfloat16)
    return predictor


def predictor_of(config: PredictionSettings) -> Predictor:
    """Return the `Predictor` that the settings of an evaluation or prediction name; raise as `load_predictor` does."""
    return load_predictor(
        config.model, config.backend, config.network, **{name: getattr(config, name) for name in SETTINGS}
    )


def to_model_channels(images: Tensor, in_channels: int, channel_order: str) -> Tensor:
    """Return images ``(B, C, H, W)`` with the channels of a model: as they are, or the luma of RGB for one channel.

    Raises:
        InferenceError: They have other channels.
    """
    if images.shape[1] == in_channels:
        return images
    if (images.shape[1], in_channels) != (RGB_CHANNELS, 1):
        raise InferenceError(f"images: have {images.shape[1]} channels, but the model takes {in_channels}; give these")
    weights = GRAY_WEIGHTS if channel_order == "rgb" else GRAY_WEIGHTS[::-1]
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(weights)).unsqueeze(1)


def to_labels(probabilities: Tensor, threshold: float = 0.5) -> Tensor:
    """Return uint8 label maps ``(B, H, W)`` of probabilities ``(B, P, H, W)``.

    With one channel, a pixel is 1 if its probability is above ``threshold``. With several channels, it gets its most
    probable class, whatever the threshold.
    """
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] > threshold).to(torch.uint8)
    return probabilities.argmax(1).to(torch.uint8)


def _with_probabilities(network: Callable[[Tensor], Tensor], amp: str) -> Callable[[Tensor], Tensor]:
    """Return a function of network inputs ``(B, C, H, W)`` to probabilities, float32 ``(B, P, H, W)``."""

    def forward(inputs: Tensor) -> Tensor:
        autocast = contextlib.nullcontext()
        if amp == "bf16":  # without the cache of casts, which must not outlive the capture of a CUDA graph
            autocast = torch.autocast(inputs.device.type, torch.bfloat16, cache_enabled=False)
        with autocast:
            logits = network(inputs).float()
        return probabilities(logits)

    return forward


class Ensemble(nn.Module):
    """Several models as one: its logits are those of the mean of their probabilities.

    The authors of UCTransNet average the models of their folds in this way.

    Attributes:
        models: The members.
        name: "ensemble".
        in_channels, classes: Those of every member.
        size_multiple: Pixels that images of every member are padded to a multiple of.
        config: The configurations of the members, under "members".
        metadata: What the members have in common; "members", their names; and "images", those of all members.

    Args:
        models: Two or more models in evaluation mode, with equal protocol, image size, channel order, target and
            classes.
        names: Names of the models for ``metadata`` and error messages.

    Raises:
        InferenceError: There are fewer than two models, or the probabilities of two of them mean different things.
    """

    name = "ensemble"

    def __init__(self, models: Sequence[nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        if len(models) < 2:
            raise InferenceError(f"model: an ensemble needs two models or more, got {len(models)}; name them as a,b")
        first, *others = [_meaning(model) for model in models]
        for meaning, name in zip(others, names[1:], strict=True):
            if differences := [key for key in first if first[key] != meaning[key]]:
                listed = "; ".join(f"{key}: {first[key]!r} and {meaning[key]!r}" for key in differences)
                raise InferenceError(
                    f"model: {names[0]} and {name} cannot be averaged, they differ in {listed}; name models that were "
                    "trained with the same classes and under the same protocol"
                )
        self.models = nn.ModuleList(models)
        self.in_channels, self.classes = first["in_channels"], first["classes"]
        self.size_multiple = math.lcm(*(size_multiple(model) for model in models))
        self.config: dict[str, Any] = {
            "members": [{"name": model.name, **model.config} for model in models],
            "image_size": first["image_size"],
        }
        self.metadata: dict[str, Any] = {
            "protocol": first["protocol"],
            "image_size": first["image_size"],
            "channel_order": first["channel_order"],
            **{key: first[key] for key in SHARED_METADATA if first[key] is not None},
            "members": list(names),
        }
        if all("images" in model.metadata for model in models):
            self.metadata["images"] = join_records(model.metadata["images"] for model in models)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of the mean probability, float32: ``(B, in_channels, H, W)`` to ``(B, classes, H, W)``.

        Softmax, or sigmoid for one class, gives the mean back, clamped to 1e-7..1 - 1e-7.
        """
        total = sum(probabilities(model(image).float()) for model in self.models)
        mean = (total / len(self.models)).clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
        return mean.logit() if self.classes == 1 else mean.log()


def _meaning(model: nn.Module) -> dict[str, Any]:
    """Return what decides how a model takes images and what its probabilities mean."""
    protocol = protocol_of(model)
    return {
        "in_channels": model.in_channels,
        "classes": model.classes,
        "protocol": protocol.name,
        "image_size": list(protocol.image_size),
        "channel_order": protocol.channel_order,
        **{key: model.metadata.get(key) for key in SHARED_METADATA},
    }


def _load_model_or_ensemble(path: str | Path, network: str | Sequence[str] | None, device: torch.device) -> nn.Module:
    names = [part.strip() for part in str(path).split(",")]
    if len(names) == 1 or Path(path).exists():
        return _load(path, network, device)
    if "" in names:
        raise InferenceError(f'model: a name in "{path}" is empty; write an ensemble as runs/a,runs/b')
    return Ensemble([_load(name, network, device) for name in names], names)


def _load(path: str | Path, network: str | Sequence[str] | None, device: torch.device) -> nn.Module:
    return OnnxModel(path, device) if Path(path).suffix == SUFFIX else load_model(path, network=network)
