"""Refusals of the attention functions: the same errors and words on every backend."""

import math

import pytest
import torch

from tests.kernels.support import DEVICE
from uctrans.kernels import channel_attention, projected_attention_maps, projected_channel_attention
from uctrans.kernels.channel_attention import correlating_is_cheaper
from uctrans.kernels.testing import AttentionShape, attention_inputs

pytest.importorskip("triton")

SMALL = AttentionShape(2, 2, 5, (4, 8), 12)
OTHER_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]

pytestmark = pytest.mark.parametrize("backend", ["reference", "composed", "triton"])


def packed_inputs(dtype=torch.float32):
    """Query, key and value."""
    return [tensor.detach().to(DEVICE) for tensor in attention_inputs(SMALL, dtype)]


def projected_inputs(dtype=torch.float32):
    """Tokens, context, key_value_weight and two query weights; tokens so few that projections come first."""
    assert not correlating_is_cheaper(5, 2, SMALL.segments, 12)
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 5, 12), (2, 5, 12), (2, 2, 12, 12), (2, 4, 4), (2, 8, 8))
    return [torch.randn(*size, generator=generator).to(DEVICE, dtype) for size in sizes]


def attend(backend, inputs, segments=SMALL.segments, **settings):
    return channel_attention(*inputs, segments, backend=backend, **settings)


def project_and_attend(backend, inputs, **settings):
    tokens, context, key_value_weight, *query_weights = inputs
    return projected_channel_attention(tokens, context, query_weights, key_value_weight, backend=backend, **settings)


def project_to_maps(backend, inputs, **settings):
    tokens, context, key_value_weight, *query_weights = inputs
    return projected_attention_maps(tokens, context, query_weights, key_value_weight, backend=backend, **settings)


BOTH = pytest.mark.parametrize(
    ("function", "inputs_of"), [(attend, packed_inputs), (project_and_attend, projected_inputs)], ids=["", "projected"]
)


class TestSegments:
    @pytest.mark.parametrize(
        "segments",
        [(4.0, 8.0), torch.tensor([4, 8]), [torch.tensor(4), torch.tensor(8)], [4, None], (True, 11), "48", 12, None],
        ids=str,
    )
    def test_no_integers(self, backend, segments):
        with pytest.raises(TypeError, match="segments must be a sequence of ints, one width a scale; got "):
            attend(backend, packed_inputs(), segments)

    @pytest.mark.parametrize("segments", [(), (0, 12), (-4, 16)], ids=str)
    def test_no_width(self, backend, segments):
        with pytest.raises(ValueError, match="segments must be one positive width a scale; got "):
            attend(backend, packed_inputs(), segments)

    @pytest.mark.parametrize("segments", [(4, 7), (4, 8, 1), (12, 12)], ids=str)
    def test_do_not_add_up(self, backend, segments):
        with pytest.raises(ValueError, match=f"add up to {sum(segments)}, but the packed axis has 12"):
            attend(backend, packed_inputs(), segments)

    @pytest.mark.parametrize("segments", [[4, 8], (4, 8), torch.Size([4, 8])], ids=repr)
    def test_any_sequence_will_do(self, backend, segments):
        inputs = packed_inputs()
        assert torch.equal(attend(backend, inputs, segments), attend(backend, inputs))


