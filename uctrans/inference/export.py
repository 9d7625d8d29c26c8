"""Write a model for use without uctrans: as a `torch.export` program and as ONNX, each checked against the model.

Both are made from one traced program of the composed path in eval mode. What can vary in it:

- ``dynamic="none"``: nothing, the input is ``(batch_size, channels, *image_size)``.
- ``dynamic="batch"``: the batch.
- ``dynamic="size"``: the batch, and height and width in multiples of the model's patch grid (16 pixels for the default
  models), from twice that on. The model itself pads any other size up to the grid, but a pad whose width depends on the
  input is a branch that tracing cannot keep open: pad by repeating the last row and column, and crop the logits.
  For the same reason channel attention multiplies in one order at every size, that of large images. The model changes
  orders, at 400 pixels with the default widths; below, the program does more work than the model (45 GFLOP an image at
  224 pixels, where UCTransNet takes 77). For images of one size, export that size with ``dynamic="batch"``.
"""

import contextlib
import copy
import dataclasses
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import uctrans
from uctrans.data import protocol_of
from uctrans.extras import import_extra
from uctrans.inference.export_checks import Run, check_program, checked_shapes, failing_as_export_error
from uctrans.inference.files import InferenceError, output_folder, refuse_existing, write_json
from uctrans.layers.backend import layers_with_backend
from uctrans.layers.tokens import PatchEmbedding

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SUMMARY = "export.json"
AXIS_NAMES = {"none": {}, "batch": {0: "batch"}, "size": {0: "batch", 2: "height", 3: "width"}}
TRACED_BATCH = 2
CHATTY_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")


@dataclass
class ExportConfig:
    """Settings of `export`.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), or a published .pth.tar.
        output: Folder for model.pt2, model.onnx and export.json.
        formats: torch (torch.export program), onnx, or both.
        dynamic: What may vary from call to call: none; batch; size, which is the batch, and height and width in
            multiples of the model's patch grid (16 pixels by default), from twice that on.
        image_size: Height and width in pixels of the input; one number means square, none takes the model's. With
            dynamic size, only the size that is traced.
        batch_size: Images in a call, of exports without a dynamic batch.
        opset: ONNX operator set; none takes that of the installed PyTorch.
        channel_order: Colour order that export.json tells its reader to feed: rgb or bgr; none takes the model's.
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's and the converter's notes on their own working."""
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


def _traced(model: nn.Module, config: ExportConfig, size: tuple[int, int], grid: int) -> torch.export.ExportedProgram:
    dimensions: dict[int, Any] = {}
    batch = config.batch_size if config.dynamic == "none" else TRACED_BATCH
    if config.dynamic != "none":
        dimensions[0] = torch.export.Dim("batch")
    if config.dynamic == "size":
        model = _with_open_grids(model)
        dimensions |= {2: grid * torch.export.Dim("rows", min=2), 3: grid * torch.export.Dim("columns", min=2)}
    image = torch.rand(batch, model.in_channels, *size)
    with failing_as_export_error("The model cannot be traced", config.dynamic):
        return torch.export.export(model, (image,), dynamic_shapes=(dimensions,))


def _write_torch(program: torch.export.ExportedProgram, path: Path, config: ExportConfig) -> dict[str, Any]:
    torch.export.save(program, path)
    return {}


def _write_onnx(program: torch.export.ExportedProgram, path: Path, config: ExportConfig) -> dict[str, Any]:
    onnx = import_extra("onnx", "export")
    import_extra("onnxscript", "export")
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
            f"The model cannot be written with ONNX opset {config.opset}: leave opset out, {written_opset} works."
        )
    return {"opset": written_opset, "onnx_version": onnx.__version__}


def _run_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def _run_onnx(path: Path) -> Run:
    onnxruntime = import_extra("onnxruntime", "export")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


WRITERS = {"torch": _write_torch, "onnx": _write_onnx}
RUNNERS = {"torch": _run_torch, "onnx": _run_onnx}


