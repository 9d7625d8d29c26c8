"""DualBranchUCTransNet: the order of its parts, its options, bad input, and learning."""

import os

import pytest
import torch

import uctrans
from tests.models import support
from tests.models.support import FEW_SCALES, randomised
from uctrans.data import find_samples, load_native
from uctrans.inference import ExportConfig, export
from uctrans.layers import NestedU
from uctrans.training import image_dice, segmentation_loss
from uctrans.training.build import build_model
from uctrans.training.config import ConfigError, TrainConfig

MONUSEG = "UCTRANS_MONUSEG"


def build(**options):
    return support.build("dual_branch_uctransnet", **options)


def blobs(size, seed=0):
    """Return two noisy images (2, 3, size, size) of dark discs, and their masks (2, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = torch.zeros(2, size, size, dtype=torch.long)
    for mask in masks:
        for row, column, radius in torch.rand(8, 3, generator=generator):
            radius = (0.05 + 0.07 * radius) * size
            mask[(rows - row * size) ** 2 + (columns - column * size) ** 2 < radius**2] = 1
    colours = torch.tensor([[0.8, 0.6, 0.8], [0.5, 0.4, 0.6]])  # ground, disc
    noise = 0.15 * torch.randn(2, 3, size, size, generator=generator)
    return (colours[masks].permute(0, 3, 1, 2) + noise).clamp(0, 1), masks


class TestNetwork:
    def test_order_of_its_parts(self):
        model = build().eval()
        image = torch.rand(2, 3, 32, 48)
        features, feature = [], model.encoder.stem(image)
        for scale in range(4):
            features.append(model.encoder.nested[scale](feature))
            feature = model.encoder.stages[scale](features[scale])
        tokens = model.transformer.token_maps(features)
        for scale in (3, 2, 1, 0):
            feature = model.decoder[scale](features[scale], tokens[scale], feature)
        torch.testing.assert_close(model(image), model.head(feature))

    def test_triton_agrees(self):
        pytest.importorskip("triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = randomised(build(**FEW_SCALES["dual_branch_uctransnet"], mlp_ratio=1)).to(device)
        image = torch.rand(1, 3, 8, 16, device=device)
        with torch.no_grad():
            outputs = {backend: uctrans.set_backend(model, backend)(image) for backend in ("triton", "composed")}
        torch.testing.assert_close(outputs["triton"], outputs["composed"], rtol=1e-4, atol=1e-4)

    def test_channels_last(self):
        model = build().double().eval()
        image = torch.rand(2, 3, 40, 32, dtype=torch.float64)
        expected = model(image)
        model.to(memory_format=torch.channels_last)
        outputs = []
        model.encoder.stages[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
        torch.testing.assert_close(model(image.contiguous(memory_format=torch.channels_last)), expected)
        assert outputs[0].is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.slow
    @pytest.mark.parametrize("settings", [{}, {"formats": ("torch",), "dynamic": "size"}], ids=["batch", "size"])
    def test_exports(self, tmp_path, settings):
        """``export`` itself compares every program with the model, on several shapes."""
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        randomised(build()).save_pretrained(tmp_path / "model")
        written = export(ExportConfig(str(tmp_path / "model"), str(tmp_path / "out"), image_size=32, **settings))
        names = ["model.pt2", "export.json"] if settings else ["model.pt2", "model.onnx", "export.json"]
        assert [path.name for path in written] == names


class TestOptions:
    def test_any_widths(self):
        model = build(base_channels=(5, 2, 6, 10), nested_channels=(3, 1, 7, 2))
        assert [block.down[0].convs[0].conv.out_channels for block in model.encoder.nested] == [3, 1, 7, 2]
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)

    @pytest.mark.parametrize(("nested_channels", "expected"), [(None, [2, 4, 8, 16]), (3, [3, 6, 12, 24])], ids=str)
    def test_widths_of_the_nested_u(self, nested_channels, expected):
        model = build(nested_channels=nested_channels)
        assert [block.down[-1].convs[0].conv.out_channels for block in model.encoder.nested] == expected

    def test_a_channel_has_no_half(self):
        assert build(base_channels=(1, 2, 2, 2)).encoder.nested[0].down[0].convs[0].conv.out_channels == 1

    def test_one_dilation_for_all_or_one_for_each(self):
        def dilations(model):
            return [[block.conv.dilation[0] for block in stage.dilated] for stage in model.encoder.stages]

        assert dilations(build(image_size=224, dilations=5)) == [[5, 5]] * 4
        assert dilations(build(dilations=(4, 3, 2, 1))) == [[4, 4], [3, 3], [2, 2], [1, 1]]

    def test_depths(self):
        model = build(depths=(3, 0, 2, 1))
        depths = [len(block.down) if isinstance(block, NestedU) else 0 for block in model.encoder.nested]
        assert depths == [3, 0, 2, 1]
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)

    def test_images_are_padded_until_every_level_holds_its_depth(self):
        """Depth 3 at the fourth scale needs multiples of 64 pixels, so an image of 224 is padded to 256."""
        model = build(image_size=224, depths=(4, 3, 2, 3), dilations=2).eval()
        assert model.size_multiple == 64
        assert model.transformer.embeddings[0].position.shape[-2:] == (16, 16)
        for size in ((224, 224), (1, 1), (70, 33)):
            assert model(torch.rand(1, 3, *size)).shape == (1, 1, *size)

    def test_dilation_of_the_map_that_is_padded_for_the_depths(self):
        """Depth 2 at the fourth scale pads 48 pixels to 64; the last stage then has 4x4 pixels, not 3x3."""
        options = {"image_size": 48, "depths": (4, 3, 2, 2)}
        assert build(**options, dilations=(1, 1, 1, 3)).size_multiple == 32
        with pytest.raises(
            ValueError, match=r"dilations: 4 at down-sampling 4, whose map is 4x4 .* give at most 3 there"
        ):
            build(**options, dilations=(1, 1, 1, 4))
        with pytest.raises(ValueError, match="dilations: 3 at down-sampling 4, whose map is 3x3"):
            build(image_size=48, dilations=(1, 1, 1, 3))

    def test_defaults(self):
        with torch.device("meta"):
            config = uctrans.DualBranchUCTransNet().config
        assert config == {
            "in_channels": 3,
            "classes": 1,
            "image_size": 224,
            "base_channels": 64,
            "dilations": 2,
            "depths": [4, 3, 2, 1],
            "nested_channels": None,
            "num_layers": 4,
            "num_heads": 4,
            "patch_sizes": [16, 8, 4, 2],
            "mlp_ratio": 4,
            "embedding_dropout": 0.1,
            "attention_dropout": 0.1,
            "mlp_dropout": 0.0,
            "backend": "auto",
        }

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"dilations": 0}, ValueError, "dilations must be at least 1 each"),
            ({"dilations": (2, 2)}, ValueError, "dilations needs one number for each of the 4 scales .* got 2"),
            (
                {"dilations": (2, 2, 2, 1.5)},
                TypeError,
                r"dilations must be a whole number, such as 2, .* \[2, 2, 2, 1.5\]",
            ),
            ({"dilations": "2"}, TypeError, "dilations must be a whole number, such as 2, .* got '2'"),
            ({"dilations": True}, TypeError, "dilations must be a whole number, such as 2, .* got True"),
            ({"dilations": 2}, ValueError, "dilations: 2 at down-sampling 4, whose map is 2x2 .* give at most 1 there"),
            ({"dilations": (16, 1, 1, 1)}, ValueError, "dilations: 16 at down-sampling 1, whose map is 16x16"),
            ({"depths": (4, 3, 2, -1)}, ValueError, "depths must be at least 0 each"),
            ({"depths": (4, 3, 2)}, ValueError, "depths needs one number for each of the 4 scales .* got 3"),
            ({"depths": 4}, TypeError, r"depths must be a list of whole numbers, .* such as \(4, 3, 2, 1\); got 4"),
            ({"depths": (4, 3, 2, 3)}, ValueError, "depths: 3 at scale 4, whose map is 4x4 .* give at most 2 there"),
            (
                {"depths": (6, 3, 2, 1), "image_size": (32, 64)},
                ValueError,
                r"depths: 6 at scale 1, whose map is 32x64 for image_size \[32, 64\] and can be halved 5 times",
            ),
            ({"base_channels": (4, 5, 6, 8)}, ValueError, r"base_channels must be even .* got \[4, 5, 6, 8\]"),
            ({"nested_channels": 0}, ValueError, "nested_channels must be at least 1 each"),
            ({"nested_channels": (2, 4)}, ValueError, "nested_channels needs one number for each of the 4 scales"),
        ],
        ids=str,
    )
    def test_refuses_options_that_do_not_fit(self, options, error, message):
        with pytest.raises(error, match=message):
            build(**options)

    def test_options_of_a_training_run(self):
        options = {"depths": [2, 1, 0, 1], "num_layers": 1}
        config = TrainConfig("data", "run", model="dual_branch_uctransnet", base_channels=4, model_options=options)
        assert build_model(config, (64, 48)).config["depths"] == [2, 1, 0, 1]
        options["depths"] = [6, 1, 0, 1]
        with pytest.raises(ConfigError, match=r"model_options: .*depths: 6 at scale 1, whose map is 64x48"):
            build_model(config, (64, 48))

    def test_one_scale_with_an_odd_width(self):
        with pytest.raises(ValueError, match="base_channels must be even"):
            build(base_channels=(5,), patch_sizes=(2,), depths=(1,), dilations=1)


def test_full_size_counts():
    """Parameters and operations are as the documentation of DualBranchUCTransNet states."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = uctrans.DualBranchUCTransNet(backend="reference").eval()
        image = torch.empty(1, 3, 224, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == 74_036_289
    assert sum(parameter.numel() for parameter in model.encoder.nested.parameters()) == 10_333_568
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() == pytest.approx(116.5e9, rel=1e-3)
    with torch.device("meta"):
        plain = uctrans.DualBranchUCTransNet(depths=(0, 0, 0, 0), backend="reference").eval()
    with FlopCounterMode(display=False) as without, torch.no_grad():
        plain(image)
    assert counter.get_total_flops() - without.get_total_flops() == pytest.approx(45.3e9, rel=1e-3)


def least_dice_after_overfitting(name, images, masks, steps):
    """Train on two images; return the lower of their Dice scores in evaluation mode.

    The learning rate falls to zero, so that weights and running statistics settle before the score is taken.
    """
    torch.manual_seed(0)
    model = uctrans.create_model(name, base_channels=8, image_size=images.shape[-1], num_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = segmentation_loss(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return image_dice(model.eval()(images), masks).min().item()


@pytest.mark.parametrize("name", [pytest.param("uctransnet", marks=pytest.mark.slow), "dual_branch_uctransnet"])
def test_overfits_two_pictures(name):
    assert least_dice_after_overfitting(name, *blobs(64), steps=80) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(MONUSEG not in os.environ, reason=f"needs MoNuSeg: set {MONUSEG} to its folder of train, val, test")
@pytest.mark.parametrize("name", ["uctransnet", "dual_branch_uctransnet"])
def test_overfits_two_crops_of_monuseg(name):
    """Use the middle 96 x 96 pixels of the first two training images, at full resolution."""
    samples = find_samples(os.environ[MONUSEG], "train")[:2]
    tissue = load_native(samples, classes=1)
    corners = (tissue.sizes - 96) // 2
    images, masks = tissue.crops(torch.arange(2), *corners, (96, 96))
    assert 0 < masks.float().mean() < 1
    dice = least_dice_after_overfitting(name, images / 255, masks.long(), steps=80)
    print(f"{name} on {' and '.join(sample.name for sample in samples)}: Dice {dice:.3f}")
    assert dice > 0.95
