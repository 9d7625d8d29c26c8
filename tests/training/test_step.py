"""A training step: it never waits for the device, copies nothing to it, and lowers the loss."""

import functools
import gc
import resource
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uctrans.data import NativeImages, SegmentationTensors
from uctrans.kernels import segmentation_loss
from uctrans.training import TrainConfig, build
from uctrans.training.build import build_model, build_protocol
from uctrans.training.distributed import Processes
from uctrans.training.loop import train_step
from uctrans.training.losses import EpochTotals, configured_loss_and_dice, image_dice
from uctrans.training.optimization import WeightAverage, build_optimizer
from uctrans.training.own import NOTHING
from uctrans.training.validation import validate

CPU = Processes(rank=0, count=1, device=torch.device("cpu"))
META = torch.device("meta")


class CalledOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


class Transfers(TorchDispatchMode):
    """Notes the operators that have tensors on the device and on the host."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options, results)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == "meta"]
        # A CPU tensor of no dimensions is a number that goes along with the launch, unless it is copied.
        is_copy = function.name() in ("aten::_to_copy", "aten::copy_", "aten::lift_fresh_copy")
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu" and (tensor.ndim > 0 or is_copy)]
        if on_device and on_host:
            self.found.append(str(function))
        self.operators += bool(on_device)
        return results


class TensorsOfPythonValues(TorchFunctionMode):
    """Notes tensors made of Python's values, which are copied to the device."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in self.MAKERS:
            self.found.append(function.__name__)
        return function(*arguments, **(options or {}))


def step_on_meta(images=6, side=32, **changes):
    """A step on PyTorch's device "meta", which computes shapes only, in place of a GPU.

    A tensor that was left on the CPU, a value that is read, or a copy between host and device stops the step or is
    found: what would fail on a GPU, make the host wait, or not be recordable as a CUDA graph.
    """
    config = TrainConfig(data="data", output="run", base_channels=2, image_size=side, **changes)
    protocol = build_protocol(config)
    model = build_model(config, protocol.image_size).to(META, memory_format=torch.channels_last)
    names = [f"image{number}" for number in range(images)]
    zeros = functools.partial(torch.zeros, device=META)
    if protocol.keeps_resolution:
        pixels = images * side * side
        places = zeros(images, dtype=torch.int64), zeros(2, images, dtype=torch.int64)
        data = NativeImages(names, zeros(3, pixels, dtype=torch.uint8), zeros(pixels, dtype=torch.uint8), *places)
    else:
        maps = zeros(images, 3, side, side, dtype=torch.uint8), zeros(images, side, side, dtype=torch.uint8)
        data = SegmentationTensors(names, *maps, [(side, side)] * images)
    run = SimpleNamespace(
        forward=model,
        model=model,
        optimizer=build_optimizer(config, model, META),
        average=WeightAverage(model, config.ema_decay) if config.ema_decay else None,
        train_data=data,
        protocol=protocol,
        augment_generator=torch.Generator(),
        totals=EpochTotals(META),
        group=Processes(rank=0, count=1, device=META),
        config=config,
        own=NOTHING,
    )
    return functools.partial(train_step, run)


