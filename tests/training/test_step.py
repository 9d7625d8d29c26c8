import copy
import gc
import math
import resource
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uctrans.training import TrainConfig
from uctrans.training import run as run_module
from uctrans.training.distributed import Processes
from uctrans.training.loop import train_step, validate
from uctrans.training.losses import EpochTotals, configured_loss_and_dice, image_dice, segmentation_loss
from uctrans.training.optimization import WeightAverage, build_optimizer, learning_rate
from uctrans.training.run import Run

CPU = Processes(rank=0, count=1, device=torch.device("cpu"))
TINY_TRANSFORMER = {"model": "uctransnet", "image_size": 32, "model_options": {"num_layers": 1, "num_heads": 1}}
NATIVE = {"protocol": "native", "crops_per_image": 2, "batch_size": 2}
# What makes the host wait for a device: reading a value, or a shape that depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal.default", "is_nonzero", "item")


class CalledOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def started_run(config):
    run = Run(config, CPU)
    run.begin_epoch()
    return run


@pytest.mark.parametrize(
    "changes",
    [{}, TINY_TRANSFORMER, {"ema_decay": 0.9, "optimizer": "adamw", "weight_decay": 0.01}, {"amp": "bf16"}, NATIVE],
    ids=["unet", "uctransnet", "ema-adamw", "bf16", "native"],
)
def test_step_never_waits_for_the_device(make_config, changes):
    run = started_run(make_config(**changes))
    with CalledOperators() as called:
        train_step(run, run.batch(0))
        train_step(run, run.batch(1))
    assert any("_fused_adam" in name for name in called.names)
    assert not [name for name in called.names if any(word in name for word in WAITING)]


def test_step_of_several_classes_never_waits_for_the_device(make_config):
    run = started_run(make_config(classes=3, palette="#000000,#ffffff,#ff0000"))
    with CalledOperators() as called:
        train_step(run, run.batch(0))
    assert not [name for name in called.names if any(word in name for word in WAITING)]


