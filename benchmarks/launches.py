"""Count the operators that a training step dispatches under each backend, without computing anything.

    python -m benchmarks.network --mode launches

Forward, loss and backward run on PyTorch's device "meta", which knows shapes alone, so no GPU is needed. Views and
allocations launch nothing and are not counted. An operator of this project counts as one and launches one to a few
kernels. Autocast is off, and with it the casts of weights.
"""

import contextlib
import os
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uctrans
from uctrans.kernels import segmentation_loss
from uctrans.kernels.backend import INTERPRETER_VARIABLE

BACKENDS = ("reference", "composed", "triton")
SHOWN_OPERATORS = 12
NOT_LAUNCHED = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
    "_unsafe_view",  # a view, which its schema does not say
)


class Launched(TorchDispatchMode):
    """Counts the operators that are dispatched, without views and allocations, in ``operators``."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        namespace, name = function.name().split("::")
        name = name.split(".")[0]
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in NOT_LAUNCHED:
            self.operators[f"{namespace}::{name}"] += 1
        return function(*arguments, **(options or {}))


def dispatched_operators(
    model_name: str, backend: str, batch: int = 4, pixels: int = 224, **options: Any
) -> Counter[str]:
    """Return the operators of one forward pass, loss and backward pass by name; ``options`` are those of the model."""
    # In place of a GPU, without which the backend triton would be refused; and "meta" has no autocast to switch off.
    without_gpu = mock.patch.dict(os.environ, {INTERPRETER_VARIABLE: "1"})
    without_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with without_gpu, without_autocast, torch.device("meta"):
        model = uctrans.create_model(model_name, backend=backend, image_size=pixels, **options)
        model = model.to(memory_format=torch.channels_last).train()
        images = torch.empty(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
        masks = torch.empty(batch, pixels, pixels, dtype=torch.uint8)
        with Launched() as launched:
            segmentation_loss(model(images), masks, backend=backend).backward()
    return launched.operators


def operator_table(counts: dict[str, Counter[str]]) -> str:
    """Return the totals of all backends, and the operators that differ most from the first backend's, in Markdown."""
    first = next(iter(counts.values()))
    names = {name for operators in counts.values() for name in operators}
    spread = {name: max(abs(operators[name] - first[name]) for operators in counts.values()) for name in names}
    shown = sorted(names, key=lambda name: (-spread[name], name))[:SHOWN_OPERATORS]
    rows = [["operators", *counts], ["---", *["---:"] * len(counts)]]
    rows.append(["all", *(str(operators.total()) for operators in counts.values())])
    rows += [[f"`{name}`", *(str(operators[name]) for operators in counts.values())] for name in shown]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
