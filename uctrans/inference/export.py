"""Write a model for use without uctrans: as a `torch.export` program and as ONNX, each checked against the model.

Both are made from one traced program of the composed path in evaluation mode, with batch norms folded into
convolutions. ``dynamic`` says what may vary from call to call:

- ``"none"``: nothing, the input is ``(batch_size, channels, *image_size)``.
- ``"batch"``: the batch.
- ``"size"``: the batch, and height and width in multiples of the model's patch grid (16 pixels for the default models),
  from two of them on. The model itself pads any other size to the grid, but tracing cannot keep a pad open whose width
  depends on the input: pad by repeating the last row and column, and crop the logits.
  For the same reason, channel attention multiplies in one order at every size, the order for large images. The model
  itself changes the order at 400 pixels with the default widths; below, the program does more work than the model (45
  GFLOP an image at 224 pixels, where UCTransNet takes 77). For images of one size, export that size with ``"batch"``.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Protocol, protocol_of
from ..data.read import RGB_CHANNELS
from ..layers import set_backend
from ..layers.switching import layers_with_backend
from ..models import load_model
from ..models.base import without_images
from ..writing import locked, write_json, written_together
from .programs import (
    AXIS_NAMES,
    RUNNERS,
    ExportError,
    ProgramInput,
    check_program,
    quiet,
    require_onnx,
    shapes_to_check,
    size_multiple,
    trace,
    write_onnx,
    write_torch,
)
from .settings import InferenceError, check_choice, output_folder, refuse_existing

__all__ = ["ExportConfig", "ExportError", "export"]

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx"}
SUMMARY = "export.json"


@dataclass
class ExportConfig:
    """Settings of `export`.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), a published .pth.tar, or the name of a model
            that comes with the package: nuclei.
        output: Folder for model.pt2, model.onnx and export.json.
        formats: torch (torch.export program), onnx, or both.
        dynamic: What may vary from call to call: none; batch; size, which is the batch, and height and width in
            multiples of the model's patch grid (16 pixels by default), from two of them on.
        image_size: Height and width in pixels of the input; one number means square, none takes the model's. With
            dynamic size, only the size that is traced.
        batch_size: Images in a call, for exports without a dynamic batch.
        opset: ONNX operator set; none takes that of the installed PyTorch.
        channel_order: Colour order that export.json tells its reader to use: rgb or bgr; none takes the model's.
        network: Network that the model holds: package.module:Class for one of another package, which loads only where
            it is named here; none allows all of uctrans.
        overwrite: Replace an export that the output folder already holds.
    """

    model: str
    output: str
    formats: tuple[str, ...] = ("torch", "onnx")
    dynamic: str = "batch"
    image_size: int | tuple[int, int] | None = None
    batch_size: int = 1
    opset: int | None = None
    channel_order: str | None = None
    network: str | None = None
    overwrite: bool = False


def export(config: ExportConfig) -> list[Path]:
    """Write a model as a `torch.export` program and as ONNX, after checking both against the model.

    The programs take ``image``, float32 ``(B, in_channels, H, W)`` in 0..1, and return ``logits``, float32
    ``(B, classes, H, W)``. ``export.json`` says how to prepare the image, and by how much the programs differ from the
    model on random images of several batch sizes. `uctrans.inference.export` says what may vary from call to call.

    Returns:
        The files written.

    Raises:
        ExportError: A program cannot be traced or run, or differs from the model by more than 1e-4 of the largest
            logit; nothing is written.
        InferenceError: A setting is out of its range, or the output folder holds an export and ``overwrite`` is not
            set.
        FolderError: Another process exports into the output folder, or it cannot be made or written to.
        ModelFileError: There is no model at ``config.model``.
        ImportError: onnx, onnxscript or onnxruntime is not installed (``formats=("torch",)`` needs none of them).
    """
    if not config.formats:
        raise InferenceError(f"formats: there is none; choose from {', '.join(FORMATS)}")
    for name in config.formats:
        check_choice("formats", name, tuple(FORMATS))
    check_choice("dynamic", config.dynamic, tuple(AXIS_NAMES))
    if config.batch_size < 1:
        raise InferenceError(f"batch_size: {config.batch_size} is too small; give 1 or more")
    if "onnx" in config.formats:
        _require_onnx()
    folder = output_folder(config.output)
    files = {name: folder / FORMATS[name] for name in dict.fromkeys(config.formats)}
    if not config.overwrite:
        refuse_existing([*files.values(), folder / SUMMARY], "an export")
    model = load_model(config.model, network=config.network).eval()
    if layers_with_backend(model):
        set_backend(model, "composed")
    grid = size_multiple(model)
    taken = ProgramInput(
        _traced_size(config, model, grid), config.dynamic, grid, config.batch_size, config.channel_order
    )
    shapes = shapes_to_check(model, taken)
    description = _description(model, taken) | {"formats": {}}
    writers = {"torch": write_torch, "onnx": partial(write_onnx, model=model, taken=taken, opset=config.opset)}
    written = [*files.values(), folder / SUMMARY]
    former = [folder / name for name in (SUMMARY, *FORMATS.values())]  # programs of another model, killed or not
    with locked(folder), written_together(written, removed=former) as temporaries, quiet():
        for abandoned in folder.glob(".export-*"):  # by an export of an earlier version that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        program = trace(model, taken)
        for name, path in zip(files, temporaries[:-1], strict=True):
            details = writers[name](program, path)
            description["formats"][name] = details | {
                "file": FORMATS[name],
                "torch_version": torch.__version__,
                "checks": check_program(RUNNERS[name](path), model, shapes, name, config.dynamic),
            }
        write_json(temporaries[-1], description | {"settings": dataclasses.asdict(config)})
    return written


def _require_onnx() -> None:
    try:
        require_onnx()
    except ImportError as error:
        raise ImportError(f"{error}; or export without ONNX: formats torch") from error


def _traced_size(config: ExportConfig, model: nn.Module, grid: int) -> tuple[int, int]:
    size = config.image_size
    if size is None:
        size = protocol_of(model).image_size
    elif not isinstance(size, tuple | list):
        size = (size, size)
    if len(size) != 2 or min(size) < 1:
        raise InferenceError(f"image_size: got {config.image_size}; give one or two numbers of pixels, at least 1")
    if config.dynamic == "size" and any(side % grid or side < 2 * grid for side in size):
        raise InferenceError(
            f"image_size: {size[0]}x{size[1]} cannot be traced with a dynamic size; give multiples of {grid} pixels, "
            f"from {2 * grid} on, or set dynamic to batch"
        )
    return tuple(size)


def _description(model: nn.Module, taken: ProgramInput) -> dict[str, Any]:
    protocol = protocol_of(model, taken.channel_order)
    batch = taken.fixed_batch_size or "batch"
    sides = taken.fixed_size or [f"{taken.grid} * rows", f"{taken.grid} * columns"]
    return {
        "input": {"name": "image", "dtype": "float32", "shape": [batch, model.in_channels, *sides], "range": [0, 1]},
        "output": {
            "name": "logits",
            "dtype": "float32",
            "shape": [batch, model.classes, *sides],
            "activation": "sigmoid" if model.classes == 1 else "softmax over axis 1",
        },
        "preprocessing": {
            "protocol": protocol.name,
            "image_size": list(protocol.image_size),
            "resize": "bilinear, half-pixel centres, no anti-aliasing, rounded to uint8",
            "channel_order": _channel_order(protocol),
            "intensity_range": protocol.intensity_range,
            "scale": "uint8 / 255"
            if protocol.intensity_range is None
            else "(value - lowest) / (highest - lowest) of intensity_range, clipped to 0..1 and rounded to 255ths",
        },
        "model": {"name": model.name, "config": model.config, "metadata": without_images(model.metadata)},
    }


def _channel_order(protocol: Protocol) -> str:
    if protocol.channels == 1:
        return "gray (0.299 R + 0.587 G + 0.114 B)"
    return protocol.channel_order if protocol.channels == RGB_CHANNELS else "as in the files"
