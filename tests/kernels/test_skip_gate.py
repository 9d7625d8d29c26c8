"""The skip path: the composed form against the reference in float64, and what the public function refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uctrans.kernels import skip_gate
from uctrans.kernels.skip_gate import composed, reference
from uctrans.kernels.testing import assert_within_budget, outputs_and_gradients


def gate_inputs(
    batch=2, channels=5, decoder_channels=3, grid=(2, 3), patch=(4, 4), factor=2, dtype=torch.float64, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    height, width = grid[0] * patch[0], grid[1] * patch[1]
    return [
        normal(batch, channels, height, width),
        normal(batch, channels, *grid),
        normal(batch, decoder_channels, height // factor, width // factor),
        normal(channels, channels),
        normal(channels),
        normal(channels, decoder_channels),
        normal(channels),
    ]


SHAPES = {
    "published": {"channels": 8, "decoder_channels": 8, "patch": (16, 16)},
    "patch of one": {"patch": (1, 1), "grid": (6, 4)},
    "oblong patches": {"patch": (2, 6), "grid": (3, 1)},
    "decoder at full size": {"factor": 1},
    "decoder four times smaller": {"factor": 4, "patch": (4, 8)},
    "one channel, one token": {"channels": 1, "decoder_channels": 1, "grid": (1, 1), "patch": (2, 2)},
    "empty batch": {"batch": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_composed_stays_within_the_error_budget(shape, memory_format, dtype):
    """Over several draws together: the gradients by the gate are few numbers, and a single draw is luck."""
    results = {"composed": [], "reference": [], "oracle": []}
    for seed in range(6):
        inputs = gate_inputs(**shape, dtype=dtype, seed=seed)
        inputs[0] = inputs[0].contiguous(memory_format=memory_format)
        exact = [tensor.double() for tensor in inputs]
        weight = torch.randn(reference.skip_gate(*exact).shape, generator=torch.Generator().manual_seed(seed))
        weight = weight.to(dtype).double()
        results["composed"].append(outputs_and_gradients(composed.skip_gate, inputs, weight))
        results["reference"].append(outputs_and_gradients(reference.skip_gate, inputs, weight))
        results["oracle"].append(outputs_and_gradients(reference.skip_gate, exact, weight))
    assert_within_budget(*([torch.stack(draws) for draws in zip(*runs, strict=True)] for runs in results.values()))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2),
    channels=st.integers(1, 6),
    decoder_channels=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6])),
    with_tokens=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_reference(batch, channels, decoder_channels, grid, patch, with_tokens, seed):
    inputs = gate_inputs(batch, channels, decoder_channels, grid, patch, seed=seed)
    if not with_tokens:
        inputs[1] = None
    torch.testing.assert_close(skip_gate(*inputs, backend="composed"), skip_gate(*inputs, backend="reference"))


def test_written_out_by_hand():
    """One channel, one pixel a token: the formula of the docstring in plain numbers."""
    encoder_feature = torch.tensor([[[[1.0, -2.0]]]])
    tokens = torch.tensor([[[[0.5, 0.5]]]])
    decoder_feature = torch.tensor([[[[4.0]]]])
    one, zero = torch.ones(1, 1), torch.zeros(1)
    skip = encoder_feature + tokens  # 1.5 and -1.5: their mean is 0
    gate = torch.sigmoid(torch.tensor((0.0 + 4.0) / 2))
    expected = torch.tensor([[[[1.5 * gate, 0.0]], [[4.0, 4.0]]]])
    assert skip.mean() == 0
    for backend in ("reference", "composed"):
        output = skip_gate(encoder_feature, tokens, decoder_feature, one, zero, one, zero, backend=backend)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("with_tokens", [True, False])
def test_gradcheck(with_tokens):
    inputs = gate_inputs(batch=1, channels=2, decoder_channels=2, grid=(1, 2), patch=(2, 2))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    if with_tokens:
        assert torch.autograd.gradcheck(composed.skip_gate, inputs)
    else:
        encoder_feature, _, *others = inputs
        assert torch.autograd.gradcheck(
            lambda feature, *rest: composed.skip_gate(feature, None, *rest), [encoder_feature, *others]
        )


class TestBadInput:
    def test_grid_that_does_not_tile(self):
        inputs = gate_inputs()
        inputs[1] = inputs[1].repeat(1, 1, 1, 3)[..., :5]
        with pytest.raises(ValueError, match=r"grid of tokens, \(2, 5\), does not tile encoder_feature, \(8, 12\)"):
            skip_gate(*inputs)
        inputs = gate_inputs()
        inputs[2] = inputs[2][..., 1:]
        with pytest.raises(ValueError, match="grid of decoder_feature"):
            skip_gate(*inputs)

    def test_shapes_do_not_match(self):
        inputs = gate_inputs()
        inputs[1] = inputs[1][:, 1:]
        with pytest.raises(ValueError, match="tokens have 4 channels, encoder_feature has 5"):
            skip_gate(*inputs)
        inputs = gate_inputs()
        inputs[2] = inputs[2][1:]
        with pytest.raises(ValueError, match="with B = 2"):
            skip_gate(*inputs)
        inputs = gate_inputs()
        with pytest.raises(ValueError, match=r"encoder_feature must be \(B, C, H, W\)"):
            skip_gate(inputs[0][0], *inputs[1:])

    @pytest.mark.parametrize(
        ("position", "name"), [(3, "weight_skip"), (4, "bias_skip"), (5, "weight_decoder"), (6, "bias_decoder")]
    )
    def test_weights_of_another_shape(self, position, name):
        inputs = gate_inputs()
        inputs[position] = inputs[position][1:]
        with pytest.raises(ValueError, match=f"{name} must be"):
            skip_gate(*inputs)

    def test_mixed_dtypes_and_devices(self):
        inputs = gate_inputs()
        with pytest.raises(
            TypeError, match=r"share one dtype; got encoder_feature torch\.float64, tokens torch\.float32"
        ):
            skip_gate(inputs[0], inputs[1].float(), *inputs[2:])
        with pytest.raises(TypeError, match="must be floating point"):
            skip_gate(inputs[0].long(), *inputs[1:])
        with pytest.raises(ValueError, match=r"on one device; got .*decoder_feature meta"):
            skip_gate(inputs[0], inputs[1], inputs[2].to("meta"), *inputs[3:])

    def test_triton_says_that_it_is_not_there(self):
        with pytest.raises(NotImplementedError, match="no Triton operator yet"):
            skip_gate(*gate_inputs(), backend="triton")
