"""The block-diagonal linear map: every form against the reference in float64, and what the public function refuses."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.support import DEVICE, assert_as_exact_as, drawn, over_dtypes, results
from uctrans.kernels import packed_linear
from uctrans.kernels.packed_linear import composed, reference
from uctrans.kernels.testing import poisoned_allocations

pytest.importorskip("triton")


@dataclass(frozen=True)
class LinearShape:
    """Sizes of one problem."""

    batch: int
    tokens: int
    heads: int | None
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]
    has_biases: bool = False


SHAPES = (
    LinearShape(2, 4, 4, (8, 16, 32, 64), (8, 16, 32, 64)),
    LinearShape(1, 1, None, (3,), (5,), has_biases=True),  # a single token, a single scale
    LinearShape(2, 9, 2, (5, 7), (9, 16), has_biases=True),  # odd everything, biases of heads
    LinearShape(1, 33, None, (17, 33), (66, 1)),  # a scale that maps to one channel
    LinearShape(1, 5, 3, (1, 130), (131, 2)),  # a contraction that runs across heads and past a block
    LinearShape(1, 257, None, (4, 8), (16, 12), has_biases=True),  # tokens enough to be summed in splits
    LinearShape(0, 9, 2, (4, 8), (4, 8)),  # an empty batch
)
SMALL = LinearShape(2, 3, 2, (4, 8), (3, 5), has_biases=True)


def linear_inputs(shape, dtype=torch.float64, seed=0):
    """Tokens, weights and biases in one list, standard normal; weights keep the size of what they map."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    lead = () if shape.heads is None else (shape.heads,)
    widths = list(zip(shape.out_widths, shape.in_widths, strict=True))
    tensors = [normal(shape.batch, shape.tokens, sum(shape.in_widths))]
    tensors += [normal(*lead, out_width, in_width) / math.sqrt(in_width) for out_width, in_width in widths]
    if shape.has_biases:
        tensors += [normal(*lead, out_width) for out_width in shape.out_widths]
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def flat(function, shape, **options):
    """``function`` of (tokens, weights, biases) as one of tensors."""
    count = len(shape.in_widths)
    return lambda tokens, *others: function(tokens, others[:count], others[count:], **options)


def test_poisoned_allocations_are_nan():
    with poisoned_allocations():
        tensor = torch.empty(3, device=DEVICE)
        for fresh in (tensor, torch.empty_like(tensor), tensor.new_empty(2, dtype=torch.float16)):
            assert fresh.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@over_dtypes(SHAPES)
