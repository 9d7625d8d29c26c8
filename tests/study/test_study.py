"""Studies: the table is right, an interrupted study ends like an undisturbed one, and mistakes are told at once."""

import csv
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import uctrans
from uctrans import cli
from uctrans.data import DataError
from uctrans.data.instances import write_instances
from uctrans.study import ModelStudyConfig, SkipStudyConfig, StudyError, cost, runs, single, study_models, study_skips
from uctrans.study.cost import Cost
from uctrans.study.lock import only_call
from uctrans.study.report import Row, Table
from uctrans.training import ConfigError, TrainConfig, TrainingError, load_checkpoint
from uctrans.training import loop as training_loop
from uctrans.training.checkpoint import save_checkpoint
from uctrans.writing import write_png

SIZE = 32
MODELS = ("unet", "uctransnet")
SEEDS = (0, 1)
PATIENCE = "patience_50"


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """The folder of a finished study, begun on the command line; nobody may write into it."""
    folder = tmp_path_factory.mktemp("study") / "models"
    words = ["study", "models", "-o", str(folder), "--seeds", "2", "--models", ",".join(MODELS)]
    for name, value in settings.items():
        if name not in ("models", "seeds"):
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    previous = signal.getsignal(signal.SIGTERM)
    assert cli.main(words) == 0
    signal.signal(signal.SIGTERM, previous)
    return folder


@pytest.fixture
def finished(undisturbed, settings, tmp_path):
    """A copy of the finished study, and the settings that go on with it."""
    shutil.copytree(undisturbed, tmp_path / "copy")
    return ModelStudyConfig(**settings, output=str(tmp_path / "copy"))


def results_of(folder):
    """Scores of every run by model and seed, from the files the runs left."""
    return {
        (model, seed): json.loads((folder / "runs" / model / f"seed_{seed}" / PATIENCE / "result.json").read_text())[
            "scores"
        ]
        for model in MODELS
        for seed in SEEDS
    }


def table_of(folder):
    with (folder / "table.csv").open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_the_table_holds_mean_and_deviation_of_the_runs(undisturbed):
    results, table = results_of(undisturbed), table_of(undisturbed)
    assert list(table) == list(MODELS)
    for model in MODELS:
        for score in ("dice", "iou"):
            values = [results[model, seed][score] for seed in SEEDS]
            mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
            assert float(table[model][f"{score}_mean"]) == pytest.approx(mean, abs=1e-12)
            assert float(table[model][f"{score}_deviation"]) == pytest.approx(deviation, abs=1e-12)
            assert f"{mean:.4f} ± {deviation:.4f}" in (undisturbed / "table.md").read_text()
        assert table[model]["seeds"] == "0 1"


def test_scores_are_those_of_the_evaluation_on_the_test_split(undisturbed):
    for (model, seed), scores in results_of(undisturbed).items():
        folder = undisturbed / "runs" / model / f"seed_{seed}" / PATIENCE / "test"
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["test0", "test1"]
        assert scores["dice"] == pytest.approx(statistics.mean(float(row["dice"]) for row in rows), abs=1e-6)
    assert len({scores["dice"] for scores in results_of(undisturbed).values()}) > 1, "nothing to tell apart"


def test_the_table_counts_parameters_and_operations(undisturbed):
    table = table_of(undisturbed)
    for model, options in (("unet", {}), ("uctransnet", {"num_layers": 1, "image_size": SIZE, "backend": "reference"})):
        network = uctrans.create_model(model, base_channels=2, **options).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.rand(1, 3, SIZE, SIZE))
        assert int(table[model]["parameters"]) == sum(parameter.numel() for parameter in network.parameters())
        assert float(table[model]["gflop"]) == pytest.approx(counter.get_total_flops() / 1e9)
        assert 0 < float(table[model]["seconds_a_step"]) < 10
        assert table[model]["peak_memory_bytes"] == ""
    assert "n/a on a CPU" in (undisturbed / "table.md").read_text()


