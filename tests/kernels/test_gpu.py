"""Channel attention and skip path on a GPU: errors, the same bits in every run, CUDA graphs really used, any device.

Sizes are the published ones at 224 pixels, and for errors also at 240, where the number of tokens is odd.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.kernels.support import assert_as_exact_as
from uctrans.kernels import channel_attention, projected_channel_attention, skip_gate
from uctrans.kernels.channel_attention import correlating_is_cheaper
from uctrans.kernels.testing import AttentionShape, attention_inputs
from uctrans.layers import TransformerLayer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPE = AttentionShape(4, 4, 196, (64, 128, 256, 512), 960)
SETTINGS = {"dropout_p": 0.1, "backend": "triton"}
SEED = 20
RUNS = 10
SKIP_SCALES = ((64, 224), (128, 112), (256, 56), (512, 28))  # channels, of skip and decoder alike, and side
GRID = 14  # tokens along a side


def attend(query, key, value, seed=SEED, **settings):
    return channel_attention(query, key, value, SHAPE.segments, seed=seed, **(SETTINGS | settings))


def project_and_attend(tokens, context, key_value_weight, *query_weights, seed=SEED, **settings):
    return projected_channel_attention(
        tokens, context, query_weights, key_value_weight, seed=seed, **(SETTINGS | settings)
    )


def packed_inputs(dtype, device, shape=SHAPE):
    """Query, key and value."""
    return [tensor.detach().to(device).requires_grad_() for tensor in attention_inputs(shape, dtype)]


def projected_inputs(dtype, device, shape=SHAPE):
    """Tokens, context, key_value_weight and the query weights, sized so that products keep the size of the tokens."""
    assert not correlating_is_cheaper(shape.tokens, shape.heads, shape.segments, shape.key_channels)
    generator = torch.Generator().manual_seed(0)
    width, heads = shape.key_channels, shape.heads
    sizes = [(shape.batch, shape.tokens, sum(shape.segments)), (shape.batch, shape.tokens, width)]
    weight_sizes = [(2, heads, width, width), *((heads, segment, segment) for segment in shape.segments)]
    tensors = [torch.randn(*size, generator=generator) for size in sizes]
    tensors += [torch.randn(*size, generator=generator) / size[-1] ** 0.5 for size in weight_sizes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def gate(*inputs, seed=None, backend="triton"):
    """The skip path; it draws nothing, so that the seed is of no use."""
    return skip_gate(*inputs, backend=backend)


def skip_inputs(dtype, device, scale=0, memory_format=torch.channels_last):
    """Encoder feature, tokens, decoder feature and the weights of a published scale."""
    generator = torch.Generator().manual_seed(0)
    channels, side = SKIP_SCALES[scale]
    maps = [torch.randn(SHAPE.batch, channels, size, size, generator=generator) for size in (side, GRID, side // 2)]
    weight_sizes = [(channels, channels), (channels,)] * 2
    weights = [torch.randn(*size, generator=generator) / size[-1] ** 0.5 for size in weight_sizes]
    tensors = [*(feature.contiguous(memory_format=memory_format) for feature in maps), *weights]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


ATTENTION = {"": (attend, packed_inputs), "projected": (project_and_attend, projected_inputs)}
SKIP_PATH = {"skip": (gate, skip_inputs)}
OTHER_SKIP_PATHS = {
    "skip, contiguous": (gate, partial(skip_inputs, memory_format=torch.contiguous_format)),
    **{f"skip, scale {scale}": (gate, partial(skip_inputs, scale=scale)) for scale in (1, 2, 3)},
}


def each(functions):
    """A test of every function, with what makes its inputs of a dtype and a device."""
    return pytest.mark.parametrize(("function", "inputs_of"), functions.values(), ids=functions.keys())


def output_and_gradients(function, inputs, **settings):
    """The output, and the gradients by all inputs of its product with fixed random numbers."""
    output = function(*inputs, **settings)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@each(ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [196, 225])
@pytest.mark.parametrize("batch", [4, 32])
def test_published_widths(function, inputs_of, dtype, tokens, batch):
    """Output and gradients, in few programs and in many."""
    inputs = inputs_of(dtype, DEVICE, replace(SHAPE, batch=batch, tokens=tokens))
    assert_as_exact_as(partial(function, backend="reference"), function, inputs)


@each(ATTENTION | SKIP_PATH | OTHER_SKIP_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_same_bits_in_every_run(function, inputs_of, dtype):
    inputs = inputs_of(dtype, DEVICE)
    first = output_and_gradients(function, inputs)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in first)
    kept = []
    for run in range(1, RUNS):
        # Memory of another size is taken and kept, so that no run works at the addresses of the one before.
        kept.append(torch.full((run * 4099,), float("nan"), device=DEVICE))
        for place, (again, before) in enumerate(zip(output_and_gradients(function, inputs), first, strict=True)):
            assert torch.equal(again, before), f"run {run}, result {place}"


class TestReduceOverhead:
    """The compiled operator goes into CUDA graphs, in forward and in backward."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.fixture
    def recorded(self, monkeypatch):
        """One entry for each CUDA graph that is recorded."""
        from torch._inductor.cudagraph_trees import CUDAGraphNode

        nodes, record = [], CUDAGraphNode.__init__

        def counted(node, *arguments, **keywords):
            nodes.append(node)
            record(node, *arguments, **keywords)

        monkeypatch.setattr(CUDAGraphNode, "__init__", counted)
        return nodes

    @staticmethod
    def skips():
        return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]

    @each(ATTENTION | SKIP_PATH)
    def test_forward(self, function, inputs_of, recorded):
        inputs = [tensor.detach() for tensor in inputs_of(torch.bfloat16, DEVICE)]
        seed = torch.tensor([SEED], device=DEVICE)
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # one to warm up, one to record, two to replay
            torch.compiler.cudagraph_mark_step_begin()
            result = compiled(*inputs, seed=seed).clone()
        assert self.skips() == 0
        assert len(recorded) == 1
        torch.testing.assert_close(result, function(*inputs, seed=seed), rtol=2e-2, atol=2e-2)

    @each(ATTENTION | SKIP_PATH)
    def test_forward_and_backward(self, function, inputs_of, recorded):
        inputs = inputs_of(torch.bfloat16, DEVICE)
        seed = torch.tensor([SEED], device=DEVICE)
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            results = [tensor.clone() for tensor in output_and_gradients(compiled, inputs, seed=seed)]
        assert self.skips() == 0
        assert len(recorded) == 2
        for result, expected in zip(results, output_and_gradients(function, inputs, seed=seed), strict=True):
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())

    @each(ATTENTION)
    def test_masks_of_torch_s_generator(self, function, inputs_of, recorded):
        """Without a seed one is drawn inside the graph: every replay has another mask."""
        inputs = inputs_of(torch.bfloat16, DEVICE)
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        results = []
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            results.append([tensor.clone() for tensor in output_and_gradients(compiled, inputs, seed=None)])
        assert self.skips() == 0
        assert len(recorded) == 2
        for again, before in zip(results[3], results[2], strict=True):
            assert again.isfinite().all()
            assert not torch.equal(again, before)


