"""Networks of other packages in a study: their options, their folders, and their place in the table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.networks import ATTENTION_UNET, ATTENTION_UNET_OPTIONS, HALVING, HALVING_OPTIONS
from uctrans import load_model
from uctrans.study import ModelStudyConfig, StudyError, study_models
from uctrans.study.folder import check_study
from uctrans.training import ConfigError

OWN = {"models": ("unet", HALVING, ATTENTION_UNET), "seeds": 1}
OPTIONS = {HALVING: HALVING_OPTIONS, ATTENTION_UNET: ATTENTION_UNET_OPTIONS, "width": 6, "unet": {"skips": [1]}}


@pytest.fixture
def make(settings, tmp_path):
    def make(**changes):
        return ModelStudyConfig(
            **settings | OWN | {"model_options": OPTIONS, "output": str(tmp_path / "study")} | changes
        )

    return make


def test_each_network_gets_its_own_options_and_those_it_takes(make):
    assert {run.config.model: run.config.model_options for run in make().plan()} == {
        "unet": {"skips": [1]},
        HALVING: HALVING_OPTIONS | {"width": 6},
        ATTENTION_UNET: ATTENTION_UNET_OPTIONS,
    }
    of_halving = make(model_options=OPTIONS | {HALVING: HALVING_OPTIONS | {"width": 2}}).plan()[1]
    assert of_halving.config.model_options == HALVING_OPTIONS | {"width": 2}


def test_a_folder_is_a_name_on_every_system(make):
    folders = [run.folder.parent.name for run in make().plan()]
    assert folders == ["unet", "tests.networks.Halving", "monai.networks.nets.AttentionUnet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("unet", "tests.networks:Halvin")}, "models: tests.networks:Halvin.* did you mean 'Halving'"),
        ({"models": ("unet", "os:system")}, r"models: os:system is no class of torch\.nn\.Module"),
        ({"models": ("unet", HALVING)}, f"model_options: none of unet, {HALVING} takes {ATTENTION_UNET}; leave it out"),
        ({"model_options": OPTIONS | {HALVING: 3}}, f"model_options: {HALVING} has 3; give a mapping of the options"),
    ],
    ids=["misspelt", "function", "options of no network", "no mapping"],
)
def test_mistakes_in_names_and_options(changes, message, make):
    with pytest.raises(StudyError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 3}, "model_options: .*Halving lacks labels"),
        ({"bands": 3, "labels": 2}, "model_options: .*Halving .* the run has 1 classes"),
    ],
    ids=["missing", "classes"],
)
def test_networks_that_cannot_be_trained_are_found_before_any_run(options, message, make, no_workers):
    config = make(model_options=OPTIONS | {HALVING: options})
    with pytest.raises(ConfigError, match=message):
        study_models(config)
    assert not Path(config.output).exists()


def test_a_study_trains_scores_and_averages_them(make, do_here, table_of):
    config = make(models=("unet", HALVING), model_options={HALVING: HALVING_OPTIONS}, cross_validation=2, epochs=1)
    do_here(config)
    row = table_of(config)[HALVING, 50]
    folder = Path(config.output) / "runs" / "tests.networks.Halving" / "seed_0"
    weights = load_model(folder / "fold_0", network=HALVING).parameters()
    assert (row["runs"], int(row["parameters"])) == ("2", sum(weight.numel() for weight in weights))
    assert float(row["gflop"]) > 0
    assert (folder / "ensemble" / "patience_50" / "summary.json").exists()

    marker = json.loads((Path(config.output) / "study.json").read_text())
    assert marker["settings"][f"model_options of {HALVING}"] == HALVING_OPTIONS
    wider = replace(config, model_options={HALVING: HALVING_OPTIONS | {"width": 8}})
    with pytest.raises(StudyError, match=f"model_options of {HALVING}"):
        check_study(wider, "models", wider.plan())
    (folder / "fold_1" / "patience_50" / "test" / "summary.json").unlink()
    check_study(config, "models", config.plan())  # reads the config.yaml of the run, which names the class
