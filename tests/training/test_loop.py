"""The loop: what a run folder holds, when it saves and stops, and what it refuses."""

import json
import math
import os
import runpy
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError, fingerprint
from uctrans.models import registry
from uctrans.training import CheckpointError, ConfigError, TrainingError, load_checkpoint, loop, train
from uctrans.training.log import read_metrics
from uctrans.training.signals import StopRequest
from uctrans.writing import FolderError, locked


@pytest.fixture
def scripted_scores(monkeypatch):
    """Replace validation by given Dice scores, one for each epoch."""

    def use(scores):
        monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, scores[run.epoch - 1]))

    return use


@pytest.fixture
def step_hook(monkeypatch):
    """Call a function with the run, the index and the number of the step, from 1, before and after each step."""
    step, calls = loop.train_step, []

    def use(before=lambda *_: None, after=lambda *_: None):
        def hooked(run, index):
            calls.append([run.train_data.names[position] for position in index.tolist()])
            before(run, len(calls))
            step(run, index)
            after(run, len(calls))

        monkeypatch.setattr(loop, "train_step", hooked)
        return calls

    return use


def fill_bias(run, value):
    with torch.no_grad():
        run.model.head.bias.fill_(value)


def test_run_folder_holds_what_it_should(make_config):
    config = make_config(epochs=2, class_names=("cell",))
    result = train(config)
    folder = Path(config.output)
    assert sorted(path.name for path in folder.iterdir()) == [
        "best", "best.pt", "config.yaml", "last.pt", "log.txt", "metrics.csv", "progress.png", "tensorboard",
    ]  # fmt: skip
    assert (result.run_folder, result.epochs, result.stopped_by) == (folder, 2, "epochs")
    assert yaml.safe_load((folder / "config.yaml").read_text())["base_channels"] == 2
    assert imread(folder / "progress.png").shape == (400, 1000, 4)
    assert list((folder / "tensorboard").iterdir())
    metadata = json.loads((folder / "best" / "config.json").read_text())["metadata"]
    images = metadata.pop("images")
    assert len(metadata.pop("run_id")) == 32
    assert list(images["train"].values()) == [f"train{number}" for number in range(7)]
    assert list(images["val"].values()) == [f"val{number}" for number in range(3)]
    assert list(images["val"]) == [
        fingerprint(imread(Path(config.data) / "val" / "images" / f"val{number}.png")) for number in range(3)
    ]
    assert metadata == {
        "protocol": "uctransnet-224",
        "target": "mask",
        "image_size": [16, 16],
        "channel_order": "rgb",
        "intensity_range": None,
        "palette": None,
        "ignore_label": None,
        "class_names": ["cell"],
        "best_epoch": result.best_epoch,
        "best_dice": result.best_score,
        "uctrans_version": uctrans.__version__,
        "torch_version": torch.__version__,
    }


def test_validation_dice_is_that_of_the_kept_weights(make_config, make_run):
    config = make_config(epochs=6, learning_rate=0.03, ema_decay=0.5)
    result = train(config)
    run = make_run(output="nowhere")
    model = uctrans.load_model(config.output)
    dice = loop.validate(model, run.val_data, run.protocol, config, run.group).read(run.group)[1]
    assert dice == pytest.approx(result.best_score)
    assert result.best_score == max(row["val_dice"] for row in read_metrics(result.run_folder / "metrics.csv"))


def test_several_classes_train(make_config):
    names = ("none", "square", "other")
    config = make_config(classes=3, palette="#000000,#ffffff,#ff0000", class_names=names, epochs=2)
    assert train(config).best_score > 0
    model = uctrans.load_model(config.output)
    assert model.classes == 3
    assert model.metadata["palette"] == ["#000000", "#ffffff", "#ff0000"]


@pytest.mark.parametrize(
    "changes",
    [{"channel_order": "bgr"}, {"optimizer": "adamw", "weight_decay": 0.1}, {"amp": "bf16"}, {"batch_size": 9}],
)
def test_options_train_and_change_the_result(finished, make_config, changes, tmp_path):
    result = train(make_config(epochs=2, output=str(tmp_path / "other"), **changes))
    states = [load_checkpoint(folder / "last.pt")["model"]["state"] for folder in (finished, result.run_folder)]
    assert not torch.equal(*(state["head.weight"] for state in states))
    assert math.isfinite(result.best_score)


