"""Weights that are cast in advance, or all at once in training, give the same bits as autocast alone."""

import copy
from pathlib import Path

import pytest
import torch

import uctrans
from benchmarks.launches import Launched
from uctrans import weight_casts
from uctrans.kernels import segmentation_loss
from uctrans.weight_casts import casting_together, keep_weights_cast, weights_cast_by_autocast

ROOT = Path(__file__).parents[1]
NAMES = ["unet", "uctransnet", "dual_branch_uctransnet"]
ON_TRITON = {"backend": "triton", "patch_sizes": (4, 2), "base_channels": 2, "num_layers": 1, "num_heads": 1}


def network(name, **options):
    torch.manual_seed(0)
    options = {"base_channels": 4, **options}
    if name != "unet":
        options = {"image_size": 32, "num_layers": 2, "num_heads": 2, **options}
    if name == "dual_branch_uctransnet":
        options = {"dilations": (2, 2, 2, 1), **options}
    model = uctrans.create_model(name, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # no two alike, no zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def images(count=2, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {}),
        ("uctransnet", {"backend": "composed"}),
        ("uctransnet", {"backend": "reference"}),
        ("dual_branch_uctransnet", {"backend": "composed"}),
        ("dual_branch_uctransnet", {"backend": "reference"}),
    ],
)
def test_outputs_under_autocast_are_the_same_to_the_bit(name, options, dtype):
    assert_same_outputs(network(name, **options), "cpu", dtype, images())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the test below runs them")