def test_triton_stays_within_the_error_budget(shape, dtype):
    with poisoned_allocations():
        assert_as_exact_as(
            flat(reference.packed_linear, shape),
            flat(packed_linear, shape, backend="triton"),
            linear_inputs(shape, dtype),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_composed_stays_within_the_error_budget(shape, dtype):
    inputs = linear_inputs(shape, dtype)
    assert_as_exact_as(flat(reference.packed_linear, shape), flat(composed.packed_linear, shape), inputs)


@drawn(
    6,
    lambda st: {
        "batch": st.integers(0, 2),
        "tokens": st.integers(1, 8),
        "heads": st.sampled_from([None, 1, 2, 3]),
        "widths": st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
        "has_biases": st.booleans(),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(batch, tokens, heads, widths, has_biases, seed):
    shape = LinearShape(batch, tokens, heads, *zip(*widths, strict=True), has_biases)
    inputs = linear_inputs(shape, torch.float32, seed)
    expected = results(flat(reference.packed_linear, shape), inputs)
    for backend in ("composed", "triton"):
        torch.testing.assert_close(results(flat(packed_linear, shape, backend=backend), inputs), expected)


def test_written_out_by_hand():
    tokens = torch.tensor([[[1.0, 2.0, 3.0]]], device=DEVICE)
    weights = [torch.tensor([[10.0, 1.0]], device=DEVICE), torch.tensor([[2.0], [4.0]], device=DEVICE)]
    biases = [torch.tensor([0.5], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)]
    for backend in ("reference", "composed", "triton"):
        output = packed_linear(tokens, weights, biases, backend=backend)
        assert output.tolist() == [[[12.5, 6.0, 13.0]]]
        by_head = packed_linear(tokens, [torch.stack([weight, -weight]) for weight in weights], backend=backend)
        assert by_head.tolist() == [[[[12.0, 6.0, 12.0], [-12.0, -6.0, -12.0]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tile_of_the_table(dtype, monkeypatch):
    """Each tile in turn, on a problem larger than any."""
    from uctrans.kernels.packed_linear import triton as kernels

    shape = LinearShape(1, 129, 2, (66,), (65,), has_biases=True)
    for tile in kernels._tiles(dtype):
        monkeypatch.setattr(kernels, "_tiles", lambda dtype, tile=tile: (tile,))
        function = flat(packed_linear, shape, backend="triton")
        assert_as_exact_as(flat(reference.packed_linear, shape), function, linear_inputs(shape, dtype))


def test_tiles_and_splits_of_the_published_sizes():
    """Programs enough for a GPU at batch 4, and large tiles at batch 32."""
    from uctrans.kernels.packed_linear import triton as kernels

    widths = (64, 128, 256, 512)
    for batch, expected in ((4, (128, 64)), (32, (128, 128))):
        tile = kernels.choose_tile(torch.bfloat16, batch * 196, [4 * width for width in widths], 512)
        assert tile[:2] == expected
    for batch in (4, 32):
        tile, tiles, splits = kernels._choose_split(torch.bfloat16, batch * 196, widths, widths)
        assert sum(tiles) * splits >= kernels.MULTIPROCESSORS
        assert batch * 196 >= splits * kernels.FEWEST_ROWS_A_SPLIT
    assert tile[:2] == (128, 128)


def test_the_query_of_channel_attention_is_a_view():
    tokens, *weights = linear_inputs(LinearShape(2, 5, 3, (4, 8), (4, 8)), torch.float32)
    query = packed_linear(tokens, weights, backend="triton").transpose(1, 2)
    assert query.shape == (2, 3, 5, 12) and query.stride() == (5 * 3 * 12, 12, 3 * 12, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_are_summed_in_the_same_order_in_every_run(dtype):
    shape = LinearShape(1, 257, None, (5, 3), (9, 2), has_biases=True)
    inputs = linear_inputs(shape, dtype)
    function = flat(packed_linear, shape, backend="triton")
    for first, second in zip(results(function, inputs), results(function, inputs), strict=True):
        assert torch.equal(first, second)


class TestBadInput:
    def test_shapes(self):
        tokens, *others = linear_inputs(SMALL)
        weights, biases = others[:2], others[2:]
        with pytest.raises(ValueError, match=r"tokens must be \(B, N, 12\).*; got \(2, 3, 11\)"):
            packed_linear(tokens[..., 1:], weights, biases)
        with pytest.raises(ValueError, match="tokens must be"):
            packed_linear(tokens[0], weights, biases)
        with pytest.raises(ValueError, match=r"all be \(O, I\), or all \(H, O, I\).*got \(2, 3, 4\), \(5, 8\)"):
            packed_linear(tokens, [weights[0], weights[1][0]])
        with pytest.raises(ValueError, match="with one H"):
            packed_linear(tokens, [weights[0], weights[1][:1]])
        with pytest.raises(ValueError, match="not empty"):
            packed_linear(tokens, [weights[0], weights[1][:, :0]])
        with pytest.raises(ValueError, match=r"biases\[1\] must be \(2, 5\), .*; got \(5,\)"):
            packed_linear(tokens, weights, [biases[0], biases[1][0]])
        with pytest.raises(ValueError, match="one a scale; got 1 for 2 weights"):
            packed_linear(tokens, weights, biases[:1])
        with pytest.raises(ValueError, match="got none"):
            packed_linear(tokens, [])

    def test_a_tensor_for_a_list(self):
        tokens, *others = linear_inputs(SMALL)
        weights, biases = others[:2], others[2:]
        with pytest.raises(TypeError, match="weights must be a list of tensors, one a scale; got a tensor"):
            packed_linear(tokens, weights[0])
        with pytest.raises(TypeError, match="weights must be a list of tensors, one a scale; got NoneType"):
            packed_linear(tokens, None)
        with pytest.raises(TypeError, match="biases must be a list of tensors, one a scale; got a tensor"):
            packed_linear(tokens, weights, biases[0])

    def test_dtypes_and_devices(self):
        tokens, *others = linear_inputs(SMALL)
        weights = others[:2]
        with pytest.raises(TypeError, match=r"share one dtype; got tokens torch\.float64, weights\[0\] torch\.float32"):
            packed_linear(tokens, [weights[0].float(), weights[1]])
        with pytest.raises(TypeError, match="tokens must be floating point"):
            packed_linear(tokens.long(), weights)
        with pytest.raises(ValueError, match=r"on one device; got .*weights\[1\] meta"):
            packed_linear(tokens, [weights[0], weights[1].to("meta")])
        with pytest.raises(ValueError, match="unknown backend"):
            packed_linear(tokens, weights, backend="fastest")
