"""Checkpoints of a run: one dict of tensors and plain values, written atomically and read without unpickling code.

    {"format": "uctrans-checkpoint", "version": 1, "train_config": dict, "epoch": complete epochs,
     "model": {"name", "config", "metadata", "state"}, "ema": state or None, "optimizer": state,
     "scheduler": {"epoch", "learning_rate"}, "best": {"epoch", "dice"},
     "generators": one dict of generator states for each process,
     "sampler": {"generator", "train_names", "val_names", "order", "step", "totals"}}

``order`` is the order of the images of an epoch that was left after ``step`` steps, and ``totals`` its sums so far, one
dict for each process; in a checkpoint between two epochs ``order`` and ``totals`` are None and ``step`` is 0.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from uctrans.models import ModelFileError, read_checkpoint
from uctrans.models.base import load_state
from uctrans.training.errors import CheckpointError
from uctrans.writing import remove_unfinished, written_atomically

FORMAT = "uctrans-checkpoint"
VERSION = 1
KEYS = ("train_config", "epoch", "model", "ema", "optimizer", "scheduler", "best", "generators", "sampler")
MODEL_KEYS = ("name", "config", "metadata", "state")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call ``write`` with a new binary file that replaces ``path`` once it is complete and on the disk.

    Raises:
        CheckpointError: the file cannot be written. What was at ``path`` before is still there, whole.
    """
    with _failures_named(path), written_atomically(path) as temporary, temporary.open("wb") as file:
        write(file)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to ``path`` atomically; raise CheckpointError as ``write_atomically`` does."""
    remove_unfinished(path)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, file))


def copy_checkpoint(source: Path, target: Path) -> None:
    """Give a complete checkpoint a second name, atomically and without a copy where the disk can link."""
    with _failures_named(target), written_atomically(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: the file is missing, damaged, holds pickled objects, or is no checkpoint of this format.
    """
    path = Path(path)
    remedy = "take another checkpoint of the run (best.pt), or train anew in another output folder"
    try:
        checkpoint = read_checkpoint(path)
    except ModelFileError as error:
        raise CheckpointError(f"{error}; or {remedy}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is not a checkpoint of a training run; name a last.pt or best.pt, or give weights as init_from"
        )
    if checkpoint.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has format version {checkpoint.get('version')}, this uctrans reads {VERSION}; "
            "use the uctrans that wrote it"
        )
    missing = [key for key in KEYS if key not in checkpoint]
    missing += [f"model.{key}" for key in MODEL_KEYS if key not in (checkpoint.get("model") or ())]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; {remedy}")
    return checkpoint


def load_weights(model: torch.nn.Module, saved: dict[str, Any], path: str | Path) -> None:
    """Load the "model" entry of a checkpoint into ``model``.

    Raises:
        CheckpointError: it belongs to another network or to another size of it; the message says what differs.
        ModelFileError: the tensors are not those of this network.
    """
    if saved["name"] != model.name:
        raise CheckpointError(f"{path}: holds a {saved['name']}, not a {model.name}; set model to {saved['name']}")
    different = [
        f"{name}: {saved['config'].get(name)!r} in the file, {model.config.get(name)!r} here"
        for name in {**saved["config"], **model.config}
        if _plain(saved["config"].get(name)) != _plain(model.config.get(name))
    ]
    if different:
        raise CheckpointError(
            f"{path}: holds another {model.name} ({'; '.join(different)}); use the options of the file"
        )
    load_state(model, saved["state"], path)


@contextlib.contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        raise CheckpointError(_write_failure(path, error)) from error


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _write_failure(path: Path, error: Exception) -> str:
    reason = _first_line(error)
    number = getattr(error, "errno", None) or getattr(error.__cause__ or error.__context__, "errno", None)
    free = shutil.disk_usage(path.parent).free >> 20 if path.parent.is_dir() else 0
    remedy = (
        "make the folder writable" if number in (errno.EACCES, errno.EPERM, errno.EROFS) else "free space on the disk"
    )
    if number in _NO_SPACE:
        reason = f"no space: {reason}"
    return (
        f"{path}: cannot be written ({reason}; {free} MiB free on the disk); what was saved there before is untouched; "
        f"{remedy} and continue with resume"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
