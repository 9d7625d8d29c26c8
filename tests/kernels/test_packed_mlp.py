"""The packed MLP: every form against the reference in float64, and what the public function refuses."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.support import DEVICE, assert_as_exact_as, drawn, over_dtypes, results
from uctrans.kernels import packed_mlp
from uctrans.kernels.packed_mlp import reference
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")


@dataclass(frozen=True)
class MlpShape:
    """Sizes of one problem."""

    batch: int
    tokens: int
    widths: tuple[int, ...]
    hidden_widths: tuple[int, ...]


SHAPES = (
    MlpShape(1, 4, (8, 16, 32, 64), (16, 32, 64, 70)),
    MlpShape(1, 1, (3,), (5,)),  # a single token, a single scale
    MlpShape(2, 9, (5, 7), (9, 40)),  # odd everything
    MlpShape(1, 33, (17, 33), (68, 1)),  # a hidden layer of one channel
    MlpShape(0, 9, (4, 8), (16, 32)),  # an empty batch
)
SMALL = MlpShape(2, 3, (4, 8), (6, 5))


def mlp_inputs(shape, dtype=torch.float64, seed=0):
    """Tokens, residual, weights and biases in one list, standard normal; weights keep the size of what they map."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    pairs = list(zip(shape.widths, shape.hidden_widths, strict=True))
    tensors = [normal(shape.batch, shape.tokens, sum(shape.widths)) for _ in range(2)]
    tensors += [normal(hidden, width) / math.sqrt(width) for width, hidden in pairs]
    tensors += [normal(hidden) for hidden in shape.hidden_widths]
    tensors += [normal(width, hidden) / math.sqrt(hidden) for width, hidden in pairs]
    tensors += [normal(width) for width in shape.widths]
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def lists_of(shape, tensors):
    scales = len(shape.widths)
    return [tensors[start : start + scales] for start in range(0, 4 * scales, scales)]


def flat(function, shape, **options):
    """``function`` of its six arguments as one of tensors."""
    return lambda tokens, residual, *others: function(tokens, residual, *lists_of(shape, others), **options)


@over_dtypes(SHAPES)
def test_triton_stays_within_the_error_budget(shape, dtype):
    with poisoned_allocations():
        assert_as_exact_as(
            flat(reference.packed_mlp, shape), flat(packed_mlp, shape, backend="triton"), mlp_inputs(shape, dtype)
        )


