import json
import math
import os
import runpy
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError
from uctrans.models import registry
from uctrans.training import CheckpointError, ConfigError, TrainingError, load_checkpoint, loop, train
from uctrans.training.distributed import Processes
from uctrans.training.log import read_metrics
from uctrans.training.run import Run
from uctrans.training.signals import StopRequest

CPU = Processes(rank=0, count=1, device=torch.device("cpu"))


@pytest.fixture
def scripted_scores(monkeypatch):
    """Replace validation by given Dice scores, one for each epoch."""

    def use(scores):
        monkeypatch.setattr(loop, "validate_epoch", lambda run: (0.5, scores[run.epoch - 1]))

    return use


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
    assert metadata == {
        "protocol": "uctransnet-224",
        "target": "mask",
        "image_size": [16, 16],
        "channel_order": "rgb",
        "palette": None,
        "class_names": ["cell"],
        "best_epoch": result.best_epoch,
        "best_dice": result.best_score,
        "uctrans_version": uctrans.__version__,
        "torch_version": torch.__version__,
    }


def test_validation_dice_is_that_of_the_kept_weights(make_config):
    config = make_config(epochs=6, learning_rate=0.03, ema_decay=0.5)
    result = train(config)
    run = Run(make_config(output="nowhere"), CPU)
    model = uctrans.load_model(config.output)
    dice = loop.validate(model, run.val_data, run.protocol, config, CPU).read(CPU)[1]
    assert dice == pytest.approx(result.best_score)
    assert result.best_score == max(row["val_dice"] for row in read_metrics(result.run_folder / "metrics.csv"))


def test_several_classes_train(make_config):
    config = make_config(classes=3, palette="#000000,#ffffff,#ff0000", class_names=("none", "square", "other"))
    result = train(config)
    assert result.best_score > 0
    model = uctrans.load_model(config.output)
    assert model.classes == 3
    assert model.metadata["palette"] == ["#000000", "#ffffff", "#ff0000"]


@pytest.mark.parametrize(
    "changes",
    [{"channel_order": "bgr"}, {"optimizer": "adamw", "weight_decay": 0.1}, {"amp": "bf16"}, {"batch_size": 9}],
)
def test_options_train_and_change_the_result(make_config, changes, tmp_path):
    train(make_config())
    result = train(make_config(output=str(tmp_path / "other"), **changes))
    states = [load_checkpoint(tmp_path / name / "last.pt")["model"]["state"] for name in ("run", "other")]
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
    is_told = ["compiling the network" in (result.run_folder / "log.txt").read_text() for result in (compiled, plain)]
    assert is_told == [True, False]


def test_same_seed_same_bits_other_seed_others(make_config, tmp_path, assert_same):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(make_config(output=str(tmp_path / name), seed=seed, epochs=2))
    a, b, c = (load_checkpoint(tmp_path / name / "last.pt") for name in "abc")
    assert_same(a["model"]["state"], b["model"]["state"])
    assert not torch.equal(a["model"]["state"]["head.weight"], c["model"]["state"]["head.weight"])


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


def test_a_run_shorter_than_the_first_best_epoch_keeps_its_last(make_config):
    assert train(make_config(epochs=2, first_best_epoch=6)).best_epoch == 2


def test_validation_every_other_epoch(make_config):
    result = train(make_config(epochs=5, val_every=2))
    rows = read_metrics(result.run_folder / "metrics.csv")
    assert [row["val_dice"] is not None for row in rows] == [False, True, False, True, True]


@pytest.mark.parametrize(("save_minutes", "epochs"), [(0, [3, 4, 5, 6]), (2, [4, 6]), (3, [5]), (9, [])])
def test_checkpoints_every_few_minutes_at_best_and_at_the_end(make_config, monkeypatch, save_minutes, epochs):
    scores, saved, clock = [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], [], SimpleNamespace(now=0.0)

    def validate_for_a_minute(run):
        clock.now += 60
        return 0.5, scores[run.epoch - 1]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(loop, "validate_epoch", validate_for_a_minute)
    monkeypatch.setattr(loop, "save", lambda run, writer, is_best=False: saved.append((run.epoch, is_best)))
    train(make_config(epochs=7, save_minutes=save_minutes))
    assert saved == [(0, False), (1, True), (2, True), *((epoch, False) for epoch in epochs), (7, False)]


