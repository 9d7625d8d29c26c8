"""Checkpoints of a run: their format, their files, and a thread that writes them while training continues.

A checkpoint is a dict of tensors and plain values that is written atomically and read without unpickling code:

    {"format": "uctrans-checkpoint", "version": 1, "train_config": dict, "epoch": complete epochs,
     "model": {"name", "config", "metadata", "state"}, "ema": state or None, "optimizer": state,
     "scheduler": {"epoch", "learning_rate"}, "best": {"epoch", "dice"},
     "generators": one dict of generator states for each process,
     "sampler": {"generator", "train_names", "train_digest", "train_fingerprints", "val_names", "val_digest",
                 "val_fingerprints", "order", "step", "totals"}}

In the middle of an epoch ``order`` is the order of its images, ``step`` the number of steps done, and ``totals`` the
sums so far, one dict for each process. Between two epochs ``order`` and ``totals`` are None and ``step`` is 0.
"""

import contextlib
import copy
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models import ModelFileError, read_checkpoint
from ..models.base import write_model
from ..models.files import CHECKPOINT_FORMAT, CHECKPOINT_VERSION, LAST_CHECKPOINT, check_saved_model
from ..models.metadata import check_metadata
from ..models.weights import load_state, read_config
from ..system import CAUSES, first_line
from ..writing import written_atomically
from .config import CHANGEABLE_ON_RESUME, ConfigError, TrainConfig, changed_fields
from .log import failures_named, read_metrics
from .parts import damaged_parts

