"""Recipes: each trains as it says, those that differ in scoring alone share a training, and effects are of pairs."""

import csv
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from uctrans import cli
from uctrans.study import RecipeStudyConfig, StudyError, single, study_recipes, summary
from uctrans.study.cost import Cost
from uctrans.study.files import Outcome, Result, read_record
from uctrans.study.report import Row, Table
from uctrans.study.schedule import Budget, Schedule
from uctrans.training import load_checkpoint

RECIPES = """
published: {}
turned: {score_tta: d4}
averaged: &averaged {ema_decay: 0.5, restart_period: null}
crops: {<<: *averaged, protocol: native, crops_per_image: 2, score_size: uctransnet-224}
"""
PATIENCE = "patience_50"
NAMES = ("published", "turned", "averaged", "crops")


@pytest.fixture(scope="module")
def config(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "own.yaml").write_text(RECIPES)
    own = {name: value for name, value in settings.items() if name != "models"} | {
        "model": "unet", "model_options": {}, "seeds": (0,), "cross_validation": 2,
        "recipes": str(folder / "own.yaml"), "output": str(folder / "study"),
        "epochs": 6, "first_best_epoch": 6, "batch_size": 1,  # by then a network finds more than all of the image
    }  # fmt: skip
    return RecipeStudyConfig(**own)


@pytest.fixture(scope="module")
def undisturbed(config):
    """The folder of a finished study of four recipes on two folds; nobody may write into it."""
    study_recipes(config)
    return Path(config.output)


def result_of(folder, recipe, fold):
    return json.loads((folder / f"runs/{recipe}/seed_0/fold_{fold}/{PATIENCE}/result.json").read_text())


def rows_of(folder):
    with (folder / "table.csv").open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_each_recipe_trains_as_it_says(undisturbed):
    def trained(recipe):
        return load_checkpoint(undisturbed / f"runs/{recipe}/seed_0/fold_1/last.pt")["train_config"]

    published = trained("published")
    assert (published["ema_decay"], published["protocol"], published["restart_period"]) == (0, "uctransnet-224", 10)
    changed = {"ema_decay": 0.5, "restart_period": None}
    placed = {"output": trained("averaged")["output"]}
    assert trained("averaged") == published | changed | placed
    placed = {"output": trained("crops")["output"]}
    assert trained("crops") == published | changed | placed | {"protocol": "native", "crops_per_image": 2}


def test_a_recipe_of_scoring_alone_takes_the_weights_of_another(undisturbed):
    folder = undisturbed / "runs/turned/seed_0/fold_0"
    assert [path.name for path in folder.iterdir()] == [PATIENCE]
    weights = f"runs/{{}}/seed_0/fold_0/{PATIENCE}/best/model.safetensors"
    assert (undisturbed / weights.format("turned")).read_bytes() == (
        undisturbed / weights.format("published")
    ).read_bytes()
    for recipe, tta in (("turned", "d4"), ("published", "none")):
        for part in ("test", "validation"):
            summary = undisturbed / f"runs/{recipe}/seed_0/fold_0/{PATIENCE}/{part}/summary.json"
            assert json.loads(summary.read_text())["settings"]["tta"] == tta
    turned, published = (result_of(undisturbed, recipe, 0) for recipe in ("turned", "published"))
    for name in ("best_epoch", "epochs", "stopped_by"):
        assert turned[name] == published[name]


def test_scores_of_crops_are_of_resized_masks(undisturbed):
    result = result_of(undisturbed, "crops", 0)
    assert result["scored_at"] == "224 x 224 pixels, as uctransnet-224 resizes them"


def test_scores_that_are_taken_alike_compare(undisturbed):
    result = read_record(undisturbed / f"runs/crops/seed_0/fold_0/{PATIENCE}/result.json", Result)
    before = replace(result, variant="augmented", scored_at="224 x 224 pixels, as augmented-224 resizes them")
    assert summary._scored_at([result, before]) == result.scored_at == summary._scored_at([before])
    native = replace(result, variant="native", scored_at="the size of their masks")
    assert summary._scored_at([result, native]).startswith("different sizes, so they do not compare: crops at 224")