def spoil(monkeypatch, name, at_call):
    """Make the loss of one call of the training step infinite, as bad images or too high a learning rate would."""
    calls = []
    step = loop.train_step

    def spoiled(run, index):
        calls.append([run.train_data.names[position] for position in index.tolist()])
        if len(calls) == at_call:
            with torch.no_grad():
                run.model.head.bias.fill_(math.nan)
        step(run, index)

    monkeypatch.setattr(loop, "train_step", spoiled)
    return calls


def test_loss_that_is_not_finite_names_the_images_of_its_batch(make_config, monkeypatch):
    calls = spoil(monkeypatch, "head", at_call=4)
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


def test_weights_spoilt_by_the_last_step_are_not_saved(make_config, monkeypatch):
    step = loop.train_step

    def spoiled(run, index):
        step(run, index)
        with torch.no_grad():
            run.model.head.bias.fill_(math.inf)

    monkeypatch.setattr(loop, "train_step", spoiled)
    config = make_config(batch_size=8)
    with pytest.raises(TrainingError, match=r"epoch 1: .*weights that are not finite.*last\.pt"):
        train(config)
    assert load_checkpoint(Path(config.output) / "last.pt")["epoch"] == 0


def test_validation_loss_that_is_not_finite_names_the_images(make_config, monkeypatch):
    forward = uctrans.UNet.forward

    def spoiled(self, image):
        logits = forward(self, image)
        return logits if self.training else logits * math.nan

    monkeypatch.setattr(uctrans.UNet, "forward", spoiled)
    with pytest.raises(TrainingError, match="validation loss is not finite for val0, val1"):
        train(make_config(batch_size=2, image_size=32))


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


def test_output_that_holds_a_run_is_refused(make_config):
    train(make_config(epochs=1))
    before = (Path(make_config().output) / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"output: .*run holds a run already \(last\.pt.*resume.*another folder"):
        train(make_config())
    assert (Path(make_config().output) / "last.pt").read_bytes() == before


