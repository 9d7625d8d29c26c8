"""Runs, in this process and in workers: patiences, divergence, death, signals, time, and continuing where they stop."""

import math
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import uctrans
from uctrans import cli
from uctrans.study import StudyError, run, study_models
from uctrans.training import TrainingError, load_checkpoint, train
from uctrans.training.log import read_metrics


@pytest.fixture
def unet(plain, tmp_path):
    """Return the settings of a study of one U-Net that has not begun."""
    return replace(plain, models=("unet",), model_options={}, seeds=1, output=str(tmp_path / "study"))


def diverge(monkeypatch):
    forward = uctrans.UNet.forward
    patched = lambda self, image: forward(self, image) * (math.nan if self.training else 1)  # noqa: E731
    monkeypatch.setattr(uctrans.UNet, "forward", patched)


def same_weights(*folders):
    states = [uctrans.load_model(folder).state_dict() for folder in folders]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_each_patience_ends_as_it_would_alone(folded, tmp_path):
    """Check a network that starts from the U-Net of its fold, and that the start makes a difference."""
    planned = next(each for each in folded.plan() if each.variant.from_unet and each.fold == 1)
    for patience in (1, 2):
        alone = replace(planned.config, output=str(tmp_path / str(patience)), patience=patience)
        result = train(alone)
        assert same_weights(alone.output, planned.at(patience))
        assert uctrans.load_model(planned.at(patience)).metadata["best_epoch"] == result.best_epoch
    last = [load_checkpoint(Path(folder) / "last.pt") for folder in (planned.folder, tmp_path / "2")]
    assert last[0]["epoch"] == last[1]["epoch"]
    assert all(torch.equal(value, last[1]["model"]["state"][name]) for name, value in last[0]["model"]["state"].items())
    train(replace(planned.config, output=str(tmp_path / "other"), init_from=None))
    assert not same_weights(tmp_path / "other", tmp_path / "1")


def test_an_interrupted_run_continues_to_the_same_weights_also_with_data_that_moved(
    plain_copy, plain, data, do_here, monkeypatch, table_of, tmp_path
):
    planned = plain_copy.plan()[0]
    shutil.rmtree(planned.folder)
    forward, calls = uctrans.UNet.forward, []

    def interrupted(self, image):
        calls.append(self.training and not image.is_meta)  # without the check before the first step
        if sum(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, image)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(uctrans.UNet, "forward", interrupted)
        run.train_and_score(planned, plain_copy)
    assert load_checkpoint(planned.folder / "last.pt")["sampler"]["step"] == 2
    assert not planned.at(50).exists()
    shutil.copytree(data, tmp_path / "moved")
    do_here(replace(plain_copy, data=str(tmp_path / "moved")))
    assert table_of(plain_copy) == table_of(plain)


def test_a_trained_run_without_scores_is_only_scored_also_in_a_study_that_moved(folded_copy, folded, do_here, table_of):
    planned = next(each for each in folded_copy.plan() if each.variant.from_unet and each.fold == 1)
    before = (planned.folder / "metrics.csv").read_text()
    shutil.rmtree(planned.at(2))
    do_here(folded_copy)
    assert (planned.folder / "metrics.csv").read_text() == before
    assert table_of(folded_copy) == table_of(folded)


def test_a_run_that_diverges_fails_alone(plain_copy, plain, do_here, monkeypatch, capsys, no_workers, table_of):
    failing = plain_copy.plan()[2]
    shutil.rmtree(failing.folder)
    with monkeypatch.context() as patch:
        diverge(patch)
        run.train_and_score(failing, plain_copy)
    result = study_models(plain_copy)
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith("run 3 of 4: unet, seed 1: failed, epoch 1, step 1: the loss is not finite")
    assert f"to try it again, delete {failing.folder}" in line
    assert (result.finished, result.failed, result.total) == (3, 1, 4)
    row, other = table_of(plain_copy).values()
    assert (row["runs"], row["seeds"], row["failed"], row["dice_deviation"]) == ("1", "0", "seed 1", "")
    assert (other["runs"], other["seeds"], other["failed"]) == ("2", "0 1", "")
    assert "| single run of 2 |" in result.table.markdown()
    assert "Failed, in none of the scores: unet, seed 1: epoch 1, step 1: the loss is not" in result.table.markdown()
    shutil.rmtree(failing.folder)
    do_here(plain_copy)
    assert table_of(plain_copy) == table_of(plain)


