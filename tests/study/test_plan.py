"""The settings of studies and the runs that follow from them; mistakes are reported before anything is trained."""

import json
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from uctrans import cli
from uctrans.study import ModelStudyConfig, SkipStudyConfig, StudyError, study_models, study_skips
from uctrans.study.folder import begin, check_study
from uctrans.study.table import count_cost
from uctrans.training import ConfigError, TrainConfig

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "recipes"


@pytest.mark.parametrize(("written", "expected"), [("5", 5), ("monuseg", "monuseg")])
def test_folds_without_a_fold_are_all_folds(written, expected, settings):
    config = ModelStudyConfig(**settings, output="study", folds=written)
    assert (config.cross_validation, config.folds) == (expected, None)
    assert config.fold_list() == [0, 1, 2, 3, 4]
    alone = ModelStudyConfig(**settings, output="study", folds=written, fold=3)
    assert (alone.cross_validation, alone.folds, alone.fold_list()) == (None, written, [None])


def test_every_network_trains_with_every_seed_on_every_fold(settings, tmp_path):
    names = [*(f"train{number}" for number in range(4)), "val0", "val1"]
    file = tmp_path / "folds.json"
    file.write_text(json.dumps({"folds": [{"train": names[:3], "val": names[3:]}] * 2}))
    config = ModelStudyConfig(**settings, output="study", cross_validation=str(file))
    plan = config.plan()
    assert [(run.config.model, run.config.seed, run.config.fold) for run in plan] == [
        (model, seed, fold) for seed in (0, 1) for fold in (0, 1) for model in ("unet", "uctransnet")
    ]
    assert {run.config.folds for run in plan} == {str(file)}
    assert len({run.folder for run in plan}) == 8
    assert [[run.name for run in ensemble.needs] for ensemble in config.ensembles()] == [
        [f"{model}, seed {seed}, fold {fold}" for fold in (0, 1)] for seed in (0, 1) for model in ("unet", "uctransnet")
    ]


def test_runs_differ_in_network_and_seed_only(settings):
    plan = ModelStudyConfig(**settings, output="study").plan()
    configs = [run.config.to_dict() for run in plan]
    for run, config in zip(plan, configs, strict=True):
        assert (config.pop("model"), config.pop("seed")) == (run.variant.name, run.seed)
        assert config.pop("model_options") == ({"num_layers": 1} if run.variant.name == "uctransnet" else {})
        config.pop("output")
    assert all(config == configs[0] for config in configs)
    assert configs[0]["epochs"] == settings["epochs"]


def test_every_run_starts_from_the_weights_given_and_continues_with_no_others(settings, tmp_path):
    config = ModelStudyConfig(**settings, output=str(tmp_path / "study"), init_from="run")
    assert {run.config.init_from for run in config.plan()} == {"run"}
    begin(config, check_study(config, "models", config.plan()))
    (tmp_path / "study" / "runs").mkdir()
    (tmp_path / "study" / "runs" / "file").touch()
    with pytest.raises(StudyError, match="began with other settings: init_from: 'run' -> 'other'"):
        check_study(replace(config, init_from="other"), "models", config.plan())


def test_a_uctransnet_starts_from_the_unet_of_its_seed_and_fold(settings):
    own = {"models": ("unet", "uctransnet_from_unet"), "cross_validation": 2, "patience": (100, 50)}
    for run in ModelStudyConfig(**settings | own, output="study").plan():
        if run.variant.name == "unet":
            assert (run.config.init_from, run.needs) == (None, ())
        else:
            unet = Path("study/runs/unet", f"seed_{run.seed}", f"fold_{run.fold}").resolve()
            assert run.config.model == "uctransnet"
            assert run.config.init_from == str(unet / "patience_100")
            assert run.needs[0].folder.resolve() == unet


def test_the_study_of_skips_has_ten_u_nets():
    config = SkipStudyConfig(data="data", output="study", base_channels=2, seeds=1)
    variants = {variant.name: variant.options["skips"] for variant in config.variants()}
    assert variants == {
        "none": [],
        "all": [1, 2, 3, 4],
        "only_1": [1],
        "only_2": [2],
        "only_3": [3],
        "only_4": [4],
        "all_but_1": [2, 3, 4],
        "all_but_2": [1, 3, 4],
        "all_but_3": [1, 2, 4],
        "all_but_4": [1, 2, 3],
    }
    costs = {run.variant.name: count_cost(run.config) for run in config.plan()}
    assert len({cost["parameters"] for cost in costs.values()}) == 10
    assert all(costs["none"]["gflop"] < cost["gflop"] < costs["all"]["gflop"] for cost in [*costs.values()][2:])


@pytest.mark.parametrize(
    ("written", "seeds"), [("3", [0, 1, 2]), ("3,7", [3, 7]), ("[7]", [7]), ("[3, 7]", [3, 7]), ("1", [0])]
)
def test_seeds_on_the_command_line(written, seeds):
    config = cli.parse(["study", "skips", "-i", "data", "-o", "study", "--seeds", written])[1]
    assert config.seed_list == seeds