def test_the_chart_is_a_picture(undisturbed):
    from skimage.io import imread

    pixels = imread(undisturbed / "chart.png")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_runs_differ_in_model_and_seed_only(undisturbed, settings):
    configs = {
        run: TrainConfig.load_yaml(undisturbed / "runs" / run[0] / f"seed_{run[1]}" / "config.yaml").to_dict()
        for run in results_of(undisturbed)
    }
    for (model, seed), config in configs.items():
        assert (config.pop("model"), config.pop("seed")) == (model, seed)
        assert config.pop("model_options") == ({"num_layers": 1} if model == "uctransnet" else {})
        config.pop("output")
    assert len(configs) == 4
    assert all(config == configs["unet", 0] for config in configs.values())
    assert configs["unet", 0]["epochs"] == settings["epochs"]


def test_a_finished_study_is_only_told_again(finished, no_training, undisturbed, capsys):
    result = study_models(finished)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("run 1 of 4: unet, seed 0: Dice ")
    assert all(line.endswith("(finished before)") for line in lines)
    assert (result.finished, result.total, result.stopped_by) == (4, 4, "")
    assert table_of(result.output) == table_of(undisturbed)
    assert result.table.markdown() in str(result)


def test_a_second_call_at_the_same_time_is_refused(finished, no_training, undisturbed):
    with (
        only_call(Path(finished.output)),
        pytest.raises(StudyError, match=r"another call of this study works in .*; wait for its end"),
    ):
        study_models(finished)
    assert table_of(study_models(finished).output) == table_of(undisturbed)


def test_a_stopped_study_goes_on_and_ends_like_an_undisturbed_one(settings, tmp_path, monkeypatch, capsys, undisturbed):
    config = ModelStudyConfig(**settings, output=str(tmp_path / "study"))
    complete_epoch, epochs = training_loop.complete_epoch, []

    def interrupted(run, *rest):
        epochs.append(run.epoch)
        if len(epochs) == 3:  # in the first epoch of the second run
            signal.raise_signal(signal.SIGINT)
        return complete_epoch(run, *rest)

    monkeypatch.setattr(training_loop, "complete_epoch", interrupted)
    result = study_models(config)
    assert (result.stopped_by, result.finished, result.table) == ("SIGINT", 1, None)
    assert "1 of 4 runs finished; the same command goes on" in str(result)
    stopped = tmp_path / "study" / "runs" / "uctransnet" / "seed_0"
    assert (stopped / "last.pt").exists()
    assert not (stopped / PATIENCE / "result.json").exists()
    assert not (tmp_path / "study" / "table.csv").exists()
    capsys.readouterr()

    study_models(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert len(epochs) == 3 + 1 + 2 * 2, "an epoch was trained twice, or not at all"
    assert "(finished before); about" in lines[0]
    assert [line.split(": Dice")[0] for line in lines] == [
        "run 1 of 4: unet, seed 0",
        "run 2 of 4: uctransnet, seed 0",
        "run 3 of 4: unet, seed 1",
        "run 4 of 4: uctransnet, seed 1",
    ]
    assert "finished before" not in "".join(lines[1:])
    assert "to go" not in lines[3]
    assert results_of(tmp_path / "study") == results_of(undisturbed)


def test_a_killed_study_goes_on_and_ends_like_an_undisturbed_one(settings, tmp_path, undisturbed):
    script = """
        import json, os, signal, sys
        from uctrans.study import ModelStudyConfig, cost, study_models
        from uctrans.training import loop

        cost.WARM_UP_STEPS, cost.TIMED_STEPS = 1, 1
        complete_epoch, epochs = loop.complete_epoch, []

        def killed(run, *rest):
            epochs.append(run.epoch)
            if len(epochs) == 4:  # in the second epoch of the second run
                os.kill(os.getpid(), signal.SIGKILL)
            return complete_epoch(run, *rest)

        loop.complete_epoch = killed
        study_models(ModelStudyConfig(**json.loads(sys.argv[1])))
    """
    own = settings | {"output": str(tmp_path / "study")}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), json.dumps(own)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL
    killed = tmp_path / "study" / "runs" / "uctransnet" / "seed_0"
    assert load_checkpoint(killed / "last.pt")["epoch"] <= 1  # what was on the disk by then
    assert not (killed / PATIENCE / "result.json").exists()
    result = study_models(ModelStudyConfig(**own))
    assert (result.finished, result.failed, result.total) == (4, 0, 4)
    assert results_of(tmp_path / "study") == results_of(undisturbed)
    assert not [path for path in (tmp_path / "study").rglob(".*") if path.is_file()], "temporary files are left"


