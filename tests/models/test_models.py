"""Every model: sizes, gradients, compiling, exporting, bad input; then UCTransNet and U-Net."""

import json

import numpy as np
import pytest
import torch

import uctrans
from tests.models.support import FEW_SCALES, NAMES, build, randomised


@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    @pytest.mark.parametrize("size", [(32, 32), (1, 1), (17, 50), (96, 33)], ids=str)
    def test_any_size(self, name, size):
        logits = build(name, in_channels=2, classes=3).eval()(torch.rand(2, 2, *size))
        assert logits.shape == (2, 3, *size)
        assert torch.isfinite(logits).all()

    def test_every_parameter_gets_a_gradient(self, name):
        model = build(name)
        model(torch.rand(2, 3, 32, 32)).square().mean().backward()
        without = [
            key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()
        ]
        assert without == []

    def test_padding_does_not_reach_the_image(self, name):
        """An image whose last row and column are repeated gives the same logits as the padded one."""
        model = build(name).eval()
        image = torch.rand(1, 3, 30, 31)
        continued = torch.cat([image, image[..., -1:]], dim=3)
        continued = torch.cat([continued, continued[..., -1:, :], continued[..., -1:, :]], dim=2)
        torch.testing.assert_close(model(image), model(continued)[..., :30, :31])

    @pytest.mark.slow
    @torch.no_grad()
    def test_inference_compiles_without_a_graph_break(self, name):
        model = build(name, **FEW_SCALES[name]).eval()
        image = torch.rand(2, 3, 16, 24)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), model(image))

    def test_training_compiles_without_a_graph_break(self, name):
        model = build(name, **FEW_SCALES[name])
        image = torch.rand(2, 3, 16, 24)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(5)
        output = compiled(image)
        output.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        state = {key: value.clone() for key, value in model.state_dict().items()}

        plain = build(name, **FEW_SCALES[name])
        torch.manual_seed(5)
        expected = plain(image)
        expected.square().mean().backward()
        torch.testing.assert_close(output, expected)
        for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(state[key], value, msg=key)

    @pytest.mark.slow
    def test_compiles_for_sizes_that_change(self, name):
        """From the second size on, height and width are symbols, and the padding is computed from them."""
        model = build(name, **FEW_SCALES[name]).eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for size in ((32, 32), (49, 40)):
                image = torch.rand(1, 3, *size)
                torch.testing.assert_close(compiled(image), model(image))

    def test_exports_without_a_graph_break(self, name):
        model = randomised(build(name, **FEW_SCALES[name]))
        image = torch.rand(2, 3, 18, 24)
        program = torch.export.export(model, (image,))
        torch.testing.assert_close(program.module()(image), model(image))

    def test_takes_arrays_for_lists(self, name):
        widths = (4, 6, 8, 10)
        model = build(name, base_channels=np.array(widths), classes=np.int64(2))
        assert model.config == build(name, base_channels=widths, classes=2).config
        json.dumps(model.config)

    def test_refuses_images_of_another_kind(self, name):
        model = build(name)
        with pytest.raises(ValueError, match=r"the image must be \(B, 3, height, width\); got \(2, 1, 32, 32\)"):
            model(torch.rand(2, 1, 32, 32))
        with pytest.raises(ValueError, match=r"got \(3, 32, 32\)"):
            model(torch.rand(3, 32, 32))
        with pytest.raises(ValueError, match=r"got \(1, 3, 0, 32\)"):
            model(torch.rand(1, 3, 0, 32))
        with pytest.raises(TypeError, match="divide by 255"):
            model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        for dtype in (torch.float16, torch.float64):
            with pytest.raises(TypeError, match=f"got image {dtype}, weights torch.float32: convert them with"):
                model(torch.rand(1, 3, 32, 32).to(dtype))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("in_channels", None, "in_channels must be an int, such as 4; got None"),
        ("classes", True, "classes must be an int, .* got True"),
        (
            "base_channels",
            None,
            r"base_channels must be a whole number, such as 64, or .* \(64, 128, 256, 512\); got None",
        ),
        ("base_channels", 64.0, "base_channels must be a whole number, .* got 64.0"),
        ("base_channels", "64", "base_channels must be a whole number, .* got '64'"),
        ("base_channels", (4, 8, 16, 32.0), r"base_channels must be a whole number, .* got \[4, 8, 16, 32.0\]"),
        ("skips", 3, r"skips must be a list of numbers of 1 to 4, such as \(1, 2\), .* got 3"),
        ("skips", (1, "2"), r"skips must be a list .* got \[1, '2'\]"),
        ("image_size", None, r"image_size must be .* such as 224, or height and width: \(224, 320\); got None"),
        ("image_size", 224.5, "image_size must be .* got 224.5"),
        ("image_size", (32.0, 32.0), r"image_size must be .* got \[32.0, 32.0\]"),
        ("patch_sizes", 16, r"patch_sizes must be a list of whole numbers, .* such as \(16, 8, 4, 2\); got 16"),
        ("patch_sizes", (16.0, 8.0, 4.0, 2.0), "patch_sizes must be a list of whole numbers"),
        ("num_heads", 2.0, "num_heads must be an int"),
        ("mlp_dropout", "0.1", "mlp_dropout must be a number, such as 0.1; got '0.1'"),
    ],
    ids=str,
)
def test_refuses_options_of_another_type(option, value, message):
    names = [name for name in NAMES if option in build(name).config]
    assert names
    for name in names:
        with pytest.raises(TypeError, match=message):
            build(name, **{option: value})


