"""Every model: sizes, gradients, saving and loading, compiling and exporting, and what it refuses."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import uctrans
from uctrans.models import registry
from uctrans.models.base import CONFIG_FILE, WEIGHTS_FILE

SMALL = {
    "dual_branch_uctransnet": {
        "base_channels": 4,
        "image_size": 32,
        "dilations": (2, 2, 2, 1),
        "num_layers": 2,
        "num_heads": 2,
    },
    "unet": {"base_channels": 4},
    "uctransnet": {"base_channels": 4, "image_size": 32, "num_layers": 2, "num_heads": 2},
}
NAMES = sorted(SMALL)


def build(name, **options):
    torch.manual_seed(0)
    return uctrans.create_model(name, **(SMALL[name] | options))


def randomised(model):
    """Fresh weights with statistics and positions that are not zero or one, so that mixing them up shows."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    return model.eval()


def test_small_configurations_cover_the_registry():
    assert uctrans.list_models() == NAMES


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
        """An image whose last row and column go on is the same to the network as a padded one."""
        model = build(name).eval()
        image = torch.rand(1, 3, 30, 31)
        continued = torch.cat([image, image[..., -1:]], dim=3)
        continued = torch.cat([continued, continued[..., -1:, :], continued[..., -1:, :]], dim=2)
        torch.testing.assert_close(model(image), model(continued)[..., :30, :31])

    def test_save_and_load(self, name, tmp_path):
        model = randomised(build(name, classes=2))
        model.metadata = {"protocol": "uctransnet-224", "best_dice": 0.5}
        model.save_pretrained(tmp_path / "model")
        image = torch.rand(1, 3, 32, 32)
        for loaded in (uctrans.load_model(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model").eval()):
            assert loaded.config == model.config
            assert loaded.metadata == model.metadata
            assert torch.equal(loaded(image), model(image))
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]

    def test_run_folder_and_checkpoint(self, name, tmp_path):
        model = randomised(build(name))
        model.save_pretrained(tmp_path / "run" / "best")
        saved = {"name": name, "config": model.config, "metadata": {"epoch": 3}, "state": model.state_dict()}
        torch.save(
            {"format": "uctrans-checkpoint", "version": 1, "model": saved, "ema": None}, tmp_path / "run" / "last.pt"
        )
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(uctrans.load_model(tmp_path / "run")(image), model(image))
        loaded = uctrans.load_model(tmp_path / "run" / "last.pt")
        assert torch.equal(loaded(image), model(image))
        assert loaded.metadata == {"epoch": 3}

    def test_averaged_weights_are_preferred(self, name, tmp_path):
        model, averaged = build(name), randomised(build(name))
        saved = {"name": name, "config": model.config, "metadata": {}, "state": model.state_dict()}
        torch.save(
            {"format": "uctrans-checkpoint", "version": 1, "model": saved, "ema": averaged.state_dict()},
            tmp_path / "best.pt",
        )
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(uctrans.load_model(tmp_path / "best.pt")(image), averaged(image))

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_compiles_without_a_graph_break(self, name, training):
        model = build(name).train(training)
        image = torch.rand(2, 3, 32, 40)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(5)
        output = compiled(image)
        output.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        state = {key: value.clone() for key, value in model.state_dict().items()}

        plain = build(name).train(training)
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
        """The second size makes height and width symbols, from which the padding is computed."""
        one_scale = {"patch_sizes": (2,), "num_layers": 1} if name != "unet" else {}
        one_scale |= {"dilations": 2, "depths": (1,)} if name == "dual_branch_uctransnet" else {}
        model = build(name, **one_scale).eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for size in ((32, 32), (49, 40)):
                image = torch.rand(1, 3, *size)
                torch.testing.assert_close(compiled(image), model(image))

    def test_exports_without_a_graph_break(self, name):
        model = randomised(build(name))
        image = torch.rand(2, 3, 40, 48)
        program = torch.export.export(model, (image,))
        torch.testing.assert_close(program.module()(image), model(image))

    def test_hub_mixin_reads_what_we_write(self, name, tmp_path):
        hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
        model = randomised(build(name))
        model.save_pretrained(tmp_path)

        class OnHub(hub.PyTorchModelHubMixin, type(model)):
            pass

        loaded = OnHub.from_pretrained(tmp_path)
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(loaded.eval()(image), model(image))

    def test_push_to_hub_uploads_both_files(self, name, monkeypatch):
        hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
        uploaded = {}

        def upload_folder(repo_id, folder_path, commit_message):
            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
            return "address of the commit"

        monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: None)
        monkeypatch.setattr(hub, "upload_folder", upload_folder)
        assert build(name).push_to_hub("someone/something") == "address of the commit"
        assert uploaded == {"someone/something": [CONFIG_FILE, WEIGHTS_FILE]}

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

    def test_full_disk_keeps_the_former_weights(self, name, tmp_path, monkeypatch):
        model = randomised(build(name))
        model.save_pretrained(tmp_path)
        before = (tmp_path / WEIGHTS_FILE).read_bytes()

        def half_written(path, contents):
            with path.open("wb") as file:
                file.write(contents[: len(contents) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", half_written)
        with pytest.raises(OSError, match="No space left"):
            build(name).save_pretrained(tmp_path)
        assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


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


class TestUCTransNet:
    def test_backends_agree(self):
        model = build("uctransnet").double()
        image = torch.rand(2, 3, 40, 56, dtype=torch.float64)
        outputs = {}
        for backend in ("reference", "composed"):
            uctrans.set_backend(model.eval(), backend)
            outputs[backend] = model(image)
        torch.testing.assert_close(outputs["composed"], outputs["reference"])

    @pytest.mark.parametrize("patch_sizes", [(8,), (4, 2), (16, 8, 4), (16, 8, 4, 2), (32, 16, 8, 4, 2)], ids=str)
    def test_any_number_of_scales(self, patch_sizes):
        model = uctrans.UCTransNet(base_channels=3, image_size=32, num_layers=1, num_heads=2, patch_sizes=patch_sizes)
        assert model(torch.rand(2, 3, 64, 80)).shape == (2, 1, 64, 80)

    def test_any_widths(self):
        model = build("uctransnet", base_channels=(5, 3, 7, 6))
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 1, 32, 32)
        assert model.load_unet(build("unet", base_channels=(5, 3, 7, 6)))

    def test_oblong_image_size(self):
        model = build("uctransnet", image_size=(32, 64))
        assert model.transformer.embeddings[0].position.shape[-2:] == (2, 4)
        assert model(torch.rand(2, 3, 32, 64)).shape == (2, 1, 32, 64)

    def test_attention_maps(self):
        model = build("uctransnet").eval()
        logits, maps = model.forward_with_attention(torch.rand(2, 3, 30, 32))
        assert logits.shape == (2, 1, 30, 32)
        assert [[tuple(scale.shape) for scale in layer] for layer in maps] == [
            [(2, width, 60) for width in (4, 8, 16, 32)]
        ] * 2

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
    def test_refuses_options_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            build("uctransnet", **options)

    def test_starts_from_a_unet(self):
        unet = randomised(build("unet"))
        model = build("uctransnet")
        untouched = {key: value.clone() for key, value in model.state_dict().items()}
        taken = model.load_unet(unet)
        state = model.state_dict()
        assert taken == list(unet.state_dict())
        assert all(torch.equal(state[key], value) for key, value in unet.state_dict().items())
        assert all(torch.equal(state[key], untouched[key]) for key in state.keys() - set(taken))

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

    @pytest.mark.parametrize("options", [{"base_channels": 8}, {"classes": 2}, {"skips": (1, 2)}], ids=str)
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


class TestConfig:
    def test_holds_plain_copies(self):
        skips = [1, 2]
        model = build("unet", skips=skips, base_channels=np.int64(4))
        skips.append(3)
        assert model.config == {"in_channels": 3, "classes": 1, "base_channels": 4, "skips": [1, 2]}
        assert build("unet", skips=range(1, 3)).config["skips"] == [1, 2]
        assert json.loads(json.dumps(model.config)) == model.config

    def test_of_a_subclass_that_passes_options_on(self):
        class Narrow(uctrans.UNet):
            def __init__(self, **options):
                super().__init__(base_channels=2, **options)

        assert Narrow(classes=2).config == build("unet", base_channels=2, classes=2).config


class TestRegistry:
    def test_near_names(self):
        with pytest.raises(ValueError, match="did you mean 'uctransnet'"):
            uctrans.create_model("uctransnt")
        with pytest.raises(ValueError, match="did you mean 'unet'"):
            uctrans.create_model("UNet")
        with pytest.raises(ValueError, match="did you mean 'dual_branch_uctransnet'"):
            uctrans.create_model("DualBranchUCTransNet")
        with pytest.raises(ValueError, match="choose one of dual_branch_uctransnet, uctransnet, unet"):
            uctrans.create_model("zzz")

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="unet has no option 'depth'; it takes in_channels, classes, base_channels"):
            uctrans.create_model("unet", depth=3)
        with pytest.raises(TypeError, match=r"uctransnet has no option 'clases'; did you mean 'classes'\?"):
            uctrans.create_model("uctransnet", clases=1)

    def test_options_that_are_passed_on(self, monkeypatch):
        monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

        @uctrans.register_model("narrow")
        class Narrow(uctrans.UNet):
            def __init__(self, **options):
                super().__init__(base_channels=2, **options)

        model = uctrans.create_model("narrow", classes=2)
        assert (model.name, model.classes, model.config) == ("narrow", 2, {"classes": 2})

    def test_name_taken(self):
        with pytest.raises(ValueError, match="registered already"):
            uctrans.register_model("unet")(uctrans.UNet)