def _validated_size(config: ExportConfig, model: nn.Module, grid: int) -> tuple[int, int]:
    if config.image_size is None:
        size = protocol_of(model).image_size
    else:
        size = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size,) * 2
    if len(size) != 2 or min(size) < 1:
        raise InferenceError(f"image_size must be one or two numbers of pixels, at least 1, got {config.image_size}.")
    if config.dynamic == "size" and any(side % grid or side < 2 * grid for side in size):
        raise InferenceError(
            f"A dynamic size is traced at multiples of {grid} pixels, from {2 * grid} on; image_size is "
            f"{size[0]}x{size[1]}: choose another image_size, or dynamic batch."
        )
    return tuple(size)


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
            "channel_order": "gray (0.299 R + 0.587 G + 0.114 B)" if model.in_channels == 1 else protocol.channel_order,
            "scale": "uint8 / 255",
        },
        "model": {"name": model.name, "config": model.config, "metadata": model.metadata},
    }


def _check_onnx_is_there() -> None:
    """Tell what is missing before the minutes of tracing."""
    for package in ONNX_PACKAGES:
        try:
            import_extra(package, "export")
        except ImportError as error:
            raise ImportError(f"{error}; or export without ONNX: formats torch") from error


def export(config: ExportConfig) -> list[Path]:
    """Write a model as a `torch.export` program and as ONNX, after checking both against the model.

    The programs take ``image``, float32 ``(B, in_channels, H, W)`` in 0..1, and return ``logits``, float32
    ``(B, classes, H, W)``. ``export.json`` says how to prepare the image and how far the programs differ from the model
    on random images of several batch sizes. See the top of this module for what may vary from call to call.

    Returns:
        The files written.

    Raises:
        ExportError: A program cannot be traced or run, or differs from the model by more than 1e-4 of the largest
            logit; nothing is written.
        InferenceError: A setting out of its range, or an export in the output folder and ``overwrite`` not set.
        ModelFileError: ``config.model`` is no model file.
        ImportError: onnx, onnxscript or onnxruntime is not installed (for ONNX; without it, ``formats=("torch",)``).
    """
    unknown = [name for name in config.formats or () if name not in FORMATS]
    if unknown or not config.formats:
        raise InferenceError(f"formats must be of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}.")
    if config.dynamic not in AXIS_NAMES:
        raise InferenceError(f"dynamic must be one of {', '.join(AXIS_NAMES)}, got {config.dynamic!r}.")
    if config.batch_size < 1:
        raise InferenceError(f"batch_size must be at least 1, got {config.batch_size}.")
    if "onnx" in config.formats:
        _check_onnx_is_there()
    folder = output_folder(config.output)
    files = {name: folder / FORMATS[name] for name in dict.fromkeys(config.formats)}
    if not config.overwrite:
        refuse_existing([*files.values(), folder / SUMMARY], "an export")
    model = uctrans.load_model(config.model).eval()
    if layers_with_backend(model):
        uctrans.set_backend(model, "composed")
    grid = getattr(model, "size_multiple", 16)
    size = _validated_size(config, model, grid)
    shapes = checked_shapes(model, config.dynamic, config.batch_size, size, grid)
    description = _description(model, config, size, grid) | {"formats": {}}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary, _quiet():
        program = _traced(model, config, size, grid)
        for name in files:
            path = Path(temporary) / FORMATS[name]
            details = WRITERS[name](program, path, config)
            description["formats"][name] = details | {
                "file": FORMATS[name],
                "torch_version": torch.__version__,
                "checks": check_program(RUNNERS[name](path), model, shapes, name, config.dynamic),
            }
        for name, path in files.items():
            os.replace(Path(temporary) / FORMATS[name], path)  # noqa: PTH105 - the atomic rename
    write_json(folder / SUMMARY, description | {"settings": dataclasses.asdict(config)})
    return [*files.values(), folder / SUMMARY]
