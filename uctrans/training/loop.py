"""The training loop: epochs, the training step, validation.

A run is a folder with config.yaml, last.pt, best.pt, best/ (the best weights, for use), metrics.csv, progress.png,
tensorboard/ and log.txt. last.pt is written

- before the first step,
- after every best epoch and the last epoch,
- after the epoch in which ``save_minutes`` have passed since it was last written,
- when a signal stops the run.

A signal stops a run after the current step, which is the same in all processes. A run resumed from last.pt ends with
the same bits as one that was never stopped.

A thread writes the checkpoints while training continues (see ``uctrans.training.checkpoint``). A killed run resumes
from what is on the disk; a run that ends in any other way has written everything. A new run that fails in its first
epoch, as with a batch that exceeds the memory, removes what it wrote, so that it can begin again with other settings.

The folder is locked during a run, so that no other process writes into it.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.find import describe_draw
from ..devices import explaining_short_memory
from ..kernels import segmentation_totals
from ..models.files import LAST_CHECKPOINT
from .checkpoint import (
    RUN_FILES,
    CheckpointError,
    CheckpointWriter,
    find_checkpoint,
    foreign_parts_named,
    load_checkpoint,
    write_files,
)
from .config import TrainConfig, settings_for_memory
from .distributed import locked_by_main, processes
from .log import LOG_FILES, RunLog, SilentLog, TrainingError, failures_named
from .losses import configured_loss_and_dice, ignored_label
from .optimization import learning_rate
from .own import Own
from .run import Run
from .signals import StopRequest
from .validation import validate, validation_batch_size

NAMES_SHOWN = 16


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_folder: Folder with all files of the run.
        best_epoch: Epoch with the best validation Dice, 0 if there is none yet.
        best_score: Validation Dice of the best epoch, nan if there is none yet.
        epochs: Number of complete epochs.
        stopped_by: "epochs" or "early stopping"; "SIGINT" or "SIGTERM" if the run can be resumed.
        model: Name of the network.
    """

    run_folder: Path
    best_epoch: int
    best_score: float
    epochs: int
    stopped_by: str
    model: str


