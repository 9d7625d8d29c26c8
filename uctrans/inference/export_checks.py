"""Hold an exported program against the model it was made from, at sizes where the two may differ."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from uctrans.inference.files import InferenceError
from uctrans.kernels.channel_attention import fewest_tokens_to_correlate
from uctrans.layers.attention import ChannelAttention

CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4  # of the largest logit, or of 1 where that is larger
REMEDIES = {
    "none": "Try another version of PyTorch.",
    "batch": "Set dynamic to none and batch_size to what you need, or try another version of PyTorch.",
    "size": "Set dynamic to batch and export every image_size you need, or try another version of PyTorch.",
}

Run = Callable[[Tensor], Tensor]


class ExportError(InferenceError):
    """A program cannot be made or run, or does not compute what the model computes; nothing was written."""


@contextlib.contextmanager
def failing_as_export_error(what: str, dynamic: str) -> Iterator[None]:
    """Turn every error into an :class:`ExportError` that starts with ``what`` and ends with a remedy.

    The tracer and the runtimes have no type of their own for what they cannot trace or run.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].rstrip(".")
        raise ExportError(f"{what} ({reason}): nothing was written. {REMEDIES[dynamic]}") from error


def checked_shapes(
    model: nn.Module, dynamic: str, batch_size: int, size: tuple[int, int], grid: int
) -> list[tuple[int, int, int]]:
    """Batch, height and width of the images to check with: every batch, and sizes on both sides of any change of order.

    Args:
        model: what was exported.
        dynamic: what may vary; see :mod:`uctrans.inference.export`.
        batch_size: of an export for one batch.
        size: height and width that were traced.
        grid: of what height and width are multiples, where they may vary.
    """
    if dynamic == "none":
        return [(batch_size, *size)]
    shapes = [(batch, *size) for batch in CHECKED_BATCHES]
    if dynamic == "batch":
        return shapes
    tokens = _fewest_tokens_to_correlate(model)
    large = [] if tokens is None else [(1, *_size_of(tokens, math.prod(model.token_grid(grid)), grid))]
    return list(dict.fromkeys([*shapes, (1, 2 * grid, 3 * grid), *large]))


@torch.inference_mode()
def check_program(
    run: Run, model: nn.Module, shapes: list[tuple[int, int, int]], name: str, dynamic: str
) -> list[dict[str, Any]]:
    """Largest difference from the model on random images of every shape.

    Raises:
        ExportError: It is above the tolerance, the shape or a value is wrong, or the program does not run.
    """
    generator = torch.Generator().manual_seed(0)
    checks = []
    for batch, height, width in shapes:
        image = torch.rand(batch, model.in_channels, height, width, generator=generator)
        expected = model(image)
        with failing_as_export_error(f"The {name} export cannot run input {tuple(image.shape)}", dynamic):
            found = run(image)
        if expected.shape != found.shape:
            raise ExportError(f"The {name} export gives {tuple(found.shape)}, the model {tuple(expected.shape)}.")
        difference = (expected - found).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise ExportError(
                f"The {name} export differs from the model by {difference:.2g} on input {tuple(image.shape)}, more "
                f"than {allowed:.2g}: nothing was written. Try another opset or another version of PyTorch."
            )
        checks.append({"input": list(image.shape), "largest_difference": difference, "allowed": allowed})
    return checks


def _fewest_tokens_to_correlate(model: nn.Module) -> int | None:
    """From how many tokens on all of the model's attention multiplies in the order of a program with an open size."""
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


def _size_of(tokens: int, tokens_a_cell: int, grid: int) -> tuple[int, int]:
    """Height and width of an image of at least ``tokens``, nearly square, in cells of ``grid`` pixels, 2 at least."""
    cells = math.ceil(tokens / tokens_a_cell)
    rows = max(2, math.isqrt(cells))
    return rows * grid, max(2, math.ceil(cells / rows)) * grid
