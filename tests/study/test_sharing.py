"""Weights to share: those of the best run by validation Dice, with a card that is true, and a picture of these runs."""

import json
import re
import shlex
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import uctrans
from uctrans import cli
from uctrans.inference import dice, evaluate
from uctrans.inference.evaluate import EvaluateConfig
from uctrans.model_card import CardScores, ModelCard
from uctrans.models import ModelFileError
from uctrans.sharing import NOT_IN_THE_COMMAND, ShareConfig, SharingError, share, training_command
from uctrans.study import ModelStudyConfig, comparison, study_models
from uctrans.study.best import best_runs
from uctrans.study.schedule import Budget, Schedule
from uctrans.study.sharing import share_best
from uctrans.training import TrainConfig

yaml = pytest.importorskip("yaml", reason="the training extra is not installed")

MODELS = ("unet", "uctransnet")
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """The folder of a finished study; nobody may write into it."""
    folder = tmp_path_factory.mktemp("sharing") / "study"
    study_models(ModelStudyConfig(**settings, output=str(folder)))
    return folder


@pytest.fixture
def finished(undisturbed, settings, tmp_path, no_training):
    """A copy of the finished study, and the settings that go on with it."""
    shutil.copytree(undisturbed, tmp_path / "study")
    return ModelStudyConfig(**settings, output=str(tmp_path / "study"))


def run_of(folder, model, seed):
    return folder / "runs" / model / f"seed_{seed}" / "patience_50"


def result_of(folder, model, seed):
    return json.loads((run_of(folder, model, seed) / "result.json").read_text())


def change(path, **values):
    """Write other values into a JSON file; a file with several names stays as it is under the others."""
    content = json.loads(path.read_text()) | values
    path.unlink()
    path.write_text(json.dumps(content))


def best_seed(folder, model):
    configs = {seed: run_of(folder, model, seed) / "best" / "config.json" for seed in (0, 1)}
    scores = {seed: json.loads(path.read_text())["metadata"]["best_dice"] for seed, path in configs.items()}
    assert scores[0] != scores[1], "nothing to tell apart"
    return max(scores, key=scores.get)


