"""Layers on Triton: as exact as the published sequence, without copies, compiled and recorded as one graph.

Without a GPU the kernels run in Triton's interpreter.
"""

import copy
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uctrans.kernels.testing import assert_within_budget, budget_spent
from uctrans.layers import ChannelAttention, ChannelTransformer, TransformerLayer, set_backend

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
CHANNELS, PATCHES, GRID = (8, 24), (4, 2), (2, 3)
BATCH = 1  # the interpreter takes long; the kernels' own tests have larger batches
PUBLISHED_CHANNELS, PUBLISHED_PATCHES, PUBLISHED_GRID = (64, 128, 256, 512), (16, 8, 4, 2), (14, 14)


def perturbed(module, dtype=torch.float32):
    """Move positions, biases and norms of ``module`` away from their initial values of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 or name.endswith("position"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.to(DEVICE, dtype)


def layer(channels=CHANNELS, dropout=0.0, mlp_dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    return perturbed(TransformerLayer(channels, 2, 2, dropout, mlp_dropout, "triton"), dtype)


def transformer(num_layers=1, dropout=0.0):
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), dropout)
    sizes = {"num_layers": num_layers, "num_heads": 2, "mlp_ratio": 2}
    return perturbed(ChannelTransformer(CHANNELS, PATCHES, GRID, **sizes, **dropouts, backend="triton"))


def published_transformer(dropout=0.0):
    torch.manual_seed(0)
    dropouts = {"embedding_dropout": dropout, "attention_dropout": dropout}
    module = ChannelTransformer(PUBLISHED_CHANNELS, PUBLISHED_PATCHES, PUBLISHED_GRID, **dropouts, backend="triton")
    return perturbed(module)


def normal(*size, dtype=torch.float32, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tokens(channels=CHANNELS, dtype=torch.float32):
    return normal(BATCH, GRID[0] * GRID[1], sum(channels), dtype=dtype)


def features(channels=CHANNELS, patches=PATCHES, grid=GRID, draw=0, batch=BATCH):
    return [
        normal(batch, width, grid[0] * patch, grid[1] * patch, seed=100 * draw + width)
        for width, patch in zip(channels, patches, strict=True)
    ]


def all_results(module, inputs, backend, dtype, transform=lambda module: module):
    """Return outputs, gradients by inputs and parameters, and buffers, computed by ``backend`` in ``dtype``."""
    module = set_backend(copy.deepcopy(module).to(dtype), backend)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    outputs = transform(module)(*inputs) if len(inputs) == 1 else transform(module)(inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    weights = [normal(*output.shape, seed=place).to(output.dtype) for place, output in enumerate(outputs)]
    # In training, batch norm takes away what a bias before it adds: its gradient is nothing but rounding.
    parameters = [
        parameter
        for name, parameter in module.named_parameters()
        if not (module.training and name.endswith("conv.bias"))
    ]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters], weights)
    running = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    return [tensor.detach() for tensor in (*outputs, *gradients, *running)]


def ours_published_and_exact(module, inputs):
    dtype = inputs[0].dtype
    return (
        all_results(module, inputs, "triton", dtype),
        all_results(module, inputs, "reference", dtype),
        all_results(module, inputs, "reference", torch.float64),
    )


class TestErrorBudget:
    @pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layer(self, dtype, is_training):
        module = layer(dtype=dtype).train(is_training)
        assert_within_budget(*ours_published_and_exact(module, [tokens(dtype=dtype)]))

    @pytest.mark.parametrize(("num_layers", "is_training"), [(2, False), (1, True)], ids=["evaluation", "training"])
    def test_transformer(self, num_layers, is_training):
        """Stacked layers amplify the rounding of some draws tenfold on either side, so the median of three counts."""
        module = transformer(num_layers).train(is_training)
        spent = [budget_spent(*ours_published_and_exact(module, features(draw=draw))) for draw in range(3)]
        for place, shares in enumerate(zip(*spent, strict=True)):
            assert statistics.median(shares) <= 1, f"result {place} spends {shares} of its budget"

    def test_layer_under_autocast(self):
        module, inputs = layer(), [tokens()]
        exact = all_results(module, inputs, "reference", torch.float64)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            ours, published = (all_results(module, inputs, name, torch.float32) for name in ("triton", "reference"))
        assert_within_budget(ours, published, exact)


def test_attention_maps_are_those_of_the_reference():
    module = layer().eval()
    ours = module.attention_maps(tokens())
    for actual, expected in zip(ours, set_backend(module, "reference").attention_maps(tokens()), strict=True):
        torch.testing.assert_close(actual, expected)


class TestDropout:
    WIDTH, RATE = 48, 0.3

    def attention_that_shows_its_map(self):
        """Return an attention whose output is its map: values and output projection are identities."""
        module = ChannelAttention([self.WIDTH], num_heads=1, dropout=self.RATE, backend="triton").to(DEVICE)
        module.key_value.data[1, 0] = torch.eye(self.WIDTH)
        module.output[0].weight.data = torch.eye(self.WIDTH, device=DEVICE)
        module.output_dropout.p = 0.0
        context = torch.eye(self.WIDTH, device=DEVICE).expand(2, -1, -1)
        return module, (normal(2, self.WIDTH, self.WIDTH), context)

    def test_entries_of_the_map_are_dropped_at_the_rate_and_the_others_rescaled(self):
        module, inputs = self.attention_that_shows_its_map()
        whole = module.eval()(*inputs)
        dropped = module.train()(*inputs)
        is_kept = dropped != 0
        torch.testing.assert_close(dropped[is_kept], (whole / (1 - self.RATE))[is_kept])
        # 4608 entries: five standard deviations of their share are 0.034.
        assert abs((~is_kept).float().mean().item() - self.RATE) < 0.034
        assert not torch.equal(is_kept, module(*inputs) != 0)

    def test_the_generator_of_torch_decides_it(self):
        module = transformer(dropout=0.3).train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(module(features())[0])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])

    def test_every_parameter_learns(self):
        module = transformer(dropout=0.3).train()
        sum(output.square().mean() for output in module(features())).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() != name.endswith("conv.bias"), name  # batch norm takes away what these add

    def test_dropout_of_the_mlps(self, monkeypatch):
        """Both dropouts of an MLP act, at the rate that all scales share."""
        module = layer(mlp_dropout=0.3).mlp.train()
        hidden, drop = [], torch.nn.functional.dropout

        def noting(*arguments):
            hidden.append(drop(*arguments))
            return hidden[-1]

        monkeypatch.setattr(torch.nn.functional, "dropout", noting)
        tokens = normal(2, 64, sum(CHANNELS))
        output = module(tokens, residual=torch.zeros_like(tokens))
        assert [tuple(tensor.shape) for tensor in hidden] == [(2, 64, 2 * sum(CHANNELS)), (2, 64, sum(CHANNELS))]
        for tensor in (*hidden, output):  # 3584 entries or more: five standard deviations are at most 0.039
            assert abs((tensor == 0).float().mean().item() - 0.3) < 0.039


class MovedData(TorchDispatchMode):
    """Record operators that only move data (copies, concatenations, casts), with their first argument."""

    NAMES = ("clone", "copy_", "cat", "stack", "_to_copy", "contiguous", "index", "constant_pad_nd")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func._opname in self.NAMES:
            self.found.append((func._opname, args[0]))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [name for name, _ in self.found]


class TestNothingIsCopied:
    """Norms, projections and attention read what the others wrote, in forward and backward."""

    def forward_and_backward(self, module):
        inputs = tokens(dtype=module.mlp_norm.weight.dtype).requires_grad_()
        with MovedData() as forward:
            output = module(inputs)
        gradient = torch.ones_like(output)
        with MovedData() as backward:
            output.backward(gradient)
        assert all(parameter.grad is not None for parameter in module.parameters())
        return forward, backward

    @pytest.mark.parametrize(
        ("dtype", "dropout"),
        [(torch.float32, 0.0), (torch.bfloat16, 0.3)],
        ids=str,
    )
    def test_in_one_dtype(self, dtype, dropout):
        forward, backward = self.forward_and_backward(layer(dropout=dropout, mlp_dropout=dropout, dtype=dtype))
        assert forward.names == backward.names == []

    def test_under_autocast_only_weights_and_the_residual_are_cast(self):
        """The norms write the dtype that the projections read; tokens stay float32 between the residuals."""
        module = layer()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            forward, backward = self.forward_and_backward(module)
        assert {*forward.names, *backward.names} == {"_to_copy"}
        addresses = {parameter.data_ptr() for parameter in module.parameters()}
        assert all(tensor.data_ptr() in addresses for _, tensor in forward.found)
        # The gradient of the residual stream enters each of the two branches in autocast's dtype.
        assert sum(tensor.shape == tokens().shape for _, tensor in backward.found) == 2

    def test_plain_torch_does_copy(self):
        forward, backward = self.forward_and_backward(set_backend(layer(), "composed"))
        assert "cat" in forward.names
        assert "cat" in backward.names


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "is_training", [pytest.param(False, marks=pytest.mark.slow), True], ids=["evaluation", "training"]
    )
    def test_one_graph_gives_the_same_results(self, is_training):
        module = transformer().train(is_training)
        results = [
            all_results(module, features(), "triton", torch.float32, transform)
            for transform in (
                lambda module: module,
                lambda module: torch.compile(module, fullgraph=True, backend="aot_eager"),
            )
        ]
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)

    def test_dropout_draws_new_numbers_in_every_call(self):
        module = transformer(dropout=0.3).train()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert not torch.equal(compiled(features())[0], compiled(features())[0])


@pytest.mark.gpu
class TestOnAGpu:
    """The published widths at 224 pixels under bfloat16 autocast, as in training."""

    def features(self):
        return features(PUBLISHED_CHANNELS, PUBLISHED_PATCHES, PUBLISHED_GRID, batch=2)

    @staticmethod
    def step(module, inputs):
        """Run forward and backward; return outputs and gradients."""
        # Autocast must not keep casts of weights from one replay to the next.
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            outputs = module(inputs)
            loss = sum(output.float().square().mean() for output in outputs)
        return [output.detach() for output in outputs], torch.autograd.grad(loss, list(module.parameters()))

    def captured(self, module, inputs):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(module, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.step(module, inputs)
        return graph, results

    def test_bfloat16_autocast_within_budget(self):
        module, inputs = published_transformer().eval(), self.features()
        exact = all_results(module, inputs, "reference", torch.float64)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            ours, published = (all_results(module, inputs, name, torch.float32) for name in ("triton", "reference"))
        assert_within_budget(ours, published, exact)

    def test_a_cuda_graph_replays_forward_and_backward(self):
        """With other features in the same memory, a replay computes what a call of the module computes."""
        module, inputs = published_transformer().eval(), self.features()
        graph, (outputs, gradients) = self.captured(module, inputs)
        for place, feature in enumerate(inputs):
            feature.copy_(normal(*feature.shape, seed=100 + place))
        graph.replay()
        expected_outputs, expected_gradients = self.step(module, inputs)
        for actual, expected in zip((*outputs, *gradients), (*expected_outputs, *expected_gradients), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())

    def test_every_replay_draws_new_masks(self):
        module = published_transformer(dropout=0.1).train()
        graph, (outputs, gradients) = self.captured(module, self.features())
        graph.replay()
        first = outputs[0].clone()
        graph.replay()
        assert not torch.equal(outputs[0], first)
        assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))

    def test_reduce_overhead(self):
        module, inputs = published_transformer().eval(), self.features()
        expected_outputs, expected_gradients = self.step(module, inputs)
        compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                outputs = compiled(inputs)
                loss = sum(output.float().square().mean() for output in outputs)
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            results = [tensor.detach().clone() for tensor in (*outputs, *gradients)]
        for actual, expected in zip(results, (*expected_outputs, *expected_gradients), strict=True):
            torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())