@pytest.mark.slow
def test_compiled_network_trains_with_a_smaller_last_batch(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    runpy.run_path(str(Path(__file__).with_name("distributed_run.py")))  # registers a network that compiles in seconds
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process compile too
    compiled = train(make_config(model="plain", epochs=1, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # batches of 4 and of 3 images
    torch.compiler.reset()
    plain = train(make_config(model="plain", epochs=1, output=str(tmp_path / "plain")))
    states = [load_checkpoint(result.run_folder / "last.pt")["model"]["state"] for result in (compiled, plain)]
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=1e-5)
    is_logged = ["compiling the network" in (result.run_folder / "log.txt").read_text() for result in (compiled, plain)]
    assert is_logged == [True, False]


def test_same_seed_same_bits_other_seed_others(finished, make_config, tmp_path, assert_same):
    folders = [finished]
    for seed in (0, 2):
        folders.append(train(make_config(output=str(tmp_path / str(seed)), seed=seed, epochs=2)).run_folder)
    first, same, other = (load_checkpoint(folder / "last.pt")["model"]["state"] for folder in folders)
    assert_same(first, same)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_early_stopping_after_patience_epochs_without_a_better_score(make_config, scripted_scores):
    scripted_scores([0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.9, 0.9])
    result = train(make_config(epochs=8, patience=3))
    assert (result.stopped_by, result.epochs, result.best_epoch, result.best_score) == ("early stopping", 6, 2, 0.5)


def test_best_is_kept_from_the_first_best_epoch_on(make_config, scripted_scores):
    scripted_scores([0.9, 0.8, 0.3, 0.4, 0.35])
    result = train(make_config(epochs=5, first_best_epoch=3, patience=1))
    assert (result.stopped_by, result.epochs, result.best_epoch, result.best_score) == ("epochs", 5, 4, 0.4)
    assert load_checkpoint(result.run_folder / "best.pt")["epoch"] == 4
    rows = read_metrics(result.run_folder / "metrics.csv")
    assert [row["best_epoch"] for row in rows] == [None, None, 3, 4, 4]


def test_validation_every_other_epoch_and_a_first_best_epoch_beyond_the_last(make_config):
    result = train(make_config(epochs=3, val_every=2, first_best_epoch=6))
    rows = read_metrics(result.run_folder / "metrics.csv")
    assert [row["val_dice"] is not None for row in rows] == [False, True, True]
    assert result.best_epoch == 3


@pytest.mark.parametrize(("save_minutes", "epochs"), [(0, [3, 4, 5, 6]), (2, [4, 6]), (3, [5]), (9, [])])
def test_checkpoints_every_few_minutes_at_best_and_at_the_end(make_run, monkeypatch, save_minutes, epochs):
    scores, saved, clock = [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], [], SimpleNamespace(now=0.0)

    def validate_for_a_minute(run):
        clock.now += 60
        return 0.5, scores[run.epoch - 1]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(loop, "validate_epoch", validate_for_a_minute)
    monkeypatch.setattr(loop, "save", lambda run, writer, is_best=False: saved.append((run.epoch, is_best)))
    run = make_run(epochs=7, save_minutes=save_minutes)
    assert loop.train_epochs(run, loop.SilentLog(), StopRequest(), None) == "epochs"
    assert saved == [(1, True), (2, True), *((epoch, False) for epoch in epochs), (7, False)]


def test_loss_that_is_not_finite_names_the_images_of_its_batch(make_config, step_hook):
    calls = step_hook(before=lambda run, number: fill_bias(run, math.nan) if number == 4 else None)
    config = make_config(epochs=5, save_minutes=0)
    with pytest.raises(TrainingError, match="epoch 2, step 2: the loss is not finite for the batch of ") as error:
        train(config)
    assert ", ".join(calls[3]) in str(error.value)
    assert "learning_rate" in str(error.value)
    checkpoint = load_checkpoint(Path(config.output) / "last.pt")
    assert checkpoint["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"]["state"].values())


@pytest.mark.parametrize("batch_size", [8, 4])
def test_resuming_with_a_lower_learning_rate_mends_a_run_that_was_not_finite(make_config, batch_size):
    settings = {"batch_size": batch_size, "optimizer": "adamw", "epochs": 2}
    with pytest.raises(TrainingError, match=r"not finite.*resume with a lower learning_rate or with amp no.*last\.pt"):
        train(make_config(learning_rate=1e38, weight_decay=10.0, **settings))
    result = train(make_config(learning_rate=0.01, weight_decay=10.0, amp="bf16", resume=True, **settings))
    assert (result.stopped_by, result.epochs) == ("epochs", 2)
    assert read_metrics(result.run_folder / "metrics.csv")[0]["learning_rate"] == pytest.approx(0.01)


def test_weights_spoilt_by_the_last_step_are_not_saved(make_config, step_hook):
    step_hook(after=lambda run, number: fill_bias(run, math.inf))
    config = make_config(batch_size=8)
    with pytest.raises(TrainingError, match=r"epoch 1: .*weights that are not finite.*last\.pt"):
        train(config)
    assert load_checkpoint(Path(config.output) / "last.pt")["epoch"] == 0


def test_validation_loss_that_is_not_finite_names_the_images(make_run, monkeypatch):
    run = make_run(batch_size=2, image_size=24)
    monkeypatch.setattr(run, "validation_forward", lambda images: images[:, :1] * math.nan)
    with pytest.raises(TrainingError, match="validation loss is not finite for val0, val1"):
        loop.validate_epoch(run)


@pytest.mark.parametrize(
    ("backend", "variable", "message"),
    [
        ("triton", "", "backend: the Triton operators .*got cpu; use backend='composed'"),
        ("auto", "triton", "backend: the Triton operators .*got cpu"),
        ("fast", "", "backend: unknown backend 'fast'; choose one of auto"),
    ],
)
def test_backend_that_cannot_run_is_refused_before_the_run_begins(make_config, monkeypatch, backend, variable, message):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("UCTRANS_BACKEND", variable or "auto")
    with pytest.raises(ConfigError, match=message):
        train(make_config(model="uctransnet", backend=backend))
    assert not Path(make_config().output).exists()


def test_output_that_holds_a_run_is_refused(finished, make_config):
    before = (finished / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"output: .*run holds a run already \(last\.pt.*resume.*another folder"):
        train(make_config())
    assert (finished / "last.pt").read_bytes() == before


@pytest.mark.parametrize("kept", ["best", "config.yaml"])
def test_output_with_what_is_left_of_a_run_is_refused(finished, make_config, kept):
    for name in {"last.pt", "best.pt", "metrics.csv", "best", "config.yaml"} - {kept}:
        shutil.rmtree(finished / name) if name == "best" else (finished / name).unlink()
    files = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"output: .*run holds a run already \({kept}\); name another folder"):
        train(make_config())
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == files


