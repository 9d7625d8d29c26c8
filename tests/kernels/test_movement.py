"""No launcher moves a tensor into another layout or dtype: operators hand each other what they wrote.

A dispatch mode does not see into operators: it is off while their Python implementation runs. So the methods of tensors
that can move data are watched.
"""

import pytest
import torch

from uctrans.kernels import packed_linear, projected_channel_attention
from uctrans.kernels.channel_attention import correlating_is_cheaper
from uctrans.layers import ChannelGate, TransformerLayer

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(torch.float32, 0.3), (torch.bfloat16, 0.0)]
METHODS = ("contiguous", "clone", "copy_", "to", "type", "float", "half", "bfloat16", "reshape", "flatten", "repeat")
FUNCTIONS = ("cat", "stack", "clone")
WIDTHS, TOKENS = (16, 32), 11
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def moved(monkeypatch):
    """The names of calls that wrote what they were given to other memory."""
    names = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(source, *arguments, **keywords):
            result = original(source, *arguments, **keywords)
            is_view = isinstance(source, torch.Tensor) and _storage(result) == _storage(source) and name != "copy_"
            if isinstance(result, torch.Tensor) and result.numel() > 0 and not is_view:
                names.append(name)
            return result

        monkeypatch.setattr(owner, name, watched)

    for name in METHODS:
        watch(torch.Tensor, name)
    for name in FUNCTIONS:
        watch(torch, name)
    return names


def _storage(tensor):
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, torch.Tensor) else None


