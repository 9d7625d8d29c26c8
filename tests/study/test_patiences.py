"""Several patiences share one training, which is at each of them what it would have been alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import uctrans
from uctrans.study import ModelStudyConfig, StudyError, single, study_models, summary
from uctrans.training import load_checkpoint
from uctrans.training import loop as training_loop

SCORES = [0.3, 0.5, 0.4, 0.4, 0.6, 0.4, 0.4, 0.4, 0.4]  # patience 1 stops after epoch 4, patience 3 after epoch 9


@pytest.fixture(scope="module", autouse=True)
def scripted_scores():
    """Validation that trains nothing: its Dice is that of the list for each epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "validate_epoch", lambda run: (0.5, SCORES[run.epoch - 1]))
        yield


@pytest.fixture(scope="module")
def config(settings, tmp_path_factory):
    own = {"models": ("unet",), "model_options": {}, "seeds": 1, "epochs": 20, "patience": (3, 1)}
    return ModelStudyConfig(**settings | own, output=str(tmp_path_factory.mktemp("study") / "both"))


@pytest.fixture(scope="module")
def both(config):
    """The folder of a finished study with two patiences; nobody may write into it."""
    study_models(config)
    return Path(config.output)


def result_of(folder, patience):
    return json.loads((folder / "runs" / "unet" / "seed_0" / f"patience_{patience}" / "result.json").read_text())


def weights_of(folder, patience):
    return uctrans.load_model(folder / "runs" / "unet" / "seed_0" / f"patience_{patience}").state_dict()


def test_each_patience_ends_as_it_would_alone(both, config, tmp_path):
    assert [result_of(both, patience)["epochs"] for patience in (1, 3)] == [4, 9]
    assert [result_of(both, patience)["best_epoch"] for patience in (1, 3)] == [2, 5]
    for patience in (1, 3):
        alone = tmp_path / str(patience)
        study_models(replace(config, patience=patience, output=str(alone)))
        together, apart = (result_of(folder, patience) for folder in (both, alone))
        assert {**together, "seconds": 0} == {**apart, "seconds": 0}
        for one, other in zip(*(weights_of(folder, patience).values() for folder in (both, alone)), strict=True):
            assert torch.equal(one, other)
    checkpoints = [
        load_checkpoint(folder / "runs" / "unet" / "seed_0" / "last.pt") for folder in (both, tmp_path / "3")
    ]
    for one, other in zip(*(checkpoint["model"]["state"].values() for checkpoint in checkpoints), strict=True):
        assert torch.equal(one, other)
    moments = [checkpoint["optimizer"]["state"] for checkpoint in checkpoints]
    assert all(torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]) for key in moments[0])
    pairs = zip(*(weights_of(both, patience).values() for patience in (1, 3)), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs), "nothing to tell apart"


def test_the_table_has_a_row_for_each_patience(both, table_of):
    table = table_of(both)
    assert list(table) == [("unet", 1), ("unet", 3)]
    for patience in (1, 3):
        assert float(table["unet", patience]["dice_mean"]) == result_of(both, patience)["scores"]["dice"]
    lines = (both / "table.md").read_text().splitlines()
    assert [[cell.strip() for cell in line.split("|")][1:3] for line in lines[2:4]] == [["unet", "1"], ["unet", "3"]]


def test_the_line_of_a_run_tells_the_score_at_each(both, config, no_training, capsys):
    study_models(config)
    first, second = (result_of(both, patience)["scores"]["dice"] for patience in (1, 3))
    assert f"unet, seed 0: Dice {first:.4f} at patience 1, {second:.4f} at patience 3, " in capsys.readouterr().out


def test_a_larger_patience_goes_on_and_a_smaller_is_refused(both, config, tmp_path, monkeypatch, no_training):
    shutil.copytree(both, tmp_path / "copy")
    copy = replace(config, output=str(tmp_path / "copy"))
    study_models(replace(copy, patience=3))
    with pytest.raises(StudyError, match="was trained with patience 3 already, and the weights at 2 are lost"):
        study_models(replace(copy, patience=(2, 3)))
    with pytest.raises(AssertionError, match="something was trained"):
        study_models(replace(copy, patience=(3, 4)))


def test_one_cosine_that_early_stopping_ended_is_told(config, tmp_path, capsys):
    config = replace(config, restart_period=None, epochs=9, patience=(1, 9), output=str(tmp_path / "study"))
    text = study_models(config).table.markdown()
    assert "Stopped early, before their learning rate had fallen to its end: 1 of 2 of unet." in text
    assert capsys.readouterr().out.startswith(
        "unet: the learning rate falls once, over all of 9 epochs, and a patience"
    )


def test_the_table_says_where_a_uctransnet_from_a_unet_starts(config):
    models = ("unet", "uctransnet_from_unet")
    (remark,) = summary._remark_on_starts(replace(config, models=models))
    assert remark == "uctransnet_from_unet: starts at every patience from the U-Net of patience 3."
    assert summary._remark_on_starts(replace(config, models=models, patience=3)) == []
    assert summary._remark_on_starts(config) == []


def test_the_weights_that_training_replaces_are_kept(config, tmp_path):
    config = replace(config, patience=1, output=str(tmp_path / "study"))
    study_models(config)
    before = {name: value.clone() for name, value in weights_of(tmp_path / "study", 1).items()}
    study_models(replace(config, patience=(1, 3)))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(tmp_path / "study", 1).items())
    assert result_of(tmp_path / "study", 3)["best_epoch"] == 5


def test_a_finished_run_needs_no_checkpoints(config, both, tmp_path, table_of, monkeypatch):
    config = replace(config, keep_checkpoints=False, output=str(tmp_path / "study"))
    study_models(config)
    run = tmp_path / "study" / "runs" / "unet" / "seed_0"
    assert not list(run.glob("*.pt"))
    monkeypatch.setattr(single, "train", None)
    study_models(config)
    assert table_of(tmp_path / "study")["unet", 3]["dice_mean"] == table_of(both)["unet", 3]["dice_mean"]
    with pytest.raises(StudyError, match=r"last\.pt is lost; delete the folder .*trains this run anew"):
        study_models(replace(config, patience=(1, 3, 5)))


def test_a_run_that_diverges_late_keeps_its_score_at_the_smaller_patience(config, tmp_path, monkeypatch, table_of):
    config = replace(config, patience=1, output=str(tmp_path / "study"))
    study_models(config)
    forward = uctrans.UNet.forward
    monkeypatch.setattr(
        uctrans.UNet, "forward", lambda self, image: forward(self, image) * (float("nan") if self.training else 1)
    )
    result = study_models(replace(config, patience=(1, 3)))
    assert (result.finished, result.failed) == (0, 1)
    table = table_of(tmp_path / "study")
    assert (table["unet", 1]["runs"], table["unet", 1]["failed"]) == ("1", "")
    assert (table["unet", 3]["runs"], table["unet", 3]["failed"]) == ("0", "seed 0")
    assert study_models(config).failed == 0, "the larger patience is not asked for"