def test_a_trained_run_without_scores_is_only_scored(finished, undisturbed):
    run = finished.run(finished.variants()[0], 1).folder
    before = (run / "metrics.csv").read_text()
    (run / PATIENCE / "result.json").unlink()
    study_models(finished)
    assert (run / "metrics.csv").read_text() == before
    assert results_of(Path(finished.output)) == results_of(undisturbed)


def test_seeds_and_models_may_be_added(finished, monkeypatch):
    trained = []
    train = single.train

    def noted(config, **when):
        trained.append((config.model, config.seed))
        return train(config, **when)

    monkeypatch.setattr(single, "train", noted)
    table = study_models(replace(finished, models=("unet",), seeds=(0, 1, 7), model_options={})).table
    assert trained == [("unet", 7)]
    assert [(row.variant, row.seeds) for row in table.rows] == [("unet", [0, 1, 7])]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.03}, "learning_rate: 0.02 -> 0.03"),
        ({"epochs": 3}, "epochs: 2 -> 3"),
        ({"model_options": {"num_layers": 2}}, "model_options: {'num_layers': 1} -> {'num_layers': 2}"),
        ({"score_size": "native"}, "score_size: 'protocol' -> 'native'"),
        ({"learning_rate": 0.03, "batch_size": 2}, "batch_size: 4 -> 2; learning_rate: 0.02 -> 0.03"),
    ],
)
def test_results_of_other_settings_are_refused(changes, named, finished, no_training):
    with pytest.raises(StudyError) as refused:
        study_models(replace(finished, **changes))
    assert named in str(refused.value)
    assert "name another output folder" in str(refused.value)


@pytest.mark.parametrize("kept", ["last.pt", "cost.json"])
def test_an_unfinished_run_of_other_settings_is_refused(kept, finished, no_training):
    folder = Path(finished.output) / "runs"
    for path in folder.glob("*/seed_*/*"):
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kept != "cost.json":
        for path in folder.glob("*/cost.json"):
            path.unlink()
    with pytest.raises(StudyError, match=r"weight_decay: 0\.0 -> 0\.1"):
        study_models(replace(finished, weight_decay=0.1))


def test_settings_that_change_no_result_may_change(finished, no_training, undisturbed):
    changes = {"device": "auto", "threads": 2, "graph": False, "compile": True, "save_minutes": 0, "progress": True}
    study_models(replace(finished, checkpointing=True))
    result = study_models(replace(finished, **changes))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert table_of(result.output) == table_of(undisturbed)
    assert "on cpu, 1 thread." in result.table.markdown(), "the time is of the device it was measured on"


def test_results_from_before_there_was_a_setting_count(finished, no_training, undisturbed):
    folder = Path(finished.output) / "runs"
    for path in folder.glob("*/cost.json"):
        content = json.loads(path.read_text())
        del content["settings"]["ema_decay"]
        path.write_text(json.dumps(content))
    for path in folder.glob("*/*/config.yaml"):
        path.write_text(path.read_text().replace("ema_decay: 0.0\n", ""))
    checkpoint = load_checkpoint(folder / "unet" / "seed_0" / "last.pt")
    del checkpoint["train_config"]["ema_decay"]
    save_checkpoint(folder / "unet" / "seed_0" / "last.pt", checkpoint)
    (folder / "unet" / "seed_0" / "config.yaml").unlink()
    assert table_of(study_models(finished).output) == table_of(undisturbed)
    with pytest.raises(StudyError, match=r"ema_decay: 0\.0 -> 0\.5"):
        study_models(replace(finished, ema_decay=0.5))