def test_output_that_is_a_file_is_refused(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"output: .*file cannot be made a folder"):
        train(make_config(output=str(tmp_path / "file")))


def test_a_run_that_another_process_trains_is_left_alone(finished, make_config, tmp_path):
    files = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for settings in ({"resume": True}, {}):
        with locked(finished), pytest.raises(FolderError, match=rf"run is in use by process {os.getpid()} on"):
            train(make_config(**settings))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("when", ["step", "validation"])
def test_a_new_run_that_fails_in_its_first_epoch_leaves_the_folder_as_it_was(make_config, monkeypatch, when):
    folder = Path(make_config().output)

    def fail(*_, **__):
        (folder / "notes.txt").write_text("mine")
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loop, {"step": "train_step", "validation": "validate_epoch"}[when], fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(make_config(epochs=1))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    assert train(make_config(epochs=1, batch_size=5)).epochs == 1


def test_a_run_that_fails_later_can_be_resumed(make_config, step_hook):
    def fail(run, number):
        if number == 3:
            raise torch.OutOfMemoryError("out of memory")

    step_hook(before=fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(make_config(epochs=2))
    assert train(make_config(epochs=2, resume=True)).epochs == 2


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {},
            r"set checkpointing, also to continue with resume; or lower batch_size \(now 4\), image_size \(now 16\)",
        ),
        (
            {"checkpointing": True},
            r"memory: lower batch_size \(now 4\), image_size \(now 16\) or base_channels \(now 2\)",
        ),
    ],
)
def test_short_memory_on_a_cpu_names_the_settings_to_lower(make_config, monkeypatch, changes, remedy):
    monkeypatch.setattr(loop, "train_step", lambda *_: torch.empty(2**58))
    with pytest.raises(torch.OutOfMemoryError, match=rf"{remedy}.*can't allocate memory"):
        train(make_config(**changes))
    assert list(Path(make_config().output).parent.iterdir()) == []