def is_same_model(one, other):
    states = [uctrans.load_model(folder).state_dict() for folder in (one, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def blocks(folder, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_of_the_best_run_are_shared(model, undisturbed):
    folder, seed = undisturbed / "weights" / model, best_seed(undisturbed, model)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert is_same_model(folder, run_of(undisturbed, model, seed))
    assert not is_same_model(folder, run_of(undisturbed, model, 1 - seed))
    assert f"(seed {seed}, patience 50) has the best validation Dice" in (folder / "README.md").read_text()


def test_test_scores_choose_nothing(finished, undisturbed):
    folder = Path(finished.output)
    for model in MODELS:
        for seed in (0, 1):
            scores = result_of(folder, model, seed)["scores"]
            is_chosen = seed == best_seed(folder, model)
            path = run_of(folder, model, seed) / "result.json"
            change(path, scores=scores | {"dice": 0.001 if is_chosen else 0.999})
    study_models(finished)
    for model in MODELS:
        assert is_same_model(folder / "weights" / model, undisturbed / "weights" / model)
        assert "| Dice | 0.0010 |" in (folder / "weights" / model / "README.md").read_text()


def test_the_log_of_the_training_tells_the_validation_dice_where_the_weights_do_not(finished, undisturbed):
    folder = Path(finished.output)
    shutil.rmtree(folder / "weights")
    for seed in (0, 1):
        change(run_of(folder, "unet", seed) / "best" / "config.json", metadata={"protocol": "uctransnet-224"})
    study_models(finished)
    assert is_same_model(folder / "weights" / "unet", undisturbed / "weights" / "unet")


def test_a_run_without_any_validation_dice_leaves_its_network_without_a_best(finished, capsys):
    folder = Path(finished.output)
    shutil.rmtree(folder / "weights")
    change(run_of(folder, "unet", 1) / "best" / "config.json", metadata={})
    (folder / "runs" / "unet" / "seed_1" / "metrics.csv").unlink()
    study_models(finished)
    out = capsys.readouterr().out
    assert (
        f"unet: no run is its best, {run_of(folder, 'unet', 1)} has lost its validation Dice; delete the folder" in out
    )
    assert [path.name for path in (folder / "weights").iterdir()] == ["uctransnet"]


def test_the_front_matter_has_the_scores_of_the_run_and_of_all_runs(undisturbed):
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    for model in MODELS:
        folder, seed = undisturbed / "weights" / model, best_seed(undisturbed, model)
        data = hub.ModelCard.load(folder / "README.md").data
        assert (data.library_name, data.pipeline_tag, data.model_name) == ("uctrans", "image-segmentation", model)
        assert data.license is None
        results = {(each.metric_type, bool(each.metric_args)): each for each in data.eval_results}
        values = [result_of(undisturbed, model, each)["scores"]["dice"] for each in (0, 1)]
        single, several = results["dice", False], results["dice", True]
        assert single.metric_name == "Dice, single run, mean over 2 test images"
        assert single.metric_value == pytest.approx(values[seed], abs=1e-6)
        assert several.metric_name == "Dice, mean of 2 runs"
        assert several.metric_value == pytest.approx(statistics.mean(values), abs=1e-6)
        deviation = {"runs": 2, "standard_deviation": pytest.approx(statistics.stdev(values), abs=1e-6)}
        assert several.metric_args == deviation
        assert single.dataset_split == "test"
        fingerprint = json.loads((undisturbed / "study.json").read_text())["images"]
        assert single.dataset_args == {"fingerprint": fingerprint}


def test_what_the_card_says_to_run_runs(undisturbed, settings, monkeypatch):
    monkeypatch.chdir(undisturbed / "weights")
    for model in MODELS:
        (source,) = blocks(Path(model), "python")
        names = {"image": torch.rand(1, 3, 32, 32)}
        exec(source, names)
        assert names["logits"].shape == (1, 1, 32, 32)
        predict, train = (cli.parse(shlex.split(block)[1:])[1] for block in blocks(Path(model), "sh"))
        assert (predict.model, predict.tta, predict.resolution) == (model, "none", "protocol")
        run = ModelStudyConfig(**settings, output=str(undisturbed)).run
        variant = next(each for each in ModelStudyConfig(**settings, output="o").variants() if each.name == model)
        planned = run(variant, best_seed(undisturbed, model)).config
        for name, value in planned.to_dict().items():
            assert name in NOT_IN_THE_COMMAND or train.to_dict()[name] == value, name


def test_the_training_command_repeats_settings_of_every_kind(tmp_path):
    config = TrainConfig(
        data="/home/someone/data",
        output="run",
        image_size=(64, 96),
        class_names=("a b", "c"),
        classes=2,
        palette=[[0, 0, 0], [255, 0, 0]],
        model_options={"num_layers": 2},
        graph=False,
        compile=True,
        folds="/home/someone/folds.json",
        fold=1,
        init_from="/home/someone/unet",
        learning_rate=5e-4,
    )
    command = training_command(config)
    assert "someone" not in command
    parsed = cli.parse(shlex.split(command)[1:])[1].to_dict()
    named = {"folds": "FOLDS.json", "init_from": "INITIAL_WEIGHTS", "palette": ["#000000", "#ff0000"]}
    expected = config.to_dict() | {"data": "DATA", "output": "RUN"} | named
    assert parsed == expected


def test_a_study_names_images_and_licence_and_gives_its_folds_along(finished, capsys):
    own = {"dataset_name": "MoNuSeg 2018", "license": "cc-by-nc-sa-4.0"}
    print(study_models(replace(finished, **own)))
    assert "--license names their licence" in capsys.readouterr().out
    for model in MODELS:
        content = front_matter(Path(finished.output) / "weights" / model)
        assert content["license"] == "cc-by-nc-sa-4.0"
        assert content["model-index"][0]["results"][0]["dataset"]["name"] == "MoNuSeg 2018"


def test_the_folds_of_a_study_lie_beside_the_card(finished, tmp_path):
    folds = {"folds": [{"train": ["train0", "train1"], "val": ["val0"]}]}
    (tmp_path / "own.json").write_text(json.dumps(folds))
    of_a_fold = replace(finished, folds=str(tmp_path / "own.json"), fold=0)
    schedule = Schedule(finished.plan(), {}, Budget(), 1)
    chosen = best_runs(finished, schedule)["unet"]
    run = of_a_fold.run(chosen.run.variant, chosen.run.seed)
    share_best(of_a_fold, {"unet": replace(chosen, run=replace(chosen.run, config=run.config))}, None)
    folder = Path(finished.output) / "weights" / "unet"
    (command,) = blocks(folder, "sh")[1:]
    assert "--folds folds.json --fold 0" in command
    assert json.loads((folder / "folds.json").read_text()) == folds
    assert "`folds.json` lies beside this file:" in (folder / "README.md").read_text()


def test_an_edited_card_is_kept(finished):
    folder = Path(finished.output)
    path = folder / "weights" / "unet" / "README.md"
    edited = path.read_text().replace("# license: not set", "license: mit\n# set")
    path.write_text(edited)
    study_models(finished)
    assert path.read_text() == edited
    result = run_of(folder, "unet", 0) / "result.json"
    change(result, scores=result_of(folder, "unet", 0)["scores"] | {"dice": 0.123456})
    for _ in range(2):
        study_models(finished)
    assert (path.with_name("README.former-1.md")).read_text() == edited
    assert "license" not in front_matter(path.parent)
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.former-1.md", *FILES]


def test_the_picture_shows_what_the_shared_weights_predict(finished, undisturbed, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison, "models_figure", lambda *arguments: drawn.append(arguments))
    (Path(finished.output) / "comparison.png").unlink()
    study_models(finished)
    ((path, models, rows, _, legend),) = drawn
    assert (path.name, models, legend) == ("comparison.png", list(MODELS), None)
    shown = json.loads((undisturbed / "comparison.json").read_text())
    assert [row.name for row in rows] == [image["name"] for image in shown["images"]]
    assert statistics.mean(rows[0].dice) >= statistics.mean(rows[1].dice)
    for row in rows:
        for prediction, score in zip(row.predictions, row.dice, strict=True):
            assert dice(prediction, row.truth, 1).item() == pytest.approx(score, abs=1e-6)
    assert [run["run"] for run in shown["runs"]] == [f"seed {best_seed(undisturbed, model)}" for model in MODELS]
    assert len({score for row in rows for score in row.dice}) > 1, "nothing to tell apart"


def test_the_picture_is_drawn_once_and_again_where_it_is_gone_or_was_interrupted(finished, monkeypatch):
    folder = Path(finished.output)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "models_figure", fail)
        study_models(finished)
        (folder / "comparison.png").unlink()
        with pytest.raises(KeyboardInterrupt):
            study_models(finished)
        assert (folder / "table.md").exists()
    study_models(finished)
    assert (folder / "comparison.png").stat().st_size > 10_000


def test_without_weights_or_time_there_is_no_new_picture(finished, monkeypatch, capsys):
    folder = Path(finished.output)
    before = (folder / "comparison.png").read_bytes()
    change(folder / "comparison.json", images=[])
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "is_over", True)
        study_models(finished)
    assert "comparison.png is not drawn: the time is up; the same command draws it" in capsys.readouterr().out
    gone = run_of(folder, "unet", best_seed(folder, "unet")) / "best" / "model.safetensors"
    gone.unlink()
    shutil.rmtree(folder / "weights" / "uctransnet")
    study_models(finished)
    out = capsys.readouterr().out
    assert f"comparison.png is not drawn: {gone} is gone; delete the folder {gone.parents[2]}" in out
    assert f"weights of unet are not shared: {gone} is gone" in out
    assert (folder / "comparison.png").read_bytes() == before
    assert uctrans.load_model(folder / "weights" / "unet").name == "unet", "the former weights are lost"
    assert uctrans.load_model(folder / "weights" / "uctransnet").name == "uctransnet"


def test_scores_of_single_images_that_are_lost_are_named_with_the_command_that_brings_them_back(finished, capsys):
    folder = Path(finished.output)
    best = run_of(folder, "unet", best_seed(folder, "unet"))
    (best / "test" / "metrics.csv").unlink()
    study_models(finished)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "comparison.png is not drawn" in line]
    words = shlex.split(line.partition("; uctrans ")[2].removesuffix(" writes it anew"))
    previous = signal.getsignal(signal.SIGTERM)
    assert cli.main([*words, "--device", "cpu"]) == 0
    signal.signal(signal.SIGTERM, previous)
    study_models(finished)
    assert "is not drawn" not in capsys.readouterr().out