@pytest.mark.parametrize("name", ["uctransnet", "dual_branch_uctransnet"])
class TestNetworksWithATransformer:
    def test_backends_agree(self, name):
        model = randomised(build(name)).double()
        image = torch.rand(2, 3, 40, 56, dtype=torch.float64)
        outputs = {backend: uctrans.set_backend(model, backend)(image) for backend in ("reference", "composed")}
        torch.testing.assert_close(outputs["composed"], outputs["reference"])

    @pytest.mark.parametrize("patch_sizes", [(8,), (4, 2), (16, 8, 4), (32, 16, 8, 4, 2)], ids=str)
    def test_any_number_of_scales(self, name, patch_sizes):
        depths = {"depths": range(len(patch_sizes), 0, -1), "dilations": 1} if name != "uctransnet" else {}
        model = build(name, num_layers=1, patch_sizes=patch_sizes, **depths)
        assert model(torch.rand(2, 3, 64, 80)).shape == (2, 1, 64, 80)

    def test_oblong_image_size(self, name):
        model = build(name, image_size=(32, 64))
        assert model.transformer.embeddings[0].position.shape[-2:] == (2, 4)
        assert model(torch.rand(2, 3, 32, 64)).shape == (2, 1, 32, 64)

    def test_attention_maps(self, name):
        model = build(name, num_layers=2).eval()
        image = torch.rand(2, 3, 30, 32)
        logits, maps = model.forward_with_attention(image)
        torch.testing.assert_close(logits, model(image))
        shapes = [(2, width, 60) for width in (4, 8, 16, 32)]
        assert [[tuple(scale.shape) for scale in layer] for layer in maps] == [shapes] * 2

    @pytest.mark.parametrize("image_size", [64, (64, 32)], ids=str)
    def test_positions_for_another_size(self, name, image_size):
        model = randomised(build(name))
        resized = uctrans.resize_positions(model, image_size)
        rows, columns = (64, 64) if image_size == 64 else image_size
        assert resized.transformer.embeddings[0].position.shape[-2:] == (rows // 16, columns // 16)
        image = torch.rand(1, 3, rows, columns)
        torch.testing.assert_close(resized(image), model(image))  # interpolated once, or in every call

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patch_sizes": (16, 4)}, "patch_sizes must halve"),
            ({"patch_sizes": ()}, "one positive size a scale"),
            ({"base_channels": 0}, "base_channels must be one width, or 4, at least 1 each"),
            ({"base_channels": (4, 8)}, "base_channels must be one width, or 4"),
            ({"image_size": 0}, "image_size must be a positive side"),
            ({"image_size": (32,)}, "image_size must be a positive side, or height and width"),
            ({"backend": "fast"}, "unknown backend 'fast'"),
            ({"num_layers": -1}, "num_layers must be at least 1"),
            ({"num_heads": 0}, "num_heads must be at least 1"),
            ({"classes": 0}, "classes must be at least 1"),
            ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
        ],
        ids=str,
    )
    def test_refuses_options_that_do_not_fit(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            build(name, **options)


class TestUCTransNet:
    def test_any_widths(self):
        model = build("uctransnet", base_channels=(5, 3, 7, 6))
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)
        assert model.load_unet(build("unet", base_channels=(5, 3, 7, 6)))

    def test_starts_from_a_unet(self):
        unet = randomised(build("unet"))
        model = build("uctransnet")
        untouched = {key: value.clone() for key, value in model.state_dict().items()}
        taken = model.load_unet(unet)
        state = model.state_dict()
        assert taken == list(unet.state_dict())
        assert all(torch.equal(state[key], value) for key, value in unet.state_dict().items())
        assert all(torch.equal(state[key], untouched[key]) for key in state.keys() - set(taken))

    def test_starts_from_a_unet_of_other_classes_and_channels(self):
        unet = randomised(build("unet", classes=2, in_channels=1))
        model = build("uctransnet")
        new = ["encoder.stem.conv.weight", "head.weight", "head.bias"]
        assert model.start_from(unet) == new
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in unet.state_dict().items() if key not in new)

    def test_interpolates_the_positions_of_another_image_size(self):
        source = randomised(build("uctransnet"))
        model = uctrans.create_model(**{**source.config, "name": "uctransnet", "image_size": 64})
        assert model.start_from(source) == []
        resized = uctrans.resize_positions(source, 64).state_dict()
        assert all(torch.equal(value, resized[key]) for key, value in model.state_dict().items())

    def test_refuses_to_start_with_another_number_of_scales(self):
        model = build("uctransnet", patch_sizes=(32, 16, 8, 4, 2), base_channels=(4, 8, 16, 32, 32))
        with pytest.raises(uctrans.ModelFileError, match="four scales"):
            model.load_unet(build("unet"))

    def test_defaults_are_the_published_ones(self):
        with torch.device("meta"):
            config = uctrans.UCTransNet().config
        assert config == {
            "in_channels": 3,
            "classes": 1,
            "image_size": 224,
            "base_channels": 64,
            "num_layers": 4,
            "num_heads": 4,
            "patch_sizes": [16, 8, 4, 2],
            "mlp_ratio": 4,
            "embedding_dropout": 0.1,
            "attention_dropout": 0.1,
            "mlp_dropout": 0.0,
            "backend": "auto",
        }

    @pytest.mark.parametrize("options", [{"base_channels": 8}, {"skips": (1, 2)}], ids=str)
    def test_refuses_to_start_from_an_unfit_unet(self, options):
        model = build("uctransnet")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(uctrans.ModelFileError, match="does not fit this UCTransNet"):
            model.load_unet(build("unet", **options))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_refuses_to_start_from_what_is_no_unet(self, tmp_path):
        with pytest.raises(TypeError, match=r"must be a UNet, such as uctrans.load_model gives; got UCTransNet"):
            build("uctransnet").load_unet(build("uctransnet"))
        with pytest.raises(TypeError, match=r"must be a UNet, .* got str"):
            build("uctransnet").load_unet(str(tmp_path))


