"""The skip path in plain PyTorch: the composed form against the reference, and bad input of the public function.

``test_skip_gate_triton.py`` tests the Triton operator.
"""

from functools import partial

import pytest
import torch

from tests.kernels.support import (
    BACKENDS,
    DEVICE,
    FORMATS,
    assert_within_budget_of,
    drawn,
    gate_inputs,
    gate_results,
    of_those_there,
)
from uctrans.kernels import skip_gate
from uctrans.kernels.skip_gate import composed, reference

SHAPES = {
    "published": {"channels": 8, "decoder_channels": 8, "patch": (16, 16)},
    "patch of one": {"patch": (1, 1), "grid": (6, 4)},
    "oblong patches": {"patch": (2, 6), "grid": (3, 1)},
    "decoder at full size": {"factor": (1, 1)},
    "decoder four times smaller": {"factor": (4, 4), "patch": (4, 8)},
    "one channel, one token": {"channels": 1, "decoder_channels": 1, "grid": (1, 1), "patch": (2, 2)},
    "no tokens": {"has_tokens": False},
    "no decoder": {"decoder_channels": None},
    "empty batch": {"batch": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_composed_stays_within_the_error_budget(shape, memory_format, dtype):
    draws = [gate_inputs(**shape, dtype=dtype, seed=seed, memory_format=memory_format) for seed in range(6)]
    form = partial(gate_results, function=composed.skip_gate)
    assert_within_budget_of(gate_results, form, draws)
    if shape.get("decoder_channels", 1) is not None:
        assert_within_budget_of(gate_results, form, draws, concatenate=False)


@pytest.mark.parametrize("in_float32", [(0,), (0, 1, 2), ()], ids=["float32 feature", "float32 maps", "half maps"])
def test_composed_under_autocast(in_float32):
    """The output has the reference's dtype, the widest of the maps' and autocast's, and gradients their inputs'."""
    inputs = gate_inputs(dtype=torch.float32)
    for place in {0, 1, 2}.difference(in_float32):
        inputs[place] = inputs[place].to(torch.bfloat16)
    found = []
    for form in (composed, reference):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = form.skip_gate(*leaves)
        found.append((output, *torch.autograd.grad(output.float().square().mean(), leaves)))
    for ours, published in zip(*found, strict=True):
        torch.testing.assert_close(ours, published, rtol=3e-2, atol=3e-2)


@drawn(
    25,
    lambda st: {
        "batch": st.integers(0, 2),
        "channels": st.integers(1, 6),
        "decoder_channels": st.none() | st.integers(1, 6),
        "grid": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "patch": st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])),
        "has_tokens": st.booleans(),
        "concatenate": st.booleans(),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(
    batch, channels, decoder_channels, grid, patch, has_tokens, concatenate, seed
):
    inputs = gate_inputs(batch, channels, decoder_channels, grid, patch, seed=seed, has_tokens=has_tokens)
    output, expected = (form.skip_gate(*inputs, concatenate=concatenate) for form in (composed, reference))
    torch.testing.assert_close(output, expected)


def test_written_out_by_hand():
    """One channel, one pixel a token: the formula of the docstring in plain numbers."""
    pytest.importorskip("triton")
    encoder_feature = torch.tensor([[[[1.0, -2.0]]]], device=DEVICE)
    tokens = torch.tensor([[[[0.5, 0.5]]]], device=DEVICE)
    decoder_feature = torch.tensor([[[[4.0]]]], device=DEVICE)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    skip = encoder_feature + tokens  # 1.5 and -1.5: their mean is 0
    gate = torch.sigmoid(torch.tensor((0.0 + 4.0) / 2))
    expected = torch.tensor([[[[1.5 * gate, 0.0]], [[4.0, 4.0]]]], device=DEVICE)
    assert skip.mean() == 0
    inputs = [encoder_feature, tokens, decoder_feature, one, zero, one, zero]
    for backend in BACKENDS:
        torch.testing.assert_close(skip_gate(*inputs, backend=backend), expected)
        alone = skip_gate(*inputs, concatenate=False, backend=backend)
        torch.testing.assert_close(alone, expected[:, :1])


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("has_tokens", "decoder_channels", "concatenate"),
    [(True, 2, True), (True, 2, False), (False, 2, True), (True, None, True), (False, None, True)],
)
def test_gradcheck(has_tokens, decoder_channels, concatenate, memory_format):
    """First and second derivatives."""
    inputs = gate_inputs(1, 2, decoder_channels, grid=(1, 2), patch=(2, 2), has_tokens=has_tokens)
    function, tensors = of_those_there(partial(composed.skip_gate, concatenate=concatenate), inputs)
    tensors = [tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor for tensor in tensors]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize(("side", "is_small"), [(8, True), (128, False)])
