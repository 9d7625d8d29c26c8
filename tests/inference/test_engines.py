"""Engines: the same probabilities from PyTorch, a compiled network and ONNX Runtime, and what a cache holds."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

import uctrans
from uctrans.inference import (
    Ensemble,
    EvaluateConfig,
    ExportConfig,
    ExportError,
    InferenceError,
    PredictConfig,
    Predictor,
    evaluate,
    export,
    load_predictor,
    predict,
)
from uctrans.inference.engines import CACHED_FILES, AutomaticForward, ExportedForward, cache_folder
from uctrans.inference.journal import weights_digest
from uctrans.inference.onnx_model import OnnxModel

CPU = torch.device("cpu")
SIZE = (32, 32)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inputs(*size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tiny(seed=0, classes=1, **metadata):
    """A network that is exported in a second."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, classes, 3, padding=1, padding_mode="replicate")).eval()
    network.name, network.in_channels, network.classes = "tiny", 3, classes
    network.config, network.metadata = {"image_size": list(SIZE)}, {"protocol": "native", **metadata}
    return network


class Branching(nn.Module):
    """A network that no tracer follows."""

    name, in_channels, classes, config, metadata = "branching", 3, 1, {"image_size": list(SIZE)}, {}

    def forward(self, image):
        return image[:, :1] if image.sum() > 0 else image[:, 1:2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of exports."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/uctrans/onnx"


@pytest.fixture(scope="module")
def export_of_tiny(tmp_path_factory):
    """The cached exports of two tiny networks."""
    pytest.importorskip("onnxscript")
    files = []
    with pytest.MonkeyPatch.context() as patch:
        for seed in (0, 1):
            folder = tmp_path_factory.mktemp("cache")
            patch.setenv("XDG_CACHE_HOME", str(folder))
            ExportedForward(tiny(seed), SIZE, CPU)(inputs(*SIZE))
            files += (folder / "uctrans/onnx").iterdir()
    return files


@pytest.fixture
def filled_cache(cache, export_of_tiny):
    """A cache that holds the export of a tiny network."""
    cache.mkdir(parents=True)
    shutil.copy(export_of_tiny[0], cache)
    return cache


@torch.inference_mode()
def assert_same(forward, network, *sizes):
    for size in sizes:
        torch.testing.assert_close(forward(inputs(*size)), network(inputs(*size)), rtol=1e-5, atol=1e-5)


def test_onnx_gives_the_probabilities_of_torch(unet_folder, cache):
    settings = {"device": "cpu", "resolution": "native", "tta": "flips"}
    plain = load_predictor(unet_folder, engine="torch", **settings)
    exported = load_predictor(unet_folder, engine="onnx", **settings)
    before = {name: value.clone() for name, value in exported.model.state_dict().items()}
    for size in ((32, 32), (50, 70)):
        expected, found = (predictor.probabilities_of_image(picture(*size)) for predictor in (plain, exported))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(list(cache.iterdir())) == 1, "tiles have one size"
    assert all(torch.equal(value, before[name]) for name, value in exported.model.state_dict().items())
    assert any(isinstance(module, nn.BatchNorm2d) for module in exported.model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in exported.network.modules())


@pytest.mark.slow
def test_onnx_runs_ensembles_of_images_of_any_size(uctransnet_folder, cache):
    model = f"{uctransnet_folder},{uctransnet_folder}"
    settings = {"device": "cpu", "resolution": "native"}
    plain = load_predictor(model, engine="torch", **settings)
    exported = load_predictor(model, "composed", engine="onnx", **settings)
    for size in ((32, 32), (20, 27), (60, 37), (32, 9)):
        expected, found = (predictor.probabilities_of_image(picture(*size)) for predictor in (plain, exported))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_any_size_needs_two_programs_and_very_small_images_their_own(filled_cache):
    network = tiny()
    exported = ExportedForward(network, SIZE, CPU)
    assert_same(exported, network, (32, 32), (45, 33), (64, 96))
    assert len(list(filled_cache.iterdir())) == 2
    assert_same(exported, network, (5, 40))
    assert len(list(filled_cache.iterdir())) == 3


def test_a_cached_export_is_found_again_for_the_same_network_alone(filled_cache):
    assert filled_cache == cache_folder()
    assert ExportedForward(tiny(), SIZE, CPU).is_ready(inputs(*SIZE))
    with_relu, wide = tiny(), tiny()
    with_relu.append(nn.ReLU())
    wide.config = {"image_size": [48, 48]}
    for other in (tiny(seed=1), tiny(classes=2), tiny(target="boundary"), with_relu, wide):
        assert not ExportedForward(other, SIZE, CPU).is_ready(inputs(*SIZE))
    assert not ExportedForward(tiny(), SIZE, CPU).is_ready(inputs(48, 32))


def test_ensembles_share_a_program_of_open_size(cache):
    ensemble = Ensemble([tiny(), tiny(seed=1)], ["a", "b"]).eval()
    assert ensemble.size_multiple == 16
    assert_same(ExportedForward(ensemble, SIZE, CPU), ensemble, (45, 33))


def test_code_without_a_version_is_not_cached(cache):
    hooked = tiny()
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    exported = ExportedForward(hooked, SIZE, CPU)
    assert_same(exported, hooked, SIZE)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["truncated", "of other weights"])
