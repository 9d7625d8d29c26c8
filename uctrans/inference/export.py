"""Write a model for use without uctrans: as a `torch.export` program and as ONNX, each checked against the model.

Both are made from one traced program of the composed path in evaluation mode. ``dynamic`` says what may vary from call
to call:

- ``"none"``: nothing, the input is ``(batch_size, channels, *image_size)``.
- ``"batch"``: the batch.
- ``"size"``: the batch, and height and width in multiples of the model's patch grid (16 pixels for the default models),
  from two of them on. The model itself pads any other size to the grid, but tracing cannot keep a pad open whose width
  depends on the input: pad by repeating the last row and column, and crop the logits.
  For the same reason, channel attention multiplies in one order at every size, the order for large images. The model
  itself changes the order at 400 pixels with the default widths; below, the program does more work than the model (45
  GFLOP an image at 224 pixels, where UCTransNet takes 77). For images of one size, export that size with ``"batch"``.
"""

import contextlib
import copy
import dataclasses
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Protocol, protocol_of
from ..data.read import RGB_CHANNELS
from ..extras import import_extra
from ..kernels.channel_attention import fewest_tokens_to_correlate
from ..layers import ChannelAttention, PatchEmbedding, set_backend
from ..layers.switching import layers_with_backend
from ..models import load_model
from ..models.base import without_images
from ..writing import locked, write_json, written_together
from .settings import InferenceError, check_choice, output_folder, refuse_existing

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SUMMARY = "export.json"
AXIS_NAMES = {"none": {}, "batch": {0: "batch"}, "size": {0: "batch", 2: "height", 3: "width"}}
TRACED_BATCH = 2
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4  # as a share of the largest logit, or of 1 if that is larger
CHATTY_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")
REMEDIES = {
    "none": "try another version of PyTorch",
    "batch": "set dynamic to none and batch_size to what you need, or try another version of PyTorch",
    "size": "set dynamic to batch and export every image_size you need, or try another version of PyTorch",
}


class ExportError(InferenceError):
    """A program cannot be made or run, or does not compute what the model computes; nothing was written."""


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
    model = load_model(config.model).eval()
    if layers_with_backend(model):
        set_backend(model, "composed")
    grid = getattr(model, "size_multiple", 16)
    size = _traced_size(config, model, grid)
    shapes = _shapes_to_check(model, config, size, grid)
    description = _description(model, config, size, grid) | {"formats": {}}
    written = [*files.values(), folder / SUMMARY]
    former = [folder / name for name in (SUMMARY, *FORMATS.values())]  # programs of another model, killed or not
    with locked(folder), written_together(written, removed=former) as temporaries, _quiet():
        program = _trace(model, config, size, grid)
        for name, path in zip(files, temporaries[:-1], strict=True):
            details = WRITERS[name](program, path, config)
            description["formats"][name] = details | {
                "file": FORMATS[name],
                "torch_version": torch.__version__,
                "checks": _check_program(RUNNERS[name](path), model, shapes, name, config.dynamic),
            }
        write_json(temporaries[-1], description | {"settings": dataclasses.asdict(config)})
    return written


def _require_onnx() -> None:
    """Raise ImportError before the minutes of tracing if a package for ONNX is missing."""
    for package in ONNX_PACKAGES:
        try:
            import_extra(package, "export")
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


def _shapes_to_check(
    model: nn.Module, config: ExportConfig, size: tuple[int, int], grid: int
) -> list[tuple[int, int, int]]:
    """Return batch, height and width of images to check, on both sides of any change of order in the attention."""
    if config.dynamic == "none":
        return [(config.batch_size, *size)]
    shapes = [(batch, *size) for batch in CHECKED_BATCHES]
    if config.dynamic == "batch":
        return shapes
    shapes.append((1, 2 * grid, 3 * grid))
    tokens = _fewest_tokens_to_correlate(model)
    if tokens is not None:
        cells = math.ceil(tokens / math.prod(model.token_grid(grid)))
        rows = max(2, math.isqrt(cells))
        shapes.append((1, rows * grid, max(2, math.ceil(cells / rows)) * grid))
    return list(dict.fromkeys(shapes))


def _fewest_tokens_to_correlate(model: nn.Module) -> int | None:
    """Return the number of tokens from which all attention multiplies in the order of a program with an open size."""
    fewest = [
        fewest_tokens_to_correlate(
            heads=layer.key_value.shape[1],
            segments=[weight.shape[-1] for weight in layer.query],
            key_channels=layer.key_value.shape[-1],
        )
        for layer in model.modules()
        if isinstance(layer, ChannelAttention)
    ]
    return max(fewest, default=None)


