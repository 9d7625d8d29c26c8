"""Check the parts of a checkpoint, which may be damaged or of another program, before a run takes them."""

from types import NoneType
from typing import Any

import torch

TYPES = {
    "train_config": dict,
    "epoch": int,
    "ema": (dict, NoneType),
    "optimizer": dict,
    "scheduler": dict,
    "best": dict,
    "best.epoch": int,
    "best.dice": float,
    "generators": list,
    "sampler": dict,
    "sampler.generator": torch.Tensor,
    "sampler.train_names": list,
    "sampler.val_names": list,
    "sampler.order": (torch.Tensor, NoneType),
    "sampler.step": int,
    "sampler.totals": (list, NoneType),
}
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}


def damaged_parts(checkpoint: dict[str, Any]) -> list[str]:
    """Return the names of parts that are missing or of another type, such as "sampler.step"."""
    damaged = []
    for name, kind in TYPES.items():
        outer, _, inner = name.partition(".")
        part = checkpoint if not inner else checkpoint.get(outer)
        key = inner or outer
        is_whole = isinstance(part, dict) and key in part and isinstance(part[key], kind)
        if not is_whole or (kind is int and part[key] < 0):
            damaged.append(name)
    return damaged


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of Adam or AdamW, after comparing its tensors with the weights and its settings with numbers.

    Raises:
        ValueError: a part is missing, of another shape, or no number.
        KeyError, TypeError, AttributeError: the state is that of another program.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for group in state["param_groups"]:
        if wrong := [name for name, value in group.items() if not _is_numeric(value)]:
            raise ValueError(f"the optimizer's {wrong[0]} is no number")
    for position, averages in state["state"].items():
        if set(averages) != ADAM_STATE:
            raise ValueError(f"the optimizer holds {', '.join(map(str, averages))} of a weight")
        shapes = {tuple(averages[name].shape) for name in ADAM_STATE - {"step"}}
        if shapes != {tuple(weights[position].shape)} or averages["step"].numel() != 1:
            raise ValueError(f"the optimizer's averages of weight {position} have another shape")
    optimizer.load_state_dict(state)


def check_progress(sampler: dict[str, Any], images: int, images_per_epoch: int, steps_per_epoch: int) -> None:
    """Raise ValueError unless the order of the images and the number of steps done are those of an epoch."""
    order = sampler["order"]
    if sampler["step"] > (0 if order is None else steps_per_epoch):
        raise ValueError(f"step {sampler['step']} is beyond the epoch")
    if order is None:
        return
    if order.dtype != torch.int64 or order.shape != (images_per_epoch,) or not 0 <= order.min() <= order.max() < images:
        raise ValueError("the order of the images is not that of an epoch")


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return value is None or isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
