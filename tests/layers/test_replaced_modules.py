"""Layers run the modules that users replaced, wrapped, hooked or parametrised, on every backend.

Without a GPU the kernels run in Triton's interpreter.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as pruning
from torch.utils._python_dispatch import TorchDispatchMode

import uctrans
from uctrans.layers import ChannelGate, ConvNormAct, ConvNormActPool, Reconstruct, TransformerLayer, set_backend
from uctrans.layers.packed import PackedLinear, PackedMlp

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "composed", "reference"]
CHANNELS = (2, 4)
PATCH = 2


def by_scale(modules, tokens):
    return torch.cat([module(scale) for module, scale in zip(modules, tokens.split(CHANNELS, -1), strict=True)], -1)


def in_full_size(module, tokens):
    return F.relu(module.norm(module.conv(F.interpolate(tokens, scale_factor=PATCH, mode="nearest"))))


def gated(module, encoder_feature, decoder_feature):
    decoded = F.interpolate(decoder_feature, scale_factor=2, mode="nearest")
    gate = (module.skip(encoder_feature.mean((2, 3))) + module.decoder(decoded.mean((2, 3)))) / 2
    return torch.cat([F.relu(encoder_feature * gate.sigmoid()[:, :, None, None]), decoded], dim=1)


def block(module, feature):
    return module.act(module.norm(module.conv(feature)))


def block_and_pool(module, feature):
    return (block(module, feature), F.max_pool2d(block(module, feature), 2))


def transform(module, tokens):
    query, context = module.query_norm(tokens), module.context_norm(tokens)
    tokens = tokens + module.attention(query, context)
    return tokens + by_scale(module.mlp, module.mlp_norm(tokens))


def normal(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(len(size))).to(DEVICE)


TOKENS = (1, 3, sum(CHANNELS))
# Each layer, the modules that a fused operator stands for, the shapes of the arguments, and the steps one by one.
LAYERS = {
    "block": (lambda: ConvNormAct(3, 4), ["conv", "norm", "act"], [(2, 3, 4, 4)], block),
    "block with pool": (lambda: ConvNormActPool(3, 4), ["norm", "act"], [(2, 3, 4, 4)], block_and_pool),
    "reconstruction": (lambda: Reconstruct(4, PATCH, "auto"), ["conv", "norm"], [(2, 4, 2, 3)], in_full_size),
    "gate": (lambda: ChannelGate(4, 3), ["skip", "decoder"], [(2, 4, 4, 4), (2, 3, 2, 2)], gated),
    "linear maps": (lambda: PackedLinear(CHANNELS), ["1"], [TOKENS], by_scale),
    "perceptrons": (
        lambda: PackedMlp(CHANNELS, 2, 0.0),
        ["0", "1.expand", "1.contract", "0.dropout"],
        [TOKENS, TOKENS],
        lambda module, tokens, residual: residual + by_scale(module, tokens),
    ),
    "transformer layer": (
        lambda: TransformerLayer(CHANNELS, 1, 2, 0.0, 0.0, "auto"),
        ["query_norm", "context_norm"],
        [TOKENS],
        transform,
    ),
}


class Adapter(nn.Module):
    """Adds to the result of a module, as a low-rank adapter does; has no parameters of the module's names."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, feature):
        output = self.base(feature)
        return output + 0.5 * output.roll(1, dims=1 if output.ndim == 4 else -1) + 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def wrap(module):
    return Adapter(module)


def subclass(module):
    kind = type(module)
    module.__class__ = type("Other", (kind,), {"forward": lambda self, feature: 2 * kind.forward(self, feature) + 1})


def set_forward(module):
    module.forward = lambda feature: 2 * type(module).forward(module, feature) + 1


def hook(module):
    module.register_forward_hook(lambda _, inputs, output: 2 * output + 1)


def hook_before(module):
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].square() + 1,))


def parametrise(module):
    parametrize.register_parametrization(module, "weight", Doubled())


def normalise_weights(module):
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(2)


def prune(module):
    pruning.random_unstructured(module, "weight", amount=0.5)
    module.weight_orig.data.add_(1)  # as an optimizer does; the hook masks it again


CHANGES = [wrap, subclass, set_forward, hook, hook_before, parametrise, normalise_weights, prune]


def is_possible(part, change):
    weight = getattr(part, "weight", None)
    if change is parametrise:
        return weight is not None
    return change not in (normalise_weights, prune) or (weight is not None and weight.ndim > 1)


def layer(name):
    make, parts, sizes, steps = LAYERS[name]
    torch.manual_seed(0)
    module = make().to(DEVICE).eval()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return module, parts, [normal(*size) for size in sizes], steps