def test_validation_scores_are_of_the_images_of_the_fold(undisturbed):
    folds = json.loads((undisturbed / "folds.json").read_text())["folds"]
    for recipe in NAMES:
        for fold in (0, 1):
            folder = undisturbed / f"runs/{recipe}/seed_0/fold_{fold}/{PATIENCE}"
            with (folder / "validation/metrics.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            assert [row["name"] for row in rows] == folds[fold]["val"]
            expected = statistics.mean(float(row["dice"]) for row in rows)
            assert result_of(undisturbed, recipe, fold)["validation"]["dice"] == pytest.approx(expected, abs=1e-6)


def test_effects_are_mean_differences_from_the_first_recipe_fold_by_fold(undisturbed):
    rows = rows_of(undisturbed)
    assert rows["published"]["effect_mean"] == ""
    assert len({row["effect_mean"] for row in rows.values()}) == 3, "nothing to tell apart"
    for recipe in ("turned", "averaged"):
        differences = [
            result_of(undisturbed, recipe, fold)["validation"]["dice"]
            - result_of(undisturbed, "published", fold)["validation"]["dice"]
            for fold in (0, 1)
        ]
        assert float(rows[recipe]["effect_mean"]) == pytest.approx(statistics.mean(differences), abs=1e-12)
        assert float(rows[recipe]["effect_deviation"]) == pytest.approx(statistics.stdev(differences), abs=1e-12)
    text = (undisturbed / "table.md").read_text()
    assert "Each probability is one prediction, but of turned, the mean over 8 flips and rotations." in text
    assert "choose by it, not by test scores. Each run's epoch was chosen on these images too" in text
    assert "Nothing is chosen by it" in text
    assert "from published with the same seed and fold" in text
    # Crops are scored at 224 pixels, the others at the 32 of this test.
    assert (rows["crops"]["effect_mean"], rows["crops"]["effect_pairs"]) == ("", "0")
    assert "over the pairs, 0 of crops." in text
    assert "different sizes, so they do not compare" in text


def test_a_difference_has_a_sign():
    cost = Cost(10, 10, 0.1, None, "cpu")
    scores = {"dice": [0.5, 0.7], "iou": [0.4, 0.6]}
    first = Row("published", "unet", 50, [0, 0], scores, cost, validation=[0.5, 0.7])
    better = Row("better", "unet", 50, [0, 0], scores, cost, validation=[0.6, 0.7], effects=[0.1, 0.0])
    worse = Row("worse", "unet", 50, [0], {name: values[:1] for name, values in scores.items()}, cost,
                validation=[0.3], effects=[-0.2])  # fmt: skip
    table = Table([first, better, worse], "", "", "", baseline="published")
    lines = table.markdown().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:5]]
    assert cells[0][3:5] == ["val Dice", "effect"]
    assert [line[4] for line in cells[2:]] == ["", "+0.0500 ± 0.0707", "-0.2000"]
    assert cells[2][3] == "0.6000 ± 0.1414"
    assert [record["effect_pairs"] for record in table.records()] == [0, 2, 1]
    errors = [record["effect_standard_error"] for record in table.records()]
    assert errors == [None, pytest.approx(0.05), None]
    assert "over the pairs. Pairs that" in table.markdown()
    fewer = replace(better, effects=[0.1])
    assert "over the pairs, 1 of better. Pairs that" in replace(table, rows=[first, fewer, worse]).markdown()


def test_a_finished_study_trains_nothing_and_another_scoring_is_refused(undisturbed, config, no_training):
    study_recipes(config)
    with pytest.raises(StudyError, match=r"score_tta: 'none' -> 'flips'"):
        study_recipes(replace(config, score_tta="flips"))


def test_a_training_that_diverged_fails_the_recipes_that_share_it(config, tmp_path, monkeypatch, capsys):
    def diverge(*_, **__):
        from uctrans.training import TrainingError

        raise TrainingError("the loss is not finite; lower learning_rate")

    (tmp_path / "two.yaml").write_text("first: {}\nturned: {score_tta: flips}\n")
    monkeypatch.setattr(single, "train", diverge)
    settings = {"recipes": str(tmp_path / "two.yaml"), "output": str(tmp_path / "study"), "cross_validation": None}
    with pytest.raises(StudyError, match=r"all runs failed, the first, first, seed 0: the loss is not finite"):
        study_recipes(replace(config, **settings))
    assert "run 2 of 2: turned, seed 0: failed, the loss is not finite" in capsys.readouterr().out


@pytest.fixture
def moved(config, undisturbed, tmp_path, no_training):
    """A copy of the finished study, and the settings that go on with it."""
    shutil.copytree(undisturbed, tmp_path / "moved")
    return replace(config, output=str(tmp_path / "moved"))


def test_scores_of_weights_that_were_trained_anew_are_taken_anew(moved, undisturbed):
    published, turned = (Path(moved.output) / f"runs/{recipe}/seed_0/fold_0" / PATIENCE for recipe in NAMES[:2])
    shutil.rmtree(published / "best")
    shutil.copytree(published.parents[1] / "fold_1" / PATIENCE / "best", published / "best")
    shutil.copyfile(published.parents[1] / "fold_1" / PATIENCE / "result.json", published / "result.json")
    study_recipes(moved)
    assert (turned / "best/model.safetensors").read_bytes() == (published / "best/model.safetensors").read_bytes()
    first, second = (result_of(Path(moved.output), "turned", fold)["scores"] for fold in (0, 1))
    assert first == second != result_of(undisturbed, "turned", 0)["scores"]


