"""Channel attention: the composed forms against the reference in float64."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.support import assert_as_exact_as, drawn
from uctrans.kernels import channel_attention, projected_attention_maps, projected_channel_attention
from uctrans.kernels.channel_attention import composed, correlating_is_cheaper, reference
from uctrans.kernels.testing import ATTENTION_SHAPES, AttentionShape, attention_inputs

EPS = 1e-5
SMALL = AttentionShape(2, 2, 9, (4, 8), 12)
LARGE = AttentionShape(1, 2, 3, (1, 5, 394), 660)  # a head's map is no longer in a cache
SHAPES = (*ATTENTION_SHAPES, LARGE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = (composed.project_then_attend, composed.correlate_then_attend)


def projected_inputs(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    tokens = normal(shape.batch, shape.tokens, sum(shape.segments))
    context = normal(shape.batch, shape.tokens, shape.key_channels)
    query_weights = [normal(shape.heads, width, width) / math.sqrt(width) for width in shape.segments]
    square = (2, shape.heads, shape.key_channels, shape.key_channels)
    return tokens, context, query_weights, normal(*square) / math.sqrt(shape.key_channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_composed_stays_within_the_error_budget(shape, dtype):
    def run(implementation):
        return lambda *inputs: implementation.channel_attention(*inputs, shape.segments, 0.0, EPS, None)

    assert_as_exact_as(run(reference), run(composed), attention_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_orders_stay_within_the_error_budget(shape, order, dtype):
    # The gradient by the query weight of a one-channel scale vanishes (instance norm takes its size out again), so its
    # rounding noise says nothing by itself: the query weights of all scales are one tensor here.
    def run(function):
        def packed(tokens, context, key_value_weight, flat_query_weights):
            sizes = [shape.heads * width * width for width in shape.segments]
            query_weights = [
                piece.view(shape.heads, width, width)
                for piece, width in zip(flat_query_weights.split(sizes), shape.segments, strict=True)
            ]
            return function(tokens, context, query_weights, key_value_weight, 0.0, EPS, None)

        return packed

    is_chosen = correlating_is_cheaper(shape.tokens, shape.heads, shape.segments, shape.key_channels)
    if dtype != torch.float32 and order is composed.correlate_then_attend and not is_chosen:
        pytest.skip("with few tokens their rounded correlation loses bits, and there the other order is chosen")
    tokens, context, query_weights, key_value_weight = projected_inputs(shape, dtype)
    inputs = [tokens, context, key_value_weight, torch.cat([weight.flatten() for weight in query_weights])]
    assert_as_exact_as(run(reference.projected_channel_attention), run(order), inputs)


@pytest.mark.parametrize("shape", [SMALL, AttentionShape(1, 2, 3, (1, 50, 149), 200), LARGE], ids=str)
def test_a_seed_drops_the_same_entries_in_maps_of_any_size(shape):
    query, key, value = (tensor.detach() for tensor in attention_inputs(shape, torch.float64))
    found, expected = (
        channel_attention(query, key, value, shape.segments, dropout_p=0.4, seed=5, backend=backend)
        for backend in ("composed", "reference")
    )
    torch.testing.assert_close(found, expected)


class Calls(TorchDispatchMode):
    """Count the operations that are dispatched; views cost next to nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("segments", [(4, 4, 4, 4), (16, 32)], ids=str)
@pytest.mark.parametrize("tokens", [4, 16, 196])
def test_small_maps_take_no_more_calls_than_the_published_steps(tokens, segments):
    """Their time is that of the calls, forward and backward."""
    inputs = projected_inputs(AttentionShape(1, 4, tokens, segments, sum(segments)), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (*inputs[:2], *inputs[2], inputs[3])]
    counts = {}
    for backend in ("composed", "reference"):
        with Calls() as forward:
            output = projected_channel_attention(*inputs, backend=backend)
        with Calls() as backward:
            torch.autograd.grad(output.sum(), leaves)
        counts[backend] = (forward.count, backward.count)
    for composed_count, reference_count in zip(counts["composed"], counts["reference"], strict=True):
        assert composed_count <= reference_count