REMEDY = "take another checkpoint of the run (best.pt), or train in another output folder"
RUN_FILES = (LAST_CHECKPOINT, "best.pt", "best", "metrics.csv", "config.yaml")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used here; the message names the file and the remedy."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to ``path`` atomically.

    Raises:
        CheckpointError: the file cannot be written. The previous file is still there, whole.
    """
    with _failed_writes_named(path), written_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, **checkpoint}, file)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Give a complete checkpoint a second name, atomically and without a copy if the disk can link."""
    with _failed_writes_named(target), written_atomically(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_files(folder: Path, checkpoint: dict[str, Any], is_best: bool) -> None:
    """Write last.pt and, for the best epoch, best.pt and best/, each atomically.

    Raises:
        CheckpointError, TrainingError: a file cannot be written. The previous one is still there.
    """
    if not is_best:
        save_checkpoint(folder / LAST_CHECKPOINT, checkpoint)
        return
    with failures_named(folder / "best"):
        write_model(folder / "best", checkpoint["model"] | {"state": checkpoint["ema"] or checkpoint["model"]["state"]})
    # best.pt comes first: if last.pt is not reached, the epoch is repeated and gives the same best.pt.
    save_checkpoint(folder / "best.pt", checkpoint)
    copy_checkpoint(folder / "best.pt", folder / LAST_CHECKPOINT)


def find_checkpoint(config: TrainConfig) -> dict[str, Any] | None:
    """Return the checkpoint from which to resume, or None for a new run.

    Raises:
        CheckpointError: there is nothing to resume, the checkpoint cannot be read, or the files are of several runs.
        ConfigError: the output folder already holds a run, or the run to resume has other settings.
    """
    folder = Path(config.output)
    if not config.resume:
        if found := [name for name in RUN_FILES if (folder / name).exists()]:
            remedy = "continue it with resume, or " if LAST_CHECKPOINT in found else ""
            raise ConfigError(f"output: {folder} holds a run already ({', '.join(found)}); {remedy}name another folder")
        return None
    path = folder / LAST_CHECKPOINT
    if not path.exists():
        raise CheckpointError(f"{path}: there is no run to resume; name its folder as output, or train without resume")
    checkpoint = load_checkpoint(path)
    if changed := changed_fields(checkpoint["train_config"], config.to_dict()):
        raise ConfigError(
            f"{folder}: the run has other settings ({'; '.join(changed)}), and resuming may change only "
            f"{', '.join(CHANGEABLE_ON_RESUME)}; give the former values, or train in another folder"
        )
    if foreign := _files_of_another_run(folder, checkpoint):
        raise CheckpointError(
            f"{path}: is of another run than {' and '.join(foreign)} in {folder}; move these away to continue the run "
            f"of {LAST_CHECKPOINT} without them, restore those of this run, or train in another output folder"
        )
    return checkpoint


def _files_of_another_run(folder: Path, checkpoint: dict[str, Any]) -> list[str]:
    """Return the names of files that another run than that of ``checkpoint`` wrote, as far as they tell.

    Files of earlier versions have no ``run_id``. A file that cannot be read is not needed to resume.
    """
    ids = {}
    with contextlib.suppress(ModelFileError):
        metadata = read_config(folder / "best").get("metadata", {})
        check_metadata(metadata, folder / "best")
        ids["best"] = metadata.get("run_id")
    best_checkpoint = folder / "best.pt"
    if best_checkpoint.exists() and not best_checkpoint.samefile(folder / LAST_CHECKPOINT):
        with contextlib.suppress(CheckpointError):
            ids["best.pt"] = load_checkpoint(best_checkpoint)["model"]["metadata"].get("run_id")
    own = checkpoint["model"]["metadata"].get("run_id")
    foreign = [name for name, run_id in ids.items() if None not in (own, run_id) and own != run_id]
    best = checkpoint["best"]
    scores = [row["val_dice"] for row in read_metrics(folder / "metrics.csv") if row["epoch"] == best["epoch"]]
    if any(score != best["dice"] for score in scores):
        foreign.append("metrics.csv")
    return foreign


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: the file is missing or damaged, holds pickled objects, or is no checkpoint of this format.
    """
    path = Path(path)
    try:
        checkpoint = read_checkpoint(path)
    except ModelFileError as error:
        raise CheckpointError(f"{error}; or {REMEDY}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: is not a checkpoint of a training run; name a last.pt or best.pt, or use init_from for weights"
        )
    if checkpoint.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {checkpoint.get('version')}, this uctrans reads {CHECKPOINT_VERSION}; "
            "use the uctrans that wrote it"
        )
    if damaged := damaged_parts(checkpoint):
        raise CheckpointError(f"{path}: lacks {', '.join(damaged)}, or they are damaged; {REMEDY}")
    try:
        check_saved_model(checkpoint.get("model"), path)
    except ModelFileError as error:
        raise CheckpointError(f"{error}; {REMEDY}") from error
    return checkpoint


@contextlib.contextmanager
def foreign_parts_named(path: Path) -> Iterator[None]:
    """Turn the errors of restoring a run from parts that are not its own into a CheckpointError."""
    try:
        yield
    except (CheckpointError, ModelFileError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its parts are damaged or not those of this run ({first_line(error)}); {REMEDY}"
        ) from error


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
def _failed_writes_named(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        number = getattr(error, "errno", None) or getattr(error.__cause__ or error.__context__, "errno", None)
        cause, remedy = CAUSES.get(number, ("writing failed", "free space on the disk"))
        raise CheckpointError(
            f"{path}: cannot be written ({cause}: {first_line(error)}), and the previous file is unchanged; {remedy} "
            "and continue with resume"
        ) from error


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class StateCopy:
    """Host memory for copies of a state, used again for the next copy because pinning memory takes long."""

    def __init__(self):
        self._tensors: dict[tuple, torch.Tensor] = {}

    def take(self, state: Any) -> Any:
        """Copy nested dicts, lists and tuples with their tensors; this overwrites the result of the previous call."""
        copied = self._copied(state, ())
        if torch.cuda.is_initialized():
            # The next step changes these tensors, so it would have to wait for the copy in any case.
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, value: Any, place: tuple) -> Any:
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps the attributes of a state dict
            copied.update({key: self._copied(item, (*place, key)) for key, item in value.items()})
            return copied
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, (*place, number)) for number, item in enumerate(value))
        return self._copied_tensor(value, place) if isinstance(value, torch.Tensor) else value

    def _copied_tensor(self, tensor: torch.Tensor, place: tuple) -> torch.Tensor:
        kept = self._tensors.get(place)
        if kept is None or _layout(kept) != _layout(tensor):
            kept = self._tensors[place] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=tensor.is_cuda)


@dataclass(frozen=True)
class _Save:
    memory: StateCopy
    checkpoint: dict[str, Any]
    is_best: bool


class CheckpointWriter:
    """Context manager that calls ``write(checkpoint, is_best)`` in a thread; leaving it waits for all checkpoints.

    Training continues as soon as its state is copied. One checkpoint is written at a time and one more waits, so there
    are at most two copies of the state, in pinned memory if it is on a CUDA device (PyTorch rounds the bytes of each
    tensor up to a power of two). A newer checkpoint replaces the waiting one, so a slow disk does not delay training.
    Only a better epoch may replace a waiting best epoch: any other save blocks until that one is being written.

    An error of ``write`` is raised by the next call of a method, at the latest on leaving. If another error is already
    being raised, it gets a note. The thread never calls CUDA, which could spoil a CUDA graph that is being recorded.
    """

    def __init__(self, write: Callable[[dict[str, Any], bool], None]):
        self._write = write
        self._changed = threading.Condition()  # guards all attributes below
        self._free = [StateCopy(), StateCopy()]
        self._waiting: _Save | None = None
        self._is_writing = self._is_over = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)

    def save(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        """Copy ``checkpoint`` and write it as soon as possible; raise an error of an earlier one."""
        with self._changed:
            self._changed.wait_for(lambda: is_best or self._waiting is None or not self._waiting.is_best)
            self._raise_failure()
            memory = self._free.pop() if self._waiting is None else self._waiting.memory
            self._waiting = None
        save = _Save(memory, memory.take(checkpoint), is_best)
        with self._changed:
            self._waiting = save
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all checkpoints are on the disk; raise an error of writing them."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._is_writing)
            self._raise_failure()

    def __enter__(self) -> "CheckpointWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"also: {failure}")
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
        self._thread.join()  # its references to pinned memory are gone, whose release calls CUDA

    def _work(self) -> None:
        while (save := self._next()) is not None:
            failure = None
            try:
                self._write(save.checkpoint, save.is_best)
            except BaseException as error:  # raised again in the training
                failure = error
            with self._changed:
                self._failure = self._failure or failure
                self._free.append(save.memory)
                self._is_writing = False
                self._changed.notify_all()
            save = None  # releasing pinned memory calls CUDA, so the training does it

    def _next(self) -> _Save | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._is_over)
            save, self._waiting = self._waiting, None
            self._is_writing = save is not None
            self._changed.notify_all()
            return save

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype
