"""Channel attention as an operator of torch: its Triton kernels, without a map and over maps in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.support import DEVICE, TRITON_DTYPES, assert_as_exact_as, drawn
from uctrans.kernels import channel_attention, projected_channel_attention
from uctrans.kernels.channel_attention import correlating_is_cheaper
from uctrans.kernels.dropout import keep_mask, keep_scale, row_keys
from uctrans.kernels.testing import (
    ATTENTION_SHAPES,
    AttentionShape,
    attention_inputs,
    outputs_and_gradients,
    poisoned_allocations,
)

pytest.importorskip("triton")

EPS = 1e-5
SEED = 20
SMALL = AttentionShape(2, 2, 5, (4, 8), 12)
ODD = AttentionShape(1, 2, 21, (3, 39), 67)
SHAPES = (
    AttentionShape(1, 2, 8, (8, 16, 32, 64), 120),
    AttentionShape(4, 1, 1, (3,), 3),  # a single token; several samples, so that luck averages out
    ODD,
    AttentionShape(1, 2, 7, (1, 130), 131),  # a scale of one channel beside one over 128
    AttentionShape(1, 1, 100, (12, 20), 24),  # more tokens than channels, in three tiles; keys of another width
    AttentionShape(0, 2, 9, (4, 8), 12),  # an empty batch
)
HALF = (torch.float16, torch.bfloat16)
# Query channels, key channels, warps, stages: what the table holds, and tiles smaller than the widths of the tests.
CONFIGURATIONS = [(16, 16, 4, 1), (64, 32, 4, 1), (64, 32, 4, 2), (128, 64, 8, 2)]


def on_device(tensors, dtype=None):
    return [tensor.detach().to(DEVICE, dtype or tensor.dtype) for tensor in tensors]


def attend(segments, backend="triton", **settings):
    return lambda query, key, value: channel_attention(query, key, value, segments, backend=backend, **settings)


def assert_as_exact_as_the_reference(segments, inputs, gradient=None, **settings):
    """Check output and every gradient of the Triton operator."""
    oracle, function = (attend(segments, backend, **settings) for backend in ("reference", "triton"))
    assert_as_exact_as(oracle, function, inputs, gradient)


def compare(shape, dtype, **settings):
    assert_as_exact_as_the_reference(shape.segments, on_device(attention_inputs(shape, dtype)), **settings)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in ATTENTION_SHAPES)], ids=str
)
def test_error_budget(shape, dtype):
    with poisoned_allocations():
        compare(shape, dtype)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(2, 1, 1, (5, 8), 64),
        AttentionShape(1, 2, 3, (1, 33), 960),
        AttentionShape(1, 1, 2, (5,), 1025),  # rows of two warps
        AttentionShape(1, 1, 2, (960,), 33),
        AttentionShape(1, 1, 256, (8, 16), 24),  # as many tokens as the registers hold
        AttentionShape(1, 1, 257, (8, 16), 24),
        AttentionShape(1, 2, 1000, (5, 64), 33),
    ],
    ids=str,
)
def test_tokens_and_widths_of_any_number(shape, dtype):
    with poisoned_allocations():
        compare(shape, dtype, dropout_p=0.1, seed=SEED)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [196, 225, 256, 400, 576, 1024])
def test_published_widths(tokens, dtype, dropout_p):
    for batch in (1, 32):  # few programs and many: two rows of the table
        compare(AttentionShape(batch, 4, tokens, (64, 128, 256, 512), 960), dtype, dropout_p=dropout_p, seed=SEED)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("blocks", CONFIGURATIONS, ids=str)
def test_every_launch_configuration(blocks, dtype, monkeypatch):
    from uctrans.kernels.channel_attention import triton

    monkeypatch.setattr(triton, "fused_blocks", lambda *_: triton.Blocks(*blocks))
    with poisoned_allocations():
        compare(AttentionShape(1, 1, 21, (3, 39), 67), dtype, dropout_p=0.2, seed=SEED)


@pytest.mark.parametrize(
    ("tokens", "tiles"),
    [
        (1, (16,)),
        (16, (16,)),
        (17, (32,)),
        (49, (64,)),
        (100, (64, 32, 16)),
        (196, (128, 64, 16)),
        (225, (256,)),
        (256, (256,)),
    ],
)
def test_token_tiles(tokens, tiles):
    from uctrans.kernels.channel_attention.triton import token_tiles

    assert token_tiles(tokens) == tiles


def test_token_tiles_cover_the_tokens():
    from uctrans.kernels.channel_attention.triton import LONGEST_FUSED, token_tiles

    for tokens in range(1, LONGEST_FUSED + 1):
        tiles = token_tiles(tokens)
        assert tokens <= sum(tiles)
        assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in tiles)
        assert sum(tiles) - tokens < max(16, sum(tiles) / 2)


class TestMaps:
    """Parts of the images, memory kept for backward, and large grids of the forms over maps."""

    shape = AttentionShape(5, 2, 6, (3, 9), 20)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_parts_of_the_images_give_the_whole(self, dtype, monkeypatch):
        """Dropout's mask included. In truth a part of the images takes half a gigabyte."""
        from uctrans.kernels.channel_attention import triton

        inputs = on_device(attention_inputs(self.shape, dtype))
        gradient = torch.randn(5, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
        function = attend(self.shape.segments, dropout_p=0.3, seed=SEED)
        expected = outputs_and_gradients(function, inputs, gradient)
        monkeypatch.setattr(triton, "MAP_BYTES", 2 * 2 * 2 * 12 * 20 * dtype.itemsize)  # of two images
        with poisoned_allocations():
            found = outputs_and_gradients(function, inputs, gradient)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("tokens", [6, 257])
    def test_none_is_kept_for_backward(self, tokens):
        shape = AttentionShape(1, 1, tokens, (70,), 90)
        inputs = [tensor.requires_grad_() for tensor in on_device(attention_inputs(shape, torch.float16))]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda size: size):
            attend(shape.segments, dropout_p=0.2, seed=SEED)(*inputs)
        inputs_alone = [tensor.numel() for tensor in inputs]
        assert sorted(sizes) == sorted([*inputs_alone, 70, 70, 1])  # two numbers a row, and the seed

    @pytest.mark.gpu
    def test_more_heads_than_an_axis_of_a_grid_has(self):
        inputs = [torch.randn(32768, 2, 1, 2, device=DEVICE, requires_grad=True) for _ in range(3)]
        assert_as_exact_as_the_reference((2,), inputs)


