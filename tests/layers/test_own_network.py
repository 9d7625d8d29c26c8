"""The networks of docs/layers.md, which hold our layers: gradients, two processes, checkpointing, export, hooks."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import PAGES, blocks
from uctrans.kernels import segmentation_loss
from uctrans.layers import ChannelGate, ChannelTransformer, ConvNormAct, set_backend, set_checkpointing

SMALL_UNET, EXPORT, EXPORT_ONNX, MONAI = blocks("python", "docs/layers.md")
PROCESSES = 2
LAYERS = {  # and their arguments
    "ChannelTransformer": (
        lambda: ChannelTransformer([2, 4], [4, 2], (2, 2), num_layers=2, num_heads=1),
        [[torch.rand(1, 2, 8, 8), torch.rand(1, 4, 4, 4)]],
    ),
    "ChannelGate": (lambda: ChannelGate(4, 3), [torch.rand(1, 4, 4, 4), torch.rand(1, 3, 2, 2)]),
    "ConvNormAct": (lambda: ConvNormAct(3, 4), [torch.rand(1, 3, 4, 4)]),
}


def names_of(*scripts):
    """Return the variables that blocks of the page leave, run one after the other."""
    names = {}
    torch.manual_seed(0)
    for script in scripts:
        exec(script, names)
    return names


def batch(size=(32, 48), seed=0):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return image, (image.mean(1) > 0.5).long()


def step(network, seed=0):
    """Return the loss of a batch, with its gradients in the parameters, for the same random numbers in each call."""
    image, mask = batch(seed=seed)
    torch.manual_seed(seed)
    network.zero_grad(set_to_none=True)
    loss = segmentation_loss(network(image), mask)
    loss.backward()
    return loss.detach()


def without_gradient(network):
    return [name for name, parameter in network.named_parameters() if parameter.grad is None]


def assert_same_in_every_size(run, network):
    """Compare a program with the network, on the grid that its positions were learned for and on others."""
    for count, height, width in ((1, 64, 64), (3, 32, 80), (2, 48, 32)):
        image = torch.rand(count, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(run(image), network(image), rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient():
    network = names_of(SMALL_UNET)["network"]
    assert network(torch.rand(1, 3, 61, 35)).shape == (1, 1, 61, 35)
    step(network)
    assert without_gradient(network) == []


def train_in_one_of_several(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    network = DistributedDataParallel(names_of(SMALL_UNET)["network"], find_unused_parameters=False)
    for number in range(2):  # DDP misses the gradient of a step in the next one
        step(network, seed=PROCESSES * number + rank)
    torch.save([parameter.grad for parameter in network.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_it(tmp_path):
    torch.multiprocessing.spawn(train_in_one_of_several, (str(tmp_path),), PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_checkpointing_gives_the_same_bits():
    plain = names_of(SMALL_UNET)["network"]
    checkpointed = set_checkpointing(copy.deepcopy(plain))
    layers = checkpointed.transformer.layers
    assert all("forward" in vars(layer) and layer.attention.map_dropout > 0 for layer in layers)
    assert torch.equal(step(checkpointed), step(plain))
    for one, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_checkpointing_a_transformer_keeps_less():
    transformer = ChannelTransformer([4, 8], [4, 2], (8, 8), num_layers=3)
    features = [torch.rand(2, 4, 32, 32, requires_grad=True), torch.rand(2, 8, 16, 16)]
    kept = {}
    for on in (False, True):
        sizes = []
        set_checkpointing(transformer, on)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            transformer(features)
        kept[on] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_a_program_of_open_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = names_of(SMALL_UNET, EXPORT)["network"]
    assert_same_in_every_size(torch.export.load("network.pt2").module(), network)


@pytest.mark.slow
def test_onnx_of_open_size(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime", reason="the extra export brings onnxruntime")
    monkeypatch.chdir(tmp_path)
    network = names_of(SMALL_UNET, EXPORT, EXPORT_ONNX)["network"]
    session = runtime.InferenceSession("network.onnx")
    assert_same_in_every_size(lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), network)


def transformed_unet():
    torch.manual_seed(0)
    return names_of(SMALL_UNET, MONAI)["TransformedUNet"](widths=(4, 4, 8, 8, 8, 4))


def test_a_network_of_monai_trains_with_our_skips():
    network = transformed_unet()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        losses.append(step(network).item())
        optimizer.step()
    assert without_gradient(network) == []
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_a_network_of_monai_becomes_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra export brings onnxruntime")
    network = transformed_unet()
    step(network)
    network.eval()
    sizes = {0: torch.export.Dim("batch"), 2: 16 * torch.export.Dim("rows"), 3: 16 * torch.export.Dim("columns")}
    program = torch.export.export(network, (torch.rand(2, 3, 64, 64),), dynamic_shapes=[sizes])
    torch.onnx.export(program, input_names=["image"], verbose=False).save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    assert_same_in_every_size(lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), network)


def documented(layer):
    """Return the modules of a layer that the page says are not called, on every backend and on Triton also."""
    (row,) = re.findall(rf"^\| `{layer}` \|(.*)\|(.*)\|$", PAGES["docs/layers.md"], re.MULTILINE)
    return [set(re.findall(r"`([^`]+)`", cell)) for cell in row]


@pytest.mark.parametrize("backend", ["reference", "composed", "triton"])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_page_names_the_modules_that_hold_parameters_only(name, is_training, backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    make, arguments = LAYERS[name]
    layer = set_backend(make(), backend).train(is_training)
    called, call = set(), nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *inputs, **more: called.add(self) or call(self, *inputs, **more)
    )
    layer(*arguments)
    monkeypatch.undo()
    lists = (nn.ParameterList, nn.ModuleList)
    uncalled = {
        re.sub(r"\.\d+(?=\.|$)", ".*", path)
        for path, module in layer.named_modules()
        if module not in called and type(module) not in lists
    }
    always, on_triton = documented(name)
    assert uncalled == (always | on_triton if backend == "triton" else always)