def test_the_data_may_move_but_not_change(finished, data, tmp_path, undisturbed):
    shutil.copytree(data, tmp_path / "moved")
    moved = replace(finished, data=str(tmp_path / "moved"))
    run = Path(finished.output) / "runs" / "unet" / "seed_1"
    before = (run / "metrics.csv").read_text()
    (
        run / PATIENCE / "result.json"
    ).unlink()  # a run that goes on, as last.pt says, with the data in their former place
    study_models(moved)
    assert (run / "metrics.csv").read_text() == before
    assert results_of(Path(finished.output)) == results_of(undisturbed)

    mask = tmp_path / "moved" / "train" / "masks" / "train0.png"
    write_png(mask, np.eye(SIZE, dtype=np.uint8))
    with pytest.raises(StudyError, match=r"data: its images or masks are not those .* name another output folder"):
        study_models(moved)
    (Path(finished.output) / "study.json").write_text('{"study": "models"}')  # begun before images were compared
    with pytest.raises(StudyError, match=r"data: '.*squares\d' -> '.*moved'"):
        study_models(moved)


RESULT_OF_ANOTHER_KIND = '{"scores": {}, "scored": {}, "seconds": 1, "variant": "unet", "seed": 0, "images": 2, "epochs": 2, "scored_at": "", "best_epoch": 1, "stopped_by": ""}'  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("runs/unet/seed_0/patience_50/result.json", '{"scores"'),
        ("runs/unet/seed_0/patience_50/result.json", "[]"),
        ("runs/unet/seed_0/patience_50/result.json", "{}"),
        ("runs/unet/seed_0/patience_50/result.json", RESULT_OF_ANOTHER_KIND),
        (
            "runs/unet/seed_0/patience_50/result.json",
            RESULT_OF_ANOTHER_KIND.replace("{}", '{"dice": "high", "iou": 0.5}', 1),
        ),
        ("runs/unet/cost.json", "{"),
        ("runs/unet/cost.json", '{"settings": {}, "cost": {}}'),
        ("runs/unet/cost.json", '{"settings": [], "cost": {}}'),
        ("runs/unet/cost.json", '{"settings": {}, "cost": null}'),
    ],
)
def test_a_damaged_file_is_named(name, content, finished, no_training):
    (Path(finished.output) / name).write_text(content)
    with pytest.raises(StudyError, match=rf"{name}: is damaged .*delete it, and the same command makes it anew"):
        study_models(finished)


@pytest.mark.parametrize("content", ['{"study"', '{"study": 3}'])
def test_a_damaged_marker_is_mended_as_the_message_says(content, finished, no_training):
    marker = Path(finished.output) / "study.json"
    marker.write_text(content)
    with pytest.raises(StudyError, match=r"study\.json: is damaged; write") as refused:
        study_models(finished)
    marker.write_text(str(refused.value).partition("write ")[2].partition(" into")[0])
    assert study_models(finished).finished == 4


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "finding"),
    [(truncate, r"its last\.pt cannot be used"), (Path.unlink, r"last\.pt is lost")],
)
def test_a_run_beyond_repair_is_told_before_anything_is_trained(damage, finding, finished, no_training):
    run = Path(finished.output) / "runs" / "uctransnet" / "seed_1"
    (run / PATIENCE / "result.json").unlink()
    damage(run / "last.pt")
    with pytest.raises(StudyError, match=rf"uctransnet/seed_1.*{finding}; delete the folder {run}, and the same"):
        study_models(finished)


def test_a_damaged_configuration_of_a_finished_run_is_named(finished, no_training):
    file = Path(finished.output) / "runs" / "unet" / "seed_0" / "config.yaml"
    file.write_text("data: data\noutput: out\nepochs: many")
    with pytest.raises(StudyError, match=rf"{file}: is damaged \(epochs: .*delete it"):
        study_models(finished)
    file.unlink()
    assert study_models(finished).finished == 4