def test_a_damaged_export_is_made_again(damage, filled_cache, export_of_tiny):
    (file,) = filled_cache.iterdir()
    content = file.read_bytes()[:-100] if damage == "truncated" else export_of_tiny[1].read_bytes()
    file.write_bytes(content)
    network = tiny()
    exported = ExportedForward(network, SIZE, CPU)
    assert not exported.is_ready(inputs(*SIZE))
    assert_same(exported, network, SIZE)
    assert ExportedForward(network, SIZE, CPU).is_ready(inputs(*SIZE))


def test_a_cache_that_cannot_be_written_only_warns(cache):
    cache.parents[1].write_text("a file where the folder should be")
    network = tiny()
    with pytest.warns(UserWarning, match="cannot keep the export for the next time"):
        assert_same(ExportedForward(network, SIZE, CPU), network, SIZE)


def test_the_exports_used_last_are_kept(cache):
    cache.mkdir(parents=True)
    for number in range(CACHED_FILES + 1):
        (cache / f"{number}.onnx").touch()
        os.utime(cache / f"{number}.onnx", (number, number))
    ExportedForward(tiny(), SIZE, CPU)(inputs(*SIZE))
    kept = sorted(int(file.stem) for file in cache.iterdir() if file.stem.isdigit() and len(file.stem) < 3)
    assert kept == list(range(2, CACHED_FILES + 1))
    assert len(list(cache.iterdir())) == CACHED_FILES


@pytest.mark.usefixtures("filled_cache")
def test_auto_takes_a_cached_export_at_once():
    network = tiny()
    automatic = AutomaticForward(Branching(), ExportedForward(network, SIZE, CPU))
    assert_same(automatic, network, SIZE)


def test_auto_exports_when_that_pays(cache):
    network = tiny()
    automatic = AutomaticForward(
        network,
        ExportedForward(network, SIZE, CPU),
        pays_after=3 * inputs(*SIZE)[:, 0].numel() * sum(parameter.numel() for parameter in network.parameters()),
    )
    for _ in range(3):
        assert_same(automatic, network, SIZE)
        assert not cache.exists()
    assert_same(automatic, network, SIZE)
    assert len(list(cache.iterdir())) == 1


def test_auto_goes_on_in_torch_where_the_export_fails(cache):
    network = Branching()
    automatic = AutomaticForward(network, ExportedForward(network, SIZE, CPU), pays_after=0)
    with pytest.warns(UserWarning, match=r"forward cannot be traced .*; PyTorch runs the network") as warned:
        assert_same(automatic, network, SIZE, SIZE)
    assert len(warned) == 1
    with pytest.raises(ExportError, match="forward cannot be traced"):
        Predictor(network, device="cpu", engine="onnx").probabilities(torch.zeros(1, 3, *SIZE, dtype=torch.uint8))


