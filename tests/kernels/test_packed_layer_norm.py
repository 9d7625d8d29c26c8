"""The packed layer norms: every form against the reference in float64, and what the public functions refuse."""

import pytest
import torch

from tests.kernels.support import DEVICE, TRITON_DTYPES, assert_as_exact_as, drawn, over_dtypes, results
from uctrans.kernels import cross_layer_norm, packed_layer_norm
from uctrans.kernels.packed_layer_norm import reference
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")

EPS = 1e-6
# batch, tokens, segments
SHAPES = (
    (1, 2, (8, 16, 32, 64)),
    (1, 1, (3,)),  # a single token, a single scale
    (2, 3, (5, 7, 2)),  # odd everything
    (1, 5, (1, 130, 33)),  # a scale of one channel beside one over 128, rows of two programs
    (1, 1, (100, 1030)),  # a row of several warps
    (0, 9, (4, 8)),  # an empty batch
)
NORMS = ("packed_layer_norm", "cross_layer_norm")
PUBLIC = {"packed_layer_norm": packed_layer_norm, "cross_layer_norm": cross_layer_norm}


def norm_inputs(name, batch, tokens, segments, dtype=torch.float64, seed=0):
    """Tokens, then weight and bias of each norm: standard normal, weights around 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    width = sum(segments)
    channels = []
    for _ in range(1 if name == "packed_layer_norm" else 2):
        channels += [1 + 0.5 * normal(width), normal(width)]
    return [tensor.to(DEVICE, dtype) for tensor in (normal(batch, tokens, width), *channels)]


def joined(function, segments, *after, **options):
    """``function`` of (tokens, weights and biases), with both of its outputs side by side."""

    def call(tokens, *channels):
        outputs = function(tokens, segments, *channels, *after, **options)
        return outputs if isinstance(outputs, torch.Tensor) else torch.cat(outputs, dim=-1)

    return call


def assert_agrees(name, inputs, segments):
    """Check the Triton operator against the reference."""
    oracle = joined(getattr(reference, name), segments, EPS)
    assert_as_exact_as(oracle, joined(PUBLIC[name], segments, eps=EPS, backend="triton"), inputs)


@over_dtypes(SHAPES)
@pytest.mark.parametrize("name", NORMS)
def test_triton_stays_within_the_error_budget(name, shape, dtype):
    inputs = norm_inputs(name, *shape, dtype)
    with poisoned_allocations():
        assert_agrees(name, inputs, shape[-1])


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["centred", "far from zero"])
@pytest.mark.parametrize("size", [1e-4, 1e4], ids=["tiny", "huge"])
@pytest.mark.parametrize("name", NORMS)
def test_scales_and_offsets(name, size, offset, dtype):
    """Deviations of any size around a mean up to a thousand times as large."""
    if dtype == torch.float16 and size * max(offset, 1) > 1e3:
        size = 1.0  # float16 ends at 65504
    segments = (8, 33)
    tokens, *channels = norm_inputs(name, 1, 2, segments)
    inputs = [((tokens + offset) * size).to(dtype), *(vector.to(dtype) for vector in channels)]
    assert_agrees(name, inputs, segments)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.3, -1e6])
def test_constant_rows(name, value):
    """No deviation at all: the norm is its bias, whatever the constant, and the gradient is finite."""
    segments = (5, 33)
    tokens, *channels = norm_inputs(name, 1, 2, segments, torch.float32)
    tokens = torch.full_like(tokens, value).requires_grad_()
    output = joined(PUBLIC[name], segments, backend="triton")(tokens, *channels)
    torch.testing.assert_close(output, torch.cat(channels[1::2]).expand_as(output), atol=2e-6, rtol=0)
    (gradient,) = torch.autograd.grad(output.square().sum(), tokens)
    assert gradient.isfinite().all()


@drawn(
    6,
    lambda st: {
        "name": st.sampled_from(NORMS),
        "batch": st.integers(0, 2),
        "tokens": st.integers(1, 4),
        "segments": st.lists(st.integers(2, 70), min_size=1, max_size=3),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(name, batch, tokens, segments, seed):
    inputs = norm_inputs(name, batch, tokens, segments, torch.float32, seed)
    expected = results(joined(PUBLIC[name], segments, eps=1e-3, backend="reference"), inputs)
    for backend in ("composed", "triton"):
        actual = results(joined(PUBLIC[name], segments, eps=1e-3, backend=backend), inputs)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_written_out_by_hand():
    tokens = torch.tensor([[[1.0, 3.0, 7.0, 5.0]]], device=DEVICE)
    one, zero = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    root = 5**0.5  # of the variance of 1, 3, 7, 5
    for backend in ("reference", "composed", "triton"):
        output, context = cross_layer_norm(tokens, (2, 2), one, zero, 2 * one, one, backend=backend)
        torch.testing.assert_close(output, torch.tensor([[[-1.0, 1.0, 1.0, -1.0]]], device=DEVICE))
        expected = torch.tensor([[[-3.0, -1.0, 3.0, 1.0]]], device=DEVICE) * 2 / root + 1
        torch.testing.assert_close(context, expected)
        torch.testing.assert_close(packed_layer_norm(tokens, (2, 2), one, zero, backend=backend), output)


@pytest.mark.parametrize("name", NORMS)
def test_rows_of_several_programs(name, monkeypatch):
    """More rows than the programs of backward take at once, the last of them fewer than the others'."""
    from uctrans.kernels.packed_layer_norm import triton as kernels

    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 2)  # 528 of them need thousands of rows
    assert_agrees(name, norm_inputs(name, 1, 9, (4, 9), torch.float32), (4, 9))