def test_a_single_run_is_shared(undisturbed, data, tmp_path, capsys):
    run = undisturbed / "runs" / "unet" / "seed_0"
    evaluation = EvaluateConfig(
        str(run), str(data), str(tmp_path / "scores"), tta="flips", progress=False, device="cpu"
    )
    scores = evaluate(evaluation)
    previous = signal.getsignal(signal.SIGTERM)
    words = ["-i", str(run), "-o", str(tmp_path / "shared"), "--evaluation", str(tmp_path / "scores")]
    assert cli.main(["share", *words, "--license", "mit", "--name", "first", "--dataset", "MoNuSeg 2018"]) == 0
    signal.signal(signal.SIGTERM, previous)
    assert f"    hf upload OWNER/first {tmp_path / 'shared'}" in capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == FILES
    assert is_same_model(tmp_path / "shared", run)
    content = front_matter(tmp_path / "shared")
    assert content["license"] == "mit"
    (result,) = content["model-index"][0]["results"]
    assert result["dataset"] == {"type": "MoNuSeg-2018", "name": "MoNuSeg 2018", "split": "test"}
    assert result["metrics"][0]["value"] == pytest.approx(scores.mean["dice"], abs=1e-6)
    text = (tmp_path / "shared" / "README.md").read_text()
    assert "uctrans predict -i images -o masks --model first --tta flips\n" in text
    assert "±" not in text, "a single run has no deviation"