class TestShapes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda query, key, value: (query[:, :, 1:], key, value), "agree in batch, heads and tokens"),
            (lambda query, key, value: (query[:, :1], key, value), "agree in batch, heads and tokens"),
            (lambda query, key, value: (query[:1], key, value), "agree in batch, heads and tokens"),
            (lambda query, key, value: (query, key, value[..., 1:]), "key and value must have one shape"),
            (lambda query, key, value: (query[0], key[0], value[0]), r"must be \(B, H, N, channels\)"),
            (lambda query, key, value: (query, key[0], value[0]), r"must be \(B, H, N, channels\)"),
            (lambda *tensors: [tensor[:, :, :0] for tensor in tensors], "tokens must be at least 1; got 0"),
            (lambda *tensors: [tensor[:, :0] for tensor in tensors], "heads must be at least 1; got 0"),
            (lambda query, key, value: (query, key[..., :0], value[..., :0]), "key_channels must be at least 1"),
        ],
    )
    def test_packed(self, backend, change, words):
        with pytest.raises(ValueError, match=words):
            attend(backend, change(*packed_inputs()))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda tokens, context, square, *weights: (tokens[:, 1:], context, square, *weights), "same B and N"),
            (lambda tokens, context, square, *weights: (tokens[0], context[0], square, *weights), "same B and N"),
            (
                lambda tokens, context, square, *weights: (tokens, context, square[:, :, 1:], *weights),
                r"key_value_weight must be \(2, H, S, S\) with S = 12; got \(2, 2, 11, 12\)",
            ),
            (
                lambda tokens, context, square, *weights: (tokens, context, square[:1], *weights),
                r"key_value_weight must be \(2, H, S, S\) with S = 12; got \(1, 2, 12, 12\)",
            ),
            (
                lambda tokens, context, square, first, second: (tokens, context, square, first, second[:1]),
                r"query_weights\[1\] must be \(H, C, C\) with H = 2; got \(1, 8, 8\)",
            ),
            (
                lambda tokens, context, square, first, second: (tokens, context, square, first[:, 1:], second),
                r"query_weights\[0\] must be \(H, C, C\) with H = 2; got \(2, 3, 4\)",
            ),
            (
                lambda *inputs: inputs[:-1],
                r"^the widths of query_weights \[4\] add up to 4, but the packed axis has 12",
            ),
            (lambda *inputs: inputs[:3], "^the widths of query_weights must be one positive width a scale"),
        ],
    )
    def test_projected(self, backend, change, words):
        for function in (project_and_attend, project_to_maps):
            with pytest.raises(ValueError, match=words):
                function(backend, change(*projected_inputs()))

    @pytest.mark.parametrize("segments", [(1,), (2, 1)], ids=str)
    def test_map_of_one_entry(self, backend, segments):
        query, key, value = packed_inputs()
        with pytest.raises(ValueError, match="a map of one entry has no deviation"):
            attend(backend, [query[..., : sum(segments)], key[..., :1], value[..., :1]], segments)
        tokens, context, square, *_ = projected_inputs()
        weights = [tokens.new_ones(2, width, width) for width in segments]
        inputs = [tokens[..., : sum(segments)], context[..., :1], square[..., :1, :1], *weights]
        for function in (project_and_attend, project_to_maps):
            with pytest.raises(ValueError, match="a map of one entry has no deviation"):
                function(backend, inputs)

    def test_maps_of_one_row_or_one_column(self, backend):
        query, key, value = packed_inputs()
        assert attend(backend, [query[..., :3], key[..., :2], value[..., :2]], (1, 2)).isfinite().all()
        assert attend(backend, [query[..., :5], key[..., :1], value[..., :1]], (3, 2)).isfinite().all()


class TestDtypesAndDevices:
    @BOTH
    @pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
    def test_all_of_a_dtype_that_is_not_known(self, backend, function, inputs_of, dtype):
        with pytest.raises(TypeError, match=f"must be floating point, of 16, 32 or 64 bits; got {dtype}"):
            function(backend, [tensor.to(dtype) for tensor in inputs_of()])

    @pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
    def test_one_of_a_dtype_that_is_not_known(self, backend, dtype):
        query, key, value = packed_inputs()
        with pytest.raises(TypeError, match=f"value must be floating point, .*; got {dtype}"):
            attend(backend, [query, key, value.to(dtype)])
        *inputs, last = projected_inputs()
        with pytest.raises(TypeError, match=rf"query_weights\[1\] must be floating point, .*; got {dtype}"):
            project_and_attend(backend, [*inputs, last.to(dtype)])

    @BOTH
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_mixed(self, backend, function, inputs_of, place):
        for dtype in (torch.float16, torch.float64):
            inputs = inputs_of()
            inputs[place] = inputs[place].to(dtype)
            with pytest.raises(TypeError, match=f"share one dtype; got .*{dtype}"):
                function(backend, inputs)

    @BOTH
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_float64_among_others_under_autocast(self, backend, function, inputs_of, place):
        inputs = inputs_of()
        inputs[place] = inputs[place].double()
        names = ("query", "key", "value") if function is attend else ("tokens", "context", "key_value_weight")
        words = f"autocast leaves float64 as it is, .*{names[place]} torch.float64"
        with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(TypeError, match=words):
            function(backend, inputs)

    @BOTH
    def test_nothing_but_float64(self, backend, function, inputs_of):
        inputs = inputs_of(torch.float64)
        if backend == "triton":
            with pytest.raises(NotImplementedError, match="computes in float32; use backend='composed'"):
                function(backend, inputs)
            return
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = function(backend, inputs)
        assert output.dtype == torch.float64
        torch.testing.assert_close(output, function(backend, inputs))

    @BOTH
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_mixed_devices(self, backend, function, inputs_of, place):
        inputs = inputs_of()
        inputs[place] = inputs[place].to("meta")
        with pytest.raises(ValueError, match=r"on one device; got .*meta"):
            function(backend, inputs)

    def test_a_tensor_for_a_list(self, backend):
        tokens, context, key_value_weight, weight, _ = projected_inputs()
        for function in (projected_channel_attention, projected_attention_maps):
            with pytest.raises(TypeError, match="query_weights must be a list of tensors, one a scale; got a tensor"):
                function(tokens, context, weight, key_value_weight, backend=backend)

    def test_no_tensor(self, backend):
        query, key, _ = packed_inputs()
        with pytest.raises(TypeError, match="value must be a tensor; got list"):
            attend(backend, [query, key, [1.0, 2.0]])