@pytest.mark.usefixtures("filled_cache")
def test_auto_goes_on_in_torch_where_onnxruntime_is_broken(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text("raise ImportError('libonnxruntime.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    network = tiny()
    automatic = AutomaticForward(network, ExportedForward(network, SIZE, CPU))
    with pytest.warns(UserWarning, match="libonnxruntime.so is missing; PyTorch runs the network instead"):
        assert_same(automatic, network, SIZE)
    assert_same(automatic, network, SIZE)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_an_engine_that_is_not_installed(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is needed .*pip install "uctrans\[export\]"'):
        Predictor(tiny(), device="cpu", engine="onnx")
    images = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    automatic = Predictor(tiny(), device="cpu").probabilities(images)
    assert torch.equal(automatic, Predictor(tiny(), device="cpu", engine="torch").probabilities(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "tensorrt"}, "engine: 'tensorrt' is not known; choose one of auto, torch, compile, onnx"),
        ({"engine": "onnx", "amp": "bf16"}, "amp: the engine onnx computes in float32, not in bf16"),
    ],
)
def test_settings_that_no_engine_takes(settings, message):
    with pytest.raises(InferenceError, match=message):
        Predictor(tiny(), device="cpu", **settings)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_onnx_has_no_other_operators(by, uctransnet_folder, monkeypatch):
    if by == "environment":
        monkeypatch.setenv("UCTRANS_BACKEND", "reference")
    backend = "reference" if by == "argument" else "auto"
    with pytest.raises(InferenceError, match="backend: the engine onnx has operators of its own, not those of ref"):
        load_predictor(uctransnet_folder, backend, device="cpu", engine="onnx")
    assert load_predictor(uctransnet_folder, backend, device="cpu").model.name == "uctransnet"


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_probabilities():
    compiled, plain = (Predictor(tiny(), device="cpu", engine=engine) for engine in ("compile", "torch"))
    for batch in (4, 2):
        images = torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8)
        torch.testing.assert_close(compiled.probabilities(images), plain.probabilities(images), rtol=0, atol=1e-5)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    def refuse(*_):
        raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: no working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda network: refuse)
    predictor = Predictor(tiny(), device="cpu", engine="compile")
    with pytest.raises(
        InferenceError, match=r"cannot compile the network \(Invalid.*compiler\); .*set engine to torch"
    ):
        predictor.probabilities(torch.zeros(1, 3, *SIZE, dtype=torch.uint8))


@pytest.fixture
def exported(use_model, tmp_path):
    """A function that exports a model and returns the ONNX file."""
    pytest.importorskip("onnxscript")

    def write(model, folder="exported", **settings):
        use_model(model)
        return export(ExportConfig("model", str(tmp_path / folder), formats=("onnx",), **settings))[0]

    return write


def test_a_file_is_a_model(exported):
    network = tiny(class_names=["nucleus"], images={"train": {"secret": "a.png"}}, channel_order="rgb")
    path = exported(network, channel_order="bgr")
    predictor, plain = load_predictor(path, device="cpu"), Predictor(network, device="cpu", channel_order="bgr")
    assert predictor.model.name == "tiny"
    assert predictor.model.metadata["class_names"] == ["nucleus"]
    assert "images" not in predictor.model.metadata
    assert predictor.protocol.channel_order == "bgr"
    for size in ((32, 32), (50, 70)):  # in tiles
        expected = plain.probabilities_of_image(picture(*size))
        torch.testing.assert_close(predictor.probabilities_of_image(picture(*size)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"dynamic": "none", "batch_size": 2}, {"dynamic": "size"}], ids=str)
def test_a_file_of_fixed_batch_or_open_size(settings, exported):
    network = tiny()
    model = OnnxModel(exported(network, **settings))
    sizes = [(32, 32), (45, 33)] if settings["dynamic"] == "size" else [(32, 32)]
    for size in sizes:
        images = inputs(*size, batch=3)
        torch.testing.assert_close(model(images), network(images), rtol=1e-5, atol=1e-5)
    message = (
        "from 32 pixels a side on, got 9x40" if settings["dynamic"] == "size" else "of 32x32 pixels only, got 9x40"
    )
    with pytest.raises(InferenceError, match=message):
        model(inputs(9, 40))