@drawn(
    25,
    lambda st: {
        "batch": st.integers(0, 3),
        "heads": st.integers(1, 4),
        "tokens": st.integers(1, 40),
        "segments": st.lists(st.integers(1, 20), min_size=1, max_size=5),
        "key_channels": st.integers(2, 40),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(batch, heads, tokens, segments, key_channels, seed):
    shape = AttentionShape(batch, heads, tokens, tuple(segments), key_channels)
    inputs = attention_inputs(shape, torch.float64, seed)
    expected = channel_attention(*inputs, segments, backend="reference")
    torch.testing.assert_close(channel_attention(*inputs, segments, backend="composed"), expected)
    projected = projected_inputs(shape, seed=seed)
    expected = projected_channel_attention(*projected, backend="reference")
    for order in ORDERS:
        torch.testing.assert_close(order(*projected, 0.0, EPS, None), expected)


def test_both_sides_of_the_cost_boundary_agree():
    segments, heads = (4, 8), 2
    flips = [
        tokens
        for tokens in range(2, 200)
        if correlating_is_cheaper(tokens, heads, segments, 12)
        != correlating_is_cheaper(tokens - 1, heads, segments, 12)
    ]
    assert len(flips) == 1
    for tokens in (flips[0] - 1, flips[0]):
        inputs = projected_inputs(AttentionShape(2, heads, tokens, segments, 12))
        expected = projected_channel_attention(*inputs, backend="reference")
        torch.testing.assert_close(projected_channel_attention(*inputs), expected)


@pytest.mark.parametrize("tokens", [5, 30, 31, 60, 120])
def test_cost_model_agrees_with_a_count_of_operations(tokens):
    shape = AttentionShape(1, 4, tokens, (8, 16, 24), 48)
    inputs = projected_inputs(shape)
    counts = []
    for order in ORDERS:
        with FlopCounterMode(display=False) as counter:
            order(*inputs, 0.0, EPS, None)
        counts.append(counter.get_total_flops())
    project_first, correlate_first = counts
    cheaper = correlating_is_cheaper(shape.tokens, shape.heads, shape.segments, shape.key_channels)
    assert cheaper == (correlate_first < project_first)


def test_cost_boundary_of_the_published_sizes():
    assert not correlating_is_cheaper(588, 4, (64, 128, 256, 512), 960)
    assert correlating_is_cheaper(589, 4, (64, 128, 256, 512), 960)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_gradcheck(order):
    tokens, context, query_weights, key_value_weight = projected_inputs(AttentionShape(2, 2, 5, (2, 3), 4))
    inputs = [tensor.requires_grad_() for tensor in (tokens, context, key_value_weight, *query_weights)]

    def function(tokens, context, key_value_weight, *query_weights):
        return order(tokens, context, query_weights, key_value_weight, 0.0, EPS, None)

    assert torch.autograd.gradcheck(function, inputs)


def test_attention_maps_are_those_that_mix():
    tokens, context, query_weights, key_value_weight = projected_inputs(AttentionShape(2, 3, 11, (4, 8), 12))
    maps = {
        backend: projected_attention_maps(tokens, context, query_weights, key_value_weight, backend=backend)
        for backend in ("reference", "composed")
    }
    for ours, published in zip(maps["composed"], maps["reference"], strict=True):
        torch.testing.assert_close(ours, published)
        torch.testing.assert_close(ours.sum(dim=-1), torch.ones_like(ours[..., 0]))


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_scores_cancels(backend, scale):
    """Instance norm makes the map independent of the size of query and key, until eps takes over."""
    query, key, value = (tensor.detach() for tensor in attention_inputs(SMALL, torch.float64))
    exact = channel_attention(query, key, value, SMALL.segments, eps=0.0, backend=backend)
    scaled = channel_attention(query * scale, key, value, SMALL.segments, eps=0.0, backend=backend)
    torch.testing.assert_close(scaled, exact)


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_constant_map_attends_evenly(backend, dtype, eps):
    query, key, value = (tensor.detach() for tensor in attention_inputs(SMALL, dtype))
    inputs = [torch.ones_like(query).requires_grad_(), torch.ones_like(key).requires_grad_(), value.requires_grad_()]
    output = channel_attention(*inputs, SMALL.segments, eps=eps, backend=backend)
    expected = value.mean(dim=(1, 3), keepdim=True).squeeze(1).expand_as(output)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(output.sum(), inputs))


def test_large_common_offset():
    """Scores with a mean of a thousand deviations: the budget holds where a naive sum of squares would cancel."""
    query, key, value = (tensor.detach() for tensor in attention_inputs(SMALL, torch.float64))
    offset = 40.0
    inputs = [(query + offset).float(), (key + offset).float(), value.float()]
    scores = inputs[0].double().transpose(-1, -2) @ inputs[1].double()
    assert (scores.mean().abs() / (scores - scores.mean(dim=(-1, -2), keepdim=True)).std()) > 20

    def run(implementation):
        return lambda *tensors: implementation.channel_attention(*tensors, SMALL.segments, 0.0, EPS, None)

    assert_as_exact_as(run(reference), run(composed), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_half_precision_are_taken_in_float32(dtype):
    """Scores of a mean far above their spread: statistics in the maps' own dtype would be off by more than they are."""
    scores = (torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0)) + 20).to(dtype)
    centred = scores.double() - scores.double().mean(dim=(1, 2), keepdim=True)
    expected = (centred / (centred.square().mean(dim=(1, 2), keepdim=True) + EPS).sqrt()).softmax(dim=-1)
    error = (composed._tempered_softmax(scores, [12], EPS).double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_strided_inputs_and_gradients_of_stride_zero():
    query, key, value = (tensor.detach() for tensor in attention_inputs(SMALL, torch.float64))
    packed = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
    plain = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert not packed[0].is_contiguous()
    gradients = [
        torch.autograd.grad(channel_attention(*inputs, SMALL.segments, backend=backend).sum(), inputs)
        for inputs, backend in ((packed, "composed"), (plain, "reference"))
    ]
    for ours, published in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, published)