def test_outputs_of_the_triton_operators_are_the_same_to_the_bit():
    pytest.importorskip("triton")
    assert_same_outputs(network("uctransnet", **ON_TRITON), "cpu", torch.bfloat16, images(1, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_outputs_are_the_same_to_the_bit(name):
    assert_same_outputs(network(name, base_channels=16).cuda(), "cuda", torch.bfloat16, images().cuda())


@torch.no_grad()
def assert_same_outputs(model, device, dtype, image):
    cast = keep_weights_cast(copy.deepcopy(model), dtype)
    with torch.autocast(device, dtype, cache_enabled=False):
        assert torch.equal(cast(image), model(image))


class StandardisedConv(torch.nn.Conv2d):
    """A convolution that computes with its weight in float32 first, as weight standardisation does."""

    def forward(self, feature):
        weight = self.weight / self.weight.std()
        return self._conv_forward(feature, weight, self.bias)


@pytest.mark.parametrize("change", ["subclass", "parametrisation"])
def test_weights_that_a_module_computes_with_are_left_to_autocast(change):
    model = network("unet")
    if change == "subclass":
        model.encoder.stem.conv.__class__ = StandardisedConv
    else:
        torch.nn.utils.parametrizations.weight_norm(model.encoder.stem.conv)
    assert_same_outputs(model, "cpu", torch.bfloat16, images(1))
    assert_the_same_training(model, "cpu", torch.bfloat16, images())


@pytest.mark.parametrize("name", NAMES)
def test_what_autocast_leaves_alone_stays_in_float32(name):
    model = keep_weights_cast(network(name), torch.bfloat16)
    kept = {key for key, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert all(word in "\n".join(kept) for word in (["norm", "position", "gate"] if name != "unet" else ["norm"]))
    cast = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert cast > 0.8 * sum(p.numel() for p in model.parameters())


def test_the_number_of_weights_that_is_stated_is_right():
    with torch.device("meta"):
        model = uctrans.create_model("uctransnet")
    count = len(list(weights_cast_by_autocast(model)))
    assert f"{count} such weights" in weight_casts.__doc__
    assert f"UCTransNet's {count} weights" in (ROOT / "docs/training.md").read_text(encoding="utf-8")


def train_once(model, forward, device, dtype, image):
    """Return the logits of a call in training under autocast; the gradients stay in ``model``."""
    torch.manual_seed(2)  # of dropout
    with torch.autocast(device, dtype, cache_enabled=False):
        logits = forward(image)
    masks = torch.ones(len(image), *image.shape[2:], dtype=torch.uint8, device=device)
    masks[:, ::2] = 0
    segmentation_loss(logits, masks, backend="composed").backward()
    return logits


def assert_the_same_training(model, device, dtype, image):
    """Train ``model`` and a copy whose weights are cast together, once."""
    model = model.train().to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    logits = train_once(model, model, device, dtype, image)
    assert torch.equal(train_once(other, casting_together(other, dtype), device, dtype, image), logits)
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert same.grad.dtype == torch.float32, name
        assert same.grad.stride() == parameter.grad.stride(), name
        assert torch.equal(same.grad, parameter.grad), name
    for (name, buffer), same in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(same, buffer), name


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_has_fewer_casts(name):
    model = network(name).train()
    weights = list(weights_cast_by_autocast(model))
    casts = []
    for forward in (model, casting_together(model, torch.bfloat16)):
        with Launched() as launched:
            train_once(model, forward, "cpu", torch.bfloat16, images(1))
        casts.append(launched.operators["aten::_to_copy"])
    assert 1.8 * len(weights) < casts[0] - casts[1] <= 2 * len(weights)  # there and back, but for a few


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_has_the_same_bits(name, is_checkpointing):
    model = network(name)
    if is_checkpointing:
        uctrans.set_checkpointing(model)
    assert_the_same_training(model, "cpu", torch.bfloat16, images())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, a test below runs them")
def test_a_training_step_of_the_triton_operators_likewise():
    pytest.importorskip("triton")
    assert_the_same_training(network("uctransnet", **ON_TRITON), "cpu", torch.bfloat16, images(1, 8))


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_lie_as_one_launch_for_many_casts_them(name, is_checkpointing, monkeypatch):
    """On CUDA one launch casts many tensors only where all lie as their copies do; else each has one of its own."""
    casts = []

    def note_and_cast(tensors, dtypes):
        copies = cast(tensors, dtypes)
        casts.append([tensor.stride() == copy.stride() for tensor, copy in zip(tensors, copies, strict=True)])
        assert len({tensor.dtype for tensor in tensors}) == len(set(dtypes)) == 1
        return copies

    cast = weight_casts._cast
    monkeypatch.setattr(weight_casts, "_cast", note_and_cast)
    model = network(name).train().to(memory_format=torch.channels_last)
    if is_checkpointing:
        uctrans.set_checkpointing(model)
    train_once(model, casting_together(model, torch.bfloat16), "cpu", torch.bfloat16, images())
    there, back = casts
    assert len(there) == len(back) and all(there) and all(back)


@pytest.mark.gpu
@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_training_step_has_the_same_bits(name, is_checkpointing):
    model = network(name, base_channels=16).cuda()
    if is_checkpointing:
        uctrans.set_checkpointing(model)
    # Gradients of weights that cuDNN adds up in any order would differ from run to run.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        assert_the_same_training(model, "cuda", torch.bfloat16, images().cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_few_launches_cast_all_weights(name):
    """There and back: what casts a list of tensors, and what casts one, by the names of PyTorch's kernels."""
    model = network(name, base_channels=16).cuda().train().to(memory_format=torch.channels_last)
    weights = list(weights_cast_by_autocast(model))
    launches = []
    for tensors, dtype in ((weights, torch.bfloat16), ([weight.bfloat16() for weight in weights], torch.float32)):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            weight_casts._cast(tensors, [dtype] * len(tensors))
            torch.cuda.synchronize()
        on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        launches.append(sum(event.count for event in on_device))
    assert 0 < sum(launches) < len(weights) / 4, launches


def test_a_weight_that_two_modules_share_is_cast_once():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    inputs, gradients, outputs = torch.rand(4, 3), [], []
    for forward in (model, casting_together(model, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            outputs.append(forward(inputs))
        gradients.append(torch.autograd.grad(outputs[-1].float().sum(), list(model.parameters())))
    assert torch.equal(*outputs)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)  # the sum of two is rounded to bfloat16


def test_a_weight_that_is_not_used_has_no_gradient():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "idle": torch.nn.Linear(3, 2)})
    model.forward = model["used"].forward
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        casting_together(model, torch.bfloat16)(torch.rand(4, 3)).sum().backward()
    assert model["used"].weight.grad.abs().sum() > 0
    assert model["idle"].weight.grad is None and model["idle"].bias.grad is None