@pytest.mark.parametrize("target", ["mask", "boundary"])
def test_loss_and_dice_share_one_read_of_the_logits(target):
    """Where they are of the same logits: nuclei are scored whole, but learned as interior and border."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(data="data", output="run", protocol="native", target=target, backend="triton")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, config.network_classes, 6, 5, generator=generator).to(device).requires_grad_()
    masks = torch.randint(0, max(config.network_classes, 2), (2, 6, 5), generator=generator).to(device)
    with CalledOperators() as called:
        loss, dice = configured_loss_and_dice(logits, masks, config)
        loss.backward()
    reads = 1 if target == "mask" else 2
    own = [name.removesuffix(".default") for name in called.names if name.startswith("uctrans.")]
    assert own.count("uctrans.segmentation_sums") == own.count("uctrans.segmentation_scores") == reads
    assert own.count("uctrans.segmentation_sums_backward") == 1
    expected = (logits if target == "mask" else logits[:, 1:].logsumexp(1, keepdim=True) - logits[:, :1]).detach()
    torch.testing.assert_close(dice, image_dice(expected, (masks > 0).long(), backend="reference"))
    torch.testing.assert_close(loss, segmentation_loss(logits, masks, backend="reference"))


def test_the_check_for_waiting_sees_a_value_being_read():
    with CalledOperators() as called:
        torch.ones(()).item()
    assert any(word in name for name in called.names for word in WAITING)


def test_a_step_lowers_the_loss_of_its_batch(make_config):
    run = started_run(make_config(batch_size=7))
    before = validate(run.model, run.train_data, run.protocol, run.config, CPU).read(CPU)[0]
    for _ in range(20):
        train_step(run, run.batch(0))
    assert validate(run.model, run.train_data, run.protocol, run.config, CPU).read(CPU)[0] < before - 0.05


def test_memory_of_a_step_is_flat(make_config):
    run = started_run(make_config(ema_decay=0.9))

    def live_tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(50):
        train_step(run, run.batch(0))
    tensors, resident = live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = 200
    for _ in range(steps):
        train_step(run, run.batch(0))
    # A leak is one a step at least; what earlier tests left behind may go meanwhile.
    assert live_tensors() - tensors < steps // 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 4096  # KiB; one batch's activations are 100


def test_bfloat16_autocast_trains_in_float32(make_config):
    run = started_run(make_config(amp="bf16"))
    train_step(run, run.batch(0))
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert run.totals.read(CPU)[0] > 0
    other = started_run(make_config(amp="no"))
    train_step(other, other.batch(0))
    assert run.totals.loss != other.totals.loss
    torch.testing.assert_close(run.totals.loss, other.totals.loss, rtol=0.05, atol=0)


def test_totals_remember_the_first_step_that_was_not_finite():
    totals = EpochTotals(torch.device("cpu"))
    for loss in (1.0, float("inf"), 1.0, float("nan")):
        totals.add(torch.tensor(loss), torch.zeros(2))
    assert totals.first_bad.item() == 1
    again = EpochTotals(torch.device("cpu"))
    again.load_state_dict(totals.state_dict())
    assert again.first_bad.item() == 1
    totals.reset()
    assert totals.first_bad.item() == -1
    totals.add(torch.tensor(0.5), torch.ones(2))
    assert totals.read(CPU) == (0.5, 1.0)


def test_validation_means_over_images_whatever_the_batch(make_config):
    run = started_run(make_config())
    scores = []
    for size in (1, 2, 3):
        config = make_config(batch_size=size)
        scores.append(validate(run.model, run.val_data, run.protocol, config, CPU).read(CPU)[1])
    assert scores == pytest.approx([scores[0]] * 3)
    assert run.model.training


def test_moving_average_is_its_closed_form():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.9)
    history = [copy.deepcopy(model.state_dict())]
    for _ in range(10):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
        model(torch.randn(4, 3))
        average.update(model)
        history.append(copy.deepcopy(model.state_dict()))
    for name in ("0.weight", "1.running_var"):
        expected = 0.9**10 * history[0][name]
        for step in range(1, 11):
            expected = expected + 0.1 * 0.9 ** (10 - step) * history[step][name]
        torch.testing.assert_close(average.model.state_dict()[name], expected)
    assert average.model[1].num_batches_tracked == 10
    assert not average.model.training


def test_learning_rates_are_the_published_schedule(make_config):
    config = make_config(learning_rate=1e-3, min_learning_rate=1e-4, restart_period=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=1, eta_min=1e-4)
    for epoch in range(1, 35):
        assert learning_rate(config, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_one_cosine_over_all_epochs_after_a_warm_up(make_config):
    config = make_config(
        learning_rate=1.0, min_learning_rate=0.0, restart_period=None, warmup_epochs=4, epochs=20, first_best_epoch=1
    )
    rates = [learning_rate(config, epoch) for epoch in range(1, 21)]
    cosine = [(1 + math.cos(math.pi * epoch / 20)) / 2 for epoch in range(20)]
    assert rates[:4] == pytest.approx([share * rate for share, rate in zip((0.2, 0.4, 0.6, 0.8), cosine, strict=False)])
    assert rates[4:] == pytest.approx(cosine[4:])


def test_the_step_uses_the_learning_rate_of_its_epoch(make_config):
    run = Run(make_config(learning_rate=1e-3, min_learning_rate=1e-4), CPU)
    run.epoch = 5
    run.begin_epoch()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(5.5e-4)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizer_is_the_fused_one_that_was_asked_for(make_config, name, kind):
    optimizer = build_optimizer(make_config(optimizer=name), torch.nn.Linear(2, 2), torch.device("cpu"))
    assert type(optimizer) is kind
    assert optimizer.defaults["fused"]


def test_fused_adam_is_adam(make_config):
    model = torch.nn.Linear(3, 1)
    plain = copy.deepcopy(model)
    fused = build_optimizer(make_config(learning_rate=1e-2), model, torch.device("cpu"))
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=False, foreach=False)
    for _ in range(5):
        inputs = torch.randn(4, 3)
        for network, optimizer in ((model, fused), (plain, reference)):
            optimizer.zero_grad()
            network(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)


def test_compile_wraps_what_a_step_calls_and_not_what_is_saved(make_config, monkeypatch):
    compiled = []

    def fake_compile(model, dynamic):
        assert dynamic is False
        compiled.append(model)
        return lambda images: model(images)

    monkeypatch.setattr(torch, "compile", fake_compile)
    run = started_run(make_config(compile=True))
    assert compiled == [run.model]
    train_step(run, run.batch(0))
    assert run.totals.steps == 1


def test_deterministic_kernels_where_they_are_asked_for(make_config):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        run = started_run(make_config(deterministic=True, threads=1))
        assert torch.are_deterministic_algorithms_enabled()
        train_step(run, run.batch(0))
    finally:
        torch.use_deterministic_algorithms(before)


def test_an_epoch_shows_every_image_once_and_keeps_the_last_smaller_batch(make_config):
    run = started_run(make_config(batch_size=3))
    batches = [run.batch(step).tolist() for step in range(run.steps_per_epoch)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(position for batch in batches for position in batch) == list(range(7))


def test_processes_share_an_epoch_evenly(make_config):
    run = started_run(make_config(batch_size=2))
    shares = []
    for rank in range(2):
        run.group = Processes(rank=rank, count=2, device=torch.device("cpu"))
        shares.append([run.batch(step).tolist() for step in range(run.steps_per_epoch)])
    assert [[len(batch) for batch in share] for share in shares] == [[2, 1], [2, 1]]
    seen = [position for share in shares for batch in share for position in batch]
    assert len(set(seen)) == 6
    assert [run.images_before(step) for step in range(run.steps_per_epoch + 1)] == [0, 4, 6]


@pytest.mark.parametrize(
    ("settings", "count", "called"),
    [
        ({"amp": "bf16"}, 1, "cast at once"),
        ({"amp": "no"}, 1, "the model"),
        ({"amp": "bf16"}, 2, "in two processes"),
        ({"amp": "bf16", "compile": True}, 1, "compiled"),
    ],
    ids=str,
)
def test_how_the_network_is_called(make_config, monkeypatch, settings, count, called):
    """Both ways to cast give the same bits, so that only this shows which one is taken."""
    group = SimpleNamespace(count=count, wrap=lambda model: model if count == 1 else "in two processes")
    monkeypatch.setattr(run_module, "casting_together", lambda model, dtype: "cast at once")
    monkeypatch.setattr(torch, "compile", lambda forward, **_: "compiled")
    assert run_module.training_forward("the model", make_config(**settings), group)
