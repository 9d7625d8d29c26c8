"""Do the runs of a study in worker processes, then write the table and the chart.

A worker receives one job after another through a pipe. When the study closes the pipe, or ends in whatever way, the
worker saves the run that it is training and leaves. It has a session of its own, so that Ctrl-C reaches the study
alone, and it inherits the lock of the folder, which is free when the last worker has left.
"""

import contextlib
import dataclasses
import inspect
import math
import multiprocessing
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ..devices import find_device
from ..extras import import_extra
from ..inference import EvaluateConfig, evaluate
from ..models.files import LAST_CHECKPOINT
from ..models.registry import model_class
from ..training import TrainingError, train
from ..training.log import read_metrics
from ..training.run import check_backend_runs
from ..training.signals import StopRequest
from ..writing import write_bytes
from .folder import (
    FAILED,
    begin,
    check_study,
    is_over,
    only_call,
    patiences_to_score,
    read_ensemble,
    read_failure,
    read_scores,
)
from .plan import ModelStudyConfig, PlannedEnsemble, PlannedRun, SkipStudyConfig, StudyConfig, StudyError
from .table import Table, count_cost, make_table

Job = PlannedRun | PlannedEnsemble

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
            parts += ["", self.table.markdown(), "", f"table.csv, table.md and chart.png are in {self.output}"]
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
            every run failed; or the process of a run died.
        ConfigError, DataError: As for ``uctrans.training.train``.
        ImportError: A package of the extra "training" is missing.
    """
    return _study(config, "models")


def _study(config: StudyConfig, kind: str) -> StudyResult:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise StudyError("torchrun: starts several processes of one training; start a study without it, with processes")
    for package in ("matplotlib", "monai"):  # before the work, not after it
        import_extra(package, "training")
    deadline = None if config.minutes is None else time.time() + 60 * config.minutes
    folder, plan = Path(config.output), config.plan()
    check_study(config, kind, plan)
    first_runs = plan[: len(config.variants())]
    costs = {run.variant.name: count_cost(run.config) for run in first_runs}
    if not all(map(is_over, plan)):
        device = find_device(config.device)
        for run in first_runs:
            check_backend_runs(run.config, device)
    folder.mkdir(parents=True, exist_ok=True)
    with only_call(folder) as lock:
        begin(config, kind)
        study = _Study(config, plan, deadline, lock)
        stopped_by = study.work()
        table = make_table(config, plan, costs)
        if table is not None:
            table.write(folder)
    if study.died:
        raise StudyError(
            f"processes: {len(study.died)} died ({'; '.join(study.died)}); the table in {folder} has the other runs; "
            "the same command tries these again, with fewer processes if memory was short"
        )
    failed = sum(read_failure(run) is not None for run in plan)
    return StudyResult(folder, table, stopped_by, sum(map(is_over, plan)) - failed, failed, len(plan))


@dataclass
class _Worker:
    process: subprocess.Popen
    pipe: Connection
    job: Job | None = None

    def begin(self, job: Job, config: StudyConfig) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # of a worker that has died, which the next look finds
            self.pipe.send((job, config))


class _Study:
    """The runs and ensembles that are left to do, and the workers that do them.

    Attributes:
        died: Names of the jobs whose worker ended before they were over, and how it ended.
    """

    def __init__(self, config: StudyConfig, plan: list[PlannedRun], deadline: float | None, lock: int):
        self.config, self.plan, self.deadline, self.lock = config, plan, deadline, lock
        self.died: list[str] = []
        self._seconds: dict[str, float] = {}  # of training, by the name of a run that is over; nan if it failed
        over = [run for run in plan if is_over(run)]
        for run in over:
            self._note_end(run)
        for number, run in enumerate(over, 1):
            self._report(run, number)
        jobs: list[Job] = [*plan, *config.ensembles()]
        self._waiting = [job for job in jobs if not is_over(job)]
        self._workers: list[_Worker] = []

    def work(self) -> str:
        """Run all waiting jobs; return "" or what stopped it: the name of a signal, or "time"."""
        with StopRequest() as stop:
            try:
                while True:
                    is_late = self.deadline is not None and time.time() >= self.deadline
                    if stop.name or is_late:
                        return stop.name or TIME_IS_UP
                    self._begin_jobs()
                    if not any(worker.job for worker in self._workers):
                        return TIME_IS_UP if self._waiting and not self.died else ""
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    for worker in [*self._workers]:
                        self._look_at(worker)
            finally:
                self._stop_workers()

    def _begin_jobs(self) -> None:
        """Give the next jobs to idle workers and to new ones."""
        while (job := self._next()) is not None:
            idle = [worker for worker in self._workers if worker.job is None]
            if not idle and len(self._workers) == self.config.processes:
                return
            if not idle:
                idle = [start_worker(self.lock)]
                self._workers += idle
            idle[0].begin(job, self.config)
            self._waiting.remove(job)

    def _next(self) -> Job | None:
        """Return the first job that can begin now and is expected to end in time."""
        ready = (job for job in self._waiting if all(run.name in self._seconds for run in job.needs))
        return next((job for job in ready if self._fits(job)), None)

    def _fits(self, job: Job) -> bool:
        """Return whether a job may begin; one that takes longer than the whole call can only be done in pieces."""
        seconds = self._seconds_left(job) if isinstance(job, PlannedRun) else None
        if self.deadline is None or seconds is None:
            return True
        return seconds <= self.deadline - time.time() or seconds > 60 * self.config.minutes

    def _seconds_left(self, run: PlannedRun) -> float | None:
        """Return the expected time of a run, by finished runs of the same network or else of all; None without any."""
        trained = [other for other in self.plan if self._seconds.get(other.name, math.nan) >= 0]
        own = [other for other in trained if other.variant == run.variant]
        if not trained:
            return None
        seconds = statistics.mean(self._seconds[other.name] for other in own or trained)
        return max(0.0, seconds - _seconds_trained(run))

    def _look_at(self, worker: _Worker) -> None:
        """Note that the job of a worker is over, or that the worker has died."""
        code, job = worker.process.poll(), worker.job
        if job is not None and is_over(job):
            worker.job = None
            self._note_end(job)
            self._report(job, len(self._seconds))
        elif job is not None and code is not None:
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            self.died.append(f"{job.name} {end}")
            print(f"{job.name}: its process {end}; the same command tries it again", flush=True)
        if code is not None:
            self._workers.remove(worker)

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            try:
                worker.process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                worker.process.kill()

    def _note_end(self, job: Job) -> None:
        if isinstance(job, PlannedRun):
            self._seconds[job.name] = math.nan if read_failure(job) else _seconds_trained(job)

    def _report(self, job: Job, number: int) -> None:
        """Print a line about a job that is over."""
        if isinstance(job, PlannedEnsemble):
            scores = {patience: read_ensemble(job, patience) for patience in self.config.patience}
            print(f"{job.name}: {_dice_in_words(scores)}", flush=True)
            return
        line = f"run {number} of {len(self.plan)}: {job.name}: "
        if reason := read_failure(job):
            line += f"failed, {reason}; to try it again, delete {job.folder}"
        else:
            line += f"{_dice_in_words(read_scores(job))}, {_duration(_seconds_trained(job))}"
        left = [self._seconds_left(run) for run in self.plan if run.name not in self._seconds]
        if left and None not in left:
            line += f"; about {_duration(sum(left) / self.config.processes)} to go"
        print(line, flush=True)


def start_worker(lock: int) -> _Worker:
    """Start a process that does jobs; see the head of this module."""
    theirs, ours = multiprocessing.Pipe(duplex=False)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", "from uctrans.study.run import work; work()", str(theirs.fileno())],
            pass_fds=(theirs.fileno(), lock),
            start_new_session=True,
        )
    return _Worker(process, ours)


def work() -> None:
    """Do the jobs that arrive through the pipe; save the job and leave when the pipe is closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    jobs: queue.Queue = queue.Queue()
    threading.Thread(target=_receive, args=(Connection(int(sys.argv[1]), writable=False), jobs), daemon=True).start()
    threads = torch.get_num_threads()
    while True:
        job, config = jobs.get()
        if config.threads is None and find_device(config.device).type == "cpu" and config.processes > 1:
            config = dataclasses.replace(config, threads=max(1, threads // config.processes))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if isinstance(job, PlannedRun):
            train_and_score(job, config)
        else:
            for patience in patiences_to_score(job):
                models = ",".join(str(run.at(patience)) for run in job.needs)
                evaluate(_evaluation(models, job.needs[0], config, job.at(patience)))


def _receive(pipe: Connection, jobs: queue.Queue) -> None:
    with contextlib.suppress(EOFError):
        while True:
            jobs.put(pipe.recv())
    os.kill(os.getpid(), signal.SIGTERM)


def train_and_score(run: PlannedRun, config: StudyConfig) -> None:
    """Train a run to each of its patiences in turn; keep and score the best weights there.

    Continues from existing checkpoints and scores. A training that diverges leaves its reason in failed.txt.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: As for ``uctrans.training.train``.
    """
    if run.unet is not None and (reason := read_failure(run.unet)):
        write_bytes(run.folder / FAILED, f"the U-Net that it starts from failed, {reason}\n".encode())
        return
    for patience in run.patiences:
        if patience in read_scores(run):
            continue
        is_begun = (run.folder / LAST_CHECKPOINT).exists()
        settings = dataclasses.replace(run.config, threads=config.threads, patience=patience, resume=is_begun)
        try:
            trained = train(settings)
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
        shutil.copytree(run.folder / "best", kept, copy_function=_link_or_copy)
        evaluate(_evaluation(str(run.at(patience)), run, config, run.at(patience) / "test"))
    if not config.keep_checkpoints:
        for name in CHECKPOINTS:
            (run.folder / name).unlink(missing_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    """Keep a file of the best weights, which training replaces as a whole and never changes."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _evaluation(model: str, run: PlannedRun, config: StudyConfig, folder: Path) -> EvaluateConfig:
    has_backends = "backend" in inspect.signature(model_class(run.variant.model)).parameters
    return EvaluateConfig(
        model=model,
        data=run.config.data,
        output=str(folder),
        **run.scoring,
        batch_size=config.batch_size,
        backend=config.backend if has_backends else "auto",
        device=config.device,
        overwrite=True,
        progress=config.progress,
    )


def _seconds_trained(run: PlannedRun) -> float:
    return sum(row["seconds"] for row in read_metrics(run.folder / "metrics.csv"))


def _dice_in_words(scores: dict) -> str:
    texts = {patience: f"{score.mean['dice']:.4f}" for patience, score in scores.items() if score is not None}
    if len(texts) == 1:
        return f"Dice {next(iter(texts.values()))}"
    return "Dice " + ", ".join(f"{text} at patience {patience}" for patience, text in texts.items())


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"