def test_resume_without_a_run_is_refused(make_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt: there is no run to resume"):
        train(make_config(resume=True))
    assert not (tmp_path / "run").exists()


def test_missing_data_is_named_and_leaves_no_folder(make_config, tmp_path):
    with pytest.raises(DataError, match="nothing-here"):
        train(make_config(data=str(tmp_path / "nothing-here")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_without_images_is_named(make_run, image_folder, tmp_path, split):
    data = shutil.copytree(image_folder, tmp_path / "data")
    for path in (data / split).rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=split):
        make_run(data=str(data))


def test_images_of_bad_content_are_named(make_run, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    path = data / "train" / "masks" / "train3.png"
    imsave(path, imread(path)[:5], check_contrast=False)
    with pytest.raises(DataError, match=r"train3\.png"):
        make_run(data=str(data))


def test_folds_choose_the_images(make_run, tmp_path):
    folds = {"folds": [{"train": ["train1", "val0"], "val": ["train2"]}, {"train": ["val1"], "val": ["train0"]}]}
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    run = make_run(folds=str(tmp_path / "folds.json"), fold=0)
    assert (run.train_data.names, run.val_data.names) == (["train1", "val0"], ["train2"])
    with pytest.raises(DataError, match=r"fold: .* has folds 0 to 1, not 2"):
        make_run(folds=str(tmp_path / "folds.json"), fold=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "unett"}, "^model: .*unet"),
        ({"model_options": {"depth": 3}}, "model_options: unet has no depth; it takes .*skips"),
        ({"model_options": {"skips": [9]}}, "model_options: unet cannot be built"),
        ({"device": "abacus"}, "^device: 'abacus'"),
        ({"device": "cuda:99"}, "^device: cuda:99 is not there"),
        ({"sync_batch_norm": True}, "^sync_batch_norm: .*CUDA only"),
    ],
)
def test_settings_that_cannot_be_used_here_are_named(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(**changes))


def test_a_network_starts_from_a_trained_unet(finished, make_run, tmp_path, assert_same):
    unet = dict(uctrans.load_model(finished).state_dict())
    same = make_run(init_from=str(finished)).model.state_dict()
    assert_same(dict(same), unet)
    options = {"model": "uctransnet", "model_options": {"num_layers": 1, "num_heads": 1}}
    larger = make_run(init_from=str(finished), **options).model.state_dict()
    assert_same({name: larger[name] for name in unet}, unet)


@pytest.mark.parametrize(
    ("changes", "new", "counts"),
    [
        ({"classes": 3, "palette": "#000000,#ffffff,#ff0000"}, ["head.weight", "head.bias"], "1 classes there, 3 here"),
        ({"in_channels": 1}, ["encoder.stem.conv.weight"], "1 in_channels there, 3 here"),
    ],
)
@pytest.mark.parametrize("model", ["unet", "uctransnet"])
def test_a_network_starts_from_one_of_other_classes_or_channels(
    make_run, make_config, tmp_path, assert_same, model, changes, new, counts
):
    source = uctrans.create_model(model, base_channels=2, in_channels=changes.get("in_channels", 3))
    source.save_pretrained(tmp_path / "source")
    settings = {"classes": changes.get("classes", 1), "palette": changes.get("palette"), "model": model}
    fresh = make_run(**settings).model.state_dict()
    run = make_run(init_from=str(tmp_path / "source"), **settings)
    state, given = run.model.state_dict(), source.state_dict()
    positions = [name for name in state if name.endswith("position")]  # of another image size
    taken = [name for name in given if name not in [*new, *positions]]
    assert_same({name: state[name] for name in taken}, {name: given[name] for name in taken})
    assert_same({name: state[name] for name in new}, {name: fresh[name] for name in new})
    assert run.start == (
        f"starting from the weights of {tmp_path / 'source'}, but for {', '.join(new)}, which are new: {counts}"
    )


def test_the_log_says_with_which_weights_a_run_starts(make_config, tmp_path):
    uctrans.UNet(base_channels=2, classes=2).save_pretrained(tmp_path / "unet")
    config = make_config(epochs=1, init_from=str(tmp_path / "unet"))
    train(config)
    assert "but for head.weight, head.bias, which are new" in (Path(config.output) / "log.txt").read_text()


def test_the_images_that_formed_the_first_weights_are_remembered(make_run, finished, tmp_path):
    source = uctrans.load_model(finished)
    source.metadata["images"]["train"] |= {"0123456789abcdef": "earlier"}
    source.save_pretrained(tmp_path / "source")
    run = make_run(init_from=str(tmp_path / "source"))
    assert list(run.images["train"].values()) == [*(f"train{number}" for number in range(7)), "earlier"]
    other = make_run()
    other.load_state_dict(run.state_dict(), Path("last.pt"))
    assert other.metadata()["images"] == run.images


