"""The training loop.

A run lives in a folder: config.yaml, last.pt, best.pt, best/ (the best weights, for use), metrics.csv, progress.png,
tensorboard/ and log.txt. last.pt is written before the first step, with a best epoch and the last one, after the epoch
in which ``save_minutes`` ran out, and when a signal stops the run, then in the middle of an epoch: after the step that
was running, the same in all processes. A run continued from it ends with the very bits of an undisturbed one.

Files are written beside the training (see ``uctrans.training.writer``). A run that is killed goes on from what is on
the disk by then; one that ends in any other way has written everything.
"""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uctrans.models.base import write_model
from uctrans.training.build import learning_rate
from uctrans.training.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from uctrans.training.config import CHANGEABLE_ON_RESUME, TrainConfig, changed_fields
from uctrans.training.distributed import Processes, processes
from uctrans.training.errors import CheckpointError, ConfigError, TrainingError
from uctrans.training.logs import RunLog, SilentLog, writing
from uctrans.training.run import Run
from uctrans.training.signals import StopRequest
from uctrans.training.step import validate, validation_batch_size
from uctrans.training.writer import CheckpointWriter

RUN_FILES = ("last.pt", "best.pt", "best", "metrics.csv", "config.yaml")
NAMES_SHOWN = 16


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_folder: where everything was written.
        best_epoch: the epoch with the best validation Dice, 0 where there was none yet.
        best_score: its Dice, nan where there was none yet.
        epochs: complete epochs.
        stopped_by: "epochs" or "early stopping"; "SIGINT", "SIGTERM" or "time" where it can go on.
    """

    run_folder: Path
    best_epoch: int
    best_score: float
    epochs: int
    stopped_by: str


def train(config: TrainConfig, *, stop_at: float | None = None) -> RunResult:
    """Train a network as ``config`` says, or continue the run in its output folder.

    Under ``torchrun`` every process calls this; the first one writes the files. At ``stop_at``, a time as of
    ``time.time()``, the run is stopped after the step that is running and saved, as by a signal.

    Raises:
        ConfigError: a setting cannot be used here, or a resumed run was begun with other settings.
        DataError: the data cannot be used.
        ModelFileError: ``init_from`` cannot be used.
        CheckpointError: a checkpoint cannot be read or written.
        TrainingError: the loss or the weights are no longer finite, or a log cannot be written.
        ImportError: a package of the extra "training" is missing.
    """
    config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    with processes(config.device) as group:
        checkpoint = find_checkpoint(config)
        run = Run(config, group)
        if checkpoint is not None:
            run.load_state_dict(checkpoint, Path(config.output) / "last.pt")
            del checkpoint
        group.barrier()  # nobody writes before everybody has looked
        with _open_log(run) as log, StopRequest(stop_at) as stop:
            with open_writer(config) as writer:
                if not config.resume:
                    save(run, writer)
                    writer.wait()  # a folder with files of a run, but without last.pt, could not be gone on with
                if group.is_main:
                    dataclasses.replace(config, resume=False).save_yaml(Path(config.output) / "config.yaml")
                stopped_by = train_epochs(run, log, stop, writer)
            log.line(_farewell(run, stopped_by))
        group.barrier()  # nobody leaves before the files are complete
    return RunResult(Path(config.output), run.best_epoch, run.best_dice, run.epoch, stopped_by)


def train_epochs(run: Run, log: RunLog | SilentLog, stop: StopRequest, writer: CheckpointWriter) -> str:
    """Train until the run is over; return why."""
    saved = time.perf_counter()
    while run.epoch < run.config.epochs and not run.is_out_of_patience:
        started, images_before = time.perf_counter(), run.images_before(run.steps_done)
        is_complete = train_epoch(run, log, stop)
        check_training_was_finite(run)
        check_weights_are_finite(run)
        is_best = is_complete and complete_epoch(run, log, started, images_before)
        signal_name = next(filter(None, run.group.gather(stop.name)), None)
        is_over = run.epoch == run.config.epochs or run.is_out_of_patience
        is_due = run.group.any(time.perf_counter() - saved >= 60 * run.config.save_minutes)
        if is_best or is_over or signal_name or is_due:
            save(run, writer, is_best=is_best)
            saved = time.perf_counter()
        if signal_name and not is_over:
            return signal_name
    return "early stopping" if run.is_out_of_patience else "epochs"


def train_epoch(run: Run, log: RunLog | SilentLog, stop: StopRequest) -> bool:
    """Do the steps that are left of an epoch; return False where a signal came before the last one."""
    run.begin_epoch()
    while run.steps_done < run.steps_per_epoch:
        if run.group.any(stop.name is not None):  # the signal may come to the processes at different steps
            return False
        run.step(run.batch(run.steps_done))
        run.steps_done += 1
        log.step()
    return True


def complete_epoch(run: Run, log: RunLog | SilentLog, started: float, images_before: int) -> bool:
    """Read the sums of the epoch, validate, log; tell whether this is the best epoch so far.

    ``started`` is when this process began or resumed the epoch, after the ``images_before`` first images of it.
    """
    train_loss, train_dice = run.totals.read(run.group)
    run.end_epoch()
    is_validated = run.epoch % run.config.val_every == 0 or run.epoch == run.config.epochs
    val_loss, val_dice = validate_epoch(run) if is_validated else (None, None)
    is_best = is_validated and run.take_score(val_dice)
    seconds = time.perf_counter() - started
    log.epoch(
        {
            "epoch": run.epoch,
            "learning_rate": learning_rate(run.config, run.epoch),
            "train_loss": train_loss,
            "train_dice": train_dice,
            "val_loss": val_loss,
            "val_dice": val_dice,
            "best_epoch": run.best_epoch or None,
            "best_dice": run.best_dice if run.best_epoch else None,
            "seconds": seconds,
            "images_per_second": (run.images_before(run.steps_per_epoch) - images_before) / seconds,
        }
    )
    return is_best


def validate_epoch(run: Run) -> tuple[float, float]:
    """Return mean loss and mean Dice over the validation images; TrainingError names images with a non-finite loss."""
    if run.average:
        run.group.share_buffers(run.average.model)
    totals = validate(
        run.validated_model, run.val_data, run.protocol, run.config, run.group, forward=run.validation_forward
    )
    for rank, step in enumerate(run.group.gather(totals.first_bad.item())):
        if step >= 0:
            size = validation_batch_size(run.protocol, run.config)
            names = run.val_data.names[rank :: run.group.count][step * size : (step + 1) * size]
            raise TrainingError(
                f"epoch {run.epoch}: the validation loss is not finite for {_listed(names)}; look at these images, or "
                f"resume with a lower learning_rate or with amp no. {_kept(run)}"
            )
    return totals.read(run.group)


def check_training_was_finite(run: Run) -> None:
    """Raise TrainingError, naming the images, where the loss of a step of this epoch was not finite."""
    for rank, step in enumerate(run.group.gather(run.totals.first_bad.item())):
        if step >= 0:
            names = [run.train_data.names[position] for position in run.batch(step, rank).tolist()]
            raise TrainingError(
                f"epoch {run.epoch + 1}, step {step + 1}: the loss is not finite for the batch of {_listed(names)}; "
                f"look at these images and masks, or resume with a lower learning_rate or with amp no. {_kept(run)}"
            )


def check_weights_are_finite(run: Run) -> None:
    """Raise TrainingError where the last step, whose loss was finite, has spoilt the weights."""
    floating = [tensor for tensor in run.model.state_dict().values() if tensor.is_floating_point() and tensor.numel()]
    # The largest magnitude of each, for all tensors in a few launches.
    if not torch.stack(torch._foreach_norm(floating, math.inf)).isfinite().all():
        raise TrainingError(
            f"epoch {run.epoch + 1}: the last step made weights that are not finite; resume with a lower "
            f"learning_rate or with amp no. {_kept(run)}"
        )


def open_writer(config: TrainConfig) -> CheckpointWriter:
    """Return what writes the checkpoints of a run into its folder."""
    return CheckpointWriter(functools.partial(write_files, Path(config.output)))


def save(run: Run, writer: CheckpointWriter, *, is_best: bool = False) -> None:
    """Have last.pt written and, for the best epoch, best.pt and best/; raise what went wrong with earlier ones."""
    checkpoint = run.state_dict()
    if run.group.is_main:
        writer.save(checkpoint, is_best)


def write_files(folder: Path, checkpoint: dict[str, Any], is_best: bool) -> None:
    """Write last.pt and, for the best epoch, best.pt and best/, each as a whole.

    Raises:
        CheckpointError, TrainingError: a file cannot be written; the one before is still there.
    """
    if not is_best:
        save_checkpoint(folder / "last.pt", checkpoint)
        return
    with writing(folder / "best"):
        for half in (folder / "best").glob(".*"):  # left by a process that was killed
            half.unlink()
        write_model(folder / "best", checkpoint["model"] | {"state": checkpoint["ema"] or checkpoint["model"]["state"]})
    # best.pt comes first: if last.pt is not reached, the epoch is done once more and gives the same best.pt.
    save_checkpoint(folder / "best.pt", checkpoint)
    copy_checkpoint(folder / "best.pt", folder / "last.pt")


def find_checkpoint(config: TrainConfig) -> dict[str, Any] | None:
    """Return the checkpoint to continue from, or None for a new run.

    Raises:
        CheckpointError: there is nothing to resume, or the checkpoint cannot be read.
        ConfigError: the output folder holds a run already, or the run to resume has other settings.
    """
    folder = Path(config.output)
    if not config.resume:
        if found := [name for name in RUN_FILES if (folder / name).exists()]:
            remedy = "continue it with resume, or " if "last.pt" in found else ""
            raise ConfigError(f"output: {folder} holds a run already ({', '.join(found)}); {remedy}name another folder")
        return None
    path = folder / "last.pt"
    if not path.exists():
        raise CheckpointError(f"{path}: there is no run to resume; name its folder as output, or train without resume")
    checkpoint = load_checkpoint(path)
    if changed := changed_fields(checkpoint["train_config"], config.to_dict()):
        raise ConfigError(
            f"{folder}: the run was begun with other settings, which a resumed run keeps: {'; '.join(changed)}. "
            f"Give the former values, or train anew in another folder (may change: {', '.join(CHANGEABLE_ON_RESUME)})"
        )
    return checkpoint


def _open_log(run: Run) -> RunLog | SilentLog:
    config = run.config
    if not run.group.is_main:
        return SilentLog()
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be made a folder ({error}); name another one") from error
    log = RunLog(config, run.epoch, run.steps_done, run.steps_per_epoch)
    size = sum(parameter.numel() for parameter in run.model.parameters())
    log.line(
        f"{'continuing' if config.resume else 'training'} {config.model} ({size / 1e6:.2f} M parameters) on "
        f"{len(run.train_data)} images, validating on {len(run.val_data)}, {_devices(run.group)}, "
        f"epoch {run.epoch + 1} to at most {config.epochs}, in {folder}"
    )
    if run.epoch < run.first_best_epoch - 1:
        log.line(f"the best weights are those of epoch {run.first_best_epoch} or later (first_best_epoch)")
    if config.graph and run.group.device.type == "cuda":
        obstacle = run.obstacle_to_capture
        log.line("steps are replayed as CUDA graphs" if obstacle is None else f"no CUDA graphs: {obstacle}")
    if config.compile:
        log.line("compiling the network: the first step of each size of batch waits for it, on a CPU for minutes")
    return log


def _devices(group: Processes) -> str:
    return str(group.device) if group.count == 1 else f"{group.count} processes on {group.device.type}"


def _farewell(run: Run, stopped_by: str) -> str:
    best = (
        f"best validation Dice {run.best_dice:.4f} at epoch {run.best_epoch}" if run.best_epoch else "no best epoch yet"
    )
    if stopped_by not in ("epochs", "early stopping"):
        where = f"after epoch {run.epoch}" + (f" and {run.steps_done} steps" if run.steps_done else "")
        path = Path(run.config.output) / "last.pt"
        return f"stopped by {stopped_by} {where}, saved in {path}; continue with resume; {best}"
    why = f"no better for {run.config.patience} epochs" if stopped_by == "early stopping" else "all epochs done"
    return f"finished after epoch {run.epoch} ({why}); {best}"


def _kept(run: Run) -> str:
    return f"{Path(run.config.output) / 'last.pt'} holds the last good state"


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + rest