def test_one_output_alone_may_be_used():
    inputs = norm_inputs("cross_layer_norm", 2, 3, (4, 9), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    for place in (0, 1):
        actual, expected = (
            torch.autograd.grad(
                cross_layer_norm(leaves[0], (4, 9), *leaves[1:], backend=backend)[place].square().sum(), leaves[0]
            )
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_autocast(name):
    """The tokens are read as they are and the result is what a linear map after it would cast them to."""
    segments = (4, 9)
    leaves = [tensor.requires_grad_() for tensor in norm_inputs(name, 2, 3, segments, torch.float32)]
    leaves[0] = (leaves[0].detach() + 300).requires_grad_()  # in half precision they would lose their deviation
    functions = {
        backend: joined(PUBLIC[name], segments, backend=backend) for backend in ("reference", "composed", "triton")
    }
    torch.compiler.reset()
    with torch.autocast(DEVICE, torch.float16):
        outputs = {backend: function(*leaves) for backend, function in functions.items()}
        compiled = torch.compile(functions["triton"], fullgraph=True, backend="aot_eager")(*leaves)
    dtypes = {backend: output.dtype for backend, output in outputs.items()}
    assert dtypes == {"reference": torch.float32, "composed": torch.float16, "triton": torch.float16}
    assert torch.equal(compiled, outputs["triton"])
    exact = functions["reference"](*leaves)
    for output in outputs.values():
        torch.testing.assert_close(output.float(), exact, atol=2e-3, rtol=2e-3)
    gradients = torch.autograd.grad(outputs["triton"].float().square().sum(), leaves)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    expected = torch.autograd.grad(outputs["reference"].float().square().sum(), leaves)
    torch.testing.assert_close(gradients, expected, atol=0.05, rtol=0.01)


class TestBadInput:
    def test_shapes(self):
        tokens, weight, bias = norm_inputs("packed_layer_norm", 2, 3, (4, 9))
        with pytest.raises(ValueError, match=r"tokens must be \(B, N, sum C\); got \(3, 13\)"):
            packed_layer_norm(tokens[0], (4, 9), weight, bias)
        with pytest.raises(ValueError, match=r"segments \[4, 8\] add up to 12; tokens have 13 channels"):
            packed_layer_norm(tokens, (4, 8), weight, bias)
        with pytest.raises(ValueError, match="one positive width a scale"):
            packed_layer_norm(tokens, (0, 13), weight, bias)
        with pytest.raises(ValueError, match="one positive width a scale"):
            packed_layer_norm(tokens, (), weight, bias)
        with pytest.raises(ValueError, match=r"bias must be \(13,\); got \(12,\)"):
            packed_layer_norm(tokens, (4, 9), weight, bias[1:])
        with pytest.raises(ValueError, match=r"context_weight must be \(13,\); got \(1, 13\)"):
            cross_layer_norm(tokens, (4, 9), weight, bias, weight[None], bias)
        with pytest.raises(ValueError, match="eps must be above 0; got 0"):
            packed_layer_norm(tokens, (4, 9), weight, bias, eps=0.0)
        with pytest.raises(TypeError, match="eps must be a number; got str"):
            packed_layer_norm(tokens, (4, 9), weight, bias, eps="1e-6")
        with pytest.raises(TypeError, match="segments must be a sequence of ints"):
            packed_layer_norm(tokens, torch.tensor([4, 9]), weight, bias)

    def test_dtypes_and_devices(self):
        tokens, weight, bias = norm_inputs("packed_layer_norm", 2, 3, (4, 9))
        with pytest.raises(TypeError, match="share one dtype; got tokens"):
            packed_layer_norm(tokens.float(), (4, 9), weight, bias)
        with pytest.raises(TypeError, match="tokens must be floating point"):
            packed_layer_norm(tokens.long(), (4, 9), weight, bias)
        with pytest.raises(ValueError, match=r"on one device; got .*context_bias meta"):
            cross_layer_norm(tokens, (4, 9), weight, bias, weight, bias.to("meta"))
        with pytest.raises(ValueError, match="unknown backend"):
            packed_layer_norm(tokens, (4, 9), weight, bias, backend="fastest")
