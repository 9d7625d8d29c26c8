"""Images and settings of studies that take seconds, studies that ran in this process, and readers of their tables."""

import csv
import importlib
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from uctrans.study import ModelStudyConfig, run, study_models
from uctrans.study.folder import begin, check_study
from uctrans.training import log
from uctrans.writing import write_png

SIZE = 32


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@contextmanager
def no_pictures():
    """Leave out the pictures of runs and evaluations, which take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("uctrans.inference.evaluate"), "comparison_figure", lambda *_: None)
        patch.setattr(log, "draw_progress", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Write four training, two validation and two test images of bright squares."""
    folder, generator = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for number in range(count):
            row, column = generator.integers(2, 16, 2)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[row : row + 12, column : column + 12] = 255
            image = generator.integers(0, 80, (SIZE, SIZE, 3)) + (mask[..., None] > 0) * 120
            write_png(folder / split / "images" / f"{split}{number}.png", image.astype(np.uint8))
            write_png(folder / split / "masks" / f"{split}{number}.png", mask)
    return folder


@pytest.fixture(scope="session")
def settings(data):
    """Return the settings of a study of two networks and two seeds."""
    return {
        "data": str(data),
        "base_channels": 2,
        "image_size": SIZE,
        "epochs": 2,
        "first_best_epoch": 1,
        "batch_size": 1,
        "learning_rate": 0.02,
        "device": "cpu",
        "threads": 1,
        "model_options": {"num_layers": 1},
        "models": ("unet", "uctransnet"),
        "seeds": (0, 1),
    }


@pytest.fixture(scope="session")
def do_here():
    """Return a function that does the runs of a study in this process, and calls the study, which has nothing left."""

    def do(config):
        begin(config, check_study(config, "models", config.plan()))
        with no_pictures():
            for planned in sorted(config.plan(), key=lambda each: len(each.needs)):
                run.train_and_score(planned, config)
            for ensemble in config.ensembles():
                run.score_ensemble(ensemble, config)
        return study_models(config)

    return do


@pytest.fixture(scope="session")
def plain(settings, tmp_path_factory, do_here):
    """Return the settings of a finished study of two networks and two seeds; no test may write into its folder."""
    config = ModelStudyConfig(**settings, output=str(tmp_path_factory.mktemp("study") / "plain"))
    do_here(config)
    return config


@pytest.fixture(scope="session")
def folded(settings, tmp_path_factory, do_here):
    """Return those of one with two folds, two patiences, and a UCTransNet that starts from the U-Net."""
    own = {"models": ("uctransnet_from_unet", "unet"), "cross_validation": 2, "epochs": 4, "patience": (2, 1)}
    own |= {"seeds": 1, "output": str(tmp_path_factory.mktemp("study") / "folded")}
    config = ModelStudyConfig(**settings | own)
    do_here(config)
    return config


@pytest.fixture
def plain_copy(plain, tmp_path):
    """Return the settings of a copy of the plain study in another place."""
    shutil.copytree(plain.output, tmp_path / "copy")
    return replace(plain, output=str(tmp_path / "copy"))


@pytest.fixture
def folded_copy(folded, tmp_path):
    """Return the settings of a copy of the study with folds in another place."""
    shutil.copytree(folded.output, tmp_path / "copy")
    return replace(folded, output=str(tmp_path / "copy"))


@pytest.fixture
def no_workers(monkeypatch):
    """Let the start of any worker fail."""

    def fail(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(run, "start_worker", fail)


@pytest.fixture(scope="session")
def table_of():
    """Return a function that reads the table of a study: rows by variant and patience."""

    def read(config):
        with (Path(config.output) / "table.csv").open(newline="") as file:
            rows = {(row["variant"], int(row["patience"])): row for row in csv.DictReader(file)}
        for row in rows.values():
            del row["seconds_an_epoch"]
        return rows

    return read
