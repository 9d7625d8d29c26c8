"""Networks of other packages as models: how they are found, built, checked, saved and loaded."""

import json
import sys

import pytest
import torch
from torch import nn

import uctrans
from tests.networks import ATTENTION_UNET, EXTERNAL, HALVING, HALVING_OPTIONS, NESTED_UNET, NESTED_UNET_OPTIONS, Halving
from uctrans.models import ExternalModel, NetworkError, registry
from uctrans.models.base import CARD_FILE
from uctrans.models.external import find_model_class
from uctrans.models.weights import CONFIG_FILE


def halving(**arguments):
    return find_model_class(HALVING)(**{"options": HALVING_OPTIONS} | arguments)


class Returning(nn.Module):
    """Returns what ``output`` makes of the logits."""

    output = staticmethod(lambda logits: logits)

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 1, 1)

    def forward(self, image):
        return self.output(self.head(image))


def returning(output):
    return ExternalModel.of(type("Returning", (Returning,), {"output": staticmethod(output)}))()


class TestLogits:
    @pytest.mark.parametrize("name", EXTERNAL)
    def test_they_are_those_of_the_network(self, name):
        model = find_model_class(name)(options=EXTERNAL[name]).eval()
        image = torch.rand(2, 3, 32, 48)
        expected = model.network(image)
        assert torch.equal(model(image), expected[0] if name == NESTED_UNET else expected)
        model.check((32, 48))

    def test_images_are_padded_if_asked_and_logits_cropped(self):
        model = halving(size_multiple=4).eval()
        image = torch.rand(1, 3, 9, 7)
        padded = nn.functional.pad(image, (0, 1, 0, 3), mode="replicate")
        assert torch.equal(model(image), model.network(padded)[..., :9, :7])
        model.check((9, 7))

    def test_a_size_that_fails_is_named_in_evaluation_mode(self):
        with pytest.raises(NetworkError, match=r"Halving fails on images \(1, 3, 9, 7\) .* set size_multiple"):
            halving().eval()(torch.rand(1, 3, 9, 7))

    def test_lack_of_memory_keeps_its_type(self):
        def fail(logits):
            raise torch.OutOfMemoryError

        with pytest.raises(torch.OutOfMemoryError):
            returning(fail).eval()(torch.rand(1, 3, 8, 8))

    def test_it_can_be_compiled_and_exported(self):
        model = halving(size_multiple=2).eval()
        image = torch.rand(2, 3, 8, 8)
        exported = torch.export.export(model, (image,)).module()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for run in (exported, compiled):
            assert torch.allclose(run(image), model(image))


class TestChecks:
    @pytest.mark.parametrize(
        "output, message",
        [
            (lambda logits: [logits, logits], "returns a list of 2; it must return logits"),
            (lambda logits: {"out": logits}, "returns a dict of 1; it must return logits"),
            (lambda logits: None, "returns a NoneType; it must return logits"),
            (lambda logits: logits[..., ::2, ::2], r"\(2, 1, 4, 6\) for images \(2, 3, 8, 12\)"),
            (lambda logits: logits[:, 0], "it must return floating-point logits"),
            (lambda logits: logits > 0, r"returns torch\.bool .* it must return floating-point logits"),
            (lambda logits: torch.cat([logits, logits], 1), "the run has 1 classes; set its number of output channels"),
            (lambda logits: logits.nothing, "AttributeError: 'Tensor' object has no attribute 'nothing'"),
        ],
        ids=["two maps", "dict", "nothing", "half size", "three axes", "mask", "two classes", "raises"],
    )
    def test_output(self, output, message):
        with pytest.raises(ValueError, match=f"Returning .*{message}"):
            returning(output).check((8, 12))

    def test_output_of_training_alone(self):
        class Deep(Returning):
            def forward(self, image):
                logits = self.head(image)
                return [logits, logits] if self.training else logits

        with pytest.raises(ValueError, match="Deep returns a list of 2"):
            ExternalModel.of(Deep)().check((8, 8))

    def test_number_of_classes_names_the_argument(self):
        options = NESTED_UNET_OPTIONS | {"out_channels": 2}
        with pytest.raises(ValueError, match="the run has 3 classes; set out_channels to 3 in its options"):
            find_model_class(NESTED_UNET)(classes=3, options=options).check((32, 32))

    def test_size_names_the_multiple(self):
        with pytest.raises(ValueError, match=r"\(2, 3, 9, 8\).*image_size of multiples of 2, or \"size_multiple\": 2"):
            halving().check((9, 8))
        options = {"options": EXTERNAL[ATTENTION_UNET] | {"channels": [2] * 4, "strides": [2] * 3}}
        with pytest.raises(ValueError, match="image_size of multiples of 8"):
            find_model_class(ATTENTION_UNET)(**options).check((36, 32))

    def test_channels_of_the_image(self):
        with pytest.raises(ValueError, match="to have 3 channels, but got 1 channels instead"):
            halving(in_channels=1).check((8, 8))

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match=r"torch\.nn:Identity has no weights that can be trained"):
            find_model_class("torch.nn:Identity")().check((8, 8))


