"""Properties of every public operator, tested on each in the same way.

Numbers, shapes, launch configurations and limits of an operator are tested in the files named after it.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.support import (
    DEVICE,
    FORMATS,
    OPERATORS,
    OTHER_FORMS,
    assert_same_bits,
    map_inputs,
    random_like,
)
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
every_form = pytest.mark.parametrize("operator", OPERATORS + OTHER_FORMS, ids=lambda operator: operator.name)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run(operator, dtype):
    """Whatever was in the memory that is allocated."""
    inputs = operator.inputs(dtype)
    expected = operator.results(inputs)
    with poisoned_allocations():
        found = operator.results(inputs)
    assert_same_bits(found, expected)


class TestViews:
    """Tensors that are not contiguous, and those with strides of 0, give the results of tensors that are."""

    VIEWS = (
        lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),  # the first axis inside all others
        lambda tensor: tensor.transpose(-2, -min(tensor.ndim, 3)).contiguous().transpose(-2, -min(tensor.ndim, 3)),
        lambda tensor: torch.stack([tensor, -tensor], dim=-1)[..., 0],  # every second number
        lambda tensor: torch.nn.functional.pad(tensor, (3, 2))[..., 3:-2],  # part of longer rows
    )

    @every_operator
    def test_not_contiguous(self, operator):
        """Inputs and gradients."""
        inputs = operator.inputs(torch.float32)
        learning, others = inputs[: operator.learning], inputs[operator.learning :]
        expected = operator.results(inputs)
        for view in self.VIEWS:

            def rearranged(tensor, view=view):
                return view(tensor) if tensor.ndim > 1 else tensor.repeat_interleave(2)[::2].reshape(tensor.shape)

            found = operator.results([*map(rearranged, learning), *others], view=rearranged)
            torch.testing.assert_close(found, expected)

    @every_operator
    def test_strides_of_0(self, operator):
        """One sample for the whole batch, and gradients of a sum."""

        def one_number(gradient):
            return gradient.flatten()[0].expand_as(gradient)

        inputs = operator.inputs(torch.float32)
        inputs[0] = inputs[0][:1].expand_as(inputs[0])
        found = operator.results(inputs, view=one_number)
        inputs[0] = inputs[0].contiguous()
        expected = operator.results(inputs, view=lambda gradient: one_number(gradient).contiguous())
        torch.testing.assert_close(found, expected)


def gradients_by(operator, inputs, places):
    """Return the gradients by the inputs at ``places``; no others learn."""
    inputs = [tensor.clone().requires_grad_(place in places) for place, tensor in enumerate(inputs)]
    used = [output for output in operator.outputs(inputs) if output.requires_grad]
    gradients = [random_like(output).to(output.dtype) for output in used]
    return torch.autograd.grad(used, [inputs[place] for place in places], gradients)


@every_operator
def test_only_the_gradients_that_are_asked_for(operator):
    """They have the very bits that they have when all inputs learn."""
    inputs = operator.inputs(torch.float32)
    expected = gradients_by(operator, inputs, range(operator.learning))
    for places in ([0], range(1, operator.learning, 2), range(2, operator.learning, 2)):
        if places:
            assert_same_bits(gradients_by(operator, inputs, places), [expected[place] for place in places])


class LargestZeros(TorchDispatchMode):
    """Keep the number of elements of the largest tensor of zeros that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if "zero" in function.name():
            self.elements = max(self.elements, result.numel())
        return result


@every_form
def test_gradients_of_one_output(operator):
    """Gradients of the other outputs, also of those that only backward reads, are not made up as zeros."""

    def gradients_of_each(backend):
        leaves = [tensor.clone().requires_grad_() for tensor in operator.inputs(torch.float32)[: operator.learning]]
        outputs = operator.outputs([*leaves, *operator.inputs(torch.float32)[operator.learning :]], backend)
        for output in outputs:
            if output.requires_grad:
                gradient = random_like(output).to(output.dtype)
                yield torch.autograd.grad(output, leaves, gradient, retain_graph=True, allow_unused=True)

    with LargestZeros() as zeros:
        found = list(gradients_of_each("triton"))
    assert zeros.elements <= 1
    torch.testing.assert_close(found, list(gradients_of_each("composed")), rtol=1e-4, atol=1e-4)


