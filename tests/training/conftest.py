import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imsave

from uctrans.training import TrainConfig, train
from uctrans.training.distributed import Processes
from uctrans.training.run import Run

CPU = Processes(rank=0, count=1, device=torch.device("cpu"))
SIZE = 24


def write_images(root, train, val, seed=0):
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Seven training and three validation images of bright squares, 24 x 24 pixels."""
    return write_images(tmp_path_factory.mktemp("squares"), 7, 3)


@pytest.fixture(scope="session")
def even_folder(tmp_path_factory):
    """Eight training images, so that two processes leave none out, and three validation images."""
    return write_images(tmp_path_factory.mktemp("even"), 8, 3, seed=1)


# A run that takes milliseconds an epoch.
SETTINGS = {
    "model": "unet",
    "base_channels": 2,
    "image_size": 16,
    "epochs": 3,
    "first_best_epoch": 1,
    "learning_rate": 0.01,
    "min_learning_rate": 0.001,
    "device": "cpu",
    "progress": False,
}


@pytest.fixture
def make_config(image_folder, tmp_path):
    """Make the settings of a small run in the folder "run" of the test."""

    def make(**changes):
        return TrainConfig(**{"data": str(image_folder), "output": str(tmp_path / "run"), **SETTINGS, **changes})

    return make


@pytest.fixture
def make_run(make_config):
    """Make a small run at the beginning of its first epoch."""

    def make(**changes):
        run = Run(make_config(**changes), CPU)
        run.begin_epoch()
        return run

    return make


@pytest.fixture(scope="session")
def trained_once(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(TrainConfig(data=str(image_folder), output=str(folder), **SETTINGS | {"epochs": 2}))
    return folder


@pytest.fixture
def finished(trained_once, tmp_path):
    """The folder "run" of the test, which holds a run of two epochs with the settings of make_config."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


@pytest.fixture
def assert_same():
    """Check that two nested values hold the same tensors, bit for bit, and the same plain values but ids of runs."""

    def check(one, other, where=""):
        assert type(one) is type(other), where
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, where
            assert torch.equal(one, other), where
        elif isinstance(one, dict):
            assert one.keys() == other.keys(), where
            for key in one.keys() - {"run_id"}:
                check(one[key], other[key], f"{where}/{key}")
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other), where
            for number, pair in enumerate(zip(one, other, strict=True)):
                check(*pair, f"{where}/{number}")
        else:
            assert one == other or (one != one and other != other), where

    return check
