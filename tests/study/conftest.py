"""Images and settings of studies that take seconds."""

import csv

import numpy as np
import pytest
import torch

from uctrans.study import cost, runs, single
from uctrans.writing import write_png

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_few_steps():
    threads, steps = torch.get_num_threads(), (cost.WARM_UP_STEPS, cost.TIMED_STEPS)
    torch.set_num_threads(1)
    cost.WARM_UP_STEPS, cost.TIMED_STEPS = 1, 3
    yield
    torch.set_num_threads(threads)
    cost.WARM_UP_STEPS, cost.TIMED_STEPS = steps


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Four training, two validation and two test images of bright squares."""
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
    """Settings of a study of two models and two seeds that takes seconds."""
    return {
        "data": str(data),
        "base_channels": 2,
        "image_size": SIZE,
        "epochs": 2,
        "first_best_epoch": 1,
        "learning_rate": 0.02,
        "device": "cpu",
        "threads": 1,
        "model_options": {"num_layers": 1},
        "models": ("unet", "uctransnet"),
        "seeds": (0, 1),
    }


@pytest.fixture
def no_training(monkeypatch):
    """Let any training or measurement fail."""

    def fail(*_, **__):
        raise AssertionError("something was trained")

    monkeypatch.setattr(single, "train", fail)
    monkeypatch.setattr(runs, "measure", fail)


@pytest.fixture(scope="session")
def table_of():
    """A function that reads the table of a study: rows by variant and patience."""

    def read(folder):
        with (folder / "table.csv").open(newline="") as file:
            return {(row["variant"], int(row["patience"])): row for row in csv.DictReader(file)}

    return read