def test_a_uctransnet_whose_unet_failed_fails_too_and_so_may_all(unet, do_here, monkeypatch):
    unet = replace(unet, models=("unet", "uctransnet_from_unet"))
    diverge(monkeypatch)
    with pytest.raises(StudyError, match="all runs failed, the first, unet, seed 0: epoch 1, step 1: the loss"):
        do_here(unet)
    failed = Path(unet.output) / "runs" / "uctransnet_from_unet" / "seed_0" / "failed.txt"
    assert failed.read_text().startswith("the U-Net that it starts from failed, epoch 1, step 1: the loss")


def test_a_larger_patience_keeps_the_scores_of_the_smaller_even_if_it_diverges(unet, do_here, table_of):
    unet = replace(unet, epochs=4, patience=(1,))
    do_here(unet)
    (planned,) = unet.plan()
    before = (planned.at(1) / "best" / "model.safetensors").read_bytes()
    (planned.folder / "failed.txt").write_text("epoch 4, step 1: the loss is not finite")
    larger = replace(unet, patience=(1, 2))
    result = study_models(larger)
    assert (result.finished, result.failed) == (0, 1)
    rows = table_of(larger).values()
    assert [(row["patience"], row["runs"], row["failed"]) for row in rows] == [("1", "1", ""), ("2", "0", "seed 0")]
    assert study_models(unet).failed == 0, "the larger patience is not asked for"
    (planned.folder / "failed.txt").unlink()
    do_here(larger)
    assert [row["runs"] for row in table_of(larger).values()] == ["1", "1"]
    assert (planned.at(1) / "best" / "model.safetensors").read_bytes() == before


def test_a_full_disk_fails_no_run(unet, monkeypatch):
    def full(config):
        raise TrainingError("metrics.csv: cannot be written") from OSError("no space")

    monkeypatch.setattr(run, "train", full)
    with pytest.raises(TrainingError, match="cannot be written"):
        run.train_and_score(unet.plan()[0], unet)
    assert not (unet.plan()[0].folder / "failed.txt").exists()


def test_a_finished_run_needs_no_checkpoints(unet, do_here, no_workers):
    unet = replace(unet, keep_checkpoints=False)
    assert do_here(unet).finished == 1
    assert not list(unet.plan()[0].folder.glob("*.pt"))
    assert study_models(unet).finished == 1
    larger = replace(unet, patience=(50, 100))
    (planned,) = larger.plan()
    with pytest.raises(StudyError, match=r"holds a run already .*; or delete .* trains this run again"):
        run.train_and_score(planned, larger)
    (planned.folder / "last.pt").write_bytes(b"half")
    with pytest.raises(StudyError, match=rf"last\.pt is text .*; or delete {planned.folder}, and the same"):
        run.train_and_score(planned, larger)


def test_a_network_waits_for_the_unet_that_it_starts_from(unet, monkeypatch):
    started = []

    def start(job, *_):
        started.append(job.name)
        return subprocess.Popen(["false"], stdin=subprocess.PIPE)

    monkeypatch.setattr(run, "start_worker", start)
    with pytest.raises(StudyError, match="unet, seed 0 ended with status 1"):
        study_models(replace(unet, models=("uctransnet_from_unet", "unet"), processes=2))
    assert started == ["unet, seed 0"]


def test_bad_data_stops_the_study_with_the_error_of_the_run(unet, tmp_path):
    data = Path(shutil.copytree(unet.data, tmp_path / "data"))
    image = min((data / "train" / "images").iterdir())
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(StudyError, match=rf"^unet, seed 0: .*{image.name}.* damaged"):
        study_models(replace(unet, data=str(data), seeds=3))
    assert not (Path(unet.output) / "runs" / "unet" / "seed_1").exists()


