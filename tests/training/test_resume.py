import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import uctrans
from uctrans.training import CheckpointError, ConfigError, TrainConfig, load_checkpoint, loop, train
from uctrans.training.distributed import Processes
from uctrans.training.log import read_metrics
from uctrans.training.run import Run

ROOT = Path(uctrans.__file__).parents[1]
CPU = Processes(rank=0, count=1, device=torch.device("cpu"))
WITH_DROPOUT = {
    "model": "uctransnet",
    "image_size": 32,
    "model_options": {"num_layers": 1, "num_heads": 1},
    "ema_decay": 0.9,
}


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


@pytest.mark.slow
def test_run_killed_at_any_moment_ends_with_the_same_bits(make_config, tmp_path, assert_same):
    settings = {"epochs": 12, "save_minutes": 0, **WITH_DROPOUT}
    configs = [make_config(output=str(tmp_path / name), **settings) for name in ("straight", "killed")]
    files = [tmp_path / "straight.yaml", tmp_path / "killed.yaml"]
    for config, file in zip(configs, files, strict=True):
        config.save_yaml(file)
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py")), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    straight, killed = map(end_of, configs)
    assert [row["epoch"] for row in killed["rows"]] == list(range(1, 13))
    assert_same(straight, killed)
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.parametrize("changes", [WITH_DROPOUT, {"optimizer": "adamw", "weight_decay": 0.1, "amp": "bf16"}])
def test_run_in_two_parts_is_the_run_in_one(make_config, tmp_path, assert_same, changes):
    straight = make_config(output=str(tmp_path / "straight"), epochs=4, **changes)
    train(straight)
    train(make_config(epochs=2, **changes))
    torch.manual_seed(99)
    parts = make_config(epochs=4, resume=True, **changes)
    assert train(parts).epochs == 4
    assert_same(end_of(straight), end_of(parts))


def test_best_of_a_short_run_counts_no_more_where_the_run_goes_on(make_config, monkeypatch):
    scores = [0.9, 0.8, 0.3, 0.4, 0.35]
    monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, scores[run.epoch - 1]))
    assert train(make_config(epochs=2, first_best_epoch=4)).best_epoch == 2
    assert train(make_config(epochs=2, first_best_epoch=4, resume=True)).best_epoch == 2
    result = train(make_config(epochs=5, first_best_epoch=4, resume=True))
    assert (result.best_epoch, result.best_score) == (4, 0.4)
    assert uctrans.load_model(result.run_folder).metadata["best_epoch"] == 4


def test_config_of_a_resumed_run_repeats_the_run(make_config, tmp_path, assert_same):
    train(make_config(epochs=1))
    first = train(make_config(epochs=2, resume=True))
    repeated = TrainConfig.load_yaml(first.run_folder / "config.yaml")
    assert not repeated.resume
    train(dataclasses.replace(repeated, output=str(tmp_path / "second")))
    ends = [load_checkpoint(tmp_path / name / "last.pt")["model"]["state"] for name in ("run", "second")]
    assert_same(*ends)


def test_patience_goes_on_counting(make_config, monkeypatch):
    scores = [0.1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, scores[run.epoch - 1]))
    train(make_config(epochs=4, patience=3))
    result = train(make_config(epochs=8, patience=3, resume=True))
    assert (result.stopped_by, result.epochs, result.best_epoch) == ("early stopping", 6, 2)
    again = train(make_config(epochs=8, patience=3, resume=True))
    assert (again.stopped_by, again.epochs) == ("early stopping", 6)
    longer = train(make_config(epochs=8, patience=9, resume=True))
    assert (longer.stopped_by, longer.epochs, longer.best_epoch) == ("epochs", 8, 2)


def test_finished_run_has_nothing_left_to_do(make_config):
    train(make_config(epochs=2))
    result = train(make_config(epochs=2, resume=True))
    assert (result.stopped_by, result.epochs) == ("epochs", 2)
    assert len(read_metrics(result.run_folder / "metrics.csv")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"seed: 0 -> 5"),
        ({"base_channels": 4, "batch_size": 2}, r"base_channels: 2 -> 4; batch_size: 4 -> 2"),
        ({"model_options": {"skips": []}}, r"model_options: \{\} -> \{'skips': \[\]\}"),
        ({"ema_decay": 0.5}, r"ema_decay: 0\.0 -> 0\.5"),
    ],
)
def test_changed_settings_are_listed(make_config, changes, message):
    train(make_config(epochs=1))
    with pytest.raises(ConfigError, match=rf"run: .*other settings.*{message}.*epochs, patience, device, threads"):
        train(make_config(epochs=2, resume=True, **changes))


def test_changed_data_folder_is_an_error(make_config, tmp_path, image_folder):
    train(make_config(epochs=1))
    (tmp_path / "other").symlink_to(image_folder)
    with pytest.raises(ConfigError, match="data: "):
        train(make_config(epochs=2, resume=True, data=str(tmp_path)))
    assert train(make_config(epochs=2, resume=True, data=str(tmp_path / "other"))).epochs == 2


def test_changed_images_are_an_error(make_config, tmp_path, image_folder):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (data / split / kind).mkdir(parents=True)
            for path in (image_folder / split / kind).iterdir():
                (data / split / kind / path.name).symlink_to(path)
    train(make_config(epochs=1, data=str(data)))
    for kind in ("images", "masks"):
        (data / "train" / kind / "train6.png").unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt: the train images are not those .*first: train6"):
        train(make_config(epochs=2, data=str(data), resume=True))


def test_another_number_of_processes_is_an_error(make_config, tmp_path):
    config = make_config(epochs=1)
    train(config)
    run = Run(config, Processes(rank=0, count=1, device=torch.device("cpu")))
    run.group = Processes(rank=0, count=2, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"last\.pt: the run had 1 processes, this one has 2; .*nproc-per-node 1"):
        run.load_state_dict(load_checkpoint(tmp_path / "run" / "last.pt"), tmp_path / "run" / "last.pt")


def test_another_kind_of_device_draws_anew_from_the_seed(make_config, tmp_path):
    config = make_config(epochs=1)
    train(config)
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    checkpoint["generators"][0]["device"] = "cuda"
    checkpoint["optimizer"]["param_groups"][0] |= {"lr": torch.tensor(0.01), "capturable": True}
    draws = []
    for _ in range(2):
        run = Run(config, CPU)
        run.load_state_dict(checkpoint, tmp_path / "run" / "last.pt")
        run.begin_epoch()
        draws.append(
            [run.order.tolist(), torch.rand(3).tolist(), torch.rand(3, generator=run.augment_generator).tolist()]
        )
    assert draws[0] == draws[1]
    assert run.optimizer.param_groups[0]["capturable"] is False
    loop.train_step(run, run.batch(0))
    assert run.totals.loss > 0
    fresh = Run(config, CPU)
    fresh.begin_epoch()
    assert fresh.order.tolist() != draws[0][0]


def test_resume_needs_the_initial_weights_no_more(make_config, tmp_path):
    uctrans.UNet(base_channels=2).save_pretrained(tmp_path / "unet")
    train(make_config(epochs=1, init_from=str(tmp_path / "unet")))
    for path in (tmp_path / "unet").iterdir():
        path.unlink()
    assert train(make_config(epochs=2, init_from=str(tmp_path / "unet"), resume=True)).epochs == 2