def test_a_run_whose_best_weights_are_damaged_is_named(finished):
    run = Path(finished.output) / "runs" / "unet" / "seed_0"
    (run / PATIENCE / "result.json").unlink()
    truncate(run / "best" / "model.safetensors")
    with pytest.raises(StudyError, match=rf"{run}: its best weights cannot be read; delete the folder {run}"):
        study_models(finished)


def nan_in_training(forward):
    return lambda self, image: forward(self, image) * (math.nan if self.training else 1)


def test_a_run_that_diverges_fails_alone(finished, undisturbed, monkeypatch, capsys):
    runs_folder = Path(finished.output) / "runs"
    shutil.rmtree(runs_folder / "unet" / "seed_1")
    (runs_folder / "uctransnet" / "seed_1" / PATIENCE / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(uctrans.UNet, "forward", nan_in_training(uctrans.UNet.forward))
        result = study_models(finished)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert lines[2].startswith("run 3 of 4: unet, seed 1: failed, epoch 1, step 1: the loss is not finite")
    assert f"to try it again, delete {runs_folder / 'unet' / 'seed_1'}" in lines[2]
    assert lines[3].startswith("run 4 of 4: uctransnet, seed 1: Dice")
    assert (result.finished, result.failed, result.total) == (3, 1, 4)
    row, other = table_of(Path(finished.output)).values()
    assert (row["runs"], row["seeds"], row["failed"], row["dice_deviation"]) == ("1", "0", "seed 1", "")
    assert (other["runs"], other["seeds"], other["failed"]) == ("2", "0 1", "")
    assert float(row["dice_mean"]) == results_of(undisturbed)["unet", 0]["dice"]
    text = result.table.markdown()
    assert "| single run of 2 |" in text
    assert "Failed, in no score: unet, seed 1: epoch 1, step 1: the loss is not finite" in text

    with monkeypatch.context() as patch:  # the same command does not try it again
        patch.setattr(single, "train", None)
        study_models(finished)
    assert "unet, seed 1: failed before, epoch 1" in capsys.readouterr().out

    shutil.rmtree(runs_folder / "unet" / "seed_1")  # unless its folder is deleted
    study_models(finished)
    assert results_of(Path(finished.output)) == results_of(undisturbed)


def test_a_study_of_which_every_run_fails_says_so(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(uctrans.UNet, "forward", nan_in_training(uctrans.UNet.forward))
    monkeypatch.setattr(runs, "measure", lambda config: Cost(1, 1, 1.0, None, "cpu"))
    config = ModelStudyConfig(**settings | {"models": ("unet",), "model_options": {}}, output=str(tmp_path / "study"))
    with pytest.raises(StudyError, match="all runs failed, the first, unet, seed 0: epoch 1, step 1: the loss"):
        study_models(config)


def test_a_full_disk_stops_the_study_and_fails_no_run(finished, monkeypatch):
    run = Path(finished.output) / "runs" / "unet" / "seed_0"
    (run / PATIENCE / "result.json").unlink()

    def train(config, **when):
        raise TrainingError("metrics.csv: cannot be written") from OSError("no space")

    monkeypatch.setattr(single, "train", train)
    with pytest.raises(TrainingError, match="cannot be written"):
        study_models(finished)
    assert not (run / "failed.json").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images/test1.png", b"", "test1.png: cannot be read"),
        ("masks/test1.png", np.zeros((SIZE, SIZE + 1), np.uint8), "masks/test1.png: is 32 x 33 pixels"),
        ("instances/test1.png", np.ones((SIZE + 1, SIZE), np.int32), "instances/test1.png: is 33 x 32 pixels"),
    ],
)
def test_bad_test_data_are_told_before_anything_is_trained(
    file, content, message, settings, data, tmp_path, no_training
):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "test" / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "instances" in file:
        write_instances(path, content)
    else:
        write_png(path, content)
    own = settings | {"data": str(tmp_path / "data"), "score_size": "native"}
    with pytest.raises(DataError, match=message):
        study_models(ModelStudyConfig(**own, output=str(tmp_path / "study")))
    assert not (tmp_path / "study").exists()
    if "instances" in file:  # at the protocol's size it is not scored
        with pytest.raises(AssertionError, match="something was trained"):
            study_models(ModelStudyConfig(**own | {"score_size": "protocol"}, output=str(tmp_path / "study")))