@pytest.mark.parametrize("kept", ["best", "config.yaml"])
def test_output_with_what_is_left_of_a_run_is_refused(make_config, kept):
    folder = train(make_config(epochs=1)).run_folder
    for name in {"last.pt", "best.pt", "metrics.csv", "best", "config.yaml"} - {kept}:
        shutil.rmtree(folder / name) if name == "best" else (folder / name).unlink()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"output: .*run holds a run already \({kept}\); name another folder"):
        train(make_config())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_output_that_is_a_file_is_refused(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output: .*file cannot be made a folder"):
        train(make_config(output=str(tmp_path / "file")))


def test_resume_without_a_run_is_refused(make_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt: there is no run to resume"):
        train(make_config(resume=True))
    assert not (tmp_path / "run").exists()


def test_missing_data_is_named_and_leaves_no_folder(make_config, tmp_path):
    with pytest.raises(DataError, match="nothing-here"):
        train(make_config(data=str(tmp_path / "nothing-here")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_without_images_is_named(make_config, image_folder, tmp_path, split):
    data = tmp_path / "data"
    for other in ("train", "val"):
        for kind in ("images", "masks"):
            (data / other / kind).mkdir(parents=True)
            for path in (image_folder / other / kind).iterdir() if other != split else ():
                (data / other / kind / path.name).symlink_to(path)
    with pytest.raises(DataError, match=split):
        train(make_config(data=str(data)))


def test_folds_choose_the_images(make_config, image_folder, tmp_path):
    folds = {"folds": [{"train": ["train1", "val0"], "val": ["train2"]}, {"train": ["val1"], "val": ["train0"]}]}
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    run = Run(make_config(folds=str(tmp_path / "folds.json"), fold=0), CPU)
    assert (run.train_data.names, run.val_data.names) == (["train1", "val0"], ["train2"])
    with pytest.raises(DataError, match=r"fold: .* has folds 0 to 1, not 2"):
        Run(make_config(folds=str(tmp_path / "folds.json"), fold=2), CPU)


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


def test_uctransnet_starts_from_a_trained_unet(make_config, tmp_path, assert_same):
    train(make_config(epochs=1))
    options = {"model": "uctransnet", "model_options": {"num_layers": 1, "num_heads": 1}}
    run = Run(make_config(init_from=str(tmp_path / "run"), output=str(tmp_path / "two"), **options), CPU)
    unet = uctrans.load_model(tmp_path / "run").state_dict()
    assert_same({name: run.model.state_dict()[name] for name in unet}, dict(unet))


def test_unet_starts_from_a_unet_and_not_from_a_uctransnet(make_config, tmp_path, assert_same):
    model = uctrans.UNet(base_channels=2)
    model.save_pretrained(tmp_path / "unet")
    run = Run(make_config(init_from=str(tmp_path / "unet")), CPU)
    assert_same(dict(run.model.state_dict()), dict(model.state_dict()))
    uctrans.UCTransNet(base_channels=2, image_size=16, num_layers=1).save_pretrained(tmp_path / "uct")
    with pytest.raises(ConfigError, match=r"init_from: .*uct holds a uctransnet, which cannot start a unet"):
        Run(make_config(init_from=str(tmp_path / "uct")), CPU)
    with pytest.raises(uctrans.ModelFileError, match="unet"):
        Run(make_config(init_from=str(tmp_path / "unet"), base_channels=4), CPU)


def test_missing_extra_says_what_to_install(make_config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'tqdm.*pip install "uctrans\[training\]"'):
        train(make_config())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_saves_in_the_middle_of_an_epoch_and_resume_ends_with_the_same_bits(
    make_config, tmp_path, monkeypatch, name, assert_same
):
    straight = make_config(output=str(tmp_path / "straight"), epochs=4, batch_size=2, image_size=32, ema_decay=0.9)
    train(straight)
    calls = []
    step = loop.train_step

    def interrupted(run, index):
        step(run, index)
        calls.append(index)
        if len(calls) == 6:  # the second step of the second epoch
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(loop, "train_step", interrupted)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = make_config(epochs=4, batch_size=2, image_size=32, ema_decay=0.9, save_minutes=9)
    result = train(stopped)
    assert (result.stopped_by, result.epochs) == (name, 1)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    last_line = (result.run_folder / "log.txt").read_text().splitlines()[-1]
    assert f"stopped by {name} after epoch 1 and 2 steps, saved in {result.run_folder / 'last.pt'}" in last_line
    assert load_checkpoint(result.run_folder / "last.pt")["sampler"]["step"] == 2
    result = train(make_config(epochs=4, batch_size=2, image_size=32, ema_decay=0.9, save_minutes=9, resume=True))
    assert (result.stopped_by, result.epochs) == ("epochs", 4)
    ends = [load_checkpoint(Path(config.output) / "last.pt") for config in (straight, stopped)]
    for end in ends:
        end.pop("train_config")
    assert_same(*ends)
    rows = [read_metrics(Path(config.output) / "metrics.csv") for config in (straight, stopped)]
    for row in rows[0] + rows[1]:
        del row["seconds"], row["images_per_second"]
    assert rows[0] == rows[1]


def test_the_end_of_the_time_stops_like_a_signal(make_config):
    config = make_config(epochs=2)
    result = train(config, stop_at=time.time())
    assert (result.stopped_by, result.epochs) == ("time", 0)
    assert "stopped by time after epoch 0, saved in" in (result.run_folder / "log.txt").read_text().splitlines()[-1]
    result = train(replace(config, resume=True), stop_at=time.time() + 3600)
    assert (result.stopped_by, result.epochs) == ("epochs", 2)


def test_images_per_second_counts_what_was_trained_on_since_the_epoch_was_resumed(make_config, monkeypatch):
    run, rows = Run(make_config(batch_size=2), CPU), []
    run.begin_epoch()
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


def test_images_of_bad_content_are_named(make_config, image_folder, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (data / split / kind).mkdir(parents=True)
            for path in (image_folder / split / kind).iterdir():
                (data / split / kind / path.name).write_bytes(path.read_bytes())
    imsave(
        data / "train" / "masks" / "train3.png",
        imread(data / "train" / "masks" / "train3.png")[:5],
        check_contrast=False,
    )
    with pytest.raises(DataError, match=r"train3\.png"):
        train(make_config(data=str(data)))


@pytest.mark.parametrize("model", ["unet", "uctransnet"])
def test_a_run_with_checkpointing_ends_with_the_same_weights(make_config, tmp_path, model):
    folders = {}
    for checkpointing in (False, True):
        folders[checkpointing] = tmp_path / str(checkpointing)
        size = {} if model == "unet" else {"image_size": 32, "model_options": {"num_layers": 1, "num_heads": 1}}
        output = str(folders[checkpointing])
        train(make_config(output=output, model=model, checkpointing=checkpointing, epochs=2, **size))
    plain, checkpointed = (load_checkpoint(folder / "last.pt")["model"]["state"] for folder in folders.values())
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(value, checkpointed[name]) for name, value in plain.items())