SMALL_TRANSFORMER = {"model": "uctransnet", "model_options": {"num_layers": 1, "num_heads": 2}}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "unet", "ema_decay": 0.9, "channel_order": "bgr"},
        SMALL_TRANSFORMER,
        SMALL_TRANSFORMER | {"backend": "reference"},
        SMALL_TRANSFORMER | {"model": "dual_branch_uctransnet", "classes": 3, "side": 48},
        {"model": "unet", "protocol": "native"},
        {"model": "unet", "protocol": "native", "target": "boundary"},
    ],
    ids=["average-bgr", "uctransnet", "reference", "dual-branch-classes", "native", "boundary"],
)
def test_nothing_of_a_step_goes_between_host_and_device(changes):
    step = step_on_meta(**changes)
    index = torch.zeros(4, dtype=torch.int64, device=META)
    step(index)  # the first makes the optimizer's state
    with Transfers() as transfers, TensorsOfPythonValues() as values:
        step(index)
    assert transfers.found == []
    assert values.found == []
    assert transfers.operators > 100


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.ones(3).to(META),
        lambda: torch.tensor([1.0, 2.0], device=META),
        lambda: torch.tensor(1.0).to(META),
        lambda: torch.ones(3, device=META).index_select(0, torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_the_check_sees_a_transfer(work):
    with Transfers() as transfers, TensorsOfPythonValues() as values:
        try:
            work()
        except RuntimeError:
            return
    assert transfers.found or values.found


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


def test_steps_lower_the_loss_of_their_batch(make_run):
    run = make_run(batch_size=7)
    before = validate(run.model, run.train_data, run.protocol, run.config, CPU).read(CPU)[0]
    for _ in range(20):
        train_step(run, run.batch(0))
    assert validate(run.model, run.train_data, run.protocol, run.config, CPU).read(CPU)[0] < before - 0.05


def test_memory_of_a_step_is_flat(make_run):
    run = make_run(ema_decay=0.9)

    def live_tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(10):
        train_step(run, run.batch(0))
    tensors, resident = live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = 60
    for _ in range(steps):
        train_step(run, run.batch(0))
    # A leak is one a step at least; what earlier tests left behind may go meanwhile.
    assert live_tensors() - tensors < steps // 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 4096  # KiB; one batch's activations are 100


def test_bfloat16_autocast_trains_in_float32(make_run):
    losses = []
    for amp in ("bf16", "no"):
        run = make_run(amp=amp)
        train_step(run, run.batch(0))
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
        losses.append(run.totals.loss)
    assert losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)


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


def test_validation_means_over_images_whatever_the_batch(make_config, make_run):
    run = make_run()
    scores = []
    for size in (1, 2, 3):
        config = make_config(batch_size=size)
        scores.append(validate(run.model, run.val_data, run.protocol, config, CPU).read(CPU)[1])
    assert scores == pytest.approx([scores[0]] * 3)
    assert run.model.training


def test_an_epoch_shows_every_image_once_and_keeps_the_last_smaller_batch(make_run):
    run = make_run(batch_size=3, image_size=24)
    batches = [run.batch(step).tolist() for step in range(run.steps_per_epoch)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(position for batch in batches for position in batch) == list(range(7))


def test_processes_share_an_epoch_evenly(make_run):
    run = make_run(batch_size=2, image_size=24)
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
        ({"amp": "bf16"}, 1, "cast together"),
        ({"amp": "no"}, 1, "the model"),
        ({"amp": "bf16"}, 2, "in two processes"),
        ({"amp": "bf16", "compile": True}, 1, "compiled"),
    ],
    ids=str,
)
def test_how_the_network_is_called(make_config, monkeypatch, settings, count, called):
    """Both ways to cast give the same bits, so that only this shows which one is taken."""

    def answers(name):
        return lambda images: name

    group = SimpleNamespace(count=count, wrap=lambda model: model if count == 1 else answers("in two processes"))
    monkeypatch.setattr(build, "casting_together", lambda model, dtype: answers("cast together"))
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: answers("compiled"))
    forward = build.training_forward(answers("the model"), make_config(**settings), group)
    assert forward(torch.zeros(1)) == called


def test_compile_wraps_what_a_step_calls_and_not_what_is_saved(make_run, monkeypatch):
    compiled = []

    def fake_compile(model, dynamic):
        assert dynamic is False
        compiled.append(model)
        return lambda images: model(images)

    monkeypatch.setattr(torch, "compile", fake_compile)
    run = make_run(compile=True)
    assert compiled == [run.model]
    train_step(run, run.batch(0))
    assert run.totals.steps == 1


def test_deterministic_kernels_where_they_are_asked_for(make_run):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        run = make_run(deterministic=True, threads=1)
        assert torch.are_deterministic_algorithms_enabled()
        train_step(run, run.batch(0))
    finally:
        torch.use_deterministic_algorithms(before)