def test_validation_images_that_are_training_images_too_are_named(make_run, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    for kind in ("images", "masks"):
        shutil.copy(data / "train" / kind / "train3.png", data / "val" / kind / "val1.png")
    with pytest.warns(UserWarning, match=r"1 validation images are training images too.*: val1 \(train3\); take"):
        make_run(data=str(data))


def test_weights_that_cannot_start_a_network_are_refused(finished, make_run, tmp_path):
    uctrans.UCTransNet(base_channels=2, image_size=16, num_layers=1).save_pretrained(tmp_path / "uct")
    with pytest.raises(uctrans.ModelFileError, match=r"init_from: .*uct: a uctransnet cannot start a unet"):
        make_run(init_from=str(tmp_path / "uct"))
    with pytest.raises(uctrans.ModelFileError, match=r"init_from: .*run: .* has base_channels 2 and not 4; build"):
        make_run(init_from=str(finished), base_channels=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_options": {"in_channels": 1}}, r"model_options: in_channels is 1, .* of the run is 3; leave it out"),
        ({"model_options": {"classes": 3}}, r"model_options: classes is 3, .* of the run is 1; leave .* set classes"),
        ({"model": "uctransnet", "model_options": {"backend": "fast"}}, "backend: unknown backend 'fast'"),
        ({"batch_size": 3}, r"batch_size: with 3, the last batch of 7 images has one image, .*16 x 16 pixels"),
        ({"batch_size": 1}, r"batch_size: with 1, .*larger image_size"),
    ],
)
def test_settings_of_which_a_step_would_fail_are_refused_before_the_run_begins(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(**changes))
    assert not Path(make_config().output).exists()


def test_a_last_batch_of_one_image_trains_where_batch_norm_takes_it(make_config):
    config = make_config(batch_size=3, image_size=17, model_options={"in_channels": 3, "classes": 1}, epochs=1)
    assert train(config).epochs == 1


def test_missing_extra_says_what_to_install(make_config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'tqdm.*pip install "uctrans\[training\]"'):
        train(make_config())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_saves_in_the_middle_of_an_epoch_and_resume_ends_with_the_same_bits(
    finished, make_config, tmp_path, step_hook, name, assert_same
):
    # An epoch has two steps, so the third is the first of the second epoch.
    step_hook(after=lambda run, number: os.kill(os.getpid(), getattr(signal, name)) if number == 3 else None)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = make_config(output=str(tmp_path / "stopped"), epochs=2, save_minutes=9)
    result = train(stopped)
    assert (result.stopped_by, result.epochs) == (name, 1)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    last_line = (result.run_folder / "log.txt").read_text().splitlines()[-1]
    assert f"stopped by {name} after epoch 1 and 1 steps, saved in {result.run_folder / 'last.pt'}" in last_line
    assert load_checkpoint(result.run_folder / "last.pt")["sampler"]["step"] == 1
    result = train(replace(stopped, resume=True))
    assert (result.stopped_by, result.epochs) == ("epochs", 2)
    ends = [load_checkpoint(folder / "last.pt") for folder in (finished, result.run_folder)]
    for end in ends:
        end.pop("train_config")
    assert_same(*ends)
    rows = [read_metrics(folder / "metrics.csv") for folder in (finished, result.run_folder)]
    for row in rows[0] + rows[1]:
        del row["seconds"], row["images_per_second"]
    assert rows[0] == rows[1]


def test_images_per_second_counts_what_was_trained_on_since_the_epoch_was_resumed(make_run, monkeypatch):
    run, rows = make_run(batch_size=2, image_size=24), []
    loop.train_step(run, run.batch(0))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: 20.0))
    loop.complete_epoch(run, SimpleNamespace(epoch=rows.append), started=10.0, images_before=run.images_before(1))
    assert (rows[0]["seconds"], rows[0]["images_per_second"]) == (10, 0.5)


def test_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.name == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_handles_no_signals():
    names = []

    def work():
        with StopRequest() as stop:
            names.append(stop.name)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [None]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("model", ["unet", pytest.param("uctransnet", marks=pytest.mark.slow)])
def test_a_run_with_checkpointing_ends_with_the_same_weights(make_config, tmp_path, model):
    size = {} if model == "unet" else {"image_size": 32, "model_options": {"num_layers": 1, "num_heads": 1}}
    states = []
    for checkpointing in (False, True):
        output = str(tmp_path / str(checkpointing))
        train(make_config(output=output, model=model, checkpointing=checkpointing, epochs=1, **size))
        states.append(load_checkpoint(Path(output) / "last.pt")["model"]["state"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
