"""A study continues with the same settings, images and folds; anything else is refused by name."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from uctrans.data import DataError
from uctrans.data.instances import write_instances
from uctrans.study import SkipStudyConfig, StudyError, run, study_models, study_skips
from uctrans.study.folder import FORMAT_VERSION, check_study, read_ensemble
from uctrans.training import ConfigError
from uctrans.writing import FolderError, locked, write_png

SUMMARY = "runs/unet/seed_0/patience_50/test/summary.json"


def test_a_finished_study_is_only_reported_again(plain_copy, plain, no_workers, table_of, capsys):
    result = study_models(plain_copy)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": Dice")[0] for line in lines] == [
        "run 1 of 4: unet, seed 0",
        "run 2 of 4: uctransnet, seed 0",
        "run 3 of 4: unet, seed 1",
        "run 4 of 4: uctransnet, seed 1",
    ]
    assert (result.finished, result.failed, result.total, result.stopped_by) == (4, 0, 4, "")
    assert table_of(plain_copy) == table_of(plain)
    assert result.table.markdown() in str(result)


def test_a_second_call_at_the_same_time_is_refused(plain_copy, no_workers):
    in_use = rf"{plain_copy.output} is in use by process {os.getpid()} on .*; wait for its end"
    with locked(Path(plain_copy.output)), pytest.raises(FolderError, match=in_use):
        study_models(plain_copy)
    assert study_models(plain_copy).finished == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.03}, "learning_rate: 0.02 -> 0.03"),
        ({"epochs": 3}, "epochs: 2 -> 3"),
        ({"model_options": {"num_layers": 2}}, "model_options of uctransnet: {'num_layers': 1} -> {'num_layers': 2}"),
        ({"score_size": "native"}, "score_size: 'protocol' -> 'native'"),
        ({"score_tta": "flips"}, "score_tta: 'none' -> 'flips'"),
        ({"learning_rate": 0.03, "batch_size": 2}, "batch_size: 1 -> 2; learning_rate: 0.02 -> 0.03"),
    ],
)
def test_results_of_other_settings_are_refused(changes, named, plain_copy, no_workers):
    with pytest.raises(StudyError) as refused:
        study_models(replace(plain_copy, **changes))
    assert named in str(refused.value)
    assert "name another output folder" in str(refused.value)


def test_settings_that_change_no_result_may_change(plain_copy, plain, no_workers, table_of):
    study_models(replace(plain_copy, device="auto", threads=2, graph=False, compile=True, save_minutes=0, processes=2))
    check_study(replace(plain_copy, checkpointing=True), "models", plain_copy.plan())
    assert table_of(plain_copy) == table_of(plain)


def test_the_data_may_move_but_not_change(plain_copy, data, tmp_path, no_workers):
    shutil.copytree(data, tmp_path / "moved")
    moved = replace(plain_copy, data=str(tmp_path / "moved"))
    assert study_models(moved).finished == 4
    write_png(tmp_path / "moved" / "train" / "masks" / "train0.png", np.eye(32, dtype=np.uint8))
    with pytest.raises(StudyError, match=r"data: .* other images or masks .* name another output folder"):
        study_models(moved)


def test_a_finished_study_with_folds_may_move(folded_copy, folded, no_workers, table_of):
    assert study_models(folded_copy).finished == 4
    assert table_of(folded_copy) == table_of(folded)


def test_other_folds_are_refused(folded_copy, no_workers):
    for value in (3, None):
        with pytest.raises(StudyError, match=r"cross_validation: the study in .* began with other folds"):
            study_models(replace(folded_copy, cross_validation=value))
    file = Path(folded_copy.output) / "folds.json"
    folds = json.loads(file.read_text())["folds"]
    file.write_text(json.dumps({"folds": [dict(fold, train=fold["train"][::-1]) for fold in folds]}))
    assert study_models(folded_copy).finished == 4, "the order of the names decides nothing"
    file.write_text(json.dumps({"folds": folds[::-1]}))
    with pytest.raises(StudyError, match=r"cross_validation: the study in .* began with other folds"):
        study_models(folded_copy)
    file.unlink()
    assert study_models(folded_copy).finished == 4, "the study makes the same folds again"


def test_patience_may_grow_and_not_shrink(folded_copy, no_workers):
    unet = replace(folded_copy, models=("unet",), model_options={})
    assert study_models(replace(unet, patience=2)).finished == 2
    for planned in replace(unet, patience=2).plan():
        shutil.rmtree(planned.at(1))
    with pytest.raises(StudyError, match="was trained with patience 2 already, and its weights at 1 were not kept"):
        study_models(replace(unet, patience=(1, 2)))
    with pytest.raises(AssertionError, match="a worker was started"):
        study_models(replace(unet, patience=(2, 3)))
    with pytest.raises(StudyError, match=r"patience of the U-Net that starts uctransnet_from_unet: 2 -> 3\. Give"):
        study_models(replace(folded_copy, patience=(2, 3)))


def test_seeds_and_networks_may_be_left_out_and_added(plain_copy, no_workers):
    table = study_models(replace(plain_copy, models=("unet",), seeds=(1,), model_options={})).table
    assert [(row.record["variant"], row.record["seeds"]) for row in table.rows] == [("unet", "1")]
    with pytest.raises(AssertionError, match="a worker was started"):
        study_models(replace(plain_copy, seeds=(0, 1, 7)))
    with pytest.raises(AssertionError, match="a worker was started"):
        study_models(replace(plain_copy, models=("unet", "uctransnet", "uctransnet_from_unet")))


@pytest.mark.parametrize("content", ['{"mean"', "[]", "{}", '{"mean": 3, "count": {}, "images": 2}'])
def test_damaged_scores_are_named(content, plain_copy, no_workers):
    (Path(plain_copy.output) / SUMMARY).write_text(content)
    with pytest.raises(StudyError, match=rf"{SUMMARY}: is damaged .*delete it, and the same command writes it again"):
        study_models(plain_copy)


@pytest.mark.parametrize(
    "content",
    ['{"version"', "[]", "[" * 100_000, f'{{"version": {FORMAT_VERSION}}}'],
    ids=["torn", "list", "deep", "lacking"],
)
def test_a_damaged_marker_is_named(content, plain_copy, no_workers):
    (Path(plain_copy.output) / "study.json").write_text(content)
    with pytest.raises(StudyError, match=r"study\.json: is damaged"):
        study_models(plain_copy)


def test_a_damaged_configuration_of_an_interrupted_run_is_named(plain_copy, no_workers):
    (Path(plain_copy.output) / SUMMARY).unlink()
    file = Path(plain_copy.output) / "runs" / "unet" / "seed_0" / "config.yaml"
    file.write_text("data: data\noutput: out\nepochs: many")
    with pytest.raises(ConfigError, match="epochs: "):
        study_models(plain_copy)


def test_an_ensemble_is_over_whatever_the_clock_said_when_its_runs_were_scored(folded_copy, no_workers):
    for ensemble in folded_copy.ensembles():
        for patience in (1, 2):
            os.utime(ensemble.at(patience) / "summary.json", (0, 0))
    result = study_models(folded_copy)
    assert result.finished == result.total


def test_an_ensemble_of_a_run_that_is_scored_again_is_scored_again(folded_copy, no_workers):
    ensemble, other = folded_copy.ensembles()
    member = ensemble.needs[0]
    shutil.rmtree(member.at(2) / "test")
    run.train_and_score(member, folded_copy)
    assert [read_ensemble(each, 2) is None for each in (ensemble, other)] == [True, False]
    assert read_ensemble(ensemble, 1) is not None
    with pytest.raises(AssertionError, match="a worker was started"):
        study_models(folded_copy)


def test_a_folder_of_something_else_is_refused(plain_copy, settings, tmp_path, no_workers):
    skips = {name: value for name, value in settings.items() if name not in ("models", "model_options")}
    with pytest.raises(StudyError, match="holds a study of models"):
        study_skips(SkipStudyConfig(**skips, output=plain_copy.output))
    marker = Path(plain_copy.output) / "study.json"
    marker.write_text(json.dumps({"study": "models", "images": "0", "folds": None, "names_in_folds": None}))
    with pytest.raises(
        StudyError, match=r"another version of uctrans began the study in .* name another output folder"
    ):
        study_models(plain_copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="no study wrote"):
        study_models(replace(plain_copy, output=str(tmp_path / "mine")))
    with pytest.raises(FolderError, match="cannot be made a folder"):
        study_models(replace(plain_copy, output=str(tmp_path / "mine" / "notes.txt")))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_study_that_trained_nothing_yet_begins_with_the_mended_settings(plain_copy, no_workers):
    shutil.rmtree(Path(plain_copy.output) / "runs")
    with pytest.raises(AssertionError, match="a worker was started"):
        study_models(replace(plain_copy, batch_size=2))
    marker = json.loads((Path(plain_copy.output) / "study.json").read_text())
    assert marker["settings"]["batch_size"] == 2


def test_bad_test_images_are_named_before_anything_is_trained(plain, data, tmp_path, no_workers):
    folder = shutil.copytree(data, tmp_path / "data") / "test"
    config = replace(plain, data=str(tmp_path / "data"), output=str(tmp_path / "study"), score_size="native")
    write_instances(folder / "instances" / "test1.png", np.ones((33, 32), np.int32))
    with pytest.raises(DataError, match=r"instances/test1\.png.*33"):
        study_models(config)
    assert check_study(replace(config, score_size="protocol"), "models", config.plan()), "it needs no instance maps"
    write_png(folder / "masks" / "test1.png", np.zeros((32, 33), np.uint8))
    with pytest.raises(DataError, match=r"masks/test1\.png.*33"):
        study_models(config)
    assert not (tmp_path / "study").exists()