def test_files_and_models_average(export_of_tiny, use_model):
    paths, networks = export_of_tiny, [tiny(), tiny(seed=1)]
    use_model(networks[1])
    expected = sum(Predictor(network, device="cpu").probabilities_of_image(picture(32, 32)) for network in networks) / 2
    for names in (f"{paths[0]},{paths[1]}", f"{paths[0]},model"):
        mean = load_predictor(names, device="cpu").probabilities_of_image(picture(32, 32))
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)


def test_bad_files(export_of_tiny, tmp_path):
    onnx, path = pytest.importorskip("onnx"), export_of_tiny[0]
    for settings, message in (
        ({"engine": "compile"}, "runs on ONNX Runtime, not on compile"),
        ({"engine": "torch"}, "runs on ONNX Runtime, not on torch"),
        ({"amp": "bf16"}, "amp: .*set amp to no"),
    ):
        with pytest.raises(InferenceError, match=message):
            load_predictor(path, device="cpu", **settings)
    with pytest.raises(ValueError, match="has no layer with a backend"):
        load_predictor(path, "composed", device="cpu")
    with pytest.raises(uctrans.ModelFileError, match=r"nowhere\.onnx does not exist"):
        load_predictor(tmp_path / "nowhere.onnx", device="cpu")
    damaged = tmp_path / "damaged.onnx"
    for content in (b"", b"not ONNX", path.read_bytes()[:-50]):
        damaged.write_bytes(content)
        with pytest.raises(uctrans.ModelFileError, match=r"damaged\.onnx is damaged or not ONNX .*export it again"):
            load_predictor(damaged, device="cpu")
    foreign = onnx.load(path)
    record = json.loads(foreign.metadata_props[0].value)
    unknown = "was not written by uctrans export"
    for text, message in (
        ("no JSON", unknown),
        ("[" * 100_000, unknown),
        ("[]", unknown),
        ('{"name": "tiny"}', unknown),
        (json.dumps(record | {"classes": "many"}), unknown),
        (json.dumps(record | {"metadata": {"image_size": "32"}}), "metadata: image_size is '32', not height and width"),
    ):
        onnx.helper.set_model_props(foreign, {"uctrans": text})
        onnx.save(foreign, tmp_path / "foreign.onnx")
        with pytest.raises(uctrans.ModelFileError, match=rf"foreign\.onnx:? {message}"):
            load_predictor(tmp_path / "foreign.onnx", device="cpu")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(uctrans.ModelFileError, match=rf"foreign\.onnx {unknown}"):
        load_predictor(tmp_path / "foreign.onnx", device="cpu")


def test_a_file_whose_weights_are_not_finite_is_refused(export_of_tiny, tmp_path):
    onnx = pytest.importorskip("onnx")
    damaged = onnx.load(export_of_tiny[0])
    for weight in damaged.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            nan = np.full(tuple(weight.dims), np.nan, np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(nan, weight.name))
    onnx.save(damaged, tmp_path / "damaged.onnx")
    with pytest.raises(uctrans.ModelFileError, match=r"damaged\.onnx: gives logits that are not finite"):
        load_predictor(tmp_path / "damaged.onnx", device="cpu").probabilities(inputs(*SIZE))


def test_predict_and_evaluate_take_files_and_engines(exported, dataset, tmp_path):
    path = str(exported(tiny(protocol="uctransnet-224")))
    masks = {"output": str(tmp_path / "masks"), "device": "cpu", "progress": False}
    assert len(predict(PredictConfig(path, str(dataset / "test/images"), engine="onnx", **masks))) == 6
    scores = {"data": str(dataset), "output": str(tmp_path / "scores"), "device": "cpu", "progress": False}
    assert len(evaluate(EvaluateConfig(path, engine="auto", **scores)).rows) == 3


def test_two_files_are_two_models_to_a_folder_of_predictions(export_of_tiny):
    first, second = (weights_digest(OnnxModel(path)) for path in export_of_tiny)
    assert first != second
    assert first == weights_digest(OnnxModel(export_of_tiny[0]))
