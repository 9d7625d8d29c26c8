"""Recorded training steps have the losses of plain steps, with a stand-in for CUDA graphs where there is no GPU."""

import dataclasses
import functools
import random

import pytest
import torch

from tests.support import HostRecorder
from uctrans.training import TrainConfig, TrainingError, optimization, train
from uctrans.training import run as run_module
from uctrans.training.distributed import Processes
from uctrans.training.log import read_metrics
from uctrans.training.loop import replay_or_run_step, train_step
from uctrans.training.own import Own
from uctrans.training.run import Run
from uctrans.training.step_graphs import PLAIN_STEPS, StepGraphs, obstacle_to_graphs

CPU = Processes(rank=0, count=1, device=torch.device("cpu"))
STEPS = 20
TINY_TRANSFORMER = {"model": "uctransnet", "image_size": 32, "model_options": {"num_layers": 1, "num_heads": 1}}
NATIVE = {"protocol": "native", "crops_per_image": 2}
SETTINGS = {
    "uctransnet": TINY_TRANSFORMER,
    "average": {"ema_decay": 0.9, "optimizer": "adamw", "weight_decay": 0.01},
    "native, bf16": {**NATIVE, "amp": "bf16"},
    "classes, checkpointing": {"classes": 3, "palette": "#000000,#ffffff,#ff0000", "checkpointing": True},
}
LARGE_SETTINGS = {
    "dual-branch": {**TINY_TRANSFORMER, "model": "dual_branch_uctransnet", "image_size": 48},
    "bf16, checkpointing, average": {**TINY_TRANSFORMER, "amp": "bf16", "checkpointing": True, "ema_decay": 0.9},
}
ALL_SETTINGS = SETTINGS | LARGE_SETTINGS


@pytest.fixture
def recorders(monkeypatch):
    """Let runs on the CPU capture their steps, with what stands in for CUDA graphs; the list of all recorders."""
    made = []

    def make(generators=()):
        made.append(HostRecorder(generators))
        return made[-1]

    monkeypatch.setattr(run_module, "obstacle_to_graphs", lambda config, group: None if config.graph else "off")
    monkeypatch.setattr(run_module, "CudaRecorder", make)
    return made


def with_rate_in_a_tensor(run):
    """On CUDA the learning rate lies in a tensor; a number would be frozen in the recording."""
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = torch.tensor(parameters["lr"])
    return run


def losses_of(run, steps=STEPS):
    """The loss of each of so many steps, over as many epochs as it takes."""
    losses, seen = [], 0.0
    run.begin_epoch()
    while len(losses) < steps:
        if run.steps_done == run.steps_per_epoch:
            run.end_epoch()
            run.begin_epoch()
            seen = 0.0
        batch = run.batch(run.steps_done)
        replay_or_run_step(run, batch)
        run.steps_done += 1
        losses.append((run.totals.loss.item() - seen) / len(batch))
        seen = run.totals.loss.item()
    return losses


@pytest.mark.parametrize(
    "changes",
    [*SETTINGS.values(), *(pytest.param(changes, marks=pytest.mark.slow) for changes in LARGE_SETTINGS.values())],
    ids=[*SETTINGS, *LARGE_SETTINGS],
)
def test_losses_of_recorded_steps_are_those_of_plain_steps(make_config, recorders, changes):
    plain = losses_of(with_rate_in_a_tensor(Run(make_config(graph=False, **changes), CPU)))
    run = with_rate_in_a_tensor(Run(make_config(**changes), CPU))
    captured = losses_of(run)
    assert captured == plain
    assert len(set(plain)) == STEPS
    sizes = {len(run.batch(step)) for step in range(run.steps_per_epoch)}
    recorder = run.step_graphs.recorder
    assert recorder.recordings == len(sizes)
    assert recorder.warm_ups == recorder.rehearsals == len(sizes)
    assert recorder.replays == STEPS - PLAIN_STEPS * len(sizes)
    assert recorder.generators == [run.augment_generator]


def test_a_learning_rate_that_is_a_number_would_show(make_config, recorders):
    plain = losses_of(Run(make_config(graph=False), CPU))
    assert losses_of(Run(make_config(), CPU)) != plain


@pytest.mark.parametrize(
    "changes",
    [{"ema_decay": 0.9}, *(pytest.param(changes, marks=pytest.mark.slow) for changes in (TINY_TRANSFORMER, NATIVE))],
    ids=["average", "uctransnet", "native"],
)
def test_a_captured_run_ends_like_a_plain_one_also_where_it_is_resumed(
    make_config, recorders, tmp_path, monkeypatch, changes
):
    def fit_to_device(optimizer, device):
        for parameters in optimizer.param_groups:
            parameters["lr"] = torch.as_tensor(float(parameters["lr"]))

    monkeypatch.setattr(optimization, "fit_to_device", fit_to_device)
    monkeypatch.setattr(run_module, "fit_to_device", fit_to_device)
    settings = {"epochs": 5, "restart_period": 3, **changes}
    metrics = {}
    for name, graph in {"plain": False, "captured": True}.items():
        train(make_config(output=str(tmp_path / name), graph=graph, **settings))
        metrics[name] = scores(tmp_path / name)
    assert metrics["captured"] == metrics["plain"]
    assert any(recorder.replays for recorder in recorders)
    parts = make_config(output=str(tmp_path / "parts"), **(settings | {"epochs": 2}))
    train(parts)
    # A recording is no part of a run: what it began, plain steps may continue, and the other way round.
    train(dataclasses.replace(parts, epochs=3, graph=False, resume=True))
    train(dataclasses.replace(parts, epochs=5, resume=True))
    assert scores(tmp_path / "parts") == metrics["plain"]


