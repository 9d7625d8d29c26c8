"""Channel attention as an operator of torch: its Triton kernels, and which sizes they take.

Without a GPU the kernels run in Triton's interpreter, which multiplies bfloat16 wrongly: those cases need a GPU.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.support import DEVICE, TRITON_DTYPES, assert_as_exact_as, drawn
from uctrans.kernels import channel_attention, projected_channel_attention
from uctrans.kernels.channel_attention import correlating_is_cheaper, operator
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
# Own channels, step, warps, stages: what the table holds, and tiles smaller and larger than the widths of the tests.
CONFIGURATIONS = [(16, 16, 4, 1), (32, 16, 8, 1), (32, 32, 8, 1), (64, 16, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2)]


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


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [196, 225, 256, 400, 576, 640, 1024])
def test_published_widths(tokens, dtype, dropout_p):
    for batch in (1, 32):  # few programs and many: two rows of the table
        compare(AttentionShape(batch, 4, tokens, (64, 128, 256, 512), 960), dtype, dropout_p=dropout_p, seed=SEED)


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.gpu) for dtype in HALF)], ids=str
)
@pytest.mark.parametrize("blocks", CONFIGURATIONS, ids=str)
def test_every_launch_configuration(blocks, dtype, monkeypatch):
    from uctrans.kernels.channel_attention import triton
    from uctrans.kernels.channel_attention.triton_blocks import AttentionBlocks, GramBlocks

    own, step, num_warps, num_stages = blocks
    for table in ("forward_blocks", "query_gradient_blocks", "key_value_gradient_blocks"):
        monkeypatch.setattr(triton, table, lambda *_: AttentionBlocks(*blocks))
    for table in ("gram_blocks", "correction_blocks"):
        monkeypatch.setattr(triton, table, lambda *_: GramBlocks(own, step, num_warps, num_stages))
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
        (400, (256, 128, 16)),
        (576, (512, 64)),
        (640, (512, 128)),
    ],
)
def test_token_tiles(tokens, tiles):
    from uctrans.kernels.channel_attention.triton_blocks import Problem, token_tiles

    assert token_tiles(Problem(16, tokens, 960, torch.bfloat16, is_aligned=True)) == tiles


@pytest.mark.parametrize(
    ("dtype", "is_aligned"), [(torch.float32, True), (torch.float16, True), (torch.float16, False)], ids=str
)
def test_token_tiles_cover_the_tokens(dtype, is_aligned):
    from uctrans.kernels.channel_attention.triton_blocks import Problem, token_tiles

    for tokens in range(1, operator.LONGEST_FUSED_FORWARD + 1):
        tiles = token_tiles(Problem(16, tokens, 960, dtype, is_aligned))
        assert tokens <= sum(tiles)
        assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in tiles)
        assert sum(tiles) - tokens < max(16, sum(tiles) / 2)


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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_common_offset(self, dtype):
        """Every entry of query and key is a thousand (in float16: thirty) deviations from zero."""
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

    @pytest.mark.parametrize("gradient_size", [1e-3, 1e3])
    @pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
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
    shape = AttentionShape(2, 2, 5, (6, 10), 12)

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
    def test_inputs(self, rearrange):
        inputs = on_device(attention_inputs(self.shape, torch.float32))

        def rearranged(backend):
            return lambda *tensors: attend(self.shape.segments, backend)(*map(rearrange, tensors))

        assert_as_exact_as(rearranged("reference"), rearranged("triton"), inputs)


class TestDropout:
    # As many tokens as key channels and as query channels: with the identity as value or gradient, maps come out whole.
    shape = AttentionShape(1, 2, 20, (8, 12), 20)

    def maps(self, dropout_p, seed):
        """The dropped softmax maps of all heads as the forward pass mixes with them: (B, H, sum C, S)."""
        query, key, _ = on_device(attention_inputs(self.shape, torch.float32))
        identity = torch.eye(20, device=DEVICE)
        maps = []
        for head in range(2):
            value = torch.zeros(1, 2, 20, 20, device=DEVICE)
            value[:, head] = identity * 2
            mixed = attend(self.shape.segments, dropout_p=dropout_p, seed=seed)(query, key, value)
            maps.append(mixed.transpose(1, 2))
        return torch.stack(maps, dim=1)

    def expected_mask(self, dropout_p, seed):
        keys = row_keys(torch.tensor([seed]), 2 * 20).view(2, 1, 2, 20)
        return keep_mask(keys, 20, dropout_p).to(DEVICE)

    def test_mask_in_forward(self):
        dropped, plain = self.maps(0.1, SEED), self.maps(0.0, None)
        assert plain.min() > 0
        assert torch.equal(dropped != 0, self.expected_mask(0.1, SEED))
        torch.testing.assert_close(dropped, plain * (dropped != 0) * keep_scale(0.1))

    def test_mask_in_backward(self):
        """With the identity as upstream gradient, the gradient of value is the dropped map."""
        inputs = on_device(attention_inputs(self.shape, torch.float32))
        identity = torch.eye(20, dtype=torch.float64, device=DEVICE).expand(1, 20, 20)
        function = attend(self.shape.segments, dropout_p=0.5, seed=SEED)
        *_, value_gradient = outputs_and_gradients(function, inputs, identity)
        torch.testing.assert_close(value_gradient * 2, self.maps(0.5, SEED))

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

    def test_saved_tensors_are_what_they_say(self):
        query, key, value = on_device(attention_inputs(ODD, torch.float32))
        segments, width = list(ODD.segments), ODD.key_channels
        seed = torch.tensor([SEED], device=DEVICE)
        output, *saved = torch.ops.uctrans.channel_attention(query, key, value, segments, 0.3, EPS, seed)
        saved = operator.Saved(*saved)
        query, key = query.double(), key.double()
        scores = query.transpose(-1, -2) @ key
        deviations = [block.std(dim=(2, 3), correction=0, keepdim=True) for block in scores.split(segments, dim=2)]
        temperatures = torch.cat(
            [
                1 / (deviation**2 + EPS * width).sqrt()[..., 0].expand(-1, -1, channels)
                for deviation, channels in zip(deviations, segments, strict=True)
            ],
            dim=2,
        )
        query_means, key_means = (tensor.mean(dim=2, keepdim=True) for tensor in (query, key))
        keys = torch.cat([key - key_means, ODD.tokens**0.5 * key_means], dim=2)
        centred = keys - keys.mean(dim=-1, keepdim=True)
        expected = {
            "temperatures": temperatures,
            "log_sums": torch.logsumexp(scores * temperatures.unsqueeze(-1), dim=-1) / math.log(2),
            "query_token_means": query_means.squeeze(2),
            "key_token_means": key_means.squeeze(2),
            "key_means": keys.mean(dim=-1),
            "key_gram": centred @ centred.transpose(-1, -2) / width,
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(saved, name).double(), tensor, rtol=1e-5, atol=1e-4, msg=name)
        assert torch.equal(saved.row_keys, row_keys(seed, saved.row_keys[0].numel()).view_as(saved.row_keys))
        torch.testing.assert_close(saved.head_outputs.mean(dim=1), output)

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
    shape = AttentionShape(2, 2, 5, (8, 12), 20)

    def inputs(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            tensor = torch.randn(*size, generator=generator, dtype=torch.float64)
            return tensor.to(DEVICE, dtype).requires_grad_()

        tokens, context = normal(2, 5, 20), normal(2, 5, 20)
        return [tokens, context, normal(2, 2, 20, 20), *(normal(2, width, width) for width in self.shape.segments)]

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

    def test_nothing_is_copied_between_projections_and_operator(self):
        inputs = self.inputs()
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


class TestLimits:
    """Beyond the limits of the kernels the composed form takes their place."""

    long = AttentionShape(1, 1, 257, (70,), 90)

    @staticmethod
    def fits(tokens, dtype=torch.float16, heads=(2, 4), width=48, needs_gradient=False):
        tensor = torch.empty(*heads, tokens, width, dtype=dtype, device="meta", requires_grad=needs_gradient)
        return operator._fits_kernels(tensor, tensor, tensor)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_tokens(self, dtype):
        most = 256 if dtype == torch.float32 else 640
        assert self.fits(most, dtype) and not self.fits(most + 1, dtype)
        assert self.fits(256, dtype, width=47) and not self.fits(257, dtype, width=47)  # rows that are not aligned
        assert self.fits(256, dtype, needs_gradient=True) and not self.fits(257, dtype, needs_gradient=True)
        with torch.no_grad():
            assert self.fits(most, dtype, needs_gradient=True)

    def test_heads(self):
        assert self.fits(5, heads=(13107, 5)) and not self.fits(5, heads=(16384, 4))

    def test_longest_forward(self):
        """Without a gradient the kernel takes 257 tokens; with one, torch does."""
        shape = AttentionShape(1, 1, 257, (8,), 8)
        inputs = on_device(attention_inputs(shape, torch.float16))
        assert_as_exact_as_the_reference((8,), inputs, dropout_p=0.2, seed=SEED)
        compiled = torch.compile(attend((8,), dropout_p=0.2, seed=SEED), fullgraph=True, backend="aot_eager")
        expected = attend((8,), "reference", dropout_p=0.2, seed=SEED)(*inputs)
        found = compiled(*inputs)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)
        # A tensor that starts off 16 bytes is copied: the rows in it are aligned.
        shifted = [torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(1, 1, 257, 8) for tensor in inputs]
        assert torch.equal(attend((8,), dropout_p=0.2, seed=SEED)(*shifted), found)

    @pytest.mark.parametrize(("backend", "keeps_maps"), [("triton", False), ("composed", True)])
    def test_no_map_is_kept_for_backward(self, backend, keeps_maps):
        inputs = [tensor.requires_grad_() for tensor in on_device(attention_inputs(self.long, torch.float32))]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda size: size):
            attend((70,), backend)(*inputs)
        assert (70 * 90 in sizes) == keeps_maps

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiles_without_a_break(self, backend):
        inputs = on_device(attention_inputs(self.long, torch.float32))
        function = attend((70,), dropout_p=0.3, seed=torch.tensor([SEED], device=DEVICE))
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        gradient = torch.ones(1, 257, 70, dtype=torch.float64, device=DEVICE)
        results, expected = (outputs_and_gradients(form, inputs, gradient) for form in (compiled, function))
        torch.testing.assert_close(results, expected)

    def test_more_heads_than_a_grid_has(self):
        inputs = [torch.randn(32768, 2, 1, 2, device=DEVICE) for _ in range(3)]
        torch.testing.assert_close(attend((2,))(*inputs), attend((2,), "reference")(*inputs))

    def test_projected(self):
        generator = torch.Generator().manual_seed(0)
        assert not correlating_is_cheaper(257, 1, (258,), 258)
        sizes = ((1, 257, 258), (1, 257, 258), (2, 1, 258, 258), (1, 258, 258))
        inputs = [(torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(DEVICE) for size in sizes]
        results, expected = (TestProjected.attend(backend)(*inputs) for backend in ("triton", "reference"))
        torch.testing.assert_close(results, expected, atol=1e-5, rtol=1e-4)  # float32 ends at 256 tokens


@pytest.mark.gpu
class TestOnAGpu:
    shape = AttentionShape(4, 4, 196, (64, 128, 256, 512), 960)

    def inputs(self):
        return [tensor.requires_grad_() for tensor in on_device(attention_inputs(self.shape, torch.bfloat16))]

    def test_peak_memory_holds_no_map(self):
        """Forward and backward together need less than a quarter of the reference's peak."""
        peaks = {}
        for backend in ("triton", "reference"):
            inputs = self.inputs()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            attend(self.shape.segments, backend, dropout_p=0.1)(*inputs).sum().backward()
            torch.cuda.synchronize()
            peaks[backend] = torch.cuda.max_memory_allocated() - before
        assert peaks["triton"] < peaks["reference"] / 4

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
