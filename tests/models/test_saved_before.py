"""Models and a run that an earlier version wrote still load, compute the same and continue.

``saved_before/`` was written at commit b320907 on a CPU, with base_channels=2: ``run/`` by ``uctrans train`` on the
demonstration dataset, two epochs of a UCTransNet; ``dual_branch_uctransnet/`` by ``save_pretrained``. ``outputs.npz``
has an image and the logits of both networks; ``metrics_after_resuming.csv`` the metrics of the run after a third epoch.
"""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import uctrans
from uctrans.data import write_demo_dataset
from uctrans.training import TrainConfig, train

FOLDER = Path(__file__).parent / "saved_before"


@pytest.fixture(scope="module")
def outputs():
    with np.load(FOLDER / "outputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("run", "uctransnet"),
        ("run/best", "uctransnet"),
        ("run/last.pt", "uctransnet"),
        ("dual_branch_uctransnet", "dual_branch_uctransnet"),
    ],
)
@torch.no_grad()
def test_models_compute_the_same(path, name, outputs):
    model = uctrans.load_model(FOLDER / path)
    assert model.name == name
    torch.testing.assert_close(model(outputs["image"]), outputs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", ["run/best", "dual_branch_uctransnet"])
def test_names_and_values_of_all_weights_are_the_same(folder):
    saved = safetensors.torch.load_file(FOLDER / folder / "model.safetensors")
    state = uctrans.load_model(FOLDER / folder).state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_saving_again_gives_the_same_configuration(tmp_path):
    for folder in ("run/best", "dual_branch_uctransnet"):
        uctrans.load_model(FOLDER / folder).save_pretrained(tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config.pop("weights_sha256")
        assert json.dumps(config, indent=2) + "\n" == (FOLDER / folder / "config.json").read_text()


def test_the_run_continues_with_the_same_third_epoch(tmp_path):
    data, output = str(write_demo_dataset(tmp_path / "data")), str(tmp_path / "run")
    shutil.copytree(FOLDER / "run", output)
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    checkpoint["train_config"] |= {"data": data, "output": output}
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    config = TrainConfig.load_yaml(tmp_path / "run" / "config.yaml")
    changes = {"data": data, "output": output, "epochs": 3, "resume": True, "device": "cpu", "progress": False}
    train(dataclasses.replace(config, **changes))

    *epochs, third = metrics(tmp_path / "run")
    *expected_epochs, expected = metrics(FOLDER, "metrics_after_resuming.csv")
    assert epochs == expected_epochs
    assert (third["epoch"], third["best_epoch"]) == (expected["epoch"], expected["best_epoch"])
    # Another processor rounds differently.
    for name, tolerance in {"learning_rate": 1e-9, "train_loss": 1e-3, "val_loss": 1e-3, "train_dice": 1e-2}.items():
        assert float(third[name]) == pytest.approx(float(expected[name]), abs=tolerance), name
    assert float(third["val_dice"]) == pytest.approx(float(expected["val_dice"]), abs=2e-2)
    assert third.keys() == expected.keys()


def metrics(folder, name="metrics.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))