def test_small_maps_take_the_published_steps(side, is_small):
    """Their time is that of the calls, of which composed makes more; the bits tell which steps ran."""
    inputs = gate_inputs(1, 5, 3, (2, 2), (side // 2, side // 2), dtype=torch.float32)
    found, published, fewer_maps = (
        skip_gate(*inputs, backend="composed"),
        *(form.skip_gate(*inputs) for form in (reference, composed)),
    )
    assert not torch.equal(published, fewer_maps)
    assert torch.equal(found, published if is_small else fewer_maps)


class TestWhatPlainPyTorchAllows:
    """``composed`` is no black box to PyTorch: what works on the paper's steps works on it."""

    @staticmethod
    def loss(form, inputs):
        def of_feature(feature):
            return form.skip_gate(feature, *inputs[1:]).square().sum()

        return of_feature

    def test_functional_transforms(self):
        inputs = gate_inputs()
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            ours, published = (transform(self.loss(form, inputs))(inputs[0]) for form in (composed, reference))
            torch.testing.assert_close(ours, published)

    def test_vmap(self):
        inputs = gate_inputs()
        many = torch.stack([inputs[0], 2 * inputs[0]])
        ours, published = (torch.vmap(self.loss(form, inputs))(many) for form in (composed, reference))
        torch.testing.assert_close(ours, published)

    def test_forward_mode(self):
        inputs = gate_inputs()
        tangents = []
        for form in (composed, reference):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
                tangents.append(torch.autograd.forward_ad.unpack_dual(self.loss(form, inputs)(dual)).tangent)
        torch.testing.assert_close(*tangents)

    def test_output_and_feature_may_be_overwritten(self):
        gradients = []
        for form in (composed, reference):
            inputs = [tensor.requires_grad_() for tensor in gate_inputs()]
            feature = inputs[0] * 1
            output = form.skip_gate(feature, *inputs[1:])
            output.mul_(2)
            feature.zero_()
            gradients.append(torch.autograd.grad(output.sum(), inputs[1:]))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
class TestBadInput:
    """Refused before anything runs, and so by every backend and on any device alike."""

    @pytest.mark.parametrize(
        ("place", "change", "words"),
        [
            (
                1,
                lambda tokens: tokens.repeat(1, 1, 1, 3)[..., :5],
                r"grid of tokens, \(2, 5\), does not tile .*\(8, 12\)",
            ),
            (1, lambda tokens: tokens.repeat(1, 1, 8, 1), r"grid of tokens, \(16, 3\), does not tile"),
            (1, lambda tokens: tokens[..., :0], r"grid of tokens, \(2, 0\), does not tile"),
            (2, lambda decoder_feature: decoder_feature[..., 1:], "grid of decoder_feature"),
            (2, lambda decoder_feature: decoder_feature[:, :, :0], "grid of decoder_feature"),
            (1, lambda tokens: tokens[:, 1:], "tokens have 4 channels, encoder_feature has 5"),
            (1, lambda tokens: tokens[1:], r"tokens must be \(B, channels, height, width\) with B = 2"),
            (2, lambda decoder_feature: decoder_feature[1:], r"decoder_feature must be .* with B = 2"),
            (2, lambda decoder_feature: decoder_feature[:, :0], r"decoder_feature must be .*; got \(2, 0, 4, 6\)"),
            (1, lambda tokens: tokens.flatten(2), r"tokens must be .*; got \(2, 5, 6\)"),
            (2, lambda decoder_feature: decoder_feature[0], r"decoder_feature must be .*; got \(3, 4, 6\)"),
            (0, lambda encoder_feature: encoder_feature[0], r"encoder_feature must be \(B, C, H, W\)"),
            (0, lambda encoder_feature: encoder_feature[:, :0], "only B may be 0; got"),
            (0, lambda encoder_feature: encoder_feature[:, :, :0], r"only B may be 0; got \(2, 5, 0, 12\)"),
            (0, lambda encoder_feature: encoder_feature[..., :0], r"only B may be 0; got \(2, 5, 8, 0\)"),
            (3, lambda weight: weight[1:], r"weight_skip must be \(5, 5\); got \(4, 5\)"),
            (3, lambda weight: weight[:, 1:], r"weight_skip must be \(5, 5\); got \(5, 4\)"),
            (4, lambda bias: bias[1:], r"bias_skip must be \(5,\); got \(4,\)"),
            (4, lambda bias: bias[None], r"bias_skip must be \(5,\); got \(1, 5\)"),
            (5, lambda weight: weight.t(), r"weight_decoder must be \(5, 3\); got \(3, 5\)"),
            (6, lambda bias: bias[1:], r"bias_decoder must be \(5,\); got \(4,\)"),
        ],
    )
    def test_shapes(self, place, change, words, backend):
        inputs = gate_inputs()
        inputs[place] = change(inputs[place])
        with pytest.raises(ValueError, match=words):
            skip_gate(*inputs, backend=backend)

    @pytest.mark.parametrize("given", [(2,), (5,), (6,), (2, 5), (2, 6), (5, 6)], ids=str)
    def test_part_of_the_decoder_s_arguments(self, given, backend):
        names = {2: "decoder_feature", 5: "weight_decoder", 6: "bias_decoder"}
        inputs = [
            None if place in names and place not in given else tensor for place, tensor in enumerate(gate_inputs())
        ]
        missing = ", ".join(name for place, name in names.items() if place not in given)
        with pytest.raises(ValueError, match=f"belong together: give all or none; missing: {missing}$"):
            skip_gate(*inputs, backend=backend)

    def test_mixed_dtypes_and_devices(self, backend):
        inputs = gate_inputs()
        with pytest.raises(
            TypeError, match=r"share one dtype; got encoder_feature torch\.float64, tokens torch\.float32"
        ):
            skip_gate(inputs[0], inputs[1].float(), *inputs[2:], backend=backend)
        with pytest.raises(TypeError, match="must be floating point"):
            skip_gate(inputs[0].long(), *inputs[1:], backend=backend)
        with pytest.raises(ValueError, match=r"on one device; got .*decoder_feature meta"):
            skip_gate(inputs[0], inputs[1], inputs[2].to("meta"), *inputs[3:], backend=backend)

    def test_no_tensor(self, backend):
        inputs = gate_inputs()
        inputs[4] = 0.0
        with pytest.raises(TypeError, match="bias_skip must be a tensor; got float"):
            skip_gate(*inputs, backend=backend)

    def test_unknown_name(self, backend):
        with pytest.raises(ValueError, match=f"unknown backend '{backend}s'; choose one of auto, triton"):
            skip_gate(*gate_inputs(), backend=f"{backend}s")