def _description(model: nn.Module, config: ExportConfig, size: tuple[int, int], grid: int) -> dict[str, Any]:
    protocol = protocol_of(model, config.channel_order)
    batch = config.batch_size if config.dynamic == "none" else "batch"
    sides = [f"{grid} * rows", f"{grid} * columns"] if config.dynamic == "size" else list(size)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and notes of the tracer and the converter."""
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _AnyGridEmbedding(nn.Module):
    """A patch embedding that always interpolates its positions, so that its grid can stay open while it is traced.

    On the grid they were learned for, the interpolation gives the positions back.
    """

    def __init__(self, embedding: PatchEmbedding):
        super().__init__()
        self.projection, self.position = embedding.projection, embedding.position

    def forward(self, feature: Tensor) -> Tensor:
        patches = self.projection(feature)
        size = patches.shape[-2:]
        position = nn.functional.interpolate(self.position, size=size, mode="bicubic", align_corners=False)
        return (patches + position).flatten(2).transpose(1, 2)


def _with_open_grids(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PatchEmbedding):
                setattr(parent, name, _AnyGridEmbedding(child))
    return model


def _trace(model: nn.Module, config: ExportConfig, size: tuple[int, int], grid: int) -> torch.export.ExportedProgram:
    dimensions: dict[int, Any] = {}
    batch = config.batch_size if config.dynamic == "none" else TRACED_BATCH
    if config.dynamic != "none":
        dimensions[0] = torch.export.Dim("batch")
    if config.dynamic == "size":
        model = _with_open_grids(model)
        dimensions |= {2: grid * torch.export.Dim("rows", min=2), 3: grid * torch.export.Dim("columns", min=2)}
    image = torch.rand(batch, model.in_channels, *size)
    with _failing_as_export_error("forward cannot be traced", config.dynamic):
        return torch.export.export(model, (image,), dynamic_shapes=(dimensions,))


def _write_torch(program: torch.export.ExportedProgram, path: Path, config: ExportConfig) -> dict[str, Any]:
    content = io.BytesIO()  # PyTorch ends the process if it writes to a full disk itself
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return {}


def _write_onnx(program: torch.export.ExportedProgram, path: Path, config: ExportConfig) -> dict[str, Any]:
    onnx = import_extra("onnx", "export")
    converted = torch.onnx.export(
        program,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": AXIS_NAMES[config.dynamic]},
        opset_version=config.opset,
        dynamo=True,
        verbose=False,
    )
    converted.save(path, external_data=False)
    written_opset = next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    if config.opset not in (None, written_opset):
        raise InferenceError(
            f"opset: the model cannot be written with {config.opset}; leave it out for {written_opset}"
        )
    return {"opset": written_opset, "onnx_version": onnx.__version__}


def _run_torch(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = import_extra("onnxruntime", "export")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


WRITERS = {"torch": _write_torch, "onnx": _write_onnx}
RUNNERS = {"torch": _run_torch, "onnx": _run_onnx}


@torch.inference_mode()
def _check_program(
    run: Callable[[Tensor], Tensor], model: nn.Module, shapes: list[tuple[int, int, int]], name: str, dynamic: str
) -> list[dict[str, Any]]:
    """Return the largest difference from the model on random images of every shape.

    Raises:
        ExportError: It is above the tolerance, the shape or a value is wrong, or the program does not run.
    """
    generator = torch.Generator().manual_seed(0)
    checks = []
    for batch, height, width in shapes:
        image = torch.rand(batch, model.in_channels, height, width, generator=generator)
        expected = model(image)
        with _failing_as_export_error(f"{name} export cannot run input {tuple(image.shape)}", dynamic):
            found = run(image)
        if expected.shape != found.shape:
            raise ExportError(
                f"model: its {name} export gives the shape {tuple(found.shape)} instead of {tuple(expected.shape)}; "
                f"nothing was written, {REMEDIES[dynamic]}"
            )
        difference = (expected - found).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise ExportError(
                f"model: its {name} export differs by {difference:.2g} on input {tuple(image.shape)}, more than "
                f"{allowed:.2g}; nothing was written, try another opset or another version of PyTorch"
            )
        checks.append({"input": list(image.shape), "largest_difference": difference, "allowed": allowed})
    return checks


@contextlib.contextmanager
def _failing_as_export_error(problem: str, dynamic: str) -> Iterator[None]:
    """Turn every error into an `ExportError` with a remedy.

    The tracer and the runtimes have no type of their own for what they cannot trace or run.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].rstrip(".")
        raise ExportError(f"model: its {problem} ({reason}); nothing was written, {REMEDIES[dynamic]}") from error
