"""The layers on PyTorch: packed transformer, reconstruction on the token grid, gate, and bad input."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uctrans.layers import (
    ChannelAttention,
    ChannelGate,
    ChannelTransformer,
    Encoder,
    Reconstruct,
    TransformerLayer,
    pad_to_multiple,
    set_backend,
)
from uctrans.layers.packed import PackedLayerNorm, PackedLinear, PackedMlp

CHANNELS, PATCHES, GRID = (4, 8, 12), (8, 4, 2), (2, 3)


def transformer(channels=CHANNELS, **options):
    torch.manual_seed(0)
    options = {"num_layers": 2, "num_heads": 2, "embedding_dropout": 0.0, "attention_dropout": 0.0} | options
    return ChannelTransformer(channels, PATCHES, GRID, **options)


def features(channels=CHANNELS, grid=GRID, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        None
        if width is None
        else torch.randn(batch, width, grid[0] * patch, grid[1] * patch, generator=generator, dtype=dtype)
        for width, patch in zip(channels, PATCHES, strict=True)
    ]


class TestPackedLayers:
    @pytest.mark.parametrize("kind", [PackedLayerNorm, PackedLinear, "mlp"])
    def test_scales_do_not_see_each_other(self, kind):
        if kind == "mlp":
            mlp = PackedMlp(CHANNELS, 2, 0.0)
            layer = functools.partial(mlp, residual=torch.zeros(2, 5, sum(CHANNELS)))
        else:
            layer = kind(CHANNELS)
        tokens = torch.randn(2, 5, sum(CHANNELS))
        changed = tokens.clone()
        changed[..., : CHANNELS[0]] += torch.randn(2, 5, CHANNELS[0])
        before, after = layer(tokens), layer(changed)
        assert torch.equal(before[..., CHANNELS[0] :], after[..., CHANNELS[0] :])
        assert not torch.equal(before[..., : CHANNELS[0]], after[..., : CHANNELS[0]])

    def test_layer_norm_is_that_of_each_scale(self):
        layer = PackedLayerNorm(CHANNELS)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        tokens = torch.randn(2, 5, sum(CHANNELS))
        start = 0
        for width in CHANNELS:
            part = slice(start, start + width)
            expected = F.layer_norm(tokens[..., part], (width,), layer.weight[part], layer.bias[part], 1e-6)
            torch.testing.assert_close(layer(tokens)[..., part], expected)
            start += width


class TestReconstruct:
    def pair(self, channels=6, patch=4):
        torch.manual_seed(0)
        composed = Reconstruct(channels, patch, "composed")
        published = Reconstruct(channels, patch, "reference")
        published.load_state_dict(composed.state_dict())
        return composed, published

    @pytest.mark.parametrize("batch_and_grid", [(2, 3, 5), (1, 1, 2), (1, 1, 1), (3, 1, 1)], ids=str)
    def test_output_and_buffers_over_ten_steps(self, batch_and_grid):
        batch, *grid = batch_and_grid
        composed, published = (module.double() for module in self.pair())
        for step in range(10):
            tokens = torch.randn(batch, 6, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            expected = published(tokens)
            ours = composed(tokens)
            assert ours.shape[-2:] == tuple(grid)
            torch.testing.assert_close(F.interpolate(ours, scale_factor=4.0), expected)
        for name, buffer in published.norm.named_buffers():
            torch.testing.assert_close(composed.norm.get_buffer(name), buffer, rtol=1e-12, atol=0, msg=name)
        composed.eval(), published.eval()
        tokens = torch.randn(batch, 6, *grid, dtype=torch.float64)
        torch.testing.assert_close(F.interpolate(composed(tokens), scale_factor=4.0), published(tokens))

    def test_empty_batch(self):
        for module in self.pair():
            assert module(torch.rand(0, 6, 2, 3)).shape[0] == 0

    def test_cumulative_statistics(self):
        composed, published = (module.double() for module in self.pair())
        composed.norm.momentum = published.norm.momentum = None
        for _ in range(3):
            tokens = torch.randn(2, 6, 2, 3, dtype=torch.float64)
            torch.testing.assert_close(F.interpolate(composed(tokens), scale_factor=4.0), published(tokens))
        torch.testing.assert_close(composed.norm.running_var, published.norm.running_var)

    def test_statistics_over_two_processes(self, monkeypatch):
        """Synchronised batch norm counts the tokens of all processes; here each process holds the same ones."""
        batch_norm = F.batch_norm

        def of_two_processes(tokens, *arguments, **options):
            return batch_norm(torch.cat([tokens, tokens]), *arguments, **options)[: len(tokens)]

        monkeypatch.setattr(F, "batch_norm", of_two_processes)
        monkeypatch.setattr("uctrans.layers.tokens._processes", lambda norm: 2)
        composed, published = (module.double() for module in self.pair())
        tokens = torch.randn(1, 6, 1, 2, dtype=torch.float64)
        torch.testing.assert_close(F.interpolate(composed(tokens), scale_factor=4.0), published(tokens))
        torch.testing.assert_close(composed.norm.running_var, published.norm.running_var, rtol=1e-12, atol=0)

    def test_uncorrected_variance_would_show(self):
        """Plain batch norm over few tokens leaves another running variance, so the tests above can fail."""
        composed, published = self.pair()
        tokens = torch.randn(1, 6, 1, 2)
        published(tokens)
        composed.norm(composed.conv(tokens))
        assert (composed.norm.running_var / published.norm.running_var - 1).abs().max() > 0.01

    def test_gradients(self):
        composed, published = (module.double() for module in self.pair())
        tokens = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 6, 8, 12, dtype=torch.float64)
        ours = torch.autograd.grad(
            (F.interpolate(composed(tokens), scale_factor=4.0) * weight).sum(), [tokens, *composed.parameters()]
        )
        theirs = torch.autograd.grad((published(tokens) * weight).sum(), [tokens, *published.parameters()])
        for gradient, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, expected)


class TestChannelTransformer:
    def test_backends_agree_in_output_gradient_and_buffers(self):
        results = []
        for backend in ("reference", "composed"):
            module = set_backend(transformer().double(), backend)
            inputs = [feature.requires_grad_() for feature in features(dtype=torch.float64)]
            outputs = module(inputs)
            gradients = torch.autograd.grad(
                sum((output**2).mean() for output in outputs), [*inputs, *module.parameters()]
            )
            results.append([*outputs, *gradients, *(buffer.double() for buffer in module.buffers())])
        for published, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, published, rtol=1e-7, atol=1e-10)

    def test_forward_adds_the_token_maps(self):
        module, inputs = transformer().eval(), features()
        for enriched, feature, tokens in zip(module(inputs), inputs, module.token_maps(inputs), strict=True):
            assert tokens.shape[-2:] == GRID
            torch.testing.assert_close(
                enriched - feature, F.interpolate(tokens, size=feature.shape[-2:]), atol=1e-6, rtol=0
            )

    @pytest.mark.parametrize("backend", ["reference", "composed"])
    def test_scale_switched_off_passes_none_through(self, backend):
        channels = (4, None, 12)
        module = set_backend(transformer(channels).eval(), backend)
        outputs = module(features(channels))
        assert outputs[1] is None
        assert [output.shape[1] for output in outputs if output is not None] == [4, 12]
        assert module.layers[0].attention.key_value.shape == (2, 2, 16, 16)

    def test_single_scale(self):
        module = ChannelTransformer((5,), (4,), (2, 2), num_layers=1, num_heads=3)
        (output,) = module([torch.randn(2, 5, 8, 8)])
        assert output.shape == (2, 5, 8, 8)

    @pytest.mark.parametrize("backend", ["reference", "composed"])
    def test_another_grid_interpolates_positions(self, backend):
        module = set_backend(transformer().eval(), backend)
        for embedding in module.embeddings:
            nn.init.normal_(embedding.position)
        inputs = features(grid=(4, 5))
        outputs = module(inputs)
        for embedding in module.embeddings:
            position = F.interpolate(embedding.position, size=(4, 5), mode="bicubic", align_corners=False)
            embedding.position = nn.Parameter(position)
        for output, expected in zip(outputs, module(inputs), strict=True):
            torch.testing.assert_close(output, expected)

    def test_maps_are_distributions_over_all_channels(self):
        module = transformer().eval()
        _, maps = module.token_maps_with_attention(features())
        assert len(maps) == 2
        for layer_maps in maps:
            assert [tuple(scale.shape) for scale in layer_maps] == [(2, width, 24) for width in CHANNELS]
            for scale in layer_maps:
                torch.testing.assert_close(scale.sum(dim=-1), torch.ones(scale.shape[:2]))

    @pytest.mark.parametrize("where", ["embedding_dropout", "attention_dropout", "mlp_dropout"])
    @pytest.mark.parametrize("backend", ["reference", "composed"])
    def test_each_dropout_acts_in_training_only(self, backend, where):
        module = set_backend(transformer(**{where: 0.3}), backend)
        inputs = features()
        module.eval()
        assert torch.equal(module(inputs)[0], module(inputs)[0])
        module.train()
        assert not torch.equal(module(inputs)[0], module(inputs)[0])

    @pytest.mark.parametrize("backend", ["reference", "composed"])
    def test_dropout_of_the_maps(self, backend):
        module = set_backend(transformer(attention_dropout=0.3), backend)
        for layer in module.layers:
            layer.attention.output_dropout.p = 0.0
        assert not torch.equal(module(features())[0], module(features())[0])

    def test_bfloat16_autocast(self):
        module, inputs = transformer().eval(), features()
        exact = module(inputs)
        for backend in ("reference", "composed"):
            set_backend(module, backend)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = module(inputs)
            for output, expected in zip(outputs, exact, strict=True):
                assert (output - expected).abs().max() < 0.03

    def test_bad_input(self):
        module = transformer()
        with pytest.raises(ValueError, match=r"scales \['on', 'on', 'on'\]; got \['feature', 'None', 'feature'\]"):
            module(features((4, None, 12)))
        wrong = features()
        wrong[1] = wrong[1][..., 1:]
        with pytest.raises(ValueError, match="feature 1 is 8x11 pixels, no multiple of its patch size 4"):
            module(wrong)
        wrong = features()
        wrong[2] = wrong[2][..., 2:]
        with pytest.raises(ValueError, match="one token grid"):
            module(wrong)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda first, second, third: {"a": first}, TypeError, "features must be a list or tuple, .*; got dict"),
            (lambda first, second, third: first, TypeError, "features must be a list or tuple, .*; got Tensor"),
            (lambda first, second, third: [first, 3, third], TypeError, "feature 1 must be a tensor; got int"),
            (lambda first, second, third: [first, second[0], third], ValueError, r"feature 1 must be \(B, 8, height"),
            (lambda first, second, third: [first, second, third[:, 1:]], ValueError, r"feature 2 .*got \(2, 11, 4, 6"),
            (lambda first, second, third: [first, second[:1], third], ValueError, "feature 1 holds 1, not 2"),
            (
                lambda first, second, third: [first, second.double(), third],
                TypeError,
                r"weights torch.float32, .* feature 1 torch.float64, .*: convert them with .to\(dtype\), or run under",
            ),
            (lambda *features: [feature.half() for feature in features], TypeError, "feature 0 torch.float16"),
            (lambda first, second, third: [first.to("meta"), second, third], ValueError, "feature 0 meta"),
        ],
    )
    def test_bad_features(self, change, error, message):
        with pytest.raises(error, match=message):
            transformer()(change(*features()))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"patch_sizes": (4, 2)}, ValueError, "3 scales need as many patch sizes"),
            ({"channels": (None,) * 3}, ValueError, "at least one scale"),
            ({"channels": (4, 0, 12)}, ValueError, r"channels\[1\] must be at least 1; got 0"),
            ({"channels": (4, 8.0, 12)}, TypeError, r"channels\[1\] must be an int, such as 4; got 8.0"),
            ({"channels": 12}, TypeError, "channels must be a list or tuple, one width a scale, .*; got int"),
            ({"patch_sizes": 8}, TypeError, "patch_sizes must be a list or tuple, one side a scale; got int"),
            ({"patch_sizes": (8, 4, 0)}, ValueError, r"patch_sizes\[2\] must be at least 1"),
            ({"grid": 8}, TypeError, "grid must be a list or tuple, rows and columns of tokens; got int"),
            ({"grid": (8,)}, ValueError, r"grid must be rows and columns of tokens; got \(8,\)"),
            ({"grid": (8, 0)}, ValueError, "columns must be at least 1"),
            ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
            ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
            ({"mlp_ratio": -1}, ValueError, "mlp_ratio must be at least 1"),
            ({"mlp_dropout": 1.5}, ValueError, r"mlp_dropout must be in \[0, 1\)"),
            ({"backend": "tritn"}, ValueError, "unknown backend 'tritn'"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, changes, error, message):
        arguments = {"channels": CHANNELS, "patch_sizes": PATCHES, "grid": GRID} | changes
        with pytest.raises(error, match=message):
            ChannelTransformer(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda backend: ChannelAttention(CHANNELS, 2, 0.0, backend),
        lambda backend: TransformerLayer(CHANNELS, 2, 2, 0.0, 0.0, backend),
        lambda backend: Reconstruct(4, 2, backend),
        lambda backend: PackedLayerNorm(CHANNELS, backend),
        lambda backend: PackedLinear(CHANNELS, backend),
        lambda backend: PackedMlp(CHANNELS, 2, 0.0, backend),
        lambda backend: ChannelGate(4, 4, backend=backend),
    ],
)
def test_every_layer_knows_its_backend_when_it_is_made(make):
    make("composed")
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        make("tritn")


class TestChannelGate:
    @pytest.mark.parametrize("backend", ["reference", "composed"])
    def test_drop_in(self, backend):
        """The gate fits any U-Net: other widths of skip and decoder, decoder at half or full size, no tokens."""
        gate = ChannelGate(6, 10, backend=backend)
        skip = torch.randn(2, 6, 8, 12)
        assert gate(skip, torch.randn(2, 10, 4, 6)).shape == (2, 16, 8, 12)
        assert gate(skip, torch.randn(2, 10, 8, 12)).shape == (2, 16, 8, 12)

    def test_without_a_decoder_half(self):
        skip, decoded = torch.randn(2, 6, 8, 12), torch.randn(2, 10, 4, 6)
        whole, alone = ChannelGate(6, 10), ChannelGate(6, 10, concatenate=False)
        alone.load_state_dict(whole.state_dict())
        torch.testing.assert_close(alone(skip, decoded), whole(skip, decoded)[:, :6])
        assert ChannelGate(6, None)(skip).shape == skip.shape

    def test_widths_below_one(self):
        with pytest.raises(ValueError, match="skip_channels must be at least 1; got 0"):
            ChannelGate(0, 4)
        with pytest.raises(ValueError, match="decoder_channels must be at least 1; got -1"):
            ChannelGate(4, -1)

    def test_decoder_that_does_not_match(self):
        skip, decoded = torch.randn(2, 6, 8, 12), torch.randn(2, 10, 4, 6)
        with pytest.raises(ValueError, match="made for no decoder feature"):
            ChannelGate(6, None)(skip, decoded)
        with pytest.raises(ValueError, match="decoder_feature is missing"):
            ChannelGate(6, 10)(skip)
        with pytest.raises(ValueError, match=r"weight_decoder must be \(6, 10\)"):
            ChannelGate(6, 9)(skip, decoded)


def test_encoder_shapes():
    features, deepest = Encoder(3, (4, 8, 16))(torch.randn(1, 3, 32, 48))
    assert [tuple(feature.shape) for feature in features] == [(1, 4, 32, 48), (1, 8, 16, 24), (1, 16, 8, 12)]
    assert deepest.shape == (1, 16, 4, 6)


def test_padding_repeats_the_last_row_and_column():
    image = torch.rand(1, 2, 3, 7)
    padded = pad_to_multiple(image, 4)
    assert torch.equal(padded, torch.cat([image, image[..., -1:]], -1)[..., [0, 1, 2, 2], :])
    assert pad_to_multiple(padded, 4) is padded
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"multiple must be at least 1; got {wrong}"):
            pad_to_multiple(image, wrong)
    with pytest.raises(TypeError, match="multiple must be a whole number; got float"):
        pad_to_multiple(image, 4.0)


def test_set_backend_reaches_every_layer_and_refuses_unknown_names(monkeypatch):
    module = set_backend(transformer(), "reference")
    switched = [part for part in module.modules() if hasattr(part, "backend")]
    assert {part.backend for part in switched} == {"reference"}
    layers = (TransformerLayer, ChannelAttention, PackedLayerNorm, PackedLinear, PackedMlp, Reconstruct)
    assert {type(part) for part in switched} == set(layers)
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        set_backend(module, "tritn")
    with pytest.raises(ValueError, match="Conv2d has no layer with a backend"):
        set_backend(torch.nn.Conv2d(3, 4, 1), "composed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="run on a CUDA device"):
        set_backend(module, "triton")(features())