class TestNames:
    @pytest.mark.parametrize(
        "name, message",
        [
            ("os:system", "os:system is no class of torch.nn.Module"),
            ("pathlib:Path", "pathlib:Path is no class of torch.nn.Module"),
            ("os:nothing", "os has no nothing; it has no torch.nn.Module"),
            ("tests.networks:Halvin", "tests.networks has no Halvin; did you mean 'Halving'"),
            ("tests.networks:Other", "tests.networks has no Other; its networks are Halving"),
            ("tests.network:Halving", r"there is no module tests\.network; check the spelling"),
            ("nowhere.at.all:Net", "there is no module nowhere; check the spelling"),
            ("torch:nn.Linear", "names no class; write package.module:Class"),
            ("mynet.py:Net", "names no class; write package.module:Class"),
            ("nets/mynet:Net", "names no class; write package.module:Class"),
            ("mynet:", "names no class; write package.module:Class"),
            (":Net", "names no class; write package.module:Class"),
            ("a:b:C", "names no class; write package.module:Class"),
            ("tests.networks.Halving", "unknown model .* name any torch network like monai.networks.nets:"),
        ],
    )
    def test_unusable(self, name, message):
        with pytest.raises(ValueError, match=message):
            find_model_class(name)

    @pytest.mark.parametrize("given", [print, Halving(3, 1), int], ids=["function", "network", "other class"])
    def test_no_class(self, given):
        with pytest.raises(ValueError, match=r"is no class of torch\.nn\.Module"):
            find_model_class(given)

    def test_registered_names_and_classes(self):
        assert find_model_class("unet") is find_model_class(uctrans.UNet) is uctrans.UNet

    @pytest.mark.parametrize(
        "module, code, message",
        [
            ("mynet_lacking", "import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
            ("mynet_unfinished", "def", r"SyntaxError: .*mynet_unfinished\.py, line 1"),
            ("mynet_script", "raise SystemExit('usage: mynet DATA')", "SystemExit: usage: mynet DATA"),
        ],
        ids=["lacks a package", "syntax", "script"],
    )
    def test_module_that_fails(self, module, code, message, tmp_path, monkeypatch):
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=f"importing {module} fails .{message}"):
            find_model_class(f"{module}:Net")

    def test_the_current_folder_comes_last(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
        before = list(sys.path)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "json.py").write_text("raise AssertionError('imported in place of the library')")
        with pytest.raises(ValueError, match="json has no Net"):
            find_model_class("json:Net")
        assert sys.path == before
        (tmp_path / "net_of_this_folder.py").write_text("from tests.networks import Halving as MyNet")
        model = find_model_class("net_of_this_folder:MyNet")(options=HALVING_OPTIONS)
        assert model.name == "net_of_this_folder:MyNet"
        assert sys.path == [*before, str(tmp_path)]


class TestOptions:
    def test_tuples_are_kept_as_lists(self):
        options = EXTERNAL[ATTENTION_UNET] | {"channels": (4, 8), "strides": (2,)}
        assert find_model_class(ATTENTION_UNET)(options=options).config["options"] == EXTERNAL[ATTENTION_UNET]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"labels": 1}, "Halving lacks bands; it requires bands, labels, and takes width"),
            ({}, "Halving lacks bands, labels; it requires"),
            (
                HALVING_OPTIONS | {"depth": 2},
                "Halving has no argument depth; it requires bands, labels, and takes width",
            ),
            (HALVING_OPTIONS | {"width": -1}, r"cannot be built from {'bands': 3.*\(RuntimeError: .*; change these"),
            (HALVING_OPTIONS | {"width": nn.ReLU}, "options hold what JSON cannot"),
            ([3, 1], "give a mapping of the arguments"),
        ],
        ids=["missing", "none", "unknown", "raises", "no JSON", "list"],
    )
    def test_unusable(self, options, message):
        with pytest.raises(ValueError, match=message):
            halving(options=options)

    def test_lazy_layers(self):
        class Lazy(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.LazyConv2d(1, 1)

        with pytest.raises(ValueError, match="Lazy has lazy layers"):
            ExternalModel.of(Lazy)()


REGISTERING = """
import torch
import uctrans


@uctrans.register_model("linear")
class Linear(uctrans.SegmentationModel):
    def __init__(self, in_channels=3, classes=1, base_channels=8):
        super().__init__()
        self.in_channels, self.classes = in_channels, classes
        self.layer = torch.nn.Conv2d(in_channels, classes, 1)

    def forward(self, image):
        return self.layer(image)
"""


def test_a_class_that_its_module_registers_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "registering_net.py").write_text(REGISTERING)
    before = dict(registry._MODELS)
    monkeypatch.setattr(registry, "_MODELS", dict(before))
    folder = find_model_class("registering_net:Linear")(classes=2).save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(registry, "_MODELS", before)  # as in another process
    with pytest.raises(uctrans.ModelFileError, match=r"unknown model 'linear'.* or name the class that registers it"):
        uctrans.load_model(folder)
    loaded = uctrans.load_model(folder, network="registering_net:Linear")
    assert (loaded.name, loaded.classes) == ("linear", 2)


