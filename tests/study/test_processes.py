"""Several processes and a budget: the same scores, deaths told, signals passed on, and time that ends."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from uctrans import cli
from uctrans.study import ModelStudyConfig, StudyError, processes, schedule, study_models
from uctrans.study.schedule import Budget
from uctrans.training import load_checkpoint
from uctrans.training import loop as training_loop
from uctrans.training import signals as training_signals
from uctrans.training.log import read_metrics


@pytest.fixture(scope="module")
def config(settings, tmp_path_factory):
    own = {"models": ("unet",), "model_options": {}}
    return ModelStudyConfig(**settings | own, output=str(tmp_path_factory.mktemp("study") / "here"))


@pytest.fixture(scope="module")
def here(config, table_of):
    """The row of a study that ran in this process, without the time of a step."""
    study_models(config)
    return row_of(table_of(Path(config.output)))


def row_of(table):
    return {name: value for name, value in table["unet", 50].items() if name != "seconds_a_step"}


def test_a_process_that_dies_stops_no_other_and_scores_are_those_of_one_process(
    config, here, table_of, tmp_path, monkeypatch, capfd
):
    config = replace(config, output=str(tmp_path / "study"), processes=2)
    started, workers = processes._started, []

    def killing_the_first(*args):
        workers.append(started(*args))
        if len(workers) == 1:
            os.kill(workers[0].process.pid, signal.SIGKILL)
        return workers[-1]

    monkeypatch.setattr(processes, "_started", killing_the_first)
    with pytest.raises(StudyError, match=r"1 runs are not over.*unet, seed 0: was killed by SIGKILL"):
        study_models(config)
    assert len({worker.process.pid for worker in workers} | {os.getpid()}) == 3
    out = capfd.readouterr().out
    assert "unet, seed 0: its process was killed by SIGKILL; the same command tries it again" in out
    assert "run 1 of 2: unet, seed 1: Dice" in out
    row = table_of(tmp_path / "study")["unet", 50]
    assert (row["runs"], row["seeds"], row["missing"]) == ("1", "1", "1")
    assert "| single run of 2 |" in (tmp_path / "study" / "table.md").read_text()
    assert "Not complete" in (tmp_path / "study" / "table.md").read_text()

    result = study_models(replace(config, processes=1))
    assert (result.finished, result.stopped_by) == (2, "")
    assert row_of(table_of(tmp_path / "study")) == here


def test_an_error_in_a_process_is_told(config, tmp_path, monkeypatch):
    started = processes._started

    def without_images(run, *rest):
        return started(replace(run, config=replace(run.config, data=str(tmp_path / "gone"))), *rest)

    monkeypatch.setattr(processes, "_started", without_images)
    with pytest.raises(StudyError, match=r"unet, seed 0: ended with DataError: .*gone"):
        study_models(replace(config, output=str(tmp_path / "study"), processes=2, seeds=1))


def test_a_signal_reaches_all_processes_and_they_save(config, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "study"), processes=2, epochs=10_000, first_best_epoch=10_000)
    folders = [run.folder for run in config.plan()]
    workers, started = [], processes._started
    monkeypatch.setattr(processes, "_started", lambda *args: workers.append(started(*args)) or workers[-1])

    def interrupt():
        until = time.monotonic() + 100
        while not all(read_metrics(folder / "metrics.csv") for folder in folders) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    result = study_models(config)
    assert (result.stopped_by, result.finished, result.total) == ("SIGINT", 0, 2)
    assert "0 of 2 runs finished; the same command goes on" in str(result)
    assert not any(worker.process.is_alive() for worker in workers)
    for folder in folders:
        epochs = len(read_metrics(folder / "metrics.csv"))
        assert load_checkpoint(folder / "last.pt")["epoch"] == epochs > 0
        assert "stopped by SIGTERM" in (folder / "log.txt").read_text().splitlines()[-1]


def test_the_end_of_the_time_saves_the_run_and_the_same_command_goes_on(
    config, here, table_of, tmp_path, monkeypatch, capsys
):
    config = replace(config, output=str(tmp_path / "study"), minutes=60)
    ahead, epochs, complete_epoch = [0], [], training_loop.complete_epoch
    clock = SimpleNamespace(time=lambda: time.time() + ahead[0])
    monkeypatch.setattr(training_signals, "time", clock)
    monkeypatch.setattr(schedule, "time", clock)

    def late(run, *rest):
        epochs.append(run.epoch)
        ahead[0] = 3600 * (len(epochs) == 3)  # in the first epoch of the second run
        return complete_epoch(run, *rest)

    monkeypatch.setattr(training_loop, "complete_epoch", late)
    result = study_models(config)
    assert (result.stopped_by, result.finished, result.total) == ("time", 1, 2)
    assert str(result).endswith("The time is up, 1 of 2 runs finished; the same command goes on.")
    row = table_of(tmp_path / "study")["unet", 50]
    assert (row["runs"], row["missing"]) == ("1", "1")
    assert load_checkpoint(tmp_path / "study" / "runs" / "unet" / "seed_1" / "last.pt")["epoch"] == 1
    capsys.readouterr()

    ahead[0] = 0
    result = study_models(config)
    assert (result.stopped_by, len(epochs)) == ("", 4)
    assert row_of(table_of(tmp_path / "study")) == here


def test_no_run_is_begun_that_would_not_fit(config, monkeypatch, no_training, here):
    calls = []
    monkeypatch.setattr(processes, "train_and_score", lambda run, *_: calls.append(run.seed) or "time")
    monkeypatch.setattr(schedule.Schedule, "_seconds_to_go", lambda self, run: {2: 100.0, 3: 20.0, 4: 500.0}[run.seed])
    config = replace(config, seeds=(0, 1, 2, 3, 4), minutes=5)
    spent = Budget(300.0, begun=time.time() - 250)  # 50 s are left
    plan = replace(config, seeds=(2, 3, 4)).plan()
    left = schedule.Schedule(plan, {}, spent, 1)
    assert [run.seed for run in iter(left.next, None)] == [3, 4], "500 s never fit into 300: only in pieces"
    assert study_models(config).stopped_by == "time"
    assert calls == [2]


def test_budget():
    assert Budget().allows(1e9)
    assert Budget().stop_at is None
    assert not Budget(60, begun=time.time() - 61).allows(None)
    assert Budget(60, begun=time.time() - 30).allows(20)
    assert not Budget(60, begun=time.time() - 30).allows(40)
    assert Budget(60, begun=time.time() - 30).allows(None)


def test_a_study_whose_time_is_up_at_once_has_no_table(config, tmp_path, capsys):
    previous = signal.getsignal(signal.SIGTERM)
    words = ["study", "models", "-i", config.data, "-o", str(tmp_path / "study"), "--models", "unet", "--minutes"]
    status = cli.main([*words, "0.0001", "--base-channels", "2", "--image-size", "32", "--device", "cpu"])
    signal.signal(signal.SIGTERM, previous)
    assert status == 0
    assert capsys.readouterr().out.endswith("The time is up, 0 of 5 runs finished; the same command goes on.\n")
    assert not (tmp_path / "study" / "table.csv").exists()
