"""Convolution, batch norm, ReLU and pooling on Triton compute what the separate modules compute.

Without a GPU the kernels run in Triton's interpreter.
"""

import copy

import pytest
import torch
from torch import nn

import uctrans
from uctrans import set_backend
from uctrans.layers import ConvNormAct, ConvNormActPool, DoubleConv, DualBranchEncoder, Encoder
from uctrans.layers import blocks as blocks_module
from uctrans.layers.nested import DilatedConvNormAct

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]


def maps(seed=0, channels=3):
    drawn = torch.randn(2, channels, 6, 5, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE).contiguous(memory_format=torch.channels_last)


def block(kind=ConvNormAct, *arguments, **options):
    torch.manual_seed(0)
    module = kind(3, 8, *arguments, **options).to(DEVICE, memory_format=torch.channels_last)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return module


def outputs_gradients_and_buffers(module, steps=3):
    found = []
    for step in range(steps):
        feature = maps(step).requires_grad_()
        outputs = module(feature)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(step)
        weights = [torch.randn(output.shape, generator=generator).to(DEVICE) for output in outputs]
        found += [output.detach() for output in outputs]
        found += torch.autograd.grad(outputs, [feature, *module.parameters()], weights)
    return [*found, *(buffer.clone() for buffer in module.buffers())]


@pytest.fixture
def calls(monkeypatch):
    """Return a list that gets an entry for each call of an operator."""
    made = []

    def count(operator):
        def counted(*arguments, **options):
            made.append(arguments)
            return operator(*arguments, **options)

        monkeypatch.setattr(blocks_module, operator.__name__, counted)

    count(blocks_module.batch_norm_relu)
    count(blocks_module.batch_norm_relu_pool)
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "dilation"), [(ConvNormAct, 1), (ConvNormAct, 2), (ConvNormActPool, 1)])
def test_triton_is_the_modules(kind, dilation, training, calls):
    module = block(kind, dilation=dilation).train(training)
    expected = outputs_gradients_and_buffers(set_backend(copy.deepcopy(module), "composed"))
    assert calls == []
    found = outputs_gradients_and_buffers(set_backend(module, "triton"))
    assert len(calls) == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[-1].item() == (3 if training else 0)  # batches are counted


def test_pool_is_that_of_the_block_without_it():
    """On every backend the map and its maxima are the same, and so are the names of the weights."""
    for backend in ("reference", "composed", "triton"):
        plain, pooling = block(), block(ConvNormActPool)
        pooling.load_state_dict(plain.state_dict())
        feature, pooled = set_backend(pooling, backend)(maps())
        expected = set_backend(plain, backend)(maps())
        assert torch.equal(feature, expected)
        assert torch.equal(pooled, nn.MaxPool2d(2)(expected))


# On a GPU auto is Triton, which the tests above hold to the modules.
@pytest.mark.parametrize("backend", ["composed", "reference"] + ["auto"] * (DEVICE == "cpu"))
def test_other_backends_run_the_modules(backend, calls):
    """Results are the same to the last bit, and hooks of the modules run."""
    module = block(DoubleConv)
    expected = outputs_gradients_and_buffers(nn.Sequential(*(nn.Sequential(*part) for part in copy.deepcopy(module))))
    found = outputs_gradients_and_buffers(set_backend(module, backend))
    assert calls == []
    for result, same in zip(found, expected, strict=True):
        assert torch.equal(result, same)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(2, 8),
        nn.Identity(),
    ],
    ids=["cumulative average", "no parameters", "no running statistics", "group norm", "none"],
)
def test_other_norms_run_as_they_are(norm, calls):
    module = block(ConvNormActPool)
    module.norm = norm.to(DEVICE)
    expected = outputs_gradients_and_buffers(set_backend(copy.deepcopy(module), "composed"))
    found = outputs_gradients_and_buffers(set_backend(module, "triton"))
    assert calls == []
    for result, same in zip(found, expected, strict=True):
        assert torch.equal(result, same)


def parametrised(module):
    torch.nn.utils.parametrize.register_parametrization(module.conv, "weight", nn.Identity())


def with_reflected_borders(module):
    module.conv.padding_mode, module.conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


class OtherConv(nn.Conv2d):
    """A convolution of twice the feature."""

    def forward(self, feature):
        return super().forward(2 * feature)


def of_another_class(module):
    module.conv.__class__ = OtherConv


