"""Cross-validation: every seed on every fold, a U-Net as the start of its own fold, and ensembles of folds."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import uctrans
from uctrans.data import find_samples, load_tensors
from uctrans.inference import Predictor, dice
from uctrans.study import ModelStudyConfig, StudyError, study_models, summary
from uctrans.training import TrainConfig, load_checkpoint, train

MODELS = ("uctransnet_from_unet", "unet")
PLACES = [(seed, fold) for seed in (0, 1) for fold in (0, 1)]


@pytest.fixture(scope="module")
def config(settings, tmp_path_factory):
    own = {"models": MODELS, "cross_validation": "2", "epochs": 6, "batch_size": 1, "first_best_epoch": 6}
    return ModelStudyConfig(**settings | own, output=str(tmp_path_factory.mktemp("study") / "folds"))


@pytest.fixture(scope="module")
def undisturbed(config):
    """The folder of a finished study of eight runs; nobody may write into it."""
    study_models(config)
    return Path(config.output)


@pytest.fixture
def moved(undisturbed, config, tmp_path):
    """A copy of it in another place, and the settings that go on with it."""
    shutil.copytree(undisturbed, tmp_path / "moved")
    return replace(config, output=str(tmp_path / "moved"))


def run_folder(folder, model, seed, fold):
    return folder / "runs" / model / f"seed_{seed}" / f"fold_{fold}"


@pytest.mark.parametrize(("written", "expected"), [("5", 5), ("monuseg", "monuseg")])
def test_folds_without_a_fold_are_all_folds(written, expected, settings):
    config = ModelStudyConfig(**settings, output="study", folds=written)
    assert (config.cross_validation, config.folds) == (expected, None)
    assert config.fold_list() == [0, 1, 2, 3, 4]
    alone = ModelStudyConfig(**settings, output="study", folds=written, fold=3)
    assert (alone.cross_validation, alone.folds, alone.fold_list()) == (None, written, [None])


def test_every_seed_trains_on_every_fold(undisturbed, table_of):
    folds = json.loads((undisturbed / "folds.json").read_text())["folds"]
    development = {*(f"train{number}" for number in range(4)), "val0", "val1"}
    assert {name for fold in folds for name in fold["val"]} == development
    for model in MODELS:
        for seed, fold in PLACES:
            checkpoint = load_checkpoint(run_folder(undisturbed, model, seed, fold) / "last.pt")
            assert checkpoint["train_config"]["seed"] == seed
            assert checkpoint["sampler"]["val_names"] == folds[fold]["val"]
            assert checkpoint["sampler"]["train_names"] == folds[fold]["train"]
        row = table_of(undisturbed)[model, 50]
        assert (row["runs"], row["seeds"], row["folds"], row["ensembles"]) == ("4", "0 0 1 1", "0 1 0 1", "2")
    text = (undisturbed / "table.md").read_text()
    assert "sample standard deviation over the seeds and folds" in text


def test_mean_deviation_and_best_are_of_all_runs(undisturbed, table_of):
    assert len({row["dice_mean"] for row in table_of(undisturbed).values()}) == 2, "nothing to tell apart"
    for model in MODELS:
        folders = [run_folder(undisturbed, model, *place) / "patience_50" for place in PLACES]
        scores = [json.loads((folder / "result.json").read_text())["scores"] for folder in folders]
        row = table_of(undisturbed)[model, 50]
        for name in ("dice", "iou"):
            values = [each[name] for each in scores]
            assert float(row[f"{name}_mean"]) == pytest.approx(statistics.mean(values))
            assert float(row[f"{name}_deviation"]) == pytest.approx(statistics.stdev(values))
            assert float(row[f"{name}_best"]) == max(values)


def test_an_ensemble_is_the_mean_of_the_probabilities_of_a_seed(undisturbed, config, table_of):
    tensors, differences = None, 0
    for model in MODELS:
        of_seeds = []
        for seed in (0, 1):
            probabilities = []
            for fold in (0, 1):
                network = uctrans.load_model(run_folder(undisturbed, model, seed, fold) / "patience_50")
                predictor = Predictor(network, device="cpu")
                tensors = tensors or load_tensors(find_samples(config.data, "test"), predictor.protocol, 1)
                probabilities.append(predictor.probabilities(tensors.images))
            differences += (probabilities[0] > 0.5).ne(probabilities[1] > 0.5).sum()
            labels = (torch.stack(probabilities).mean(0)[:, 0] > 0.5).to(torch.uint8).numpy()
            pairs = zip(labels, tensors.masks.numpy(), strict=True)
            of_seeds.append(np.mean([dice(label, mask, 1).item() for label, mask in pairs]))
        row = table_of(undisturbed)[model, 50]
        assert float(row["ensemble_dice_mean"]) == pytest.approx(statistics.mean(of_seeds), abs=1e-6)
        assert float(row["ensemble_dice_deviation"]) == pytest.approx(statistics.stdev(of_seeds), abs=1e-6)
        text = f"{statistics.mean(of_seeds):.4f} ± {statistics.stdev(of_seeds):.4f}"
        assert text in (undisturbed / "table.md").read_text()
    assert differences > 0, "nothing to tell apart"


def test_a_uctransnet_starts_from_the_unet_of_its_seed_and_fold(undisturbed, tmp_path):
    run = run_folder(undisturbed, MODELS[0], 1, 0)
    own = TrainConfig.load_yaml(run / "config.yaml")
    unet = run_folder(undisturbed, "unet", 1, 0) / "patience_50"
    assert (own.model, own.init_from) == ("uctransnet", str(unet.resolve()))
    for start, is_same in ((unet / "best", True), (None, False)):
        alone = replace(own, output=str(tmp_path / str(is_same)), init_from=start and str(start))
        train(alone)
        states = [load_checkpoint(Path(folder) / "last.pt")["model"]["state"] for folder in (alone.output, run)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]) is is_same


def test_a_study_that_moved_goes_on(moved, undisturbed, table_of, no_training, monkeypatch, capsys):
    monkeypatch.setattr(summary, "score", None)
    study_models(moved)
    assert table_of(Path(moved.output)) == table_of(undisturbed)
    assert "ensemble of" not in capsys.readouterr().out


def test_a_uctransnet_keeps_the_patience_of_its_unet(moved, no_training):
    with pytest.raises(StudyError, match=r"init_from: 'patience_50' -> 'patience_100'\. Give the former ones"):
        study_models(replace(moved, patience=(50, 100)))


def test_interrupted_runs_of_a_study_that_moved_go_on(moved, undisturbed, table_of):
    for model in MODELS:
        run = run_folder(Path(moved.output), model, 1, 1)
        shutil.rmtree(run / "patience_50")
        content = json.loads((run.parent / "ensemble" / "patience_50" / "result.json").read_text())
        (run.parent / "ensemble" / "patience_50" / "result.json").write_text(
            json.dumps(content | {"members": {"fold_0": 0.5, "fold_1": 0.5}})  # of runs that are trained anew since
        )
    study_models(moved)
    table, before = table_of(Path(moved.output)), table_of(undisturbed)
    assert table == before


def test_another_number_of_folds_is_refused(moved, no_training):
    for value in (3, "monuseg", None):
        with pytest.raises(StudyError, match=r"cross_validation: the study in .* was begun with 2 folds of its own"):
            study_models(replace(moved, cross_validation=value))
    (Path(moved.output) / "folds.json").write_text(json.dumps({"folds": [{"train": ["train0"], "val": ["val0"]}]}))
    with pytest.raises(StudyError, match=r"folds\.json: holds 1 folds, not 2; restore or delete it"):
        study_models(moved)
    (Path(moved.output) / "folds.json").unlink()
    assert study_models(moved).finished == 8


def test_folds_that_deal_the_images_otherwise_are_refused(moved, no_training):
    file = Path(moved.output) / "folds.json"
    folds = json.loads(file.read_text())["folds"]
    file.write_text(json.dumps({"folds": [dict(fold, train=fold["train"][::-1]) for fold in folds]}))
    assert study_models(moved).finished == 8
    file.write_text(json.dumps({"folds": folds[::-1]}))
    with pytest.raises(StudyError, match=rf"folds: {file} no longer deals the images .*; restore it, or name"):
        study_models(moved)


def test_folds_of_a_file(settings, tmp_path, no_training):
    names = [*(f"train{number}" for number in range(4)), "val0", "val1"]
    folds = [{"train": names[:3], "val": names[3:]}, {"train": names[3:], "val": names[:3]}]
    file = tmp_path / "folds.json"
    file.write_text(json.dumps({"folds": folds}))
    config = ModelStudyConfig(**settings, output=str(tmp_path / "study"), cross_validation=str(file))
    plan = config.plan()
    assert [(run.config.folds, run.config.fold, run.config.seed) for run in plan[::2]] == [
        (str(file), fold, seed) for seed, fold in PLACES
    ]
    assert len({run.folder for run in plan}) == 8
    with pytest.raises(AssertionError, match="something was trained"):
        study_models(config)


def test_a_uctransnet_whose_unet_failed_fails_too(settings, tmp_path, monkeypatch, capsys):
    forward = uctrans.UNet.forward

    def diverging(self, image):
        return forward(self, image) * (float("nan") if self.training else 1)

    monkeypatch.setattr(uctrans.UNet, "forward", diverging)
    own = {"models": ("unet", MODELS[0], "uctransnet"), "seeds": 1, "epochs": 1}
    result = study_models(ModelStudyConfig(**settings | own, output=str(tmp_path / "study")))
    assert (result.finished, result.failed, result.total) == (1, 2, 3)
    out = capsys.readouterr().out
    assert (
        "uctransnet_from_unet, seed 0: failed, the U-Net that it starts from failed, epoch 1, step 1: the loss" in out
    )