def train(
    config: TrainConfig,
    *,
    train_data: Any = None,
    val_data: Any = None,
    transform: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> RunResult:
    """Train a network with the settings of ``config``, or resume the run in its output folder.

    Under ``torchrun`` every process calls this; the first one writes the files.

    Args:
        config: settings of the run.
        train_data: images and masks to train on, in place of ``config.data``: two tensors, (n, C, H, W) and (n, H, W),
            or a ``torch.utils.data.Dataset`` of pairs, see :func:`uctrans.data.pairs.pairs_of`. Each item is read
            once, and all of them stay on the device.
        val_data: the same to validate on, which goes with ``train_data``.
        transform: takes the place of the augmentation: a function from images, float32 (B, C, H, W) in 0..1, and
            masks, uint8 (B, H, W), to another batch. A resumed run draws the same numbers from PyTorch's generators.
        loss: takes the place of Dice and cross entropy: a function from logits, float32 (B, classes, H, W), and masks,
            int64 (B, H, W) with 255 where pixels are ignored, to a scalar.

    Raises:
        ConfigError: a setting cannot be used here, or a resumed run has other settings.
        DataError: the data cannot be used.
        ModelFileError: ``init_from`` cannot be used.
        CheckpointError: a checkpoint cannot be read or written.
        TrainingError: the loss or the weights are not finite, or a log cannot be written.
        FolderError: another process trains in the output folder, or it cannot be made or written to.
        torch.OutOfMemoryError: memory ran out, on any device; the message names settings that need less.
        ImportError: a package of the extra "training" is missing.
    """
    own = Own(train_data, val_data, transform, loss)
    config = own.recorded_in(config)
    if config.data:
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    with (
        explaining_short_memory(settings_for_memory(config)),
        processes(config.device) as group,
        locked_by_main(Path(config.output), group),
    ):
        checkpoint = find_checkpoint(config)
        run = Run(config, group, own)
        if checkpoint is not None:
            path = Path(config.output) / LAST_CHECKPOINT
            with foreign_parts_named(path):
                run.load_state_dict(checkpoint, path)
            del checkpoint
        group.barrier()  # no process writes before all have looked for a checkpoint
        with _emptied_if_nothing_was_learned(run), _open_log(run) as log, StopRequest() as stop:
            with open_writer(config) as writer:
                if not config.resume:
                    save(run, writer)
                    writer.wait()  # a folder with files of a run but without last.pt could not be resumed
                if group.is_main:
                    path = Path(config.output) / "config.yaml"
                    with failures_named(path):
                        dataclasses.replace(config, resume=False).save_yaml(path)
                stopped_by = train_epochs(run, log, stop, writer)
            log.line(_summary(run, stopped_by))
        group.barrier()  # no process returns before the files are complete
    return RunResult(Path(config.output), run.best_epoch, run.best_dice, run.epoch, stopped_by, config.model)


@contextlib.contextmanager
def _emptied_if_nothing_was_learned(run: Run) -> Iterator[None]:
    """Remove the files of a new run that fails in its first epoch, unless it can be resumed with other settings.

    Otherwise the mended command would be refused, because the folder holds a run.
    """
    folder = Path(run.config.output)
    before = set(folder.iterdir()) if run.group.is_main else set()
    try:
        yield
    except (TrainingError, CheckpointError):
        raise
    except (
        Exception
    ):  # out of memory, a size that a layer refuses, an error of the user's own layer: all are raised again
        if run.group.is_main and not run.config.resume and run.epoch <= 1 and _is_initial(folder / LAST_CHECKPOINT):
            for path in {folder / name for name in (*RUN_FILES, *LOG_FILES)} & (set(folder.iterdir()) - before):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _is_initial(path: Path) -> bool:
    """Return whether the checkpoint is that before the first step, or not yet there."""
    if not path.exists():
        return True
    checkpoint = load_checkpoint(path)
    return checkpoint["epoch"] == 0 and checkpoint["sampler"]["step"] == 0


def train_epochs(run: Run, log: RunLog | SilentLog, stop: StopRequest, writer: CheckpointWriter) -> str:
    """Train until the run ends; return the reason, see ``RunResult``."""
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
    """Run the remaining steps of an epoch; return False if a signal came before the last one."""
    run.begin_epoch()
    while run.steps_done < run.steps_per_epoch:
        if run.group.any(stop.name is not None):  # the processes may get the signal at different steps
            return False
        replay_or_run_step(run, run.batch(run.steps_done))
        run.steps_done += 1
        log.step()
    return True


def replay_or_run_step(run: Run, index: torch.Tensor) -> None:
    """Replay :func:`train_step` as a CUDA graph if the run records its steps; run it otherwise.

    A transform of the caller may wait for the device or draw numbers on the host, so it runs before the recorded part.
    """
    if run.step_graphs is None:
        train_step(run, index)
    elif run.own.transform is None:
        run.step_graphs.run(functools.partial(train_step, run), index)
    else:
        run.step_graphs.run(functools.partial(train_on_batch, run), *training_batch(run, index))


def train_step(run: Run, index: torch.Tensor) -> None:
    """Train on the images at ``index``, int64 (B,) on the device.

    All shapes are static and nothing waits for the device: images and sums stay there, so the step can be recorded as a
    CUDA graph.
    """
    train_on_batch(run, *training_batch(run, index))


def training_batch(run: Run, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images at ``index``, changed for training, and their masks."""
    return run.protocol.training_batch(run.train_data, index, run.augment_generator)


def train_on_batch(run: Run, images: torch.Tensor, masks: torch.Tensor) -> None:
    """Train on network input, (B, C, H, W), and masks, (B, H, W)."""
    totals = None  # a single process counts its pixels while it computes the loss
    if run.group.count > 1:
        totals = run.group.mean_(segmentation_totals(masks, ignore_label=ignored_label(run.config)))

    run.optimizer.zero_grad(set_to_none=True)
    logits = run.forward(images)
    loss, dice = configured_loss_and_dice(logits, masks, run.config, totals, own=run.own)
    loss.backward()
    run.optimizer.step()
    if run.average is not None:
        run.average.update(run.model)
    run.totals.add(loss.detach(), dice)


def complete_epoch(run: Run, log: RunLog | SilentLog, started: float, images_before: int) -> bool:
    """Read the sums of the epoch, validate and log; return whether this is the best epoch so far.

    Args:
        run: The run after the last step of the epoch.
        log: Log that receives the metrics.
        started: Time at which this process began or resumed the epoch, as of ``time.perf_counter()``.
        images_before: Number of images of the epoch before that time.
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
        run.validated_model,
        run.val_data,
        run.protocol,
        run.config,
        run.group,
        forward=run.validation_forward,
        scored_classes=run.scored_classes,
        own=run.own,
    )
    for rank, step in enumerate(run.group.gather(totals.first_bad.item())):
        if step >= 0:
            size = validation_batch_size(run.protocol, run.config)
            names = run.val_data.names[rank :: run.group.count][step * size : (step + 1) * size]
            raise TrainingError(
                f"epoch {run.epoch}: the validation loss is not finite for {_listed(names)}; check these images, or "
                f"resume with a lower learning_rate or with amp no. {_kept(run)}"
            )
    return totals.read(run.group)


def check_training_was_finite(run: Run) -> None:
    """Raise TrainingError, naming the images, if the loss of a step of this epoch was not finite."""
    for rank, step in enumerate(run.group.gather(run.totals.first_bad.item())):
        if step >= 0:
            names = [run.train_data.names[position] for position in run.batch(step, rank).tolist()]
            raise TrainingError(
                f"epoch {run.epoch + 1}, step {step + 1}: the loss is not finite for the batch of {_listed(names)}; "
                f"check these images and masks, or resume with a lower learning_rate or with amp no. {_kept(run)}"
            )


def check_weights_are_finite(run: Run) -> None:
    """Raise TrainingError if the last step, whose loss was finite, has made weights that are not."""
    floating = [tensor for tensor in run.model.state_dict().values() if tensor.is_floating_point() and tensor.numel()]
    # The largest magnitude of each tensor, in a few launches for all of them.
    if not torch.stack(torch._foreach_norm(floating, math.inf)).isfinite().all():
        raise TrainingError(
            f"epoch {run.epoch + 1}: the last step made weights that are not finite; resume with a lower "
            f"learning_rate or with amp no. {_kept(run)}"
        )


def open_writer(config: TrainConfig) -> CheckpointWriter:
    """Return the writer of checkpoints into the folder of a run."""
    return CheckpointWriter(functools.partial(write_files, Path(config.output)))


def save(run: Run, writer: CheckpointWriter, *, is_best: bool = False) -> None:
    """Write last.pt and, for the best epoch, best.pt and best/; raise an error of writing earlier ones."""
    checkpoint = run.state_dict()
    if run.group.is_main:
        writer.save(checkpoint, is_best)


def _open_log(run: Run) -> RunLog | SilentLog:
    config, group = run.config, run.group
    if not group.is_main:
        return SilentLog()
    folder = Path(config.output)
    log = RunLog(config, run.epoch, run.steps_done, run.steps_per_epoch)
    size = sum(parameter.numel() for parameter in run.model.parameters())
    devices = str(group.device) if group.count == 1 else f"{group.count} processes on {group.device.type}"
    if run.epoch >= config.epochs:
        log.line(f"{folder} has all {config.epochs} epochs; give more with epochs to continue it")
        return log
    log.line(
        f"{'continuing' if config.resume else 'training'} {config.model} ({size / 1e6:.2f} M parameters) on "
        f"{len(run.train_data)} images, validating on {len(run.val_data)}, {devices}, "
        f"epoch {run.epoch + 1} to at most {config.epochs}, in {folder}"
    )
    drawn = None if config.folds or not config.data else describe_draw(config.data, "val", len(run.val_data))
    if drawn is not None:
        log.line(f"{drawn} by a fixed seed")
    if not config.resume:
        log.line(run.start)
        for remark in run.remarks:
            log.line(remark)
    if run.epoch < run.first_best_epoch - 1:
        log.line(f"the best weights will be those of epoch {run.first_best_epoch} or later (first_best_epoch)")
    if config.graph and group.device.type == "cuda":
        obstacle = run.obstacle_to_graphs
        log.line("steps are replayed as CUDA graphs" if obstacle is None else f"no CUDA graphs: {obstacle}")
    if config.compile:
        log.line("compiling the network in the first step of each batch size, which takes minutes on a CPU")
    return log


def _summary(run: Run, stopped_by: str) -> str:
    best = (
        f"best validation Dice {run.best_dice:.4f} at epoch {run.best_epoch}" if run.best_epoch else "no best epoch yet"
    )
    if stopped_by not in ("epochs", "early stopping"):
        where = f"after epoch {run.epoch}" + (f" and {run.steps_done} steps" if run.steps_done else "")
        path = Path(run.config.output) / LAST_CHECKPOINT
        return f"stopped by {stopped_by} {where}, saved in {path}; continue with resume; {best}"
    why = f"no better for {run.config.patience} epochs" if stopped_by == "early stopping" else "all epochs done"
    return f"finished after epoch {run.epoch} ({why}); {best}"


def _kept(run: Run) -> str:
    return f"{Path(run.config.output) / LAST_CHECKPOINT} holds the last good state"


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + rest