class TestModelFiles:
    def saved(self, folder):
        build("unet").save_pretrained(folder)
        return folder

    def test_nothing_there(self, tmp_path):
        with pytest.raises(uctrans.ModelFileError, match="missing does not exist: give a run folder"):
            uctrans.load_model(tmp_path / "missing")
        with pytest.raises(uctrans.ModelFileError, match=r"holds no config\.json"):
            uctrans.load_model(tmp_path)

    def test_model_one_folder_further_down(self, tmp_path):
        self.saved(tmp_path / "run" / "best")
        (tmp_path / "data").mkdir()
        with pytest.raises(uctrans.ModelFileError, match=r"holds no config\.json; did you mean .*/run\?"):
            uctrans.load_model(tmp_path)
        self.saved(tmp_path / "model")
        with pytest.raises(uctrans.ModelFileError, match=r"did you mean .*/model or .*/run\?"):
            uctrans.load_model(tmp_path)

    def test_run_without_best_weights(self, tmp_path):
        (tmp_path / "last.pt").touch()
        with pytest.raises(uctrans.ModelFileError, match=r"without best weights yet: use .*last\.pt"):
            uctrans.load_model(tmp_path)

    def test_config_that_is_no_json(self, tmp_path):
        (self.saved(tmp_path) / CONFIG_FILE).write_text("{")
        with pytest.raises(uctrans.ModelFileError, match=r"config\.json is not JSON"):
            uctrans.load_model(tmp_path)

    def test_config_of_an_unknown_model_or_option(self, tmp_path):
        path = self.saved(tmp_path) / CONFIG_FILE
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"name": "nunet"}))
        with pytest.raises(uctrans.ModelFileError, match=r"config\.json: unknown model 'nunet'"):
            uctrans.load_model(tmp_path)
        path.write_text(json.dumps(config | {"depth": 3}))
        with pytest.raises(uctrans.ModelFileError, match=r"config\.json.*depth"):
            uctrans.load_model(tmp_path)
        path.write_text(json.dumps({"base_channels": 4}))
        with pytest.raises(uctrans.ModelFileError, match="names no model"):
            uctrans.load_model(tmp_path)

    def test_weights_missing_truncated_or_of_another_size(self, tmp_path):
        weights = self.saved(tmp_path) / WEIGHTS_FILE
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(uctrans.ModelFileError, match="not a whole safetensors file"):
            uctrans.load_model(tmp_path)
        weights.unlink()
        with pytest.raises(uctrans.ModelFileError, match="does not exist: copy the weights"):
            uctrans.load_model(tmp_path)
        build("unet", base_channels=8).save_pretrained(tmp_path / "wide")
        weights.write_bytes((tmp_path / "wide" / WEIGHTS_FILE).read_bytes())
        with pytest.raises(uctrans.ModelFileError, match="of another shape"):
            uctrans.load_model(tmp_path)

    def test_class_and_file_disagree(self, tmp_path):
        with pytest.raises(uctrans.ModelFileError, match="describes a 'unet', not a 'uctransnet'"):
            uctrans.UCTransNet.from_pretrained(self.saved(tmp_path))

    def test_checkpoint_truncated_foreign_or_executable(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save({"weights": torch.zeros(3)}, path)
        with pytest.raises(uctrans.ModelFileError, match="neither a checkpoint of a training run nor"):
            uctrans.load_model(path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(uctrans.ModelFileError, match="truncated or no checkpoint"):
            uctrans.load_model(path)
        path.write_bytes(b"not a checkpoint at all")
        with pytest.raises(uctrans.ModelFileError, match=r"model\.pt"):
            uctrans.load_model(path)
        path.write_text("epoch,dice\n1,0.5\n")
        with pytest.raises(uctrans.ModelFileError, match="truncated or no checkpoint"):
            uctrans.load_model(path)
        torch.save({"format": "uctrans-checkpoint", "model": {"name": "unet"}}, path)
        with pytest.raises(uctrans.ModelFileError, match="lacks the entry 'state'"):
            uctrans.load_model(path)
        torch.save(nn.Linear(2, 2), path)
        with pytest.raises(uctrans.ModelFileError, match="never executed here"):
            uctrans.load_model(path)


class TestUpstream:
    def model(self, **options):
        return randomised(build("uctransnet", **options))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"in_channels": 1, "classes": 9},
            {"num_layers": 1, "num_heads": 3, "mlp_ratio": 2, "image_size": 64},
            {"patch_sizes": (8, 4, 2)},
            {"patch_sizes": (8, 4, 2), "base_channels": (6, 5, 9)},
        ],
        ids=str,
    )
    def test_out_and_in_bit_for_bit(self, options):
        model = self.model(**options)
        published = uctrans.to_upstream(model)
        loaded = uctrans.load_upstream(published)
        assert loaded.config == model.config
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        back = uctrans.to_upstream(loaded)
        assert back.keys() == published.keys()
        assert all(torch.equal(back[key], value) for key, value in published.items())

    @pytest.mark.parametrize("wrap", [False, True], ids=["bare", "training checkpoint"])
    def test_file_as_the_authors_write_it(self, tmp_path, wrap):
        model = self.model()
        state = {f"module.{key}": value for key, value in uctrans.to_upstream(model).items()}
        contents = {"epoch": 3, "best_model": True, "val_loss": np.float64(0.3), "state_dict": state} if wrap else state
        path = tmp_path / "best_model-UCTransNet.pth.tar"
        torch.save(contents, path)
        image = torch.rand(1, 3, 32, 32)
        for loaded in (uctrans.load_upstream(path), uctrans.load_model(path)):
            assert torch.equal(loaded(image), model(image))

    def test_bgr_weights_take_rgb_images(self):
        model = self.model()
        published = uctrans.to_upstream(model)
        mirrored = uctrans.load_upstream(published, channel_order="bgr")
        image = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(mirrored(image), model(image.flip(1)))
        back = uctrans.to_upstream(mirrored, channel_order="bgr")
        assert all(torch.equal(back[key], value) for key, value in published.items())

    @pytest.mark.parametrize("image_size", [64, (48, 80)], ids=str)
    def test_same_weights_at_another_image_size(self, image_size):
        model = self.model()
        resized = uctrans.load_upstream(uctrans.to_upstream(model), image_size=image_size)
        rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        assert resized.transformer.embeddings[0].position.shape[-2:] == (rows // 16, columns // 16)
        image = torch.rand(1, 3, rows, columns)
        torch.testing.assert_close(resized(image), model(image))  # interpolated once, or at every call

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_dtype_is_kept(self, dtype):
        published = uctrans.to_upstream(self.model().to(dtype))
        back = uctrans.to_upstream(uctrans.load_upstream(published))
        assert all(torch.equal(back[key], value) for key, value in published.items())

    def test_resizing_keeps_all_but_the_positions(self):
        model = uctrans.set_backend(self.model().double(), "reference")
        model.metadata = {"notes": ["first"]}
        resized = uctrans.resize_positions(model, 64)
        resized.metadata["notes"].append("second")
        assert model.metadata == {"notes": ["first"]}
        assert resized.decoder[0].gate.backend == "reference"
        assert resized.config == model.config | {"image_size": 64}
        state = resized.state_dict()
        kept = {key: value for key, value in model.state_dict().items() if not key.endswith(".position")}
        assert all(torch.equal(state[key], value) for key, value in kept.items())
        position = model.transformer.embeddings[1].position
        expected = nn.functional.interpolate(position, size=(4, 4), mode="bicubic", align_corners=False)
        torch.testing.assert_close(resized.transformer.embeddings[1].position, expected)

    @pytest.mark.parametrize(
        ("name", "damaged"),
        [
            ("inc.conv.weight", torch.zeros(4)),
            ("mtc.encoder.layer.0.channel_attn.key.1.weight", torch.zeros(3, 3)),
            ("mtc.embeddings_2.position_embeddings", torch.zeros(1, 9, 8)),
            ("mtc.embeddings_2.patch_embeddings.weight", torch.zeros(8, 8, 4, 4)),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_contradicting_shapes_name_the_file(self, tmp_path, name, damaged):
        path = tmp_path / "damaged.pth.tar"
        torch.save({"state_dict": uctrans.to_upstream(self.model()) | {name: damaged}}, path)
        for load in (uctrans.load_model, uctrans.load_upstream):
            with pytest.raises(uctrans.ModelFileError, match=r"damaged\.pth\.tar"):
                load(path)

    def test_incomplete_and_foreign_checkpoints(self):
        published = uctrans.to_upstream(self.model())
        without = {key: value for key, value in published.items() if key != "up4.coatt.mlp_x.1.bias"}
        with pytest.raises(uctrans.ModelFileError, match=r"lacks up4\.coatt\.mlp_x\.1\.bias"):
            uctrans.load_upstream(without)
        with pytest.raises(uctrans.ModelFileError, match="holds 1 entries that UCTransNet has not, first extra"):
            uctrans.load_upstream(published | {"extra": torch.zeros(1)})
        with pytest.raises(uctrans.ModelFileError, match="it is no UCTransNet checkpoint"):
            uctrans.load_upstream({"conv.weight": torch.zeros(1)})
        with pytest.raises(uctrans.ModelFileError, match="holds no state dict"):
            uctrans.load_upstream({"epoch": 3})

    def test_unknown_channel_order(self):
        with pytest.raises(ValueError, match="must be one of rgb, bgr"):
            uctrans.load_upstream({}, channel_order="grb")
        with pytest.raises(ValueError, match="must be one of rgb, bgr"):
            uctrans.to_upstream(self.model(), channel_order="grb")
        with pytest.raises(uctrans.ModelFileError, match="needs three input channels"):
            uctrans.to_upstream(self.model(in_channels=1), channel_order="bgr")