@drawn(
    6,
    lambda st: {
        "batch": st.integers(0, 2),
        "heads": st.integers(1, 2),
        "tokens": st.integers(1, 20),
        "segments": st.lists(st.integers(1, 40), min_size=1, max_size=2),
        "key_channels": st.integers(2, 70),
        "dropout_p": st.sampled_from([0.0, 0.3]),
        "seed": st.integers(0, 2**16),
    },
)
def test_any_shape_agrees_with_the_reference(batch, heads, tokens, segments, key_channels, dropout_p, seed):
    shape = AttentionShape(batch, heads, tokens, tuple(segments), key_channels)
    inputs = on_device(attention_inputs(shape, torch.float32, seed))
    results, expected = (
        outputs_and_gradients(
            attend(segments, backend, dropout_p=dropout_p, seed=seed),
            [tensor.to(dtype) for tensor in inputs],
            torch.ones(batch, tokens, sum(segments), dtype=dtype, device=DEVICE).cumsum(dim=-1) % 3 - 1,
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    for result, exact in zip(results, expected, strict=True):
        # Of the largest entry: a map of one or two entries has gradients that vanish but for rounding.
        bound = 1e-4 * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound)


class TestNumbersThatAreHardToHold:
    shape = AttentionShape(1, 2, 20, (16, 40), 56)

    def inputs(self, dtype):
        return on_device(attention_inputs(self.shape, dtype))

    @pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
    def test_common_offset(self, dtype):
        """Every entry of query and key is a thousand (in half precision: thirty) deviations from zero."""
        query, key, value = self.inputs(torch.float64)
        offset = 1e3 if dtype == torch.float32 else 30.0
        inputs = [(query + offset).to(dtype), (key + offset).to(dtype), value.to(dtype)]
        if dtype == torch.float16:
            inputs = [inputs[0] / 32, *inputs[1:]]  # the reference's scores would leave the range of float16
        assert_as_exact_as_the_reference(self.shape.segments, inputs)

    def test_offset_of_the_map(self):
        """The map's own mean is a thousand of its deviations: sums of squares of scores would cancel to noise."""
        generator = torch.Generator().manual_seed(3)
        query, key, value = self.inputs(torch.float64)
        level = torch.rand(self.shape.tokens, 1, generator=generator, dtype=torch.float64).to(DEVICE) + 1
        inputs = [(level + 1e-3 * query).float(), (level + 1e-3 * key).float(), value.float()]
        scores = inputs[0].double().transpose(-1, -2) @ inputs[1].double()
        assert (scores.mean(dim=(-1, -2)).abs() / scores.std(dim=(-1, -2))).min() > 300
        assert_as_exact_as_the_reference(self.shape.segments, inputs)

    def test_constant_map_attends_evenly(self):
        query, key, value = self.inputs(torch.float32)
        inputs = [
            torch.ones_like(query).requires_grad_(),
            torch.ones_like(key).requires_grad_(),
            value.requires_grad_(),
        ]
        output = attend(self.shape.segments)(*inputs)
        expected = value.mean(dim=(1, 3), keepdim=True).squeeze(1).expand_as(output)
        torch.testing.assert_close(output, expected)
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(output.sum(), inputs))

    @pytest.mark.parametrize("centred", ["query", "key"])
    @pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
    def test_common_offset_of_one_side(self, centred, dtype):
        """One side far from zero, the other without a mean over the tokens: sums of products of both would cancel."""
        tensors = dict(zip(("query", "key", "value"), self.inputs(torch.float64), strict=True))
        for name in ("query", "key"):
            offset = -tensors[name].mean(dim=2, keepdim=True) if name == centred else 1e3
            tensors[name] = tensors[name] + offset
        inputs = [tensor.to(dtype) for tensor in tensors.values()]
        assert_as_exact_as_the_reference(self.shape.segments, inputs)

    @pytest.mark.parametrize("sides", [("query",), ("query", "key")], ids="+".join)
    @pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e9])
    def test_size_of_the_scores(self, scale, sides):
        """From maps that are nothing beside eps to maps whose squares need most of float32's range."""
        tensors = dict(zip(("query", "key", "value"), self.inputs(torch.float32), strict=True))
        inputs = [tensor * scale if name in sides else tensor for name, tensor in tensors.items()]
        assert_as_exact_as_the_reference(self.shape.segments, inputs)

    # Small scores with large gradients leave the range in the published steps, too.
    @pytest.mark.parametrize(
        ("scale", "gradient_size"), [(0.1, 1e-3), (0.1, 10.0), (1.0, 1e-3), (1.0, 1e3), (30.0, 1e-3), (30.0, 1e3)]
    )
    def test_range_of_float16(self, scale, gradient_size):
        shape = AttentionShape(2, 2, 20, (16, 40), 56)
        query, key, value = on_device(attention_inputs(shape, torch.float64))
        inputs = [(query * scale).half(), (key * scale).half(), value.half()]
        gradient = torch.randn(2, 20, 56, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradient = (gradient * gradient_size).half().double().to(DEVICE)
        assert_as_exact_as_the_reference(shape.segments, inputs, gradient)

    def test_constant_map_without_eps(self):
        query, key, value = self.inputs(torch.float32)
        output = attend(self.shape.segments, eps=0.0)(torch.ones_like(query), torch.ones_like(key), value)
        torch.testing.assert_close(output, value.mean(dim=(1, 3)).unsqueeze(-1).expand_as(output))

    def test_row_far_below_the_others(self):
        """The sum of a row's exponentials spans hundreds of powers of two; nothing overflows outside the map."""
        query, key, value = self.inputs(torch.float32)
        query[..., 3], key[..., 5] = 40 * query[..., 3], key[..., 5] - 40
        assert_as_exact_as_the_reference(self.shape.segments, [query, key, value])


class TestStrides:
    shape = AttentionShape(2, 2, 5, (6, 10), 24)

    @pytest.mark.parametrize(
        "rearrange",
        [
            lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),  # heads inside the tokens
            lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),  # tokens inside the channels
            lambda tensor: torch.nn.functional.pad(tensor, (3, 2))[..., 3:-2],  # rows that start off any alignment
            lambda tensor: tensor[:1].expand(2, -1, -1, -1),  # one sample for the whole batch
        ],
        ids=["heads inside", "channels apart", "offset rows", "expanded"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_inputs(self, rearrange, dtype):
        inputs = on_device(attention_inputs(self.shape, dtype))

        def rearranged(backend):
            return lambda *tensors: attend(self.shape.segments, backend)(*map(rearrange, tensors))

        assert_as_exact_as(rearranged("reference"), rearranged("triton"), inputs)


class TestDropout:
    # As many tokens as key channels and as query channels: with the identity as value or gradient, maps come out whole.
    shape = AttentionShape(1, 2, 24, (8, 16), 24)
    both_forms = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)  # over maps, and without one

    def maps(self, dropout_p, seed, dtype):
        """The dropped softmax maps of all heads as the forward pass mixes with them: (B, H, sum C, S)."""
        query, key, _ = on_device(attention_inputs(self.shape, torch.float32), dtype)
        identity = torch.eye(24, device=DEVICE, dtype=dtype)
        maps = []
        for head in range(2):
            value = torch.zeros(1, 2, 24, 24, device=DEVICE, dtype=dtype)
            value[:, head] = identity * 2
            mixed = attend(self.shape.segments, dropout_p=dropout_p, seed=seed)(query, key, value)
            maps.append(mixed.transpose(1, 2))
        return torch.stack(maps, dim=1).float()

    def expected_mask(self, dropout_p, seed):
        keys = row_keys(torch.tensor([seed]), 2 * 24).view(2, 1, 2, 24)
        return keep_mask(keys, 24, dropout_p).to(DEVICE)

    @both_forms
    def test_mask_in_forward(self, dtype):
        dropped, plain = self.maps(0.1, SEED, dtype), self.maps(0.0, None, dtype)
        assert plain.min() > 0
        assert torch.equal(dropped != 0, self.expected_mask(0.1, SEED))
        tolerance = {} if dtype == torch.float32 else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(dropped, plain * (dropped != 0) * keep_scale(0.1), **tolerance)

    @both_forms
    def test_mask_in_backward(self, dtype):
        """With the identity as upstream gradient, the gradient of value is the dropped map."""
        inputs = on_device(attention_inputs(self.shape, torch.float32), dtype)
        identity = torch.eye(24, dtype=torch.float64, device=DEVICE).expand(1, 24, 24)
        function = attend(self.shape.segments, dropout_p=0.5, seed=SEED)
        *_, value_gradient = outputs_and_gradients(function, inputs, identity)
        maps = self.maps(0.5, SEED, dtype)
        assert torch.equal(value_gradient != 0, maps != 0)
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}  # the scores are rounded once more
        torch.testing.assert_close(value_gradient.float() * 2, maps, **tolerance)

    @pytest.mark.parametrize("backend", ["triton", "composed"])
    def test_seed_gives_the_same_mask_on_every_backend(self, backend):
        inputs = on_device(attention_inputs(SMALL, torch.float32))
        for seed in (SEED, torch.tensor([SEED], device=DEVICE), torch.tensor(SEED, device=DEVICE)):
            result = attend(SMALL.segments, backend, dropout_p=0.4, seed=seed)(*inputs)
            expected = attend(SMALL.segments, "reference", dropout_p=0.4, seed=SEED)(*inputs)
            torch.testing.assert_close(result, expected)

    def test_without_a_seed_torch_draws(self):
        inputs = on_device(attention_inputs(SMALL, torch.float32))
        torch.manual_seed(5)
        first, second = (attend(SMALL.segments, dropout_p=0.4)(*inputs) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(attend(SMALL.segments, dropout_p=0.4)(*inputs), first)

    @pytest.mark.parametrize("dropout_p", [1e-9, 1 - 1e-9])
    def test_probabilities_at_the_ends_stay_finite(self, dropout_p):
        inputs = on_device(attention_inputs(SMALL, torch.float32))
        output = attend(SMALL.segments, dropout_p=dropout_p, seed=SEED)(*inputs)
        assert torch.isfinite(output).all()
        assert (output == 0).float().mean().round() == round(dropout_p)


class TestOperator:
    shape = AttentionShape(1, 2, 5, (2, 3), 4)

    def arguments(self, dropout_p, requires_grad=False):
        inputs = on_device(attention_inputs(self.shape, torch.float32))
        inputs = [tensor.requires_grad_(requires_grad) for tensor in inputs]
        return (*inputs, list(self.shape.segments), dropout_p, EPS, torch.tensor([SEED], device=DEVICE))

    def packed(self, arguments):
        query, key, value, *rest = arguments
        requires_grad = query.requires_grad
        key_value = torch.stack([key, value], dim=3).transpose(1, 2).transpose(2, 3).contiguous().detach()
        return (query, key_value.requires_grad_(requires_grad), *rest)  # (B, N, 2, H, S)

    def test_packed_is_the_same_function(self):
        arguments = self.arguments(0.3, requires_grad=True)
        packed = self.packed(arguments)
        output, *_ = torch.ops.uctrans.channel_attention(*arguments)
        packed_output, *_ = torch.ops.uctrans.channel_attention_packed(*packed)
        assert torch.equal(output, packed_output)
        gradient = torch.randn_like(output)
        of_query, of_key, of_value = torch.autograd.grad(output, arguments[:3], gradient)
        of_packed_query, of_key_value = torch.autograd.grad(packed_output, packed[:2], gradient)
        assert torch.equal(of_query, of_packed_query)
        assert torch.equal(torch.stack([of_key, of_value]), of_key_value.permute(2, 0, 3, 1, 4))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_saved_tensors_are_what_they_say(self, dtype):
        shape = AttentionShape(2, 2, 21, (8, 40), 72)
        query, key, value = on_device(attention_inputs(shape, dtype))
        seed = torch.tensor([SEED], device=DEVICE)
        _, means, temperatures = torch.ops.uctrans.channel_attention(
            query, key, value, list(shape.segments), 0.3, EPS, seed
        )
        scores = query.double().transpose(-1, -2) @ key.double() / shape.key_channels**0.5
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
        for maps, mean, temperature in zip(
            *(tensor.split(shape.segments, dim=2) for tensor in (scores, means, temperatures)), strict=True
        ):
            expected = maps.mean(dim=(2, 3)).unsqueeze(-1).expand_as(mean)
            torch.testing.assert_close(mean.double(), expected, **tolerance)
            expected = (maps.var(dim=(2, 3), correction=0) + EPS).rsqrt().unsqueeze(-1).expand_as(temperature)
            torch.testing.assert_close(temperature.double(), expected, **tolerance)

    def test_no_random_number_is_drawn_without_dropout(self):
        inputs = on_device(attention_inputs(self.shape, torch.float32))
        state = torch.random.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
        attend(self.shape.segments)(*inputs)
        after = torch.random.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
        assert torch.equal(state, after)


class Copies(TorchDispatchMode):
    """Counts what moves data without computing: copies, concatenations, casts."""

    NAMES = ("clone", "copy_", "cat", "stack", "_to_copy", "contiguous", "index", "constant_pad_nd")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func._opname in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class TestProjected:
    shape = AttentionShape(2, 2, 5, (8, 16), 24)

    def inputs(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            tensor = torch.randn(*size, generator=generator, dtype=torch.float64)
            return tensor.to(DEVICE, dtype).requires_grad_()

        tokens, context = normal(2, 5, 24), normal(2, 5, 24)
        return [tokens, context, normal(2, 2, 24, 24), *(normal(2, width, width) for width in self.shape.segments)]

    @staticmethod
    def attend(backend, **settings):
        def function(tokens, context, key_value_weight, *query_weights):
            return projected_channel_attention(
                tokens, context, query_weights, key_value_weight, backend=backend, **settings
            )

        return function

    @pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_error_budget(self, dropout_p, dtype):
        settings = {"dropout_p": dropout_p, "seed": SEED}
        assert_as_exact_as(self.attend("reference", **settings), self.attend("triton", **settings), self.inputs(dtype))

    def test_what_the_projections_write_takes_no_map_in_half_precision(self):
        from uctrans.kernels.channel_attention.triton import fused_blocks
        from uctrans.kernels.formats import key_and_value

        for dtype in HALF:
            query = torch.empty(2, 5, 2, 24, dtype=dtype, device=DEVICE).transpose(1, 2)
            key_value = torch.empty(2, 5, 2, 2, 24, dtype=dtype, device=DEVICE)
            assert fused_blocks(query, *key_and_value(key_value)) is not None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nothing_is_copied_between_projections_and_operator(self, dtype):
        inputs = self.inputs(dtype)
        seed = torch.tensor([SEED], device=DEVICE)
        with Copies() as copies:
            output = self.attend("triton", dropout_p=0.3, seed=seed)(*inputs)
            torch.autograd.grad(output, inputs, torch.ones_like(output))
        assert copies.found == []

    def test_both_sides_of_the_cost_boundary_agree(self):
        segments, heads = (4, 8), 2
        boundary = next(tokens for tokens in range(2, 200) if correlating_is_cheaper(tokens, heads, segments, 12))
        for tokens in (boundary - 1, boundary):
            generator = torch.Generator().manual_seed(tokens)
            tensors = [
                torch.randn(*size, generator=generator).to(DEVICE)
                for size in ((2, tokens, 12), (2, tokens, 12), (2, heads, 12, 12), (heads, 4, 4), (heads, 8, 8))
            ]
            settings = {"dropout_p": 0.2, "seed": SEED}
            assert_as_exact_as(self.attend("reference", **settings), self.attend("triton", **settings), tensors)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_many_tokens_compile_without_a_break(backend):
    inputs = on_device(attention_inputs(AttentionShape(1, 1, 257, (70,), 90), torch.float32))
    function = attend((70,), dropout_p=0.3, seed=torch.tensor([SEED], device=DEVICE))
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    gradient = torch.ones(1, 257, 70, dtype=torch.float64, device=DEVICE)
    results, expected = (outputs_and_gradients(form, inputs, gradient) for form in (compiled, function))
    torch.testing.assert_close(results, expected)


@pytest.mark.gpu
class TestOnAGpu:
    shape = AttentionShape(4, 4, 196, (64, 128, 256, 512), 960)

    def inputs(self):
        return [tensor.requires_grad_() for tensor in on_device(attention_inputs(self.shape, torch.bfloat16))]

    def test_peak_memory(self):
        """Backward holds two maps, where the reference holds four to five."""
        peaks = {}
        for backend in ("triton", "reference"):
            inputs = self.inputs()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            attend(self.shape.segments, backend, dropout_p=0.1)(*inputs).sum().backward()
            torch.cuda.synchronize()
            peaks[backend] = torch.cuda.max_memory_allocated() - before
        assert peaks["triton"] < peaks["reference"] * 2 / 3

    def test_captured_in_a_cuda_graph(self):
        inputs = self.inputs()
        function = attend(self.shape.segments, dropout_p=0.1)

        def step():
            output = function(*inputs)
            return output, torch.autograd.grad(output, inputs, torch.ones_like(output))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = step()
        graph.replay()
        first = output.clone()
        graph.replay()
        assert not torch.equal(output, first)  # every replay draws a new mask
        assert torch.isfinite(output).all()
