"""Batch norms folded into convolutions: the same results to rounding, and a model that stays as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import uctrans
from tests.models.support import NAMES, build, randomised
from uctrans import set_backend
from uctrans.layers import ConvNormAct, ConvNormActPool, Reconstruct, fold_batch_norms
from uctrans.layers.blocks import convolve_and_rectify, cudnn_rectifies

BACKENDS = ("reference", "composed")


def image(*size, seed=0):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_every_network_has_its_fold():
    assert uctrans.list_models() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_is_folded_and_results_stay(name):
    model = randomised(build(name)).to(memory_format=torch.channels_last)
    before = state(model)
    folded = fold_batch_norms(model)
    assert norms(model)
    assert not norms(folded)
    for backend in BACKENDS if name != "unet" else ("composed",):
        set_backend(model, backend), set_backend(folded, backend)
        with torch.inference_mode():
            for size in ((32, 32), (48, 37)):
                expected, found = model(image(*size)), folded(image(*size))
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * max(1, expected.abs().max().item()))
    assert state(model).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_in_float64_the_results_are_equal_to_its_rounding():
    model = randomised(build("uctransnet")).double()
    with torch.inference_mode():
        expected, found = model(image(32, 32).double()), fold_batch_norms(model)(image(32, 32).double())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"bias": False}, {"groups": 4}, {"stride": 2, "padding_mode": "reflect"}], ids=str)
def test_convolutions_of_every_kind(options):
    block = randomised(ConvNormAct(8, 8))
    block.conv = nn.Conv2d(8, 8, 3, padding=1, **options)
    folded = fold_batch_norms(block)
    assert not norms(folded)
    feature = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(folded(feature), block(feature), rtol=1e-5, atol=1e-5)


def test_the_weights_keep_their_dtype_and_the_rest_is_shared():
    model = randomised(build("uctransnet")).to(torch.bfloat16)
    folded = fold_batch_norms(model)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    assert folded.transformer.layers is model.transformer.layers
    assert folded.encoder.stem.conv is not model.encoder.stem.conv


def replace_norm(block):
    block.norm = nn.GroupNorm(2, 8)


def replace_conv(block):
    block.conv = nn.Sequential(block.conv, nn.Dropout(0.1)).eval()


def hook_conv(block):
    block.conv.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_norm(block):
    block.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def parametrise_conv(block):
    nn.utils.parametrizations.weight_norm(block.conv)


def train_norm(block):
    block.norm.train()


def drop_statistics(block):
    block.norm = nn.BatchNorm2d(8, track_running_stats=False).eval()


CHANGES = [replace_norm, replace_conv, hook_conv, hook_norm, parametrise_conv, train_norm, drop_statistics]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", [ConvNormAct, ConvNormActPool, Reconstruct], ids=lambda kind: kind.__name__)
def test_changed_modules_run_as_modules(kind, change):
    layer = kind(8, 8, "composed") if kind is Reconstruct else kind(8, 8)
    changed = nn.Sequential(randomised(layer))
    change(changed[0])
    folded = fold_batch_norms(changed)
    assert folded is changed
    feature = torch.randn(2, 8, 16, 16)
    torch.testing.assert_close(folded(feature), copy.deepcopy(changed)(feature))


def test_an_added_module_and_a_hook_on_a_parent_still_run():
    model, seen = randomised(build("uctransnet")), []
    model.encoder.stem.add_module("noise", nn.Hardtanh(0, 0.1))
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        torch.testing.assert_close(fold_batch_norms(model)(image(32, 32)), model(image(32, 32)), rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


def test_a_block_that_two_parents_share_is_folded_once():
    block = randomised(ConvNormAct(8, 8))
    folded = fold_batch_norms(nn.Sequential(nn.Sequential(block), nn.Sequential(block)))
    assert folded[0][0] is folded[1][0] is not block


def test_a_folded_model_runs_on_triton():
    pytest.importorskip("triton")
    block = randomised(nn.Sequential(ConvNormAct(3, 8, "triton"), ConvNormActPool(8, 8, "triton")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block, feature = block.to(device), image(8, 6).to(device)
    with torch.inference_mode():
        for found, expected in zip(fold_batch_norms(block)(feature), block(feature), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dilation", [1, 2])
def test_cudnn_gets_the_arguments_of_the_convolution(dilation, monkeypatch):
    """The call exists on CUDA only; a stand-in with its signature shows the arithmetic."""

    def stand_in(feature, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(feature, weight, bias, stride, padding, dilation, groups))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", stand_in)
    conv = nn.Conv2d(4, 8, 3, padding=dilation, dilation=dilation, groups=2)
    feature = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(convolve_and_rectify(conv, feature), F.relu(conv(feature)))
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve_and_rectify(conv, feature).dtype == torch.bfloat16
    assert not cudnn_rectifies(conv, feature), "a CPU has no cuDNN"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnn_computes_convolution_and_relu(dtype):
    conv = nn.Conv2d(16, 32, 3, padding=1).to("cuda", memory_format=torch.channels_last)
    feature = torch.randn(2, 16, 20, 12, device="cuda").to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert cudnn_rectifies(conv, feature)
        torch.testing.assert_close(convolve_and_rectify(conv, feature), F.relu(conv(feature)), rtol=1e-2, atol=1e-2)