class TestFiles:
    @pytest.fixture
    def saved(self, tmp_path):
        model = halving(size_multiple=2)
        model.metadata = {"protocol": "native"}
        return model.save_pretrained(tmp_path / "saved"), model.eval()

    @pytest.mark.parametrize("network", [HALVING, Halving, ["unet", HALVING]], ids=["name", "class", "several"])
    def test_they_load_where_the_class_is_named(self, saved, network):
        folder, model = saved
        loaded = uctrans.load_model(folder, network=network)
        assert (loaded.name, loaded.config, loaded.metadata) == (HALVING, model.config, model.metadata)
        image = torch.rand(1, 3, 9, 7)
        assert torch.equal(loaded(image), model(image))

    def test_the_module_may_have_moved(self, saved, monkeypatch):
        folder, _ = saved
        monkeypatch.setitem(sys.modules, "moved", sys.modules["tests.networks"])
        assert uctrans.load_model(folder, network="moved:Halving").name == "moved:Halving"

    def test_a_file_alone_imports_nothing(self, saved, tmp_path, monkeypatch):
        folder, model = saved
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "hostile.py").write_text("raise AssertionError('imported by a file')")
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | {"name": "hostile:Halving"}))
        entry = {"name": "hostile:Halving", "config": model.config, "metadata": {}, "state": model.state_dict()}
        torch.save({"format": "uctrans-checkpoint", "version": 1, "model": entry, "ema": None}, tmp_path / "last.pt")
        for path in (folder, tmp_path / "last.pt"):
            with pytest.raises(uctrans.ModelFileError, match=r"class hostile:Halving.*network=\"hostile:Halving\""):
                uctrans.load_model(path)
            with pytest.raises(uctrans.ModelFileError, match="holds a hostile:Halving, not a unet"):
                uctrans.load_model(path, network="unet")
            assert uctrans.load_model(path, network=HALVING).name == HALVING
        assert "hostile" not in sys.modules

    def test_another_network_than_named(self, saved, tmp_path):
        folder, _ = saved
        with pytest.raises(uctrans.ModelFileError, match=f"holds a {HALVING}, not a {NESTED_UNET}"):
            uctrans.load_model(folder, network=NESTED_UNET)
        uctrans.UNet(base_channels=2).save_pretrained(tmp_path / "unet")
        with pytest.raises(uctrans.ModelFileError, match=f"holds a unet, not a {HALVING}"):
            uctrans.load_model(tmp_path / "unet", network=HALVING)
        assert uctrans.load_model(tmp_path / "unet", network=[HALVING, "unet"]).name == "unet"

    def test_weights_of_another_width(self, saved):
        folder, _ = saved
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["options"]["width"] = 8
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        with pytest.raises(uctrans.ModelFileError, match="of another shape"):
            uctrans.load_model(folder, network=HALVING)

    def test_start_from_weights_of_other_classes(self):
        source, model = halving(), halving(classes=2, options=HALVING_OPTIONS | {"labels": 2})
        assert model.start_from(source) == ["network.head.weight", "network.head.bias"]
        assert torch.equal(model.network.coarse[0].weight, source.network.coarse[0].weight)
        with pytest.raises(uctrans.ModelFileError, match=r"a unet cannot start a tests\.networks:Halving"):
            model.start_from(uctrans.UNet(base_channels=2))

    def test_model_card_names_the_class(self, saved):
        pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
        card = (saved[0] / CARD_FILE).read_text()
        assert f'uctrans.load_model("FOLDER", network="{HALVING}")' in card
        assert f"--model FOLDER --network {HALVING}`" in card
