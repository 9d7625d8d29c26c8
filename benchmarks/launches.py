"""How many operators a training step dispatches under each backend, counted without computing anything.

    python -m benchmarks.launches --model uctransnet

Forward, loss and backward at full size on PyTorch's device "meta", which knows shapes alone, so it needs no GPU and
little time. Views and allocations launch nothing and are left out. An operator of this project counts as one and
launches one to a few kernels; autocast is off, and with it the casts of weights. What a GPU launches,
``benchmarks.profile_step`` counts.
"""

import argparse
import contextlib
import os
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uctrans
from uctrans.kernels.backend import INTERPRETER_VARIABLE
from uctrans.training.losses import segmentation_loss

BACKENDS = ("reference", "composed", "triton")
WITHOUT_KERNELS = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
    "_unsafe_view",  # a view, whose schema does not say so
)
MOST_SHOWN = 12


class Launched(TorchDispatchMode):
    """Counts the operators that are dispatched, without views and allocations, in ``operators``."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        namespace, name = function.name().split("::")
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name.split(".")[0] not in WITHOUT_KERNELS:
            self.operators[f"{namespace}::{name.split('.')[0]}"] += 1
        return function(*arguments, **(options or {}))


def count(model_name: str, backend: str, batch: int = 4, pixels: int = 224, base_channels: int = 64) -> Counter[str]:
    """Operators of one forward pass, loss and backward pass, by name."""
    model = uctrans.create_model(model_name, base_channels=base_channels, image_size=pixels, backend=backend)
    model = model.to("meta", memory_format=torch.channels_last).train()
    images = torch.empty(batch, 3, pixels, pixels, device="meta").contiguous(memory_format=torch.channels_last)
    masks = torch.empty(batch, pixels, pixels, dtype=torch.uint8, device="meta")
    # The loss switches autocast off, which this device does not have.
    without_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with without_autocast, Launched() as launched:
        segmentation_loss(model(images), masks, backend=backend).backward()
    return launched.operators


def table(counts: dict[str, Counter[str]]) -> str:
    """The totals of all backends, and the operators whose numbers differ most from the first backend's, in Markdown."""
    first = next(iter(counts.values()))
    names = {name for operators in counts.values() for name in operators}
    spread = {name: max(abs(operators[name] - first[name]) for operators in counts.values()) for name in names}
    shown = sorted(names, key=lambda name: (-spread[name], name))[:MOST_SHOWN]
    rows = [["operators", *counts], ["---", *["---:"] * len(counts)]]
    rows.append(["all", *[str(operators.total()) for operators in counts.values()]])
    rows += [[f"`{name}`", *[str(operators[name]) for operators in counts.values()]] for name in shown]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table of one network."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="uctransnet", choices=["uctransnet", "dual_branch_uctransnet"])
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    os.environ[INTERPRETER_VARIABLE] = "1"  # in place of a GPU, without which the backend triton would be refused
    print(table({backend: count(arguments.model, backend, arguments.batch) for backend in BACKENDS}))


if __name__ == "__main__":
    main()