def test_lists_in_a_config_file(tmp_path):
    file = tmp_path / "study.yaml"
    for written, seeds in (("3", [0, 1, 2]), ("[7]", [7])):
        file.write_text(f"data: data\noutput: study\nseeds: {written}\npatience: [100, 50]\n")
        config = cli.parse(["study", "models", "--config", str(file)])[1]
        assert (config.seed_list, config.patience) == (seeds, (50, 100))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_settings_of_a_training_and_of_a_study(recipe):
    words = ["--config", str(recipe), "-i", "data", "-o", "run"]
    changed = yaml.safe_load(recipe.read_text())
    config = TrainConfig.from_dict(changed | {"data": "data", "output": "run"})
    assert cli.parse(["train", *words])[1] == config
    assert config.to_dict() != TrainConfig(data="data", output="run").to_dict()
    study = cli.parse(["study", "models", *words, "--models", "uctransnet"])[1]
    assert {name: study.plan()[0].config.to_dict()[name] for name in changed} == changed


def test_the_commands_of_the_page_on_studies_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^uctrans (.*)$", (ROOT / "docs" / "studies.md").read_text(), flags=re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        words = shlex.split(command)
        name, _ = cli.parse(words)
        assert words[: len(name.split())] == name.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models unte,uctransnet", "models: unknown model 'unte'; did you mean 'unet'?"),
        ("--models unet,unet", "models: unet is named more than once"),
        ("--models=", "models: is empty"),
        ("--models unet,", "models: unknown model ''"),
        ("--models UNet", "models: unknown model 'UNet'; did you mean 'unet'?"),
        ("--models uctransnet_from_unet", "starts from the U-Net of its seed and fold; name unet too"),
        ("--models unet,unet_from_unet", "unet_from_unet: unet cannot start from a U-Net; leave it out"),
        ("--models unet,dual_branch_uctransnet_from_unet", "dual_branch_uctransnet cannot start from a U-Net"),
        ("--model-options {\"layers\":2}", "none of unet, uctransnet, dual_branch_uctransnet takes layers"),
        ("--seeds 0", "seeds: 0 is too small; give at least 1"),
        ("--seeds=-1", "seeds: -1 is too small"),
        ("--seeds=0,-1", "seeds: -1 is negative"),
        ("--seeds 1,1", "seeds: 1 is named more than once"),
        ("--seeds many", "--seeds: 'many' does not fit; write it like 50 or 50,100"),
        ("--seed 3", "did you mean --seeds?"),
        ("--patience 0", "patience: 0 is too small; give at least 1"),
        ("--patience 100,50,50", "patience: 50 is named more than once"),
        ("--patience soon", "write it like 50 or 50,100"),
        ("--patience 5,20 --val-every 10", "patience: 5 epochs end before the next validation"),
        ("--epochs 0", "epochs: 0 is too small"),
        ("--processes 0", "processes: 0 is too small"),
        ("--processes 2 --progress", "progress: the bars of several processes would mix"),
        ("--minutes 0", "minutes: 0.0 is too small"),
        ("--cross-validation 1", "cross_validation: 1 is too small; give at least 2"),
        ("--cross-validation 7 --models unet", "folds: 7 cannot be made of 6 images"),
        ("--cross-validation glas", "glas: is neither a file nor one of the folds"),
        ("--cross-validation monuseg --folds monuseg --fold 0", "leave out folds and fold"),
        ("--score-size huge", "score_size: 'huge' is not known"),
        ("--score-resolution native", "set score_size to native too"),
        ("--device cuda:99 --models unet", "device: cuda:99 is not there"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_before_anything_is_trained(words, message, data, tmp_path, no_workers, capsys):
    previous = signal.getsignal(signal.SIGTERM)
    assert cli.main(["study", "models", "-i", str(data), "-o", str(tmp_path / "study"), *words.split()]) == 2
    signal.signal(signal.SIGTERM, previous)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_settings_of_the_study_itself_and_torchrun_are_refused(settings, tmp_path, no_workers, monkeypatch):
    for name, value in (("model", "unet"), ("seed", 3), ("resume", True)):
        with pytest.raises(StudyError, match=f"{name}: the study sets it"):
            ModelStudyConfig(**settings, output="study", **{name: value})
    with pytest.raises(StudyError, match="the study varies skips"):
        SkipStudyConfig(data="data", output="study", model_options={"skips": [1]})
    with pytest.raises(StudyError, match="starts from a U-Net with all skips"):
        own = {"models": ("unet", "uctransnet_from_unet"), "model_options": {"skips": [1]}}
        ModelStudyConfig(**settings | own, output="study")
    with pytest.raises(StudyError, match="init_from: uctransnet_from_unet starts from a U-Net of the study"):
        ModelStudyConfig(**settings | {"models": ("unet", "uctransnet_from_unet")}, output="study", init_from="run")
    with pytest.raises(StudyError, match="seeds: is empty"):
        ModelStudyConfig(**settings | {"seeds": ()}, output="study")
    with pytest.raises(ConfigError, match="fold: needs folds and folds needs it"):
        ModelStudyConfig(**settings, output="study", fold=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StudyError, match="start a study without it"):
        study_models(ModelStudyConfig(**settings, output=str(tmp_path / "study")))


@pytest.mark.parametrize(
    ("study", "config", "message"),
    [
        (study_skips, SkipStudyConfig, "unet has no num_layers"),
        (study_models, ModelStudyConfig, "dual_branch_uctransnet cannot be built"),
    ],
)
def test_a_network_that_cannot_be_built_is_reported_before_anything_is_written(
    study, config, message, settings, tmp_path, no_workers
):
    own = {name: value for name, value in settings.items() if name != "models"}
    own["model_options"] = {"num_layers": 1} if study is study_skips else {"depths": [9, 9, 9, 9]}
    with pytest.raises(ConfigError, match=message):
        study(config(**own, output=str(tmp_path / "study")))
    assert not (tmp_path / "study").exists()
