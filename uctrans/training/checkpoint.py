"""Checkpoints of a run: one dict of tensors and plain values, written atomically and read without unpickling code.

    {"format": "uctrans-checkpoint", "version": 1, "train_config": dict, "epoch": complete epochs,
     "model": {"name", "config", "metadata", "state"}, "ema": state or None, "optimizer": state,
     "scheduler": {"epoch", "learning_rate"}, "best": {"epoch", "dice"},
     "generators": one dict of generator states for each process,
     "sampler": {"generator", "train_names", "val_names", "order", "step", "totals"}}

``order`` is the order of the images of an epoch that was left after ``step`` steps, and ``totals`` its sums so far, one
dict for each process; in a checkpoint between two epochs ``order`` and ``totals`` are None and ``step`` is 0.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from uctrans.models import ModelFileError, read_checkpoint
from uctrans.models.base import load_state
from uctrans.training.errors import CheckpointError

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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch.save reports a failed write
        raise CheckpointError(_write_failure(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to ``path`` atomically; CheckpointError as for ``write_atomically``."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, file))


def copy_checkpoint(source: Path, target: Path) -> None:
    """Give a complete checkpoint a second name, atomically and without writing it again where the disk can link."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError:
        with source.open("rb") as content:
            write_atomically(target, lambda file: shutil.copyfileobj(content, file))
    finally:
        temporary.unlink(missing_ok=True)


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


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can: a file renamed before outlives a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
