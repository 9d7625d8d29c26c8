"""Activation checkpointing keeps less and gives the same bits, also in recorded steps."""

import copy

import pytest
import torch
from torch import nn

import uctrans
from tests.models.support import NAMES, build
from tests.support import HostRecorder


class DropPath(nn.Module):
    """Draws random numbers without being one of PyTorch's dropouts."""

    def forward(self, feature):
        return feature * torch.rand(len(feature), 1, 1, 1).round()


def image():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(model, compute=lambda model, image: model(image).square().mean()):
    """Return loss, gradients and buffers of a step that draws the same random numbers each time."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    loss = compute(model, image())
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


def kept_bytes(model):
    """Return the bytes that a forward pass keeps for the backward pass, by autograd or as inputs of stages."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())  # the storage too, so that its address stays its own
        return tensor

    def note_inputs(stage, inputs):
        for tensor in inputs:
            note(tensor)

    stages = [module for module in model.modules() if "forward" in vars(module)]
    hooks = [stage.register_forward_pre_hook(note_inputs) for stage in stages]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(image()).square().mean()
    for hook in hooks:
        hook.remove()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    del loss
    return sum(size for pointer, (_, size) in kept.items() if pointer not in weights)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_statistics_are_the_same_bits(name, backend, momentum):
    options = {} if name == "unet" else {"backend": backend}
    plain = build(name, **options).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    checkpointed = uctrans.set_checkpointing(copy.deepcopy(plain))
    for _ in range(2):
        for one, other in zip(step(checkpointed), step(plain), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("norm", nn.InstanceNorm2d(4, track_running_stats=True)),
        ("act", nn.RReLU()),
        ("act", nn.Sequential(nn.ReLU(), nn.Dropout2d(0.5))),
        ("act", DropPath()),
    ],
    ids=["instance norm", "random activation", "dropout", "random module"],
)
def test_replaced_modules_count_and_draw_once(part, other):
    plain = build("unet").train()
    plain.encoder.stem.set_submodule(part, other)
    checkpointed = uctrans.set_checkpointing(copy.deepcopy(plain))
    for one, expected in zip(step(checkpointed), step(plain), strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("name", NAMES)
def test_less_is_kept(name):
    plain = build(name)
    checkpointed = uctrans.set_checkpointing(copy.deepcopy(plain))
    assert 0 < kept_bytes(checkpointed) < 0.6 * kept_bytes(plain)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_switched_off_again(name):
    model = build(name)
    kept = kept_bytes(model)
    uctrans.set_checkpointing(uctrans.set_checkpointing(model), False)
    assert kept_bytes(model) == kept
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_checkpoints_its_own_weights():
    model = uctrans.set_checkpointing(build("uctransnet"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    step(twin)
    assert twin.encoder.stem.conv.weight.grad.abs().sum() > 0
    assert model.encoder.stem.conv.weight.grad is None


def test_names_of_weights_stay():
    model = build("dual_branch_uctransnet")
    names = list(model.state_dict())
    assert list(uctrans.set_checkpointing(model).state_dict()) == names


def test_nothing_is_computed_again_without_gradients():
    model = uctrans.set_checkpointing(build("unet")).eval()
    plain = uctrans.set_checkpointing(copy.deepcopy(model), False)
    with torch.inference_mode():
        assert torch.equal(model(image()), plain(image()))


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_bits_are_the_same_too(name):
    def compute(model, image):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model(image).float().square().mean()

    plain = build(name)
    checkpointed = uctrans.set_checkpointing(copy.deepcopy(plain))
    for one, other in zip(step(checkpointed, compute), step(plain, compute), strict=True):
        assert torch.equal(one, other)


def test_statistics_are_put_back_where_the_backward_pass_fails():
    model = uctrans.set_checkpointing(build("unet"))
    loss = model(image()).square().mean()
    norm = model.encoder.stem.norm
    buffers = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    values = [buffer.clone() for buffer in buffers]
    model.encoder.stem.conv.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert [norm.running_mean, norm.running_var, norm.num_batches_tracked] == buffers
    assert all(torch.equal(*pair) for pair in zip(buffers, values, strict=True))


def test_a_recorded_step_is_the_plain_one():
    losses = {}
    for recorder in (None, HostRecorder()):
        model = uctrans.set_checkpointing(build("uctransnet"))
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3), fused=True)
        batch = image()
        torch.manual_seed(5)

        def work(model=model, optimizer=optimizer, batch=batch):
            optimizer.zero_grad(set_to_none=True)
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        if recorder is None:
            losses["plain"] = [work().item() for _ in range(6)]
        else:
            losses["recorded"] = [recorder.warm_up(work).item() for _ in range(2)]
            optimizer.zero_grad(set_to_none=True)
            recording = recorder.record(work)
            losses["recorded"] += [recording.replay().item() for _ in range(4)]
    assert losses["recorded"] == losses["plain"]
    assert len(set(losses["plain"])) == 6


def test_a_model_without_stages_is_refused():
    network = nn.Module()
    network.encoder = network.decoder = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Module has no stage to checkpoint: give a model that holds layers of"):
        uctrans.set_checkpointing(network)