def test_the_table_says_over_how_many_images_the_instance_scores_go(settings, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    mask = uctrans.data.read_mask(data / "test" / "masks" / "test0.png")
    write_instances(tmp_path / "data" / "test" / "instances" / "test0.png", mask.astype(np.int32))
    own = settings | {"data": str(tmp_path / "data"), "score_size": "native", "epochs": 1, "models": ("unet",)}
    config = ModelStudyConfig(**own | {"seeds": 1, "model_options": {}}, output=str(tmp_path / "study"))
    result = study_models(config)
    assert "aji" in result.table.scores
    remark = "AJI and PQ: each run's is the mean over the test images with an instance map, {}."
    assert remark.format("1 of 2") in result.table.markdown()
    path = tmp_path / "study" / "runs" / "unet" / "seed_0" / PATIENCE / "result.json"
    content = json.loads(path.read_text())
    assert content.pop("counts")["aji"] == 1
    path.write_text(json.dumps(content))
    assert remark.format("their number was not kept") in study_models(config).table.markdown()
    content["counts"] = {"dice": 2, "iou": 2, "aji": 2, "pq": 2}
    path.write_text(json.dumps(content))
    assert "AJI and PQ:" not in study_models(config).table.markdown()


@pytest.mark.parametrize(
    ("study", "config", "message"),
    [
        (study_skips, SkipStudyConfig, "unet has no num_layers"),
        (study_models, ModelStudyConfig, "dual_branch_uctransnet cannot be built"),
    ],
)
def test_a_network_that_cannot_be_built_is_told_before_anything_is_written(
    study, config, message, settings, tmp_path, no_training
):
    own = {name: value for name, value in settings.items() if name != "models"}
    own["model_options"] = {"num_layers": 1} if study is study_skips else {"depths": [9, 9, 9, 9]}
    with pytest.raises(ConfigError, match=message):
        study(config(**own, output=str(tmp_path / "study")))
    assert not (tmp_path / "study").exists()


def test_a_folder_of_something_else_is_refused(finished, settings, tmp_path, no_training):
    skips = {name: value for name, value in settings.items() if name not in ("models", "model_options")}
    with pytest.raises(StudyError, match="holds another study, of models"):
        study_skips(SkipStudyConfig(**skips, output=finished.output))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for output, message in ((tmp_path / "mine", "no study wrote"), (tmp_path / "mine" / "notes.txt", "is a file")):
        with pytest.raises(StudyError, match=message):
            study_models(replace(finished, output=str(output)))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models unte,uctransnet", "models: unknown model 'unte'; did you mean 'unet'?"),
        ("--models unet,unet", "models: unet is named more than once"),
        ("--models=", "models: is empty"),
        ("--models unet,", "models: unknown model ''"),
        ("--seeds 0", "seeds: 0 is too small; give at least 1"),
        ("--seeds=-1", "seeds: -1 is too small"),
        ("--seeds=0,-1", "seeds: -1 is negative"),
        ("--seeds 1,1", "seeds: 1 is named more than once"),
        ("--seeds many", "write it like 5 or 3,7,11"),
        ("--seed 3", "did you mean --seeds?"),
        ("--patience 0", "patience: 0 is too small; give at least 1"),
        ("--patience 100,50,50", "patience: 50 is named more than once"),
        ("--patience soon", "write it like 50 or 50,100"),
        ("--processes 0", "processes: 0 is too small"),
        ("--processes 2 --progress", "progress: the bars of several processes would mix"),
        ("--minutes 0", "minutes: 0.0 is no time"),
        ("--cross-validation 1", "cross_validation: 1 is too small; give 2 folds or more"),
        ("--cross-validation 7", "7 folds of 6 images: choose 2 to 6 folds"),
        ("--cross-validation glas", "glas is neither a file nor one of the folds"),
        ("--models uctransnet_from_unet", "starts from the U-Net of its seed and fold; name unet too"),
        ("--models unet,unet_from_unet", "unet_from_unet: unet cannot start from a U-Net; leave it out"),
        ("--score-size huge", "score_size: 'huge' is not known"),
        ("--score-resolution native", "set score_size to native too"),
        ("--cross-validation monuseg --folds monuseg --fold 0", "leave out folds and fold"),
        ("--folds 1", "cross_validation: 1 is too small; give 2 folds or more"),
        ("--model-options {\"layers\":2}", "none of unet, uctransnet, dual_branch_uctransnet takes layers"),
        ("--epochs 0", "epochs: 0 is too small"),
        ("--device cuda:99", "device: cuda:99 is not there"),
        ("--models UNet", "models: unknown model 'UNet'; did you mean 'unet'?"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(words, message, data, tmp_path, no_training, capsys):
    previous = signal.getsignal(signal.SIGTERM)
    assert cli.main(["study", "models", "-i", str(data), "-o", str(tmp_path / "study"), *words.split()]) == 2
    signal.signal(signal.SIGTERM, previous)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_settings_of_the_study_itself_and_several_processes_are_refused(settings, tmp_path, no_training, monkeypatch):
    for name, value in (("model", "unet"), ("seed", 3), ("resume", True), ("init_from", "weights.pt")):
        with pytest.raises(StudyError, match=f"{name}: the study sets it"):
            ModelStudyConfig(**settings, output="study", **{name: value})
    with pytest.raises(StudyError, match="skips is what the study varies"):
        SkipStudyConfig(data="data", output="study", model_options={"skips": [1]})
    with pytest.raises(StudyError, match="seeds: is empty"):
        ModelStudyConfig(**settings | {"seeds": ()}, output="study")
    with pytest.raises(ConfigError, match="fold and folds belong together"):
        ModelStudyConfig(**settings, output="study", fold=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StudyError, match="without torchrun"):
        study_models(ModelStudyConfig(**settings, output=str(tmp_path / "study")))


@pytest.mark.parametrize(
    ("written", "seeds"), [("3", [0, 1, 2]), ("3,7", [3, 7]), ("[7]", [7]), ("[3, 7]", [3, 7]), ("1", [0])]
)
def test_seeds_on_the_command_line(written, seeds):
    config = cli.parse(["study", "skips", "-i", "data", "-o", "study", "--seeds", written])[1]
    assert config.seed_list == seeds


def test_seeds_in_a_config_file(tmp_path):
    file = tmp_path / "study.yaml"
    for written, seeds in (("3", [0, 1, 2]), ("[7]", [7])):
        file.write_text(f"data: data\noutput: study\nseeds: {written}\n")
        assert cli.parse(["study", "models", "--config", str(file)])[1].seed_list == seeds


def test_the_study_of_skips_has_ten_u_nets():
    config = SkipStudyConfig(data="data", output="study", base_channels=2)
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
    counts = {variant.name: cost.count(config.run(variant, 0).config) for variant in config.variants()}
    assert len({parameters for parameters, _ in counts.values()}) == 10
    assert all(counts["none"][1] < flop < counts["all"][1] for _, flop in [*counts.values()][2:])


def test_a_study_of_skips_runs_and_a_single_run_has_no_deviation(settings, tmp_path, monkeypatch):
    variants = SkipStudyConfig.variants
    monkeypatch.setattr(SkipStudyConfig, "variants", lambda self: variants(self)[:2])
    own = {name: value for name, value in settings.items() if name not in ("models", "model_options")}
    result = study_skips(SkipStudyConfig(**own | {"epochs": 1, "seeds": 1}, output=str(tmp_path / "skips")))
    table = table_of(tmp_path / "skips")
    assert list(table) == ["none", "all"]
    assert {row["dice_deviation"] for row in table.values()} == {""}
    markdown = (tmp_path / "skips" / "table.md").read_text()
    assert markdown.count("| single run |") == 2
    assert "±" not in markdown
    assert "a single run each" in markdown
    assert markdown.strip() in str(result)
    assert (tmp_path / "skips" / "chart.png").stat().st_size > 1000
    model = uctrans.load_model(tmp_path / "skips" / "runs" / "none" / "seed_0")
    assert model.config["skips"] == []


def test_the_table_of_a_gpu():
    """Peak memory in GiB, instance scores where every run has them, deviations of samples."""
    measured = Cost(66_430_657, 77_200_000_000, 0.0712, 3 * 2**30, "NVIDIA H200")
    rows = [
        Row(
            "unet", "unet", 50, [0, 1, 2], {"dice": [0.7, 0.8, 0.9], "iou": [0.5, 0.6, 0.7], "aji": [0.5] * 3}, measured
        ),
        Row("other", "uctransnet", 50, [0, 1, 2], {"dice": [0.8] * 3, "iou": [0.7] * 3, "aji": [0.6] * 3}, measured),
    ]
    text = Table(rows, "the 14 test images", "batch 4, bf16", "224 x 224").markdown()
    expected = "|unet|50|3|0.8000 ± 0.1000|0.9000|0.6000 ± 0.1000|0.7000|0.5000 ± 0.0000|66.431|77.2|0.0712|3.00|"
    assert "|".join(cell.strip() for cell in text.splitlines()[2].split("|")) == expected
    assert len({len(line) for line in text.splitlines()[:4]}) == 1, "columns are not aligned"
    assert "the most PyTorch held on the GPU" in text
    without = replace(rows[1], scores={"dice": [0.8] * 3, "iou": [0.7] * 3})
    assert "AJI" not in Table([rows[0], without], "", "", "224 x 224").markdown()


def test_the_table_of_failed_runs_and_several_devices(tmp_path):
    """A network without a run has no scores and no bar; times of different devices are told apart."""
    on_gpu = Cost(1_000_000, 2_000_000_000, 0.01, 2**30, "NVIDIA H200")
    on_cpu = replace(on_gpu, device="cpu, 1 thread", peak_memory=None)
    scores = {"dice": [0.7, 0.8], "iou": [0.5, 0.6]}
    rows = [
        Row("unet", "unet", 50, [0, 2], scores, on_gpu, failed={"seed 1": "epoch 3"}),
        Row("other", "uctransnet", 50, [], {}, on_cpu, failed={"seed 0": "epoch 1"}),
    ]
    table = Table(rows, "the 14 test images", "batch 4, bf16", "224 x 224")
    cells = [[cell.strip() for cell in line.split("|")] for line in table.markdown().splitlines()]
    assert cells[2][1:7] == ["unet", "50", "2 of 3", "0.7500 ± 0.0707", "0.8000", "0.5500 ± 0.0707"]
    assert cells[3][1:7] == ["other", "50", "0 of 1", "n/a", "n/a", "n/a"]
    assert "Failed, in no score: unet, seed 1: epoch 3; other, seed 0: epoch 1." in table.markdown()
    assert "do not compare: unet on NVIDIA H200; other on cpu, 1 thread." in table.markdown()
    assert "n/a on a CPU" in table.markdown()
    assert "the most PyTorch held on the GPU" in table.markdown()
    table.write_csv(tmp_path / "table.csv")
    assert table_of(tmp_path)["other"]["dice_mean"] == ""
    table.draw(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_the_cost_says_what_is_unusual_about_it(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    for setting, said in (("compile", "compiled"), ("checkpointing", "checkpointing")):
        config = ModelStudyConfig(**settings, output=str(tmp_path / "study"), **{setting: True})
        assert cost.measure(config.plan()[0].config).device == f"cpu, 1 thread, {said}"


@pytest.mark.gpu
def test_peak_memory_on_a_gpu(settings, tmp_path):
    config = ModelStudyConfig(**settings | {"device": "cuda"}, output=str(tmp_path / "study"))
    reserved = torch.cuda.memory_reserved()
    measured = cost.measure(config.run(config.variants()[0], 0).config)
    assert torch.cuda.memory_reserved() <= reserved, "kept from the processes of the study"
    assert 0 < measured.peak_memory < torch.cuda.get_device_properties(0).total_memory
    assert measured.device == torch.cuda.get_device_name(0)
