"""A resumed run ends with the bits of one that was never stopped, or is refused."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import uctrans
from uctrans.training import CheckpointError, ConfigError, TrainConfig, load_checkpoint, loop, train
from uctrans.training.checkpoint import save_checkpoint
from uctrans.training.distributed import Processes
from uctrans.training.log import read_metrics

WITH_DROPOUT = {
    "model": "uctransnet",
    "image_size": 32,
    "model_options": {"num_layers": 1, "num_heads": 1},
    "ema_decay": 0.9,
}
# Before or after a file of this name is replaced for the first time.
MOMENTS = (
    ("before", "last.pt"),
    ("before", "model.safetensors"),
    ("before", "config.json"),
    ("before", "best.pt"),
    ("after", "best.pt"),
    ("after", "last.pt"),
)


def end_of(config):
    """The last and the best checkpoint and the metrics of a run, without what may differ from run to run."""
    folder = Path(config.output)
    checkpoints = {name: load_checkpoint(folder / name) for name in ("last.pt", "best.pt")}
    for checkpoint in checkpoints.values():
        del checkpoint["train_config"]
    rows = read_metrics(folder / "metrics.csv")
    for row in rows:
        del row["seconds"], row["images_per_second"]
    weights = dict(uctrans.load_model(folder).state_dict())
    return {"checkpoints": checkpoints, "rows": rows, "weights": weights}


def resumed(config):
    return dataclasses.replace(config, resume=(Path(config.output) / "last.pt").exists())


def train_on_a_disk(config, change):
    """Train while Path.replace is slow, or kills the process at a moment of `MOMENTS`; a child process runs this."""
    original = Path.replace

    def replace(path, target):
        if change == "slow":
            time.sleep(random.uniform(0, 0.03))  # so that the training is ahead of what is on the disk
        elif Path(target).name == change[1]:
            if change[0] == "after":
                original(path, target)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, target)

    Path.replace = replace
    train(config)


def child_that_trains(config, change):
    # Children are forked from a server that has imported the packages once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["uctrans.training", "torch.utils.tensorboard", "matplotlib.figure", "skimage.io"])
    child = context.Process(target=train_on_a_disk, args=(resumed(config), change))
    child.start()
    return child


def kill_at(config, moment):
    child = child_that_trains(config, moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_run_killed_while_it_writes_ends_with_the_same_bits(make_config, tmp_path, assert_same):
    straight, killed = (make_config(output=str(tmp_path / name), save_minutes=0) for name in ("straight", "killed"))
    train(straight)
    for moment in (("after", "last.pt"), ("before", "best.pt")):
        kill_at(killed, moment)
    assert train(resumed(killed)).epochs == 3
    assert_same(end_of(straight), end_of(killed))
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.slow
def test_run_killed_at_any_moment_ends_with_the_same_bits(make_config, tmp_path, assert_same):
    settings = {"epochs": 12, "save_minutes": 0, **WITH_DROPOUT}
    straight, killed = (make_config(output=str(tmp_path / name), **settings) for name in ("straight", "killed"))
    train(straight)
    for moment in MOMENTS:
        kill_at(killed, moment)
    path = Path(killed.output) / "last.pt"
    for _ in range(4):
        before = path.stat().st_mtime_ns
        child = child_that_trains(killed, "slow")
        while path.stat().st_mtime_ns == before and child.is_alive():
            time.sleep(0.001)
        child.join(random.uniform(0, 0.3))
        child.kill()
        child.join()
        print(f"{child.exitcode} in epoch {load_checkpoint(path)['epoch']}")
    assert train(resumed(killed)).epochs == 12
    assert_same(end_of(straight), end_of(killed))
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.parametrize("changes", [WITH_DROPOUT, {"optimizer": "adamw", "weight_decay": 0.1, "amp": "bf16"}])
def test_run_in_two_parts_is_the_run_in_one(make_config, tmp_path, assert_same, changes):
    straight = make_config(output=str(tmp_path / "straight"), epochs=2, **changes)
    train(straight)
    train(make_config(epochs=1, **changes))
    torch.manual_seed(99)
    parts = make_config(epochs=2, resume=True, **changes)
    assert train(parts).epochs == 2
    assert_same(end_of(straight), end_of(parts))


def test_best_epoch_of_a_shorter_run_does_not_count_when_the_run_continues(make_config, monkeypatch):
    scores = [0.9, 0.8, 0.3, 0.4, 0.35]
    monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, scores[run.epoch - 1]))
    assert train(make_config(epochs=2, first_best_epoch=4)).best_epoch == 2
    assert train(make_config(epochs=2, first_best_epoch=4, resume=True)).best_epoch == 2
    result = train(make_config(epochs=5, first_best_epoch=4, resume=True))
    assert (result.best_epoch, result.best_score) == (4, 0.4)
    assert uctrans.load_model(result.run_folder).metadata["best_epoch"] == 4


def test_config_of_a_resumed_run_repeats_the_run(finished, make_config, tmp_path, assert_same):
    train(make_config(epochs=3, resume=True))
    repeated = TrainConfig.load_yaml(finished / "config.yaml")
    assert (repeated.resume, repeated.epochs) == (False, 3)
    train(dataclasses.replace(repeated, output=str(tmp_path / "second")))
    ends = [load_checkpoint(tmp_path / name / "last.pt")["model"]["state"] for name in ("run", "second")]
    assert_same(*ends)


def test_patience_counts_across_a_resume(make_config, monkeypatch):
    scores = [0.1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, scores[run.epoch - 1]))
    train(make_config(epochs=4, patience=3))
    result = train(make_config(epochs=8, patience=3, resume=True))
    assert (result.stopped_by, result.epochs, result.best_epoch) == ("early stopping", 6, 2)
    again = train(make_config(epochs=8, patience=3, resume=True))
    assert (again.stopped_by, again.epochs) == ("early stopping", 6)
    longer = train(make_config(epochs=8, patience=9, resume=True))
    assert (longer.stopped_by, longer.epochs, longer.best_epoch) == ("epochs", 8, 2)


def test_finished_run_has_nothing_left_to_do(finished, make_config):
    result = train(make_config(epochs=2, resume=True))
    assert (result.stopped_by, result.epochs) == ("epochs", 2)
    assert len(read_metrics(finished / "metrics.csv")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"seed: 0 -> 5"),
        ({"base_channels": 4, "batch_size": 2}, r"base_channels: 2 -> 4; batch_size: 4 -> 2"),
        ({"model_options": {"skips": []}}, r"model_options: \{\} -> \{'skips': \[\]\}"),
        ({"ema_decay": 0.5}, r"ema_decay: 0\.0 -> 0\.5"),
    ],
)
def test_changed_settings_are_listed(finished, make_config, changes, message):
    with pytest.raises(ConfigError, match=rf"run: .*other settings.*{message}.*epochs, patience, device, threads"):
        train(make_config(resume=True, **changes))


def test_a_run_of_a_version_with_other_settings_resumes(finished, make_config):
    checkpoint = load_checkpoint(finished / "last.pt")
    checkpoint["train_config"]["gone"] = 7
    del checkpoint["train_config"]["checkpointing"]
    save_checkpoint(finished / "last.pt", checkpoint)
    assert train(make_config(epochs=2, resume=True)).epochs == 2


@pytest.fixture
def another(finished, make_config, tmp_path):
    """The folder of a run of the same settings, which is not that in the folder "run"."""
    config = make_config(epochs=2, output=str(tmp_path / "another"))
    train(config)
    return Path(config.output)


def put(source, target):
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        target.unlink()
        shutil.copy(source, target)


@pytest.mark.parametrize("name", ["best", "best.pt", "last.pt"])
def test_files_of_two_runs_are_not_resumed(name, finished, another, make_config):
    put(another / name, finished / name)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    named = "best and best.pt" if name == "last.pt" else name
    with pytest.raises(CheckpointError, match=rf"last\.pt: is of another run than {named} in .*run; move these away"):
        train(make_config(resume=True))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    for moved_away in ("best", "best.pt"):
        (finished / moved_away).rename(finished.parent / moved_away)
    assert train(make_config(resume=True)).epochs == 3


def test_metrics_of_another_run_are_not_continued(finished, make_config, tmp_path):
    train(make_config(epochs=2, output=str(tmp_path / "other"), seed=1))
    put(tmp_path / "other" / "metrics.csv", finished / "metrics.csv")
    with pytest.raises(CheckpointError, match=r"last\.pt: is of another run than metrics\.csv in .*run; move these"):
        train(make_config(resume=True))
    (finished / "metrics.csv").unlink()
    assert train(make_config(resume=True)).epochs == 3


def test_a_run_that_took_the_best_checkpoint_or_lost_files_resumes(finished, make_config, tmp_path):
    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    shutil.copy(moved / "best.pt", moved / "last.pt")
    assert train(make_config(output=str(moved), resume=True)).epochs == 3
    (finished / "best.pt").write_bytes(b"damaged")
    shutil.rmtree(finished / "best")
    (finished / "metrics.csv").unlink()
    assert train(make_config(resume=True)).epochs == 3


def test_a_run_of_a_version_without_ids_resumes_and_keeps_the_id_it_gets(finished, another, make_config):
    checkpoint = load_checkpoint(finished / "last.pt")
    del checkpoint["model"]["metadata"]["run_id"]
    save_checkpoint(finished / "last.pt", checkpoint)
    put(another / "best", finished / "best")
    assert train(make_config(resume=True, save_minutes=0)).epochs == 3
    run_id = load_checkpoint(finished / "last.pt")["model"]["metadata"]["run_id"]
    put(another / "best.pt", finished / "best.pt")
    with pytest.raises(CheckpointError, match="another run than best"):
        train(make_config(resume=True))
    put(finished / "last.pt", finished / "best.pt")
    shutil.rmtree(finished / "best")
    assert train(make_config(resume=True, epochs=4)).epochs == 4
    assert load_checkpoint(finished / "last.pt")["model"]["metadata"]["run_id"] == run_id


def test_a_run_that_starts_from_the_best_weights_of_another_is_a_run_of_its_own(finished, make_config, tmp_path):
    config = make_config(epochs=1, output=str(tmp_path / "second"), init_from=str(finished))
    train(config)
    assert train(dataclasses.replace(config, epochs=2, resume=True)).epochs == 2
    ids = {
        load_checkpoint(folder / "last.pt")["model"]["metadata"]["run_id"] for folder in (finished, tmp_path / "second")
    }
    assert len(ids) == 2


def test_data_may_move(finished, make_config, tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "moved")
    assert train(make_config(epochs=3, resume=True, data=str(tmp_path / "moved"))).epochs == 3
    assert TrainConfig.load_yaml(finished / "config.yaml").data == str(tmp_path / "moved")


def test_changed_images_are_an_error(make_config, make_run, tmp_path, image_folder):
    data = shutil.copytree(image_folder, tmp_path / "data")
    state = make_run(data=str(data)).state_dict()
    for kind in ("images", "masks"):
        (data / "train" / kind / "train6.png").unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt: the train images are not those .*first: train6"):
        make_run(data=str(data)).load_state_dict(state, Path("last.pt"))


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("protocol", ["uctransnet-224", "native"])
def test_changed_pixels_are_an_error(protocol, kind, make_config, make_run, tmp_path, image_folder):
    data = shutil.copytree(image_folder, tmp_path / "data")
    state = make_run(data=str(data), protocol=protocol).state_dict()
    shutil.copy(data / "val" / kind / "val0.png", data / "val" / kind / "val1.png")
    which = r" \(val1\)" if kind == "images" else ""
    with pytest.raises(
        CheckpointError, match=rf"last\.pt: pixels or labels of the val images in .*{which} have changed"
    ):
        make_run(data=str(data), protocol=protocol).load_state_dict(state, Path("last.pt"))


def test_a_run_of_a_version_without_digests_resumes_only_where_its_data_was(make_run, tmp_path, image_folder):
    run = make_run()
    state = run.state_dict()
    del state["sampler"]["train_digest"], state["sampler"]["val_digest"]
    make_run().load_state_dict(state, Path("last.pt"))
    moved = shutil.copytree(image_folder, tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"recorded no pixels to compare with .*moved; resume with the data in"):
        make_run(data=str(moved)).load_state_dict(state, Path("last.pt"))


def test_another_number_of_processes_is_an_error(make_run):
    run = make_run()
    state = run.state_dict()
    run.group = Processes(rank=0, count=2, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"last\.pt: the run had 1 processes, this one has 2; .*nproc-per-node 1"):
        run.load_state_dict(state, Path("last.pt"))


def test_another_kind_of_device_draws_new_numbers_from_the_seed(finished, make_run):
    checkpoint = load_checkpoint(finished / "last.pt")
    checkpoint["generators"][0]["device"] = "cuda"
    checkpoint["optimizer"]["param_groups"][0] |= {"lr": torch.tensor(0.01), "capturable": True}
    draws = []
    for _ in range(2):
        run = make_run()
        run.order = None
        run.load_state_dict(checkpoint, finished / "last.pt")
        run.begin_epoch()
        draws.append(
            [run.order.tolist(), torch.rand(3).tolist(), torch.rand(3, generator=run.augment_generator).tolist()]
        )
    assert draws[0] == draws[1]
    assert run.optimizer.param_groups[0]["capturable"] is False
    loop.train_step(run, run.batch(0))
    assert run.totals.loss > 0
    assert make_run().order.tolist() != draws[0][0]


def test_resume_does_not_need_the_initial_weights(make_config, tmp_path):
    uctrans.UNet(base_channels=2).save_pretrained(tmp_path / "unet")
    train(make_config(epochs=1, init_from=str(tmp_path / "unet")))
    shutil.rmtree(tmp_path / "unet")
    assert train(make_config(epochs=2, init_from=str(tmp_path / "unet"), resume=True)).epochs == 2