def scores(folder):
    kept = ("epoch", "learning_rate", "train_loss", "train_dice", "val_loss", "val_dice", "best_epoch")
    return [[row[name] for name in kept] for row in read_metrics(folder / "metrics.csv")]


@pytest.mark.parametrize("changes", [{}, NATIVE], ids=["resized", "native"])
def test_a_transform_decides_on_the_host_before_each_recorded_step(make_config, recorders, changes):
    def losses(graph):
        random_numbers, decisions = random.Random(0), set()

        def flip(images, masks):
            is_flipped = random_numbers.random() < 0.5
            decisions.add((is_flipped, masks.sum().item() > 0))
            return (images.flip(-1), masks.flip(-1)) if is_flipped else (images, masks)

        own = Own(transform=flip, loss=lambda logits, masks: (logits[:, 0] - masks).square().mean())
        run = with_rate_in_a_tensor(Run(make_config(graph=graph, **changes), CPU, own))
        found = losses_of(run)
        assert {decision for decision, _ in decisions} == {True, False}
        return found

    assert losses(True) == losses(False)
    assert recorders[0].replays > 0


def test_early_stopping_ends_a_captured_run(make_config, recorders):
    result = train(make_config(epochs=30, patience=2, learning_rate=1e-8, min_learning_rate=0.0))
    assert result.stopped_by == "early stopping"
    assert any(recorder.replays for recorder in recorders)


def test_a_loss_that_is_not_finite_shows_in_a_recorded_step_too(make_config, recorders):
    run = Run(make_config(), CPU)
    losses_of(run, 8)
    assert run.totals.first_bad.item() == -1
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    run.begin_epoch()
    replay_or_run_step(run, run.batch(0))
    assert run.totals.first_bad.item() >= 0


def test_a_step_that_waits_for_the_device_cannot_be_recorded(make_config):
    run = Run(make_config(), CPU)
    run.begin_epoch()
    training_batch = run.protocol.training_batch

    class Waiting:
        def training_batch(self, data, index, generator):
            index.max().item()
            return training_batch(data, index, generator)

    run.protocol = Waiting()
    graphs, step = StepGraphs(run.optimizer, HostRecorder()), functools.partial(train_step, run)
    graphs.run(step, run.batch(0))
    with pytest.raises(TrainingError, match=r"graph: the training step cannot be recorded .* resume with graph off"):
        graphs.run(step, run.batch(0))


@pytest.mark.parametrize(
    ("graph", "device", "count", "obstacle"),
    [
        (False, "cuda", 1, "graph is off"),
        (True, "cpu", 1, "not cpu"),
        (True, "cuda", 2, "several processes"),
        (True, "cuda", 1, None),
    ],
)
def test_where_steps_are_captured(graph, device, count, obstacle):
    config = TrainConfig(data="data", output="run", graph=graph)
    found = obstacle_to_graphs(config, Processes(0, count, torch.device(device)))
    assert found is None if obstacle is None else obstacle in found


@pytest.fixture
def deterministic():
    """Kernels that give the same bits each time, for as long as the test runs."""
    yield {"device": "cuda", "deterministic": True}
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [*ALL_SETTINGS.values(), {"compile": True}], ids=[*ALL_SETTINGS, "compiled"])
def test_on_a_gpu_the_losses_of_recorded_steps_are_those_of_plain_steps(make_config, deterministic, changes):
    group = Processes(rank=0, count=1, device=torch.device("cuda", torch.cuda.current_device()))
    settings = {**deterministic, **changes}
    plain = losses_of(Run(make_config(graph=False, **settings), group))
    run = Run(make_config(**settings), group)
    assert isinstance(run.step_graphs, StepGraphs)
    captured = losses_of(run)
    torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_run_ends_like_a_plain_one(make_config, deterministic, tmp_path):
    settings = {"epochs": 6, **deterministic, **TINY_TRANSFORMER}
    for name, graph in {"plain": False, "captured": True}.items():
        train(make_config(output=str(tmp_path / name), graph=graph, **settings))
    train(make_config(output=str(tmp_path / "parts"), **(settings | {"epochs": 3})))
    train(make_config(output=str(tmp_path / "parts"), resume=True, **settings))
    for name in ("captured", "parts"):
        torch.testing.assert_close(scores(tmp_path / name), scores(tmp_path / "plain"), rtol=1e-2, atol=1e-3)