def test_a_single_run_of_folds_gives_them_along(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "runs" / "unet" / "seed_0" / "best", run / "best")
    (tmp_path / "own.json").write_text('{"folds": []}')
    settings = TrainConfig.load_yaml(undisturbed / "runs" / "unet" / "seed_0" / "config.yaml")
    replace(settings, folds=str(tmp_path / "own.json"), fold=0).save_yaml(run / "config.yaml")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "folds.json").write_text("mine")
    with pytest.raises(ValueError, match="set overwrite to replace them"):
        share(ShareConfig(str(run), str(shared)))
    (shared / "folds.json").unlink()
    share(ShareConfig(str(run), str(shared)))
    assert (shared / "folds.json").read_text() == '{"folds": []}'
    assert "--folds folds.json --fold 0" in blocks(shared, "sh")[1]


def test_what_cannot_be_shared_is_refused(undisturbed, data, tmp_path):
    runs = undisturbed / "runs" / "unet"
    config = ShareConfig(str(runs / "seed_0"), str(tmp_path / "shared"))
    share(config)
    written = (tmp_path / "shared" / "README.md").read_text()
    for changes, error, message in (
        ({}, ValueError, "set overwrite to replace them"),
        ({"model": str(runs / "seed_0" / "last.pt"), "output": str(tmp_path / "new")}, SharingError, "single file"),
        ({"model": str(tmp_path / "nothing")}, ModelFileError, "does not exist"),
        ({"name": "my model", "overwrite": True}, SharingError, "name: 'my model' is none that the hub takes"),
        ({"evaluation": str(tmp_path / "nothing"), "overwrite": True}, SharingError, "summary.json cannot be used"),
        ({"evaluation": str(run_of(undisturbed, "unet", 1) / "test"), "overwrite": True}, SharingError, "of another"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            share(replace(config, **changes))
    assert (tmp_path / "shared" / "README.md").read_text() == written
    assert not (tmp_path / "new").exists()


def test_a_card_predicts_in_python_as_for_its_scores():
    scores = CardScores(
        {"dice": 0.5}, {"dice": 2}, 2, "test", "the size", "--tta d4 --threshold 0.4 --resolution native"
    )
    card = ModelCard("nuclei", {"name": "unet"}, "0" * 64, "The only run.", scores=scores)
    assert "load_predictor(\"nuclei\", resolution='native', tta='d4').probabilities" in str(card)
    assert 'load_predictor("nuclei").probabilities' in str(replace(card, scores=None))
