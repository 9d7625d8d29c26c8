"""Do the runs of a study in worker processes, then write the table and the chart.

Every run and every ensemble has a process of its own, which reads it from its standard input. When the input closes,
because the study stops or ends in whatever way, the worker saves the run that it is training and leaves. It has a
session of its own, so that Ctrl-C reaches the study alone, and it inherits the lock of the folder.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import explaining_short_memory, find_device
from ..extras import import_extra
from ..inference import EvaluateConfig, evaluate
from ..models.external import find_model_class
from ..models.files import LAST_CHECKPOINT
from ..system import explained, lasting_streams
from ..training import CheckpointError, ConfigError, TrainingError, train
from ..training.build import check_backend_runs
from ..training.checkpoint import copy_checkpoint
from ..training.log import read_metrics
from ..training.signals import StopRequest
from ..writing import format_warning, locked, write_bytes
from .folder import (
    FAILED,
    begin,
    check_study,
    is_over,
    patiences_to_score,
    read_ensemble,
    read_failure,
    read_scores,
)
from .plan import Job, ModelStudyConfig, PlannedEnsemble, PlannedRun, SkipStudyConfig, StudyConfig, StudyError
from .table import Table, count_cost, make_table

CHECKPOINTS = (LAST_CHECKPOINT, "best.pt")
ENDS = ("epochs", "early stopping")  # reasons for which a training is over
TIME_IS_UP = "time"
SECONDS_BETWEEN_LOOKS = 0.1  # between two checks of the processes
SECONDS_TO_SAVE = 60  # that a stopped process has to write its checkpoint


@dataclass(frozen=True)
class StudyResult:
    """How a study ended; ``str()`` of it is the table, and what is left to do.

    Attributes:
        output: Its folder.
        table: What it has found so far, or None if no run is over yet.
        stopped_by: "", "SIGINT", "SIGTERM", or "time" if its minutes were over.
        finished: Number of runs that are finished.
        failed: Number of runs whose training diverged.
        total: Number of runs of the study.
    """

    output: Path
    table: Table | None
    stopped_by: str
    finished: int
    failed: int
    total: int

    def __str__(self) -> str:
        """Return the table, and how to continue if runs are left."""
        parts = []
        if self.table is not None:
            parts += [
                "",
                self.table.markdown(),
                "",
                f"table.csv, differences.csv, table.md and chart.png are in {self.output}",
            ]
        if self.stopped_by:
            cause = "The time is up" if self.stopped_by == TIME_IS_UP else f"Stopped by {self.stopped_by}"
            failed = f", {self.failed} failed" if self.failed else ""
            parts.append(f"{cause}, {self.finished} of {self.total} runs finished{failed}; the same command continues.")
        return "\n".join(parts)


def study_skips(config: SkipStudyConfig) -> StudyResult:
    """Train the U-Net with none of its skips, all, each alone and all but one, over the seeds; see `study_models`."""
    return _study(config, "skips")


def study_models(config: ModelStudyConfig) -> StudyResult:
    """Train several networks with the same settings over the seeds, and compare their scores on the test images.

    Called again it continues where it was stopped. More seeds, networks or larger patiences may be asked for then, and
    settings that change no result may differ, such as the device. A run whose training diverges is left out of the
    table and named below it.

    Raises:
        StudyError: The output folder holds something else, results of other settings or images, or a damaged file;
            every run failed; data or settings of a run cannot be used, which stops the study; or the process of a run
            died, which stops no other.
        FolderError: Another process works in the output folder, or it cannot be made or written to.
        ConfigError, DataError: As for ``uctrans.training.train``, where it is found before the first run.
        ValueError: There is no such device.
        ImportError: A package of the extra "training" is missing.
    """
    return _study(config, "models")


def _study(config: StudyConfig, kind: str) -> StudyResult:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise StudyError("torchrun: starts several processes of one training; start a study without it, with processes")
    for package in ("matplotlib", "monai"):  # before the work, not after it
        import_extra(package, "training")
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    folder, plan = Path(config.output), config.plan()
    with locked(folder) as lock:
        marker = check_study(config, kind, plan)
        first_runs = plan[: len(config.variants())]
        costs = {run.variant.name: count_cost(run.config) for run in first_runs}
        if not all(map(is_over, plan)):
            device = find_device(config.device)
            for run in first_runs:
                check_backend_runs(run.config, device)
            if config.threads is None and device.type == "cpu" and config.processes > 1:
                config = dataclasses.replace(config, threads=max(1, torch.get_num_threads() // config.processes))
        begin(config, marker)
        jobs = _Jobs(config, plan, deadline)
        stopped_by = jobs.do(lock)
        table = make_table(config, plan, costs)
        if table is not None:
            table.write(folder)
    if jobs.error:
        raise StudyError(jobs.error)
    if jobs.died:
        raise StudyError(
            f"processes: {len(jobs.died)} died ({'; '.join(jobs.died)}); the table in {folder} has the other runs; "
            "the same command tries these again, with fewer processes if memory was short"
        )
    failed = sum(read_failure(run) is not None for run in plan)
    return StudyResult(folder, table, stopped_by, sum(map(is_over, plan)) - failed, failed, len(plan))


class _Jobs:
    """The runs and ensembles of a study that are left to do.

    Attributes:
        died: Names of those whose process ended before they were over, and how it ended.
        error: Message of the first run whose data or settings cannot be used, which stops the study, or "".
    """

    def __init__(self, config: StudyConfig, plan: list[PlannedRun], deadline: float):
        self.config, self.plan, self.deadline = config, plan, deadline
        self.died: list[str] = []
        self.error = ""
        self._waiting: list[Job] = [job for job in [*plan, *config.ensembles()] if not is_over(job)]
        over = [run for run in plan if run not in self._waiting]
        self._seconds = {run.name: _seconds_of(run) for run in over}  # of the runs that are over
        for number, run in enumerate(over, 1):
            self._report(run, number)

    def do(self, lock: int) -> str:
        """Do what is left; return "" or what stopped it: the name of a signal, or "time"."""
        workers: dict[subprocess.Popen, tuple[Job, int]] = {}  # with the pipe that its error message comes through
        with StopRequest() as stop:
            try:
                while True:
                    for worker in [worker for worker in workers if worker.poll() is not None]:
                        worker.stdin.close()
                        job, pipe = workers.pop(worker)
                        with os.fdopen(pipe) as message:
                            self._note_end(job, worker.returncode, message.read())
                    if self.error:
                        return ""
                    if stop.name or time.monotonic() >= self.deadline:
                        return stop.name or TIME_IS_UP
                    while len(workers) < self.config.processes and (job := self._next()) is not None:
                        self._waiting.remove(job)
                        pipe, end_of_worker = os.pipe()
                        workers[start_worker(job, self.config, lock, end_of_worker)] = job, pipe
                        os.close(end_of_worker)
                    if not workers:
                        return TIME_IS_UP if self._waiting and not self.died else ""
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                for worker, (_, pipe) in workers.items():
                    worker.stdin.close()
                    os.close(pipe)
                for worker in workers:
                    try:
                        worker.wait(SECONDS_TO_SAVE)
                    except subprocess.TimeoutExpired:
                        worker.kill()

    def _next(self) -> Job | None:
        """Return the first job that can begin now and is expected to end in time."""
        ready = (job for job in self._waiting if all(run.name in self._seconds for run in job.needs))
        return next((job for job in ready if self._fits(job)), None)

    def _fits(self, job: Job) -> bool:
        """Return whether a job may begin; one that takes longer than the whole call can only be done in pieces."""
        seconds = self._seconds_left(job) if isinstance(job, PlannedRun) else None
        if self.config.minutes is None or seconds is None:
            return True
        return seconds <= self.deadline - time.monotonic() or seconds > 60 * self.config.minutes

    def _seconds_left(self, run: PlannedRun) -> float | None:
        """Return the expected time of a run, by finished runs of the same network or else of all; None without any."""
        trained = [other for other in self.plan if self._seconds.get(other.name, math.nan) >= 0]
        own = [other for other in trained if other.variant == run.variant]
        if not trained:
            return None
        seconds = statistics.mean(self._seconds[other.name] for other in own or trained)
        return max(0.0, seconds - _seconds_trained(run))

    def _note_end(self, job: Job, code: int, message: str) -> None:
        """Note and report that a worker has ended; ``message`` is the error that stopped it, if any."""
        if message:
            self.error = f"{job.name}: {message}"
        elif not is_over(job):
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            self.died.append(f"{job.name} {end}")
            print(f"{job.name}: its process {end}; the same command tries it again", flush=True)
        elif isinstance(job, PlannedRun):
            self._seconds[job.name] = _seconds_of(job)
            self._report(job, len(self._seconds))
        else:
            summaries = {patience: read_ensemble(job, patience) for patience in self.config.patience}
            found = {patience: summary for patience, summary in summaries.items() if summary is not None}
            print(f"{job.name}: {_dice_in_words(found)}", flush=True)

    def _report(self, run: PlannedRun, number: int) -> None:
        """Print a line about a run that is over."""
        line = f"run {number} of {len(self.plan)}: {run.name}: "
        if reason := read_failure(run):
            line += f"failed, {reason}; to try it again, delete {run.folder}"
        else:
            line += f"{_dice_in_words(read_scores(run))}, {_seconds_trained(run) / 60:.1f} min"
        left = [self._seconds_left(other) for other in self.plan if other.name not in self._seconds]
        if left and None not in left:
            line += f"; about {sum(left) / self.config.processes / 60:.1f} min to go"
        print(line, flush=True)


def start_worker(job: Job, config: StudyConfig, lock: int, errors: int) -> subprocess.Popen:
    """Start a process that does a job; it ends when its ``stdin`` is closed, and writes its error to ``errors``."""
    command = [sys.executable, "-c", f"from uctrans.study.run import work; work({errors})"]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, bufsize=0, pass_fds=(lock, errors), start_new_session=True
    )
    with contextlib.suppress(BrokenPipeError):  # of a worker that has died, which the next look finds
        worker.stdin.write(pickle.dumps((job, config)))
    return worker


@lasting_streams()
def work(errors: int) -> None:
    """Do the job on the standard input; save it and leave when the input is closed.

    Args:
        errors: descriptor for the message if data, settings or files cannot be used.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.formatwarning = format_warning
    job, config = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with explaining_short_memory("start fewer processes"):
            if isinstance(job, PlannedEnsemble):
                score_ensemble(job, config)
            else:
                train_and_score(job, config)
    except torch.OutOfMemoryError as error:  # which need not stop the other runs
        print(f"{job.name}: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError, ImportError, NotImplementedError, TrainingError) as error:
        os.write(errors, explained(error).encode(errors="backslashreplace"))
        sys.exit(1)


def _leave_with_the_study() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the input is closed
    os.kill(os.getpid(), signal.SIGTERM)


def train_and_score(run: PlannedRun, config: StudyConfig) -> None:
    """Train a run to each of its patiences in turn; keep and score the best weights there.

    Continues from existing checkpoints and scores. A training that diverges leaves its reason in failed.txt.

    Raises:
        StudyError: The run cannot continue.
        DataError, TrainingError: As for ``uctrans.training.train``.
    """
    for unet in run.needs:
        if reason := read_failure(unet):
            write_bytes(run.folder / FAILED, f"the U-Net that it starts from failed, {reason}\n".encode())
            return
    missing = [patience for patience in run.patiences if patience not in read_scores(run)]
    for patience in missing:
        is_begun = (run.folder / LAST_CHECKPOINT).exists()
        settings = dataclasses.replace(run.config, threads=config.threads, patience=patience, resume=is_begun)
        try:
            trained = train(settings)
        except (CheckpointError, ConfigError) as error:
            again = (
                f"; or delete {run.folder}, and the same command trains this run again" if run.folder.exists() else ""
            )
            raise StudyError(f"{error}{again}") from error
        except TrainingError as error:
            if error.__cause__ is not None:  # a file or the device, which would stop the other runs too
                raise
            finding = str(error).partition(";")[0]  # without the advice, which is for a run on its own
            write_bytes(run.folder / FAILED, f"{finding}\n".encode())
            return
        if trained.stopped_by not in ENDS:
            sys.exit(128 + signal.SIGTERM)
        kept = run.at(patience) / "best"
        shutil.rmtree(kept, ignore_errors=True)  # of a process that was stopped here
        # Training replaces whole files, so a link keeps the content.
        shutil.copytree(run.folder / "best", kept, copy_function=lambda *paths: copy_checkpoint(*map(Path, paths)))
        for ensemble in config.ensembles():
            if run.name in [
                need.name for need in ensemble.needs
            ]:  # scored with other weights of this run, which has been deleted since
                (ensemble.at(patience) / "summary.json").unlink(missing_ok=True)
        evaluate(_evaluation(str(run.at(patience)), run, config, run.at(patience) / "test"))
    if not config.keep_checkpoints:
        for name in CHECKPOINTS:
            (run.folder / name).unlink(missing_ok=True)


def score_ensemble(ensemble: PlannedEnsemble, config: StudyConfig) -> None:
    """Score the mean of the probabilities of the folds at each patience."""
    for patience in patiences_to_score(ensemble):
        models = ",".join(str(run.at(patience)) for run in ensemble.needs)
        evaluate(_evaluation(models, ensemble.needs[0], config, ensemble.at(patience)))


def _evaluation(model: str, run: PlannedRun, config: StudyConfig, folder: Path) -> EvaluateConfig:
    has_backends = "backend" in inspect.signature(find_model_class(run.variant.model)).parameters
    return EvaluateConfig(
        model=model,
        network=run.variant.model,
        data=config.data,
        output=str(folder),
        size=config.score_size,
        resolution=config.score_resolution,
        tta=config.score_tta,
        batch_size=config.batch_size,
        backend=config.backend if has_backends else "auto",
        device=config.device,
        overwrite=True,
        progress=config.progress,
    )


def _seconds_trained(run: PlannedRun) -> float:
    return sum(row["seconds"] for row in read_metrics(run.folder / "metrics.csv"))


def _seconds_of(run: PlannedRun) -> float:
    """Return the time of a run that is over, nan if it failed."""
    return math.nan if read_failure(run) else _seconds_trained(run)


def _dice_in_words(summaries: dict[int, dict[str, Any]]) -> str:
    return "Dice " + ", ".join(f"{each['mean']['dice']:.4f} at patience {name}" for name, each in summaries.items())