class TestOtherDevice:
    """Tensors may be on another device than the current one: launches go where the tensors are."""

    @pytest.fixture(autouse=True)
    def two_devices(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        with torch.cuda.device(0):
            yield

    @each(ATTENTION | SKIP_PATH)
    def test_function(self, function, inputs_of):
        inputs = inputs_of(torch.bfloat16, "cuda:1")
        results = output_and_gradients(function, inputs)
        assert torch.cuda.current_device() == 0
        assert {tensor.device for tensor in results} == {torch.device("cuda:1")}
        with torch.cuda.device(1):
            expected = output_and_gradients(function, inputs)
        assert all(torch.equal(result, same) for result, same in zip(results, expected, strict=True))
        reference = output_and_gradients(function, inputs, backend="reference")
        for result, other in zip(results, reference, strict=True):
            torch.testing.assert_close(result, other, rtol=5e-2, atol=5e-2 * other.abs().max().item())

    def test_layer(self):
        torch.manual_seed(0)
        layer = TransformerLayer(SHAPE.segments, SHAPE.heads, 4, 0.0, 0.0, "triton").to("cuda:1", torch.bfloat16)
        tokens = torch.randn(4, SHAPE.tokens, sum(SHAPE.segments)).to("cuda:1", torch.bfloat16).requires_grad_()
        inputs = [tokens, *layer.parameters()]

        def call(tokens, *parameters):
            return layer(tokens)

        results = output_and_gradients(call, inputs)
        with torch.cuda.device(1):
            expected = output_and_gradients(call, inputs)
        assert all(torch.equal(result, same) for result, same in zip(results, expected, strict=True))
