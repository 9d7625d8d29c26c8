"""Seconds to a Dice: runs end at the target, the clock stands still over test images, the record is continued."""

import itertools
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from skimage.io import imread, imsave

from benchmarks import time_to_dice as module
from benchmarks.records import append_line, read_lines
from benchmarks.time_to_dice import (
    CANDIDATES,
    Clock,
    main,
    measure,
    missing,
    parsed,
    result_table,
    time_to_dice,
    write_resized,
)
from uctrans.data import find_samples, get_protocol, load_tensors
from uctrans.training import TrainConfig, loop

SIZE = 24
SPLITS = ("train", "val", "test")
TINY = ["--model", "unet", "--base-channels", "2", "--image-size", "16", "--device", "cpu", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright squares: seven images for training, three each for validation and test."""
    root = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    for split, count in {"train": 7, "val": 3, "test": 3}.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            row, column = generator.integers(2, 12, 2)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[row : row + 8, column : column + 8] = 255
            image = generator.integers(0, 80, (SIZE, SIZE, 3)) + (mask[..., None] > 0) * 120
            imsave(root / split / "images" / f"{split}{number}.png", image.astype(np.uint8), check_contrast=False)
            imsave(root / split / "masks" / f"{split}{number}.png", mask, check_contrast=False)
    return root


def config(data, **changes):
    settings = {"model": "unet", "base_channels": 2, "image_size": 16, "device": "cpu", "learning_rate": 0.01}
    return TrainConfig(data=str(data), output="unused", progress=False, **(settings | changes))


def test_a_run_ends_when_the_test_images_reach_the_target(data):
    found = time_to_dice(config(data, epochs=40, first_best_epoch=1), dice=0.5)
    assert found["reached"]
    assert 0.5 <= found["test_dice"] <= 1
    assert found["epochs"] == len(found["curve"]) < 40
    epochs, seconds, _, test = zip(*found["curve"], strict=True)
    assert list(epochs) == list(range(1, found["epochs"] + 1))
    assert all(earlier < later for earlier, later in itertools.pairwise(seconds))
    assert found["seconds"] == seconds[-1] <= found["seconds_until_saved"]
    assert found["seconds_before_training"] + found["seconds_of_first_epoch"] == pytest.approx(seconds[0])
    assert test[-1] == found["test_dice"]
    assert all(score is None or score < 0.5 for score in test[:-1])


def test_checkpoints_are_written_as_in_training(data, monkeypatch):
    written, looks = [], []
    monkeypatch.setattr(
        loop, "write_files", lambda folder, checkpoint, is_best: written.append((checkpoint["epoch"], is_best))
    )
    monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, [0.1, 0.05, 0.2][run.epoch - 1]))

    def look(*_, **__):
        looks.append(len(written))
        return SimpleNamespace(read=lambda group: (0.5, 0.1))

    monkeypatch.setattr(module, "validate", look)
    found = time_to_dice(config(data, epochs=3, first_best_epoch=1), dice=0.9)
    assert (written[0], written[-1]) == ((0, False), (3, True))
    assert looks[0] == 1  # the weights of an epoch are written after the look at it, on the clock
    assert found["seconds_until_saved"] >= found["seconds"]


def test_a_target_that_is_not_reached(data):
    found = time_to_dice(config(data, epochs=3, first_best_epoch=2), dice=1.1)
    assert not found["reached"]
    assert found["epochs"] == 3
    assert found["curve"][0][3] is None  # no epoch may be the best one yet
    assert found["curve"][1][3] is not None


def test_a_run_that_is_out_of_time_ends_with_its_epoch(data):
    found = time_to_dice(config(data, epochs=3), dice=2.0, longest=0.0)
    assert (found["epochs"], found["reached"]) == (1, False)


def test_training_on_resized_images_is_training_on_the_data_set(data, tmp_path):
    assert write_resized(str(data), tmp_path) == sum(len(find_samples(data, split)) for split in SPLITS)
    for split in SPLITS:
        found, expected = (
            load_tensors(find_samples(folder, split), get_protocol(), classes=1) for folder in (tmp_path, data)
        )
        assert found.names == expected.names
        assert found.digest == expected.digest
        assert set(found.original_sizes) == {(224, 224)} != set(expected.original_sizes)
    assert set(np.unique(imread(next((tmp_path / "val" / "masks").iterdir())))) == {0, 255}


def test_looks_at_the_test_images_decide_nothing_but_the_end(data):
    settings = {"epochs": 6, "first_best_epoch": 1}
    often, seldom = (time_to_dice(config(data, **settings), dice=2.0, every=every) for every in (1, 4))
    validation = [[row[2] for row in found["curve"]] for found in (often, seldom)]
    assert validation[0] == validation[1]
    assert often["val_dice"] == max(validation[0])
    looks = [[row[0] for row in found["curve"] if row[3] is not None] for found in (often, seldom)]
    assert looks[1][0] == looks[0][0]
    assert all(later - earlier >= 4 for earlier, later in itertools.pairwise(looks[1]))


def test_the_dice_is_that_of_the_kept_weights(data, tmp_path):
    pytest.importorskip("monai")
    from uctrans.inference import EvaluateConfig, evaluate
    from uctrans.training import train

    found = time_to_dice(config(data, epochs=4, first_best_epoch=1), dice=2.0)
    run = config(data, epochs=4, first_best_epoch=1).to_dict() | {"output": str(tmp_path / "run")}
    train(TrainConfig(**run))
    settings = {"data": str(data), "output": str(tmp_path / "scores"), "device": "cpu", "progress": False}
    result = evaluate(EvaluateConfig(model=str(tmp_path / "run"), **settings))
    assert found["test_dice"] == pytest.approx(result.mean["dice"], abs=1e-6)


def test_the_clock_stands_still(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] = 13.0
    assert clock.read() == 3.0
    clock.stop()
    now[0] = 100.0
    assert clock.read() == 3.0
    clock.resume()
    now[0] = 101.5
    assert clock.read() == 4.5


def test_the_command_makes_the_missing_runs_and_prints_all(data, tmp_path, capsys, monkeypatch):
    record = tmp_path / "record.jsonl"
    words = ["-i", str(data), "-o", str(record), "--dice", "0.3", "--epochs", "7", *TINY]
    assert main([*words, "--candidates", "published"]) == 0
    (line,) = read_lines(record)
    assert line["run"]["settings"]["graph"] is False
    assert line["result"]["epochs"] <= 7
    assert str(data.parent) not in record.read_text()
    assert "| unet, published | 0 | 0.3000 |" in capsys.readouterr().out

    monkeypatch.setattr(subprocess, "run", lambda command, cwd: SimpleNamespace(returncode=-9))
    assert main([*words, "--candidates", "published,compiled"]) == 1
    _, line = read_lines(record)
    assert (line["run"]["candidate"], line["result"]) == ("compiled", {"error": "the process ended with -9"})
    printed = capsys.readouterr()
    assert "| unet, compiled | 0 | 0.3000 | the process ended with -9 |" in printed.out
    assert "failed, and tried again by the same command: compiled, seed 0" in printed.err


def test_what_is_missing(tmp_path):
    record = tmp_path / "record.jsonl"
    words = ["-i", "data", "-o", str(record), "--dice", "0.7", "--seeds", "2", "--candidates", "ours,published"]
    given = parsed(words)
    assert missing(given) == [("ours", 0), ("published", 0), ("ours", 1), ("published", 1)]
    append_line(record, {"run": module.run_of("published", 0, given), "result": {"reached": False}})
    append_line(record, {"run": module.run_of("ours", 1, given), "result": {"error": "no memory"}})
    assert missing(given) == [("ours", 0), ("ours", 1), ("published", 1)]
    assert len(missing(parsed([*words, "--batch-size", "8"]))) == 4


def test_bad_settings_and_data_are_refused(data, capsys):
    with pytest.raises(ValueError, match="epochs"):
        measure("ours", 0, parsed(["-i", str(data), "--dice", "0.7", *TINY, "--epochs", "0"]))
    with pytest.raises(ValueError, match="nowhere"):
        measure("ours", 0, parsed(["-i", str(data / "nowhere"), "--dice", "0.7", *TINY]))
    with pytest.raises(SystemExit):
        parsed(["-i", "data", "--dice", "0.7", "--candidates", "ours,magic"])
    assert "'magic' is unknown" in capsys.readouterr().err


def test_the_table_says_how_long_a_run_took_or_why_it_did_not():
    run = {"settings": {"model": "unet"}, "candidate": "ours", "seed": 0, "dice": 0.5}
    names = ("seconds_before_training", "seconds_of_first_epoch", "seconds_until_saved")
    result = {"reached": False, "seconds": 3.0, "epochs": 2, "test_dice": None, **dict.fromkeys(names, 1.0)}
    assert result_table([{"run": run, "result": result}]).splitlines()[-1] == (
        "| unet, ours | 0 | 0.5000 | not in 3.0 | 1.0 | 1.0 | 1.0 | 2 | - |"
    )


def test_settings_of_all_candidates_can_be_trained_with():
    given = parsed(["-i", "data", "--dice", "0.7"])
    for candidate in CANDIDATES:
        settings = module.settings_of(candidate, 1, given)
        trained = TrainConfig(data="data", output="unused", **settings)
        assert (trained.protocol, trained.batch_size, trained.seed) == ("uctransnet-224", 4, 1)
