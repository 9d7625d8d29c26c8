"""The runs of a study one after the other in this process, or several at a time, each in a process of its own.

A process is started afresh (spawn), so that a CUDA context of this one is not shared, and in a process group of its
own: Ctrl-C reaches this process alone, which asks the others to stop and waits until they have saved.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from uctrans.study.config import StudyConfig, StudyError
from uctrans.study.plan import PlannedRun
from uctrans.study.schedule import Schedule
from uctrans.study.single import train_and_score
from uctrans.training.distributed import choose_device
from uctrans.training.signals import StopRequest

SECONDS_BETWEEN_LOOKS = 0.2  # at the signals that have come
SECONDS_TO_SAVE = 60  # of a process that was asked to stop, where this one ends in haste


@dataclass(frozen=True)
class _Worker:
    run: PlannedRun
    process: SpawnProcess
    answers: Connection


def run_here(schedule: Schedule, config: StudyConfig) -> str:
    """Do the runs one after the other; return "", or what stopped the last, see ``RunResult``."""
    while (run := schedule.next()) is not None:
        if stopped_by := train_and_score(run, config, schedule.budget.stop_at):
            return stopped_by
        schedule.take(run)
    return ""


def run_in_processes(schedule: Schedule, config: StudyConfig) -> str:
    """Do ``config.processes`` runs at a time; return "", or the name of the signal that stopped them.

    Raises:
        StudyError: the system has no process groups.
    """
    if os.name != "posix":
        raise StudyError("processes: several at a time need Linux or macOS; leave it at 1")
    workers: list[_Worker] = []
    was_asked = False
    with StopRequest() as stop:
        try:
            while True:
                while not stop.name and len(workers) < config.processes and (run := schedule.next()) is not None:
                    workers.append(_started(run, config, schedule.budget.stop_at))
                if not workers:
                    return stop.name or ""
                if stop.name and not was_asked:  # once: a second request would end them before they have saved
                    was_asked = True
                    for worker in workers:
                        worker.process.terminate()
                multiprocessing.connection.wait([each.process.sentinel for each in workers], SECONDS_BETWEEN_LOOKS)
                for worker in [each for each in workers if not each.process.is_alive()]:
                    workers.remove(worker)
                    _take_end(worker, schedule, is_stopping=was_asked)
        finally:  # workers are left where a second signal or an error ends this process
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(SECONDS_TO_SAVE)
                worker.process.kill()


def _started(run: PlannedRun, config: StudyConfig, stop_at: float | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, config, stop_at, theirs), name=run.name)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it is not in its own group from the start
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    return _Worker(run, process, ours)


def _take_end(worker: _Worker, schedule: Schedule, is_stopping: bool) -> None:
    """Note how a run ended: over, stopped and to be gone on with, or with its process."""
    worker.process.join()
    try:
        answer = worker.answers.recv() if worker.answers.poll() else None
    except EOFError:
        answer = None
    worker.answers.close()
    kind, text = answer or ("died", _exit(worker.process.exitcode))
    if kind == "done":
        schedule.take(worker.run)
    elif kind == "died" and not (is_stopping and answer is None):
        schedule.take_death(worker.run, text)


def _exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _work(run: PlannedRun, config: StudyConfig, stop_at: float | None, answers: Connection) -> None:
    """What a process does: one run, and an answer of how it ended."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    if run.config.threads is None and choose_device(run.config.device).type == "cpu":
        threads = max(1, torch.get_num_threads() // config.processes)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, threads=threads))
    if run.config.threads is not None:  # a run that is only scored sets none itself
        torch.set_num_threads(run.config.threads)
    try:
        stopped_by = train_and_score(run, config, stop_at)
        answer = ("stopped", stopped_by) if stopped_by else ("done", "")
    except Exception as error:
        traceback.print_exc()
        answer = ("died", f"ended with {type(error).__name__}: {' '.join(str(error).split())}")
    with contextlib.suppress(BrokenPipeError):  # nobody listens where the process that started this one is gone
        answers.send(answer)


def _leave(*_) -> None:
    """Outside of a training there is nothing to save: leave as an exception does, which tidies up behind it."""
    sys.exit(128 + signal.SIGTERM)


def _leave_with_the_study() -> None:
    """Ask this process to stop where the one that started it is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