class TestNumbers:
    @BOTH
    @pytest.mark.parametrize("eps", [math.nan, math.inf, -math.inf, -1e-5])
    def test_eps_out_of_range(self, backend, function, inputs_of, eps):
        with pytest.raises(ValueError, match=f"eps must be finite and at least 0; got {eps}"):
            function(backend, inputs_of(), eps=eps)
        with pytest.raises(ValueError, match=f"eps must be finite and at least 0; got {eps}"):
            project_to_maps(backend, projected_inputs(), eps=eps)

    @BOTH
    @pytest.mark.parametrize("name", ["eps", "dropout_p"])
    @pytest.mark.parametrize("value", ["0.1", None, [0.1], True], ids=str)
    def test_no_number(self, backend, function, inputs_of, name, value):
        with pytest.raises(TypeError, match=f"{name} must be a number; got {type(value).__name__}"):
            function(backend, inputs_of(), **{name: value})

    @BOTH
    def test_eps_of_zero(self, backend, function, inputs_of):
        inputs = inputs_of()
        exact = function("reference", [tensor.double() for tensor in inputs], eps=0.0)
        torch.testing.assert_close(function(backend, inputs, eps=0).double(), exact, rtol=1e-4, atol=1e-4)

    @BOTH
    @pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan, math.inf])
    def test_dropout_out_of_range(self, backend, function, inputs_of, dropout_p):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\); got "):
            function(backend, inputs_of(), dropout_p=dropout_p)

    @BOTH
    def test_ints_are_seeds_modulo_the_words_they_are_kept_in(self, backend, function, inputs_of):
        inputs = inputs_of()
        pairs = [(2**64 - 1, -1), (-(2**63) - 1, 2**63 - 1), (2**200 + 5, 5)]
        for seed, same in pairs[:1] if backend == "triton" else pairs:
            outputs = {number: function(backend, inputs, dropout_p=0.5, seed=number) for number in (seed, same, 6)}
            assert torch.equal(outputs[seed], outputs[same])
            assert not torch.equal(outputs[seed], outputs[6])

    @BOTH
    @pytest.mark.parametrize(
        ("seed", "error", "words"),
        [
            (1.5, TypeError, "seed must be an int, .*; got float"),
            ("1", TypeError, "seed must be an int, .*; got str"),
            (torch.tensor([1.0]), TypeError, "got torch.float32"),
            (torch.tensor([1], dtype=torch.int32), TypeError, "got torch.int32"),
            (torch.tensor([1, 2]), ValueError, "seed must be one int64"),
            (torch.tensor([1], device="meta"), ValueError, "on meta"),
        ],
    )
    def test_seeds_that_are_none(self, backend, function, inputs_of, seed, error, words):
        with pytest.raises(error, match=words):
            function(backend, inputs_of(), dropout_p=0.1, seed=seed)


@BOTH
def test_unknown_name(backend, function, inputs_of):
    with pytest.raises(ValueError, match=f"unknown backend '{backend}s'; choose one of auto, triton"):
        function(f"{backend}s", inputs_of())