def test_the_time_that_scoring_takes_tells_nothing_of_training(config):
    plan = [run for run in config.plan() if run.fold == 0]
    first, turned, averaged, _ = plan
    schedule = Schedule(plan, {name: Cost(10, 10, 0.1, None, "cpu") for name in NAMES}, Budget(), 1)
    schedule.ended, result = {}, Result("", 0, {"dice": 0.5, "iou": 0.5}, 2, "", {}, 1, 1, "epochs", 60.0)
    assert (schedule._seconds_to_go(averaged), schedule._seconds_to_go(turned)) == (None, 0.0)
    schedule.ended = {
        run.config.output: Outcome({50: replace(result, seconds=seconds)}, None, is_over=True)
        for run, seconds in ((first, 60.0), (turned, 2.0))
    }
    later = replace(config, output=config.output + "_later").run(averaged.variant, 0, 0)
    assert schedule._seconds_to_go(later) == pytest.approx(60)
    assert schedule._seconds_to_go(turned) == pytest.approx(2)


def test_a_recipe_of_scoring_alone_fails_and_recovers_with_the_training_it_takes(moved, undisturbed, capsys):
    run = Path(moved.output) / "runs/published/seed_0/fold_0"
    (run / PATIENCE).rename(run / "kept")
    (run / "failed.json").write_text(json.dumps({"variant": "published", "seed": 0, "reason": "epoch 1; lower it"}))
    result = study_recipes(moved)
    assert (result.finished, result.failed) == (6, 2)
    assert rows_of(result.output)["turned"]["failed"] == "seed 0, fold 0"
    assert f"turned, seed 0, fold 0: failed before, epoch 1; to try it again, delete {run}" in capsys.readouterr().out
    (run / "failed.json").unlink()
    (run / "kept").rename(run / PATIENCE)
    assert rows_of(Path(study_recipes(moved).output)) == rows_of(undisturbed)


def test_scores_of_an_unknown_training_are_refused(moved):
    run = Path(moved.output) / "runs/averaged/seed_0/fold_0"
    (run / "config.yaml").unlink()
    (run / "last.pt").unlink()
    with pytest.raises(StudyError, match=rf"{run}: holds scores, but config\.yaml is lost.* delete the folder {run}"):
        study_recipes(moved)


def test_the_shipped_recipes_can_be_trained(data, tmp_path):
    shipped = RecipeStudyConfig(str(data), str(tmp_path), cross_validation=2)
    runs = {run.variant.name: run for run in shipped.plan() if run.fold == 0}
    assert shipped.baseline == next(iter(runs)) == "published"
    assert runs["published"].config.restart_period == 10
    assert runs["flips"].trained_by == runs["published"]
    of_crops = {name: run.scored["score_size"] for name, run in runs.items() if run.config.protocol == "native"}
    assert of_crops == dict.fromkeys(["full_resolution", "together_at_full_resolution"], "uctransnet-224")
    together = runs["together_at_224"]
    assert (together.config.protocol, together.config.ema_decay, together.scored["score_tta"]) == (
        "augmented-224", 0.99, "d4"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no recipes; write 'name: "),
        ("- a", "holds no recipes"),
        ("a: {ema_decy: 0.9}", "a: ema_decy: no such setting; did you mean ema_decay?"),
        ("a: {zzz: 1}", "a: zzz: no such setting; leave it out"),
        ("a: {patience: 5}", "a: patience: is the same for all recipes; give it as a flag"),
        ("a: {}\nb: {}\na: {ema_decay: 0.9}", "own.yaml: a is named more than once; name each once"),
        ("a: 5", "a holds 5; write its settings, or {} for none"),
        ("../a: {}", "'../a' names a folder too"),
        ("a: {ema_decay: 2}", "a: ema_decay: 2.0 never moves"),
        ("a: {score_tta: all}", "a: score_tta: 'all' is not known; choose one of none, flips, d4"),
        ("a: {score_resolution: native}", "a: score_resolution: native needs native scores"),
        ("a: {model: unett}", "unett"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_file_are_told(text, message, data, tmp_path, capsys, no_training):
    (tmp_path / "own.yaml").write_text(text)
    words = ["-i", str(data), "-o", str(tmp_path / "study"), "--recipes", str(tmp_path / "own.yaml")]
    assert cli.main(["study", "recipes", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "study").exists()


def test_a_name_that_is_neither_shipped_nor_a_file(data, tmp_path):
    with pytest.raises(StudyError, match=r"glas is neither a file nor one of those that come along: monuseg-224"):
        RecipeStudyConfig(str(data), str(tmp_path), recipes="glas")