def normal(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def projected_inputs(dtype):
    """Tokens, context, key_value_weight and query weights."""
    channels = sum(WIDTHS)
    sizes = ((2, TOKENS, channels), (2, TOKENS, channels), (2, 2, channels, channels), *((2, w, w) for w in WIDTHS))
    return [normal(*size, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize(("dtype", "dropout_p"), CASES)
def test_projected_attention(dtype, dropout_p, moved):
    assert not correlating_is_cheaper(TOKENS, 2, WIDTHS, sum(WIDTHS))
    tokens, context, key_value_weight, *query_weights = inputs = projected_inputs(dtype)
    moved.clear()
    settings = {"dropout_p": dropout_p, "backend": "triton"}
    output = projected_channel_attention(tokens, context, query_weights, key_value_weight, **settings)
    assert moved == []
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    assert moved == []


@pytest.mark.parametrize(("dtype", "dropout"), CASES)
def test_transformer_layer(dtype, dropout, moved):
    layer = TransformerLayer(WIDTHS, 2, 2, dropout, dropout, "triton").to(DEVICE, dtype)
    tokens = normal(2, TOKENS, sum(WIDTHS), dtype=dtype).requires_grad_()
    moved.clear()
    output = layer(tokens)
    assert moved == []
    torch.autograd.grad(output, [tokens, *layer.parameters()], torch.ones_like(output))
    assert moved == []


def skip_maps(dtype, memory_format):
    """Encoder feature, tokens and decoder feature."""
    sizes = ((2, 4, 2, 8), (2, 4, 1, 2), (2, 6, 1, 4))
    maps = (normal(*size, dtype=dtype).contiguous(memory_format=memory_format) for size in sizes)
    return [feature.requires_grad_() for feature in maps]


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
class TestChannelGate:
    """Maps come in one format, as convolutions leave them."""

    @staticmethod
    def gate(decoder_channels=6, **options):
        return ChannelGate(4, decoder_channels, **options, backend="triton").to(DEVICE)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_skip_path(self, dtype, memory_format, moved):
        gate = self.gate().to(dtype)
        encoder_feature, tokens, decoder_feature = maps = skip_maps(dtype, memory_format)
        moved.clear()
        output = gate(encoder_feature, decoder_feature, tokens)
        assert moved == []
        torch.autograd.grad(output, [*maps, *gate.parameters()], torch.ones_like(output))
        assert moved == []

    def test_gate_by_the_decoder_that_is_not_concatenated(self, memory_format, moved):
        gate = self.gate(concatenate=False)
        encoder_feature, _, decoder_feature = skip_maps(torch.float32, memory_format)
        moved.clear()
        output = gate(encoder_feature, decoder_feature)
        torch.autograd.grad(output, [encoder_feature, decoder_feature, *gate.parameters()], torch.ones_like(output))
        assert moved == []

    def test_gradient_of_a_sum(self, memory_format, moved):
        gate = self.gate(decoder_channels=None)
        encoder_feature, tokens, _ = skip_maps(torch.float32, memory_format)
        moved.clear()
        torch.autograd.grad(gate(encoder_feature, None, tokens).sum(), [encoder_feature, tokens, *gate.parameters()])
        assert moved == []

    def test_tokens_as_the_transformer_leaves_them(self, memory_format, moved):
        gate = self.gate()
        encoder_feature, _, decoder_feature = skip_maps(torch.float32, memory_format)
        packed = normal(2, 2, 9).requires_grad_()
        tokens = packed[..., 3:7].transpose(1, 2).unflatten(2, (1, 2))
        moved.clear()
        output = gate(encoder_feature, decoder_feature, tokens)
        torch.autograd.grad(output, [encoder_feature, tokens, decoder_feature], torch.ones_like(output))
        assert moved == []

    def test_under_autocast(self, memory_format, moved):
        """Maps in half precision, weights in float32: kernels read both as they are."""
        gate = self.gate()
        encoder_feature, tokens, decoder_feature = maps = skip_maps(torch.bfloat16, memory_format)
        moved.clear()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = gate(encoder_feature, decoder_feature, tokens)
        torch.autograd.grad(output, [*maps, *gate.parameters()], torch.ones_like(output))
        assert moved == []

    def test_a_map_in_the_other_format_is_copied(self, memory_format, moved):
        other = next(other for other in FORMATS if other != memory_format)
        (encoder_feature, tokens, _), (*_, decoder_feature) = (
            skip_maps(torch.float32, chosen) for chosen in (memory_format, other)
        )
        gate = self.gate()
        moved.clear()
        output = gate(encoder_feature, decoder_feature, tokens)
        assert moved == ["contiguous"]
        gradient = torch.ones_like(output).contiguous(memory_format=other)
        moved.clear()
        torch.autograd.grad(output, [encoder_feature, tokens], gradient)
        assert set(moved) == {"contiguous"}


class TestTheWatch:
    """The watch sees the moves that the tests above must fail on."""

    def test_sees_into_an_operator(self, moved):
        tokens = normal(2, sum(WIDTHS), TOKENS).transpose(1, 2)  # channels are not adjacent: the launcher must copy
        weights = [normal(width, width) for width in WIDTHS]
        moved.clear()
        packed_linear(tokens, weights, backend="triton")
        assert moved == ["contiguous"]

    def test_sees_into_the_backward_of_an_operator(self, moved):
        tokens, *weights = (normal(*size).requires_grad_() for size in ((2, TOKENS, 48), (16, 16), (32, 32)))
        output = packed_linear(tokens, weights, backend="triton")
        moved.clear()
        torch.autograd.grad(output, [tokens, *weights], torch.ones(2, 48, TOKENS, device=DEVICE).transpose(1, 2))
        assert moved == ["contiguous", "contiguous"]  # one for the tokens' gradient, one for the weights'

    @pytest.mark.parametrize(
        ("move", "name"),
        [
            (lambda tensor: tensor.t().contiguous(), "contiguous"),
            (lambda tensor: tensor.clone(), "clone"),
            (lambda tensor: torch.empty_like(tensor).copy_(tensor), "copy_"),
            (lambda tensor: tensor.to(torch.float64), "to"),
            (lambda tensor: tensor.half(), "half"),
            (lambda tensor: tensor.t().reshape(-1), "reshape"),
            (lambda tensor: torch.cat([tensor, tensor]), "cat"),
            (lambda tensor: torch.stack([tensor, tensor]), "stack"),
        ],
    )
    def test_sees_what_moves(self, move, name, moved):
        tensor = torch.ones(3, 4, device=DEVICE)
        move(tensor)
        assert moved == [name]

    def test_overlooks_what_does_not(self, moved):
        tensor = torch.ones(3, 4, device=DEVICE)
        tensor.contiguous(), tensor.to(torch.float32), tensor.float(), tensor.reshape(12), tensor.flatten()
        assert moved == []