class TestDropout:
    shape = AttentionShape(1, 1, 64, (32, 32), 64)

    def recovered_mask(self, dropout_p, seed):
        """With the identity as value, the output is the dropped map itself."""
        query, key, _ = (tensor.detach() for tensor in attention_inputs(self.shape, torch.float64))
        value = torch.eye(64, dtype=torch.float64)[None, None]
        torch.manual_seed(seed)
        dropped = channel_attention(query, key, value, self.shape.segments, dropout_p=dropout_p, backend="composed")
        return dropped, channel_attention(query, key, value, self.shape.segments, backend="composed")

    @pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
    def test_rate_and_rescaling(self, dropout_p):
        dropped, kept = self.recovered_mask(dropout_p, seed=0)
        mask = dropped != 0
        deviation = math.sqrt(dropout_p * (1 - dropout_p) / mask.numel())
        assert abs(1 - mask.double().mean().item() - dropout_p) < 4 * deviation
        torch.testing.assert_close(dropped[mask], kept[mask] / (1 - dropout_p), rtol=2e-4, atol=0)

    def test_entries_are_independent(self):
        masks = [(self.recovered_mask(0.5, seed)[0] != 0).double().flatten() - 0.5 for seed in range(3)]
        count = masks[0].numel()
        for first, second in itertools.combinations(masks, 2):  # one draw tells nothing about the next
            assert abs((first @ second).item()) / count < 4 * 0.25 / math.sqrt(count)
        for lag in (1, 2, 3, 4, 64):  # nor one entry about its neighbours, lanes of one draw among them
            assert abs((masks[0][lag:] @ masks[0][:-lag]).item()) / count < 4 * 0.25 / math.sqrt(count)

    def test_forward_and_backward_use_one_mask(self):
        query, key, value = attention_inputs(AttentionShape(1, 2, 5, (2, 3), 4), torch.float64)

        def seeded(*inputs):
            torch.manual_seed(3)
            return channel_attention(*inputs, (2, 3), dropout_p=0.4, backend="composed")

        assert torch.autograd.gradcheck(seeded, (query, key, value))

    @pytest.mark.parametrize("dropout_p", [1e-7, 1 - 1e-7])
    def test_probabilities_at_the_ends_stay_finite(self, dropout_p):
        dropped, _ = self.recovered_mask(dropout_p, seed=0)
        assert torch.isfinite(dropped).all()
        assert (dropped == 0).double().mean().sub(round(dropout_p)).abs() < 0.01

    @pytest.mark.parametrize("backend", ["reference", "composed"])
    def test_expectation(self, backend):
        inputs = [tensor.detach() for tensor in attention_inputs(SMALL, torch.float64)]
        torch.manual_seed(0)
        draws = [channel_attention(*inputs, SMALL.segments, dropout_p=0.3, backend=backend) for _ in range(1000)]
        expected = channel_attention(*inputs, SMALL.segments, backend=backend)
        error = torch.stack(draws).mean(dim=0) - expected
        assert error.abs().max() < 0.07
