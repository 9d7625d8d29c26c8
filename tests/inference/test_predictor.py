"""From an image to probabilities: sizes, tiles, test-time transforms, channels, devices, ensembles."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import uctrans
from uctrans.inference import (
    Ensemble,
    EvaluateConfig,
    ExportConfig,
    InferenceError,
    PredictConfig,
    Predictor,
    evaluate,
    export,
    load_predictor,
    predict,
)
from uctrans.inference.predictor import (
    TRANSFORMS,
    enlarge,
    inverse_transform,
    to_labels,
    to_model_channels,
    transform,
)

SIZE = 32


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def plain(unet_folder):
    return load_predictor(unet_folder, device="cpu")


@pytest.mark.parametrize("name", ["none", "flips", "d4"])
def test_transforms_are_undone_and_differ(name):
    image = torch.arange(6.0).view(1, 1, 2, 3)
    results = [transform(image, *step) for step in TRANSFORMS[name]]
    for result, step in zip(results, TRANSFORMS[name], strict=True):
        assert torch.equal(inverse_transform(result, *step), image)
    assert len({(tuple(result.shape), tuple(result.flatten().tolist())) for result in results}) == len(results)
    assert len(results) == {"none": 1, "flips": 4, "d4": 8}[name]


def test_tta_is_the_mean_over_the_transforms(unet_folder, plain):
    image = torch.from_numpy(picture(24, 40)).permute(2, 0, 1)[None]
    expected = torch.stack(
        [inverse_transform(plain.probabilities(transform(image, *step)), *step) for step in TRANSFORMS["d4"]]
    ).mean(0)
    turning = load_predictor(unet_folder, device="cpu", tta="d4")
    averaged = turning.probabilities(image)
    torch.testing.assert_close(averaged, expected)
    assert (averaged - plain.probabilities(image)).abs().max() > 1e-5
    # with all eight transforms, the answer turns with the image
    turned = turning.probabilities(torch.rot90(image, 1, (-2, -1)))
    torch.testing.assert_close(turned, torch.rot90(averaged, 1, (-2, -1)), atol=1e-5, rtol=0)
    assert not averaged.requires_grad


@pytest.mark.parametrize("resolution", ["protocol", "native"])
def test_any_size_comes_back(resolution, unet_folder):
    predictor = load_predictor(unet_folder, device="cpu", resolution=resolution, tta="flips")
    for size in ((1, 1), (1, 50), (7, 3), (16, 16), (45, 33)):
        probabilities = predictor.probabilities_of_image(picture(*size))
        assert probabilities.shape == (1, *size)
        assert probabilities.dtype == torch.float32
        assert ((probabilities > 0) & (probabilities < 1)).all()


def test_protocol_resolution_resizes_and_native_tiles(brightness_model):
    model = brightness_model(image_size=16)
    image = np.zeros((40, 24, 3), dtype=np.uint8)
    image[10:30, 6:20] = 255
    Predictor(model, device="cpu").probabilities_of_image(image)
    assert model.seen == [(1, 3, 16, 16)]
    model.seen.clear()
    tiled = Predictor(model, device="cpu", resolution="native").probabilities_of_image(image)
    assert {shape[2:] for shape in model.seen} == {(16, 16)}
    whole = Predictor(model, device="cpu", resolution="native", tile=64).probabilities_of_image(image)
    assert model.seen[-1] == (1, 3, 40, 24)
    torch.testing.assert_close(tiled, whole)  # this model looks at single pixels, so tiles change nothing
    assert torch.equal(to_labels(whole[None])[0].bool(), torch.from_numpy(image[..., 0] > 127))


def test_a_strip_narrower_than_the_tile_is_not_padded(brightness_model):
    model = brightness_model(image_size=16)
    Predictor(model, device="cpu", resolution="native").probabilities_of_image(picture(40, 5))
    assert {shape[2:] for shape in model.seen} == {(16, 5)}


def test_tiles_need_monai_and_nothing_else_does(brightness_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    predictor = Predictor(brightness_model(), device="cpu", resolution="native")
    assert predictor.probabilities_of_image(picture(16, 16)).shape == (1, 16, 16)
    with pytest.raises(ImportError, match=r'pip install "uctrans\[training\]"'):
        predictor.probabilities_of_image(picture(17, 16))


def test_enlarging_keeps_the_middle_of_pixels():
    values = torch.tensor([[[[0.0, 1.0]]]])
    assert enlarge(values, (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert enlarge(values, (1, 2)) is values


def test_labels():
    assert to_labels(torch.tensor([[[[0.2, 0.5, 0.51]]]])).tolist() == [[[0, 0, 1]]]
    assert to_labels(torch.tensor([[[[0.2, 0.5, 0.51]]]]), threshold=0.1).tolist() == [[[1, 1, 1]]]
    several = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1)
    assert to_labels(several, threshold=0.9).tolist() == [[[1]]]


def test_gray_models_see_luma_in_either_channel_order(brightness_model):
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert to_model_channels(red, 1, "rgb").item() == pytest.approx(0.299)
    assert to_model_channels(red.flip(1), 1, "bgr").item() == pytest.approx(0.299)
    assert to_model_channels(red, 3, "rgb") is red
    model = brightness_model(in_channels=1)
    Predictor(model, device="cpu").probabilities_of_image(picture(5, 5))
    assert model.seen == [(1, 1, 16, 16)]


def test_channel_order(unet_folder, plain):
    image = picture(SIZE, SIZE)
    bgr = load_predictor(unet_folder, device="cpu", channel_order="bgr").probabilities_of_image(image)
    torch.testing.assert_close(bgr, plain.probabilities_of_image(image[..., ::-1].copy()))
    assert (plain.probabilities_of_image(image) - bgr).abs().max() > 1e-5


def test_bf16_is_close_and_float32_comes_out(unet_folder, plain):
    image = picture(SIZE, SIZE)
    reduced = load_predictor(unet_folder, device="cpu", amp="bf16").probabilities_of_image(image)
    assert reduced.dtype == torch.float32
    assert 0 < (plain.probabilities_of_image(image) - reduced).abs().max() < 0.05


def test_backend_is_set(uctransnet_folder):
    image = picture(SIZE, SIZE)
    composed = load_predictor(uctransnet_folder, "composed", device="cpu").probabilities_of_image(image)
    reference = load_predictor(uctransnet_folder, "reference", device="cpu").probabilities_of_image(image)
    torch.testing.assert_close(composed, reference, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="backend"):
        load_predictor(uctransnet_folder, "fastest", device="cpu")


def test_backend_that_cannot_run_is_refused_before_the_first_image(uctransnet_folder, unet_folder, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="run on a CUDA device"):
        load_predictor(uctransnet_folder, "triton", device="cpu")
    with pytest.raises(NotImplementedError, match="run on a CUDA device"):
        load_predictor(unet_folder, "triton", device="cpu")
    monkeypatch.setenv("UCTRANS_BACKEND", "triton")
    with pytest.raises(NotImplementedError, match="run on a CUDA device"):
        load_predictor(uctransnet_folder, device="cpu")
    monkeypatch.delenv("UCTRANS_BACKEND")
    assert load_predictor(unet_folder, "composed", device="cpu").model.name == "unet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "full"}, "resolution: 'full' is not known; choose one of protocol, native"),
        ({"tta": "d8"}, "tta: 'd8' is not known; choose one of none, flips, d4"),
        ({"amp": "fp16"}, "amp: 'fp16' is not known; choose one of no, bf16"),
        ({"tile": 0}, "tile: 0 is too small"),
        ({"overlap": 1.0}, "overlap: 1.0 is out of range"),
        ({"batch_size": 0}, "batch_size: 0 is too small"),
    ],
)
def test_bad_settings(brightness_model, settings, message):
    with pytest.raises(InferenceError, match=message):
        Predictor(brightness_model(), **{"device": "cpu", **settings})


def test_images_of_other_channels_are_refused(brightness_model):
    with pytest.raises(InferenceError, match="have 3 channels, but the model takes 4"):
        Predictor(brightness_model(in_channels=4), device="cpu").probabilities_of_image(picture(5, 5))


def test_bad_devices_are_named(brightness_model, monkeypatch):
    with pytest.raises(ValueError, match=r"device: .tpu9000. is not a device"):
        Predictor(brightness_model(), device="tpu9000")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device: cuda is not there; give auto or cpu"):
        Predictor(brightness_model(), device="cuda")


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a model")
    with pytest.raises(uctrans.ModelFileError, match=r"notes\.txt"):
        load_predictor(path, device="cpu")
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        load_predictor(tmp_path / "nowhere", device="cpu")


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(unet_folder):
    image = picture(70, 50)
    settings = {"resolution": "native", "tile": 512, "tta": "d4"}
    on_cpu = load_predictor(unet_folder, device="cpu", **settings).probabilities_of_image(image)
    on_gpu = load_predictor(unet_folder, device="cuda", **settings).probabilities_of_image(image)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=2e-3, rtol=0)


def saved(folder, seed, classes=1, model="unet", **metadata):
    """The path of a network with weights of its own."""
    torch.manual_seed(seed)
    options = {"image_size": SIZE, "num_layers": 1, "num_heads": 2} if model == "uctransnet" else {}
    network = uctrans.create_model(model, base_channels=4, classes=classes, **options)
    network.metadata = {"protocol": "uctransnet-224", "image_size": [SIZE, SIZE], **metadata}
    return str(network.save_pretrained(folder / f"{model}-{seed}"))


@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_of_an_ensemble_are_the_mean_of_its_members(classes, tmp_path):
    paths = [saved(tmp_path, 0, classes), saved(tmp_path, 1, classes), saved(tmp_path, 2, classes, model="uctransnet")]
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    members = [Predictor(uctrans.load_model(path), device="cpu", tta="flips").probabilities(images) for path in paths]
    together = load_predictor(",".join(paths), device="cpu", tta="flips").probabilities(images)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.stack(members).mean(0), rtol=1e-5, atol=1e-6)
    assert (together - members[0]).abs().max() > 1e-3, "nothing to tell apart"


def test_certain_members_give_finite_logits(brightness_model):
    ensemble = Ensemble([brightness_model(), brightness_model()], ["a", "b"])
    logits = ensemble(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(1, 3, 1, 1) * 100 - 50)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.sigmoid().flatten(), torch.tensor([1e-7, 1 - 1e-7]))


def test_evaluate_and_predict_take_several_models(tmp_path, dataset):
    paths = [saved(tmp_path, seed, palette=["#000000", "#ffffff"]) for seed in (0, 1)]
    model = f"{paths[0]}, {paths[1]}"
    output = str(tmp_path / "scores")
    result = evaluate(EvaluateConfig(model=model, data=str(dataset), output=output, device="cpu", progress=False))
    assert len(result.rows) == 3
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["model"]["name"] == "ensemble"
    assert summary["model"]["metadata"]["members"] == paths
    assert [member["name"] for member in summary["model"]["config"]["members"]] == ["unet", "unet"]
    output = str(tmp_path / "masks")
    written = predict(PredictConfig(model, str(dataset / "test" / "images"), output, device="cpu", progress=False))
    assert len(written) == 6


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": 3}, r"classes: 1 and 3"),
        ({"metadata": {"channel_order": "bgr"}}, r"channel_order: 'rgb' and 'bgr'"),
        ({"metadata": {"protocol": "native"}}, r"protocol: 'uctransnet-224' and 'native'"),
        ({"image_size": (64, 16)}, r"image_size: \[16, 16\] and \[64, 16\]"),
        ({"metadata": {"class_names": ["nucleus"]}}, r"class_names: None and \['nucleus'\]"),
    ],
)
def test_members_that_differ_are_refused(changes, named, brightness_model):
    with pytest.raises(InferenceError, match=rf"one and other cannot be averaged, they differ in {named}; name"):
        Ensemble([brightness_model(), brightness_model(**changes)], ["one", "other"])


def test_an_empty_name_and_a_single_model_are_refused(unet_folder, brightness_model):
    with pytest.raises(InferenceError, match=r"a name in .* is empty"):
        load_predictor(f"{unet_folder},", device="cpu")
    with pytest.raises(InferenceError, match="needs two models or more, got 1"):
        Ensemble([brightness_model()], ["a"])


def test_a_comma_in_the_name_of_a_folder_is_no_list(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert load_predictor(saved(tmp_path / "a,b", 0), device="cpu").model.name == "unet"


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_weights_that_are_not_finite_are_refused(command, dataset, tmp_path):
    model = uctrans.create_model("unet", base_channels=4)
    model.decoder[0].convs[0].norm.running_mean[1] = math.nan
    folder = str(model.save_pretrained(tmp_path / "model"))
    output = str(tmp_path / "output")
    run = {
        "predict": lambda: predict(PredictConfig(folder, str(dataset / "test/images"), output, progress=False)),
        "evaluate": lambda: evaluate(EvaluateConfig(folder, str(dataset), output, progress=False)),
        "export": lambda: export(ExportConfig(folder, output, formats=("torch",))),
    }[command]
    with pytest.raises(uctrans.ModelFileError, match=r"model: decoder\.0\..*running_mean has values that"):
        run()
    assert not (tmp_path / "output").exists()