def test_a_unet_starts_a_uctransnet_and_no_other_model():
    assert [name for name in NAMES if build(name).can_start_from_unet] == ["uctransnet"]
    with pytest.raises(uctrans.ModelFileError, match="does not fit this DualBranchUCTransNet"):
        build("dual_branch_uctransnet").load_unet(build("unet"))


class TestUNet:
    @pytest.mark.parametrize("skips", [(), (1,), (4,), (2, 3), (1, 2, 3, 4)], ids=str)
    def test_any_subset_of_skips(self, skips):
        model = build("unet", skips=skips)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)
        widths = [stage.convs[0].conv.in_channels for stage in model.decoder]
        assert widths == [width * (2 if scale + 1 in skips else 1) for scale, width in enumerate((4, 8, 16, 32))]

    def test_a_missing_skip_carries_nothing(self):
        """Without skips the decoder sees the deepest feature alone."""
        model = build("unet", skips=()).eval()
        image = torch.rand(1, 3, 32, 32)
        expected, deepest = model(image), model.encoder(image)[1]
        model.encoder.forward = lambda _: ([None] * 4, deepest)
        assert model(torch.rand(1, 3, 32, 32)).equal(expected)

    @pytest.mark.parametrize("skips", [(0,), (5,), (1, 1)], ids=str)
    def test_refuses_unknown_skips(self, skips):
        with pytest.raises(ValueError, match="skips must be different numbers of 1 to 4"):
            build("unet", skips=skips)