def test_a_worker_that_dies_stops_no_other_and_the_study_ends_like_in_one_process(
    folded_copy, folded, do_here, table_of, monkeypatch, capfd
):
    config = replace(folded_copy, patience=2, processes=2)
    shutil.rmtree(Path(config.output) / "runs" / "uctransnet_from_unet")
    shutil.rmtree(Path(config.output) / "runs" / "unet" / "seed_0" / "ensemble")
    start_worker, workers = run.start_worker, []

    def killing_the_first(*job):
        workers.append(start_worker(*job))
        if len(workers) == 1:
            workers[0].kill()
        return workers[-1]

    dead = "uctransnet_from_unet, seed 0, fold 0"
    with monkeypatch.context() as patch, pytest.raises(StudyError, match=f"{dead} was killed by SIGKILL"):
        patch.setattr(run, "start_worker", killing_the_first)
        study_models(config)
    assert len(workers) == 3
    assert all(worker.poll() is not None for worker in workers)
    out = capfd.readouterr().out
    assert f"{dead}: its process was killed by SIGKILL; the same command tries it again" in out
    assert "run 3 of 4: uctransnet_from_unet, seed 0, fold 1: Dice" in out
    assert "unet, seed 0, ensemble of 2 folds: Dice" in out
    row = table_of(config)["uctransnet_from_unet", 2]
    assert (row["runs"], row["folds"], row["missing"]) == ("1", "1", "1")
    do_here(config)
    assert table_of(config) == {place: row for place, row in table_of(folded).items() if place[1] == 2}


@pytest.mark.slow
def test_a_run_that_is_short_of_memory_stops_no_other_and_names_the_settings_to_lower(unet, capfd):
    config = replace(unet, models=("uctransnet", "unet"), model_options={"mlp_ratio": 10**15})
    with pytest.raises(StudyError, match=r"1 died \(uctransnet, seed 0 ended with status 1\)"):
        study_models(config)
    captured = capfd.readouterr()
    assert "uctransnet, seed 0: out of memory: set checkpointing" in captured.err
    assert "Traceback" not in captured.err
    assert "run 1 of 2: unet, seed 0: Dice" in captured.out


@pytest.mark.parametrize("cause", ["SIGINT", pytest.param("time", marks=pytest.mark.slow)])
def test_a_signal_and_the_end_of_the_time_save_the_run(cause, unet, monkeypatch):
    config = replace(unet, minutes=1000, epochs=100_000, first_best_epoch=100_000)
    folder, ahead = config.plan()[0].folder, [0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep))

    def stop():
        until = time.monotonic() + 300
        while not read_metrics(folder / "metrics.csv") and time.monotonic() < until:
            time.sleep(0.1)
        if cause == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            ahead[0] = 1e6

    threading.Thread(target=stop).start()
    result = study_models(config)
    assert (result.stopped_by, result.finished, result.total, result.table) == (cause, 0, 1, None)
    assert "0 of 1 runs finished; the same command continues" in str(result)
    epochs = len(read_metrics(folder / "metrics.csv"))
    assert load_checkpoint(folder / "last.pt")["epoch"] == epochs > 0
    assert "stopped by SIGTERM" in (folder / "log.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize(("seconds_an_epoch", "is_begun"), [(60.0, False), (10.0, True), (1000.0, True)])
def test_no_run_begins_that_would_not_fit(seconds_an_epoch, is_begun, plain_copy, monkeypatch, no_workers):
    """One of ten minutes is left. A run of two epochs that takes more than ten can only be done in pieces."""
    for planned in plain_copy.plan():
        file = planned.folder / "metrics.csv"
        header, *rows = [line.split(",") for line in file.read_text().splitlines()]
        for row in rows:
            row[header.index("seconds")] = str(seconds_an_epoch)
        file.write_text("\n".join(",".join(line) for line in [header, *rows]) + "\n")
    times = iter([0.0])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(times, 540.0), sleep=time.sleep))
    config = replace(plain_copy, seeds=3, minutes=10)
    if is_begun:
        with pytest.raises(AssertionError, match="a worker was started"):
            study_models(config)
    else:
        result = study_models(config)
        assert (result.stopped_by, result.finished, result.total) == ("time", 4, 6)
        assert str(result).endswith("The time is up, 4 of 6 runs finished; the same command continues.")
        assert "Not complete" in result.table.markdown()


def test_a_study_whose_time_is_up_at_once_has_no_table(unet, no_workers, capsys):
    previous = signal.getsignal(signal.SIGTERM)
    words = ["study", "models", "-i", unet.data, "-o", unet.output, "--models", "unet", "--minutes", "1e-9"]
    assert cli.main([*words, "--base-channels", "2", "--image-size", "32", "--device", "cpu"]) == 0
    signal.signal(signal.SIGTERM, previous)
    assert capsys.readouterr().out.endswith("The time is up, 0 of 5 runs finished; the same command continues.\n")
    assert not (Path(unet.output) / "table.csv").exists()
