"""Trace a model into a program, write it as `torch.export` program or as ONNX, and compare it with the model."""

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import protocol_of
from ..extras import import_extra, require_extra
from ..kernels.channel_attention import fewest_tokens_to_correlate
from ..layers import ChannelAttention, fold_batch_norms
from ..models.base import without_images
from .journal import weights_digest
from .onnx_model import RECORD, OnnxModel
from .settings import InferenceError

AXIS_NAMES = {"none": {}, "batch": {0: "batch"}, "size": {0: "batch", 2: "height", 3: "width"}}
DEFAULT_GRID = 16
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
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


@dataclass(frozen=True)
class ProgramInput:
    """The shapes that an exported program accepts.

    Attributes:
        size: Height and width in pixels that are traced.
        dynamic: What may vary from call to call, none, batch or size; see `uctrans.inference.export`.
        grid: Pixels of which height and width are multiples if they vary.
        batch_size: Images in a call, if their number does not vary.
        channel_order: Order of the colour channels, rgb or bgr; None takes the model's.
    """

    size: tuple[int, int]
    dynamic: str
    grid: int
    batch_size: int = 1
    channel_order: str | None = None

    @property
    def fixed_batch_size(self) -> int | None:
        """Images in a call; None if their number may vary."""
        return self.batch_size if self.dynamic == "none" else None

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None if they may vary."""
        return None if self.dynamic == "size" else self.size


def require_onnx() -> None:
    """Raise ImportError before the minutes of tracing if a package for ONNX is missing."""
    for package in ONNX_PACKAGES:
        require_extra(package, "export")


def size_multiple(model: nn.Module) -> int:
    """Return the pixels of which a program of open size takes multiples."""
    return getattr(model, "size_multiple", DEFAULT_GRID)


def shapes_to_check(model: nn.Module, taken: ProgramInput) -> list[tuple[int, int, int]]:
    """Return batch, height and width of images to check, on both sides of any change of order in the attention."""
    if taken.dynamic == "none":
        return [(taken.batch_size, *taken.size)]
    shapes = [(batch, *taken.size) for batch in CHECKED_BATCHES]
    if taken.dynamic == "batch":
        return shapes
    shapes.append((1, 2 * taken.grid, 3 * taken.grid))
    tokens = _fewest_tokens_to_correlate(model)
    if tokens is not None:
        cells = math.ceil(tokens / math.prod(model.token_grid(taken.grid)))
        rows = max(2, math.isqrt(cells))
        shapes.append((1, rows * taken.grid, max(2, math.ceil(cells / rows)) * taken.grid))
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def trace(model: nn.Module, taken: ProgramInput) -> torch.export.ExportedProgram:
    """Return the program of a model of the composed path in evaluation mode, with its batch norms folded.

    Raises:
        ExportError: The model cannot be traced.
    """
    dimensions: dict[int, Any] = {}
    if taken.dynamic != "none":
        dimensions[0] = torch.export.Dim("batch")
    if taken.dynamic == "size":
        grid = taken.grid
        dimensions |= {2: grid * torch.export.Dim("rows", min=2), 3: grid * torch.export.Dim("columns", min=2)}
    image = torch.rand(taken.fixed_batch_size or TRACED_BATCH, model.in_channels, *taken.size)
    with failing_as_export_error("forward cannot be traced", taken.dynamic):
        return torch.export.export(fold_batch_norms(model), (image,), dynamic_shapes=(dimensions,))


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    model: nn.Module,
    taken: ProgramInput,
    *,
    opset: int | None = None,
    digest: str | None = None,
) -> dict[str, Any]:
    """Write a program as ONNX, with what `OnnxModel` needs; return the versions of operator set and package.

    ``digest`` tells the program from others; None takes that of the model's weights.

    Raises:
        ExportError: The program cannot be converted.
        InferenceError: It cannot be written with the operator set.
    """
    onnx = import_extra("onnx", "export")
    with failing_as_export_error("program cannot be converted to ONNX", taken.dynamic):
        converted = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"image": AXIS_NAMES[taken.dynamic]},
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    converted.model.metadata_props[RECORD] = json.dumps(
        _record(model, taken) | {"digest": digest or weights_digest(model)}
    )
    converted.save(path, external_data=False)
    written_opset = next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    if opset not in (None, written_opset):
        raise InferenceError(f"opset: the model cannot be written with {opset}; leave it out for {written_opset}")
    return {"opset": written_opset, "onnx_version": onnx.__version__}


def _record(model: nn.Module, taken: ProgramInput) -> dict[str, Any]:
    """Return what `OnnxModel` reads."""
    metadata = without_images(model.metadata)
    metadata["channel_order"] = protocol_of(model, taken.channel_order).channel_order
    if taken.fixed_size is not None:
        metadata["image_size"] = list(taken.fixed_size)
    return {
        "name": getattr(model, "name", type(model).__name__),
        "config": model.config,
        "metadata": metadata,
        "in_channels": model.in_channels,
        "classes": model.classes,
        "batch_size": taken.fixed_batch_size,
        "size": taken.fixed_size,
        "size_multiple": taken.grid,
    }


def write_torch(program: torch.export.ExportedProgram, path: Path) -> dict[str, Any]:
    """Write a program for `torch.export.load`; return nothing to note."""
    content = io.BytesIO()  # PyTorch ends the process if it writes to a full disk itself
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return {}


def _run_torch(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


RUNNERS = {"torch": _run_torch, "onnx": OnnxModel}


@torch.inference_mode()
def check_program(
    run: Callable[[Tensor], Tensor], model: nn.Module, shapes: list[tuple[int, int, int]], name: str, dynamic: str
) -> list[dict[str, Any]]:
    """Return the largest difference of a written program from the model on random images of every shape.

    Raises:
        ExportError: It is above the tolerance, the shape or a value is wrong, or the program does not run.
    """
    generator = torch.Generator().manual_seed(0)
    checks = []
    for batch, height, width in shapes:
        image = torch.rand(batch, model.in_channels, height, width, generator=generator)
        expected = model(image)
        with failing_as_export_error(f"{name} export cannot run input {tuple(image.shape)}", dynamic):
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
def failing_as_export_error(problem: str, dynamic: str) -> Iterator[None]:
    """Turn every error into an `ExportError` with a remedy.

    The tracer and the runtimes have no type of their own for what they cannot trace or run.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].rstrip(".")
        raise ExportError(f"model: its {problem} ({reason}); nothing was written, {REMEDIES[dynamic]}") from error