@every_operator
def test_activation_checkpointing(operator):
    """It refuses a backward that reads twice what forward has kept."""

    def recomputed(*tensors, **options):
        leaves, others = tensors[: operator.learning], tensors[operator.learning :]  # it keeps what it is given
        return checkpoint(lambda *leaves: operator.call(*leaves, *others, **options), *leaves, use_reentrant=False)

    inputs = operator.inputs(torch.float32)
    count = len(inputs) - operator.learning  # running statistics are updated by both forward passes
    found, expected = operator.results(inputs, call=recomputed), operator.results(inputs)
    assert_same_bits(found[: len(found) - count], expected[: len(expected) - count])


@every_form
def test_triton_has_no_second_derivative(operator):
    inputs = operator.inputs(torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs[: operator.learning]]
    loss = sum(output.sum() for output in operator.outputs(inputs) if output.requires_grad)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    assert gradients[0].requires_grad
    name = operator.name.replace(",", "").split()[0].removeprefix("projected_")
    words = f"operator of (packed_linear|batch_norm_relu|{name}) has no second derivative; use backend='composed'"
    for gradient in gradients:
        if gradient.requires_grad:  # of a residual it is the output's, whatever the inputs
            with pytest.raises(NotImplementedError, match=words):
                torch.autograd.grad(gradient.sum(), leaves, allow_unused=True, retain_graph=True)


@every_form
def test_derivatives_of_composed(operator):
    """First and second."""
    inputs = operator.inputs(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs[: operator.learning]]

    def differentiable_outputs(*tensors):
        others = [tensor.clone() for tensor in inputs[operator.learning :]]
        outputs = operator.outputs([*tensors, *others], "composed")
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(differentiable_outputs, leaves)
    assert torch.autograd.gradgradcheck(differentiable_outputs, leaves, fast_mode=True)


@every_operator
def test_float64_is_not_for_triton(operator, monkeypatch):
    """By name it is refused; ``auto`` takes the composed form, and autocast leaves float64 alone."""
    inputs = operator.inputs(torch.float64)
    with pytest.raises(NotImplementedError, match=r"computes in float32; use backend='composed'"):
        operator.call(*inputs, backend="triton")
    monkeypatch.setenv("UCTRANS_BACKEND", "triton")
    expected = operator.results(inputs, "composed")
    assert_same_bits(operator.results(inputs, "auto"), expected)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same_bits(operator.results(inputs, "auto"), expected)


@every_operator
def test_forward_mode_gradients_are_not_for_triton(operator, monkeypatch):
    """By name it is refused, as its tangents would be lost; ``auto`` takes the composed form."""
    inputs = operator.inputs(torch.float32)
    learning, others = inputs[: operator.learning], inputs[operator.learning :]
    directions = [random_like(tensor, seed=place).to(tensor) for place, tensor in enumerate(learning)]
    monkeypatch.setenv("UCTRANS_BACKEND", "triton")
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(learning, directions, strict=True)]
        with pytest.raises(NotImplementedError, match=r"no forward-mode gradient.*; use backend='composed'"):
            operator.call(*duals, *(tensor.clone() for tensor in others), backend="triton")
        outputs = operator.outputs([*duals, *(tensor.clone() for tensor in others)], "auto")
        tangents = [forward_ad.unpack_dual(output).tangent for output in outputs]
    leaves = [tensor.detach().requires_grad_() for tensor in learning]
    outputs = operator.outputs([*leaves, *(tensor.clone() for tensor in others)], "composed")
    assert [tangent is not None for tangent in tangents] == [output.requires_grad for output in outputs]
    differentiable = [output for output in outputs if output.requires_grad]
    weights = [random_like(output, seed=9).to(output) for output in differentiable]
    gradients = torch.autograd.grad(differentiable, leaves, weights)
    tangents = [tangent for tangent in tangents if tangent is not None]
    forward = sum((tangent * weight).sum() for tangent, weight in zip(tangents, weights, strict=True))
    backward = sum((gradient * step).sum() for gradient, step in zip(gradients, directions, strict=True))
    torch.testing.assert_close(forward, backward, rtol=1e-3, atol=1e-3)