@drawn(
    6,
    lambda st: {
        "batch": st.integers(0, 2),
        "tokens": st.integers(1, 8),
        "widths": st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(batch, tokens, widths, seed):
    shape = MlpShape(batch, tokens, *zip(*widths, strict=True))
    inputs = mlp_inputs(shape, torch.float32, seed)
    expected = results(flat(reference.packed_mlp, shape), inputs)
    torch.testing.assert_close(results(flat(packed_mlp, shape, backend="triton"), inputs), expected)


@pytest.mark.parametrize("backend", ["reference", "composed", "triton"])
def test_written_out_by_hand(backend):
    tokens, residual = torch.tensor([[[1.0, 2.0]]], device=DEVICE), torch.tensor([[[10.0, 20.0]]], device=DEVICE)
    expand = [torch.tensor([[3.0]], device=DEVICE), torch.tensor([[-1.0], [1.0]], device=DEVICE)]
    expand_biases = [torch.tensor([-1.0], device=DEVICE), torch.tensor([0.0, -2.0], device=DEVICE)]
    contract = [torch.tensor([[5.0]], device=DEVICE), torch.tensor([[7.0, 9.0]], device=DEVICE)]
    contract_biases = [torch.tensor([0.5], device=DEVICE), torch.tensor([0.25], device=DEVICE)]
    output = packed_mlp(tokens, residual, expand, expand_biases, contract, contract_biases, backend=backend)

    def gelu(value):
        return value * (1 + math.erf(value / math.sqrt(2))) / 2

    expected = [10 + 5 * gelu(2.0) + 0.5, 20 + 7 * gelu(-2.0) + 9 * gelu(0.0) + 0.25]
    torch.testing.assert_close(output.flatten().tolist(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gelu_far_from_zero(backend):
    """Behind a large hidden value GELU is the identity, behind a very negative one nothing, and slopes are 1 and 0."""
    ones = torch.ones(1, 1, device=DEVICE)
    tokens = torch.tensor([[[-1e4], [-30.0], [30.0], [1e4]]], device=DEVICE, requires_grad=True)
    layers = [[ones], [torch.zeros(1, device=DEVICE)], [ones], [torch.zeros(1, device=DEVICE)]]
    output = packed_mlp(tokens, torch.zeros_like(tokens), *layers, backend=backend)
    assert output.flatten().tolist() == [0, 0, 30, 1e4]
    assert torch.autograd.grad(output.sum(), tokens)[0].flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tile_of_the_table(dtype, monkeypatch):
    """Each tile in turn, on a problem larger than any."""
    from uctrans.kernels.packed_linear import triton as kernels

    shape = MlpShape(1, 65, (33,), (129,))
    inputs = mlp_inputs(shape, dtype)
    for tile in kernels._tiles(dtype):
        monkeypatch.setattr(kernels, "_tiles", lambda dtype, tile=tile: (tile,))
        assert_as_exact_as(flat(reference.packed_mlp, shape), flat(packed_mlp, shape, backend="triton"), inputs)


def test_the_hidden_layer_is_kept_for_backward_only():
    inputs = mlp_inputs(SMALL, torch.float32)
    layers = lists_of(SMALL, inputs[2:])
    output, hidden, activation = torch.ops.uctrans.packed_mlp(*inputs[:2], *layers, False)
    assert hidden.shape == (0,) and activation.shape == (2, 3, 11)
    kept = torch.ops.uctrans.packed_mlp(*inputs[:2], *layers, True)
    assert kept[1].shape == (2, 3, 11) and torch.equal(kept[0], output) and torch.equal(kept[2], activation)
    torch.testing.assert_close(torch.nn.functional.gelu(kept[1]), activation)
    arguments = (*inputs[:2], *layers, False)
    torch.library.opcheck(torch.ops.uctrans.packed_mlp, arguments, test_utils=["test_schema", "test_faketensor"])


def test_backward_makes_no_zeros_for_the_hidden_layers():
    class Zeros(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += func._opname in ("zeros", "zeros_like", "new_zeros")
            return func(*args, **(kwargs or {}))

    leaves = [tensor.requires_grad_() for tensor in mlp_inputs(SMALL, torch.float32)]
    output = flat(packed_mlp, SMALL, backend="triton")(*leaves)
    with Zeros() as zeros:
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert zeros.made == 0


def test_an_output_without_a_gradient():
    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    leaves = [tensor.requires_grad_() for tensor in mlp_inputs(SMALL, torch.float32)]
    output = WithoutGradient.apply(flat(packed_mlp, SMALL, backend="triton")(*leaves))
    gradients = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    assert gradients == (None,) * len(leaves)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_leaves_the_residual_as_it_is(residual_dtype):
    inputs = mlp_inputs(SMALL, torch.float32)
    inputs[1] = inputs[1].to(residual_dtype)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    outputs = {}
    for backend in ("reference", "triton"):
        with torch.autocast(DEVICE, torch.float16):
            outputs[backend] = flat(packed_mlp, SMALL, backend=backend)(*leaves)
    assert {output.dtype for output in outputs.values()} == {residual_dtype}
    torch.testing.assert_close(outputs["triton"], outputs["reference"], atol=4e-3, rtol=4e-3)
    expected, gradients = (torch.autograd.grad(output.float().square().sum(), leaves) for output in outputs.values())
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]
    torch.testing.assert_close(gradients, expected, atol=0.05, rtol=0.02)


def test_a_residual_in_float32_beside_half_precision():
    inputs = mlp_inputs(SMALL, torch.float16)
    inputs[1] = inputs[1].float() + 1e-4
    for backend in ("reference", "composed", "triton"):
        output = flat(packed_mlp, SMALL, backend=backend)(*inputs)
        assert output.dtype == torch.float32
        exact = flat(reference.packed_mlp, SMALL)(*(tensor.double() for tensor in inputs))
        assert (output - exact).abs().max() < 5e-3


class TestBadInput:
    def test_shapes(self):
        tokens, residual, *others = mlp_inputs(SMALL)
        expand, expand_biases, contract, contract_biases = lists_of(SMALL, others)
        layers = (expand, expand_biases, contract, contract_biases)
        with pytest.raises(ValueError, match=r"tokens must be \(B, N, 12\).*got \(2, 3, 11\)"):
            packed_mlp(tokens[..., 1:], residual, *layers)
        with pytest.raises(ValueError, match=r"residual must be \(B, N, 12\).*got \(2, 2, 12\)"):
            packed_mlp(tokens, residual[:, 1:], *layers)
        with pytest.raises(ValueError, match=r"expand_weights\[1\] must be \(R, C\), not empty; got \(5,\)"):
            packed_mlp(tokens, residual, [expand[0], expand[1][:, 0]], *layers[1:])
        with pytest.raises(ValueError, match=r"contract_weights\[0\] must be \(4, 6\) beside .*; got \(4, 5\)"):
            packed_mlp(tokens, residual, expand, expand_biases, [contract[0][:, 1:], contract[1]], contract_biases)
        with pytest.raises(ValueError, match=r"contract_biases must hold one tensor a scale; got 1 for 2"):
            packed_mlp(tokens, residual, expand, expand_biases, contract, contract_biases[:1])
        with pytest.raises(ValueError, match="got none"):
            packed_mlp(tokens, residual, [], [], [], [])

    def test_types_and_devices(self):
        tokens, residual, *others = mlp_inputs(SMALL, torch.float32)
        layers = lists_of(SMALL, others)
        with pytest.raises(TypeError, match="expand_weights must be a list of tensors, one a scale; got a tensor"):
            packed_mlp(tokens, residual, layers[0][0], *layers[1:])
        with pytest.raises(TypeError, match="residual must be a tensor; got NoneType"):
            packed_mlp(tokens, None, *layers)
        with pytest.raises(TypeError, match=r"share one dtype; got tokens torch\.float32, residual torch\.float16"):
            packed_mlp(tokens, residual.half(), *layers)
        with pytest.raises(TypeError, match="share one dtype"):
            packed_mlp(tokens.half(), residual, *layers)
        with pytest.raises(ValueError, match="on one device"):
            half = [[tensor.half() for tensor in tensors] for tensors in layers]
            packed_mlp(tokens.half(), residual.to("meta"), *half)
        with pytest.raises(ValueError, match="unknown backend"):
            packed_mlp(tokens, residual, *layers, backend="fastest")