def listed(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def assert_same(module, inputs, expected):
    """Compare the layer on every backend with ``expected``."""
    for backend in BACKENDS:
        found = listed(set_backend(module, backend)(*inputs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, b=backend: f"{b}: {text}")


def changes():
    for name in LAYERS:
        module, parts, _, _ = layer(name)
        for part in parts:
            for change in CHANGES:
                if is_possible(module.get_submodule(part), change):
                    yield pytest.param(name, part, change, id=f"{name}-{part}-{change.__name__}")


@pytest.mark.parametrize(("name", "part", "change"), list(changes()))
@torch.no_grad()
def test_changed_modules_run(name, part, change):
    module, _, inputs, steps = layer(name)
    before = listed(steps(module, *inputs))
    replacement = change(module.get_submodule(part))
    if replacement is not None:
        module.set_submodule(part, replacement)
    expected = listed(steps(module, *inputs))
    assert not torch.allclose(expected[0], before[0], atol=1e-3)
    assert_same(module, inputs, expected)


@pytest.mark.parametrize(
    ("name", "part", "other"),
    [
        ("block", "norm", nn.GroupNorm(2, 4)),
        ("block", "norm", nn.InstanceNorm2d(4, affine=True)),
        ("block", "act", nn.LeakyReLU(0.5)),
        ("block", "act", nn.Identity()),
        ("block with pool", "act", nn.GELU()),
        ("reconstruction", "norm", nn.GroupNorm(2, 4)),
        ("reconstruction", "norm", nn.InstanceNorm2d(4, affine=True)),
        ("reconstruction", "norm", nn.Identity()),
        ("reconstruction", "conv", nn.Conv2d(4, 4, 3, padding=1)),
        ("gate", "skip", nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4))),
        ("gate", "decoder", nn.Linear(3, 4, bias=False)),
        ("linear maps", "0", nn.Linear(2, 2)),
        ("linear maps", "1", nn.Identity()),
        ("perceptrons", "1", nn.Identity()),
        ("perceptrons", "0.contract", nn.Linear(4, 2, bias=False)),
        ("transformer layer", "context_norm", nn.LayerNorm(6, eps=1.0)),
        ("transformer layer", "context_norm", nn.LayerNorm(6, elementwise_affine=False)),
        ("transformer layer", "query_norm", nn.Identity()),
    ],
    ids=str,
)
@torch.no_grad()
def test_replaced_modules_run(name, part, other):
    module, _, inputs, steps = layer(name)
    module.set_submodule(part, copy.deepcopy(other).to(DEVICE))
    assert_same(module, inputs, listed(steps(module, *inputs)))


@pytest.mark.parametrize("name", ["gate", "linear maps", "perceptrons"])
@pytest.mark.skipif(DEVICE == "cuda", reason="dynamic quantisation runs on CPUs")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@torch.no_grad()
def test_dynamically_quantised_maps_run(name):
    module, _, inputs, steps = layer(name)
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    expected = listed(steps(quantised, *inputs))
    assert not torch.equal(expected[0], steps(module, *inputs))
    assert_same(quantised, inputs, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_global", [False, True], ids=["hook", "global hook"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_fire(name, is_global, backend):
    module, names, inputs, _ = layer(name)
    set_backend(module, backend)
    parts, forward, backward = [module.get_submodule(part) for part in names], set(), set()
    if is_global:
        handle = register_module_forward_hook(lambda part, *_: forward.add(part))
        try:
            module(*inputs)
        finally:
            handle.remove()
        assert forward >= set(parts)
        return
    for part in parts:
        part.inplace = False  # PyTorch takes no backward hooks of modules that change their arguments
        part.register_full_backward_hook(lambda part, *_: backward.add(part))
    listed(module(*(tensor.requires_grad_() for tensor in inputs)))[-1].sum().backward()
    assert backward == set(parts)


@torch.no_grad()
def test_modules_appended_to_a_block_run():
    module, _, inputs, _ = layer("block")
    module.append(nn.Hardtanh())
    assert_same(module, inputs, listed(nn.Sequential(*module)(*inputs)))


def test_dropouts_of_different_probability():
    """With one dropout for all scales, the scale that drops nothing would drop, too."""
    module, _, inputs, _ = layer("perceptrons")
    module.train()
    module[0].dropout.p = 0.9
    first, second = (set_backend(module, "triton")(*inputs) for _ in range(2))
    assert torch.equal(first[..., CHANNELS[0] :], second[..., CHANNELS[0] :])


class Called(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.add(str(operator))
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_unchanged_modules_are_fused(name):
    module, _, inputs, _ = layer(name)
    with Called() as called:
        set_backend(module, "triton")(*inputs)
    assert any(operator.startswith("uctrans.") for operator in called.names)
    assert not any("batch_norm" in operator for operator in called.names if operator.startswith("aten."))


@pytest.mark.parametrize("backend", ["composed", "reference"])
@torch.no_grad()
def test_a_network_whose_ends_are_wrapped(backend):
    """Patch embeddings and head need not be convolutions with a ``weight`` and a ``kernel_size``."""
    torch.manual_seed(0)
    model = uctrans.create_model("uctransnet", base_channels=2, image_size=16, patch_sizes=(4, 2), num_layers=1).eval()
    image = torch.rand(1, 3, 16, 16)
    expected = set_backend(model, backend)(image)
    model.head = nn.Sequential(model.head)
    for embedding in model.transformer.embeddings:
        embedding.projection = nn.Sequential(embedding.projection)
    assert torch.equal(model(image), expected)


@pytest.mark.parametrize("name", ["reconstruction", "gate", "perceptrons", "transformer layer"])
@pytest.mark.parametrize("is_hooked", [False, True])
@torch.no_grad()
def test_the_choice_is_traced(name, is_hooked):
    torch._dynamo.reset()
    module, parts, inputs, _ = layer(name)
    set_backend(module, "composed")
    if is_hooked:
        hook(module.get_submodule(parts[0]))
    expected = listed(module(*inputs))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(listed(compiled(*inputs)), expected)
    if not is_hooked:  # a program holds no hooks
        program = torch.export.export(module, tuple(inputs), strict=False)
        torch.testing.assert_close(listed(program.module()(*inputs)), expected)