class TestConvolutionsWithoutTheirBias:
    @pytest.fixture
    def biases(self, monkeypatch):
        """Return a list that gets the bias of each convolution that runs."""
        found, convolve = [], torch.nn.functional.conv2d

        def noting(feature, weight, bias=None, *arguments, **options):
            found.append(bias)
            return convolve(feature, weight, bias, *arguments, **options)

        monkeypatch.setattr(torch.nn.functional, "conv2d", noting)
        return found

    def test_the_gradient_of_the_bias_is_zero_in_training(self, biases):
        """A tensor of zeros, as optimizers and DistributedDataParallel expect it; weight decay alone moves the bias."""
        module = set_backend(block(), "triton")
        before = module.conv.bias.clone()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.5)
        module(maps()).square().sum().backward()
        assert biases == [None]
        assert torch.equal(module.conv.bias.grad, torch.zeros_like(before))
        optimizer.step()
        torch.testing.assert_close(module.conv.bias.detach(), 0.75 * before)

    def test_a_frozen_norm(self, biases):
        """Running statistics do not follow the batch here, so the bias keeps its gradient."""
        module = block()
        module.norm.eval()
        nn.init.normal_(module.norm.running_mean)
        expected = outputs_gradients_and_buffers(set_backend(copy.deepcopy(module), "composed"), steps=1)
        found = outputs_gradients_and_buffers(set_backend(module, "triton"), steps=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert biases[-1] is None and biases[0] is not None

    def test_parameters_that_do_not_learn(self):
        module = set_backend(block(), "triton")
        module.conv.requires_grad_(False)
        module(maps()).sum().backward()
        assert module.conv.bias.grad is None and module.norm.weight.grad is not None

    def test_a_convolution_without_a_bias(self):
        module = block(ConvNormActPool)
        module.conv.bias = None
        expected = outputs_gradients_and_buffers(set_backend(copy.deepcopy(module), "composed"), steps=1)
        found = outputs_gradients_and_buffers(set_backend(module, "triton"), steps=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("change", [parametrised, of_another_class, with_reflected_borders])
    def test_other_convolutions(self, change, calls):
        module = block()
        change(module)
        expected = outputs_gradients_and_buffers(set_backend(copy.deepcopy(module), "composed"), steps=1)
        found = outputs_gradients_and_buffers(set_backend(module, "triton"), steps=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1

    @pytest.mark.parametrize("part", ["conv", "norm", "act"])
    def test_hooks_see_what_they_saw(self, part):
        seen = {"composed": [], "triton": []}
        for backend, kept in seen.items():
            module = set_backend(block(), backend)
            hooked = getattr(module, part)
            hooked.register_forward_hook(lambda _, inputs, output, kept=kept: kept.append(output.detach().clone()))
            module(maps())
            assert len(kept) == 1
        torch.testing.assert_close(*seen.values())

    def test_compiled_in_one_graph(self):
        torch._dynamo.reset()
        module = set_backend(block(ConvNormActPool), "triton")
        expected = outputs_gradients_and_buffers(copy.deepcopy(module))
        found = outputs_gradients_and_buffers(torch.compile(module, fullgraph=True, backend="aot_eager"))
        torch.testing.assert_close(found, expected)


def test_synchronised_batch_norm_runs_as_it_is(calls):
    """Test the result of ``convert_sync_batchnorm`` in evaluation; in training it needs a GPU."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(block()).eval()
    assert isinstance(module.norm, nn.SyncBatchNorm) and isinstance(module, ConvNormAct)
    expected = set_backend(copy.deepcopy(module), "composed")(maps())
    assert torch.equal(set_backend(module, "triton")(maps()), expected)
    assert calls == []


def test_under_autocast(calls):
    """The convolution gives bfloat16; parameters and statistics stay float32."""
    module = set_backend(block(), "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = module(maps())
    assert output.dtype == calls[0][0].dtype == torch.bfloat16
    assert module.norm.running_var.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_a_triton_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="run on a CUDA device"):
        set_backend(block().cpu(), "triton")(maps().cpu())
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        ConvNormAct(3, 8, "tritn")


def test_names_of_weights_and_random_numbers_do_not_change():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, padding=2, dilation=2)
    module = block(DilatedConvNormAct, 2)
    assert torch.equal(module.conv.weight.cpu(), plain.weight)
    assert list(module.state_dict()) == [
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda backend: Encoder(3, (4, 8), backend),
        lambda backend: DualBranchEncoder(3, (4, 8), (1, 1), (1, 0), (2, 4), backend),
        lambda backend: uctrans.UCTransNet(base_channels=2, image_size=32, backend=backend),
        lambda backend: uctrans.create_model(
            "dual_branch_uctransnet", base_channels=2, image_size=64, dilations=1, backend=backend
        ),
    ],
    ids=["encoder", "dual-branch encoder", "uctransnet", "dual_branch_uctransnet"],
)
def test_every_block_has_the_backend_of_its_network(make):
    found = [part for part in make("reference").modules() if isinstance(part, ConvNormAct)]
    assert len(found) >= 5
    assert {part.backend for part in found} == {"reference"}


def test_a_unet_can_be_switched():
    unet = set_backend(uctrans.create_model("unet", base_channels=2), "composed")
    assert {part.backend for part in unet.modules() if isinstance(part, ConvNormAct)} == {"composed"}