class TestGradientsThatForwardCannotForesee:
    """When they reach backward, the operator has been chosen."""

    def leaves_and_output(self, operator, backend):
        inputs = operator.inputs(torch.float32)
        leaves = [tensor.requires_grad_() for tensor in inputs[: operator.learning]]
        return leaves, next(output for output in operator.outputs(inputs, backend) if output.requires_grad)

    @every_form
    def test_tangents_are_refused(self, operator):
        leaves, output = self.leaves_and_output(operator, "triton")
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(random_like(output).to(output), torch.ones_like(output))
            with pytest.raises(NotImplementedError, match=r"no forward-mode gradient; use backend='composed'"):
                torch.autograd.grad(output, leaves, dual, allow_unused=True)

    @every_operator
    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    def test_batches_are_right_or_refused(self, operator):
        def gradients(backend):
            leaves, output = self.leaves_and_output(operator, backend)
            batch = torch.stack([random_like(output).to(output), torch.ones_like(output)])
            return torch.autograd.grad(output, leaves, batch, is_grads_batched=True, allow_unused=True)

        if operator.name in ("projected_channel_attention", "packed_linear", "packed_mlp", "skip_gate"):
            with pytest.raises(NotImplementedError, match=r"takes no batch of gradients.*; use backend='composed'"):
                gradients("triton")
        else:
            torch.testing.assert_close(gradients("triton"), gradients("composed"), rtol=1e-4, atol=1e-4)


@every_operator
def test_neither_gpu_nor_interpreter(operator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.cpu() for tensor in operator.inputs(torch.float32)]
    with pytest.raises(NotImplementedError, match=r"run on a CUDA device, or .*; got cpu; use backend='composed'"):
        operator.call(*inputs, backend="triton")
    assert_same_bits(operator.results(inputs, "auto"), operator.results(inputs, "composed"))


@every_form
def test_autocast(operator):
    """Dtypes and, nearly, numbers are those of the composed form; gradients have the dtypes of the inputs."""
    inputs = operator.inputs(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = (operator.results(inputs, backend) for backend in ("triton", "composed"))
    assert [result.dtype for result in found] == [result.dtype for result in expected]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)


@every_form
@pytest.mark.parametrize("backend", ["composed", "triton"])
def test_compiles_in_one_graph(operator, backend):
    torch.compiler.reset()  # a limit on compilations counts those of other tests
    inputs = operator.inputs(torch.float32)
    compiled = torch.compile(operator.call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(operator.results(inputs, backend, compiled), operator.results(inputs, backend))


class Calls(TorchDispatchMode):
    """Keep function, arguments and results of each call of an operator that is registered with torch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        if function.namespace == "uctrans":
            self.found.append((function, arguments, results))
        return results


def calls_of(operator, inputs):
    """Return the calls in forward and those in backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[: operator.learning]]
    with Calls() as forward:
        outputs = operator.outputs([*leaves, *inputs[operator.learning :]])
    used = [output for output in outputs if output.requires_grad]
    with Calls() as backward:
        torch.autograd.grad(used, leaves, [random_like(output).to(output.dtype) for output in used])
    assert forward.found and backward.found
    return forward.found, backward.found


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [(operator, torch.float32) for operator in OPERATORS + OTHER_FORMS]
    # In half precision attention runs other kernels.
    + [(operator, torch.bfloat16) for operator in OPERATORS if "attention" in operator.name],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_opcheck(operator, dtype):
    """Torch's own checks: schema, shapes without data, and of forward also gradients and compilation for any size."""

    def copied_leaf(tensor):
        return tensor.detach().requires_grad_(tensor.requires_grad)

    forward, backward = calls_of(operator, operator.inputs(dtype))
    for function, arguments, _ in forward:
        torch.library.opcheck(function, pytree.tree_map_only(torch.Tensor, copied_leaf, arguments))
    for function, arguments, _ in backward:
        arguments = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
        torch.library.opcheck(function, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 4), (3, 4, 1), (1, 3, 4), (3, 1, 1), (1, 1, 1), (3, 2, 4), (1, 2, 2)], ids=str
)
@pytest.mark.parametrize("name", ["skip_gate", "batch_norm_relu", "batch_norm_relu_pool", "segmentation_sums"])
def test_strides_of_maps_are_known_without_data(name, sizes, memory_format):
    """Also of maps with an axis of one, forward and backward."""
    if name == "batch_norm_relu_pool" and 1 in sizes[1:]:
        sizes = (sizes[0], sizes[1] + 1, sizes[2] + 1)  # at least one window
    (operator,) = (operator for operator in OPERATORS if operator.name == name)
    forward, backward = calls_of(operator, map_inputs(name, sizes, memory_format))
    for function, arguments, results in forward + backward:
        with FakeTensorMode() as mode:
            fakes = function(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for result, fake in zip(pytree.tree_leaves(results), pytree.tree_leaves(fakes), strict=True):
            assert (result.shape, result.stride(), result.dtype) == (fake.shape, fake.stride(), fake.dtype)
