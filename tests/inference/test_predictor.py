"""From an image to probabilities: sizes, tiles, test-time transforms, channels, devices."""

import numpy as np
import pytest
import torch

import uctrans
from uctrans.inference import InferenceError, Predictor, load_predictor
from uctrans.inference.predictor import (
    TRANSFORMS,
    enlarge,
    inverse_transform,
    to_labels,
    to_model_channels,
    transform,
)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["none", "flips", "d4"])
def test_transforms_are_undone_and_differ(name):
    image = torch.arange(6.0).view(1, 1, 2, 3)
    results = [transform(image, *step) for step in TRANSFORMS[name]]
    for result, step in zip(results, TRANSFORMS[name], strict=True):
        assert torch.equal(inverse_transform(result, *step), image)
    assert len({(tuple(result.shape), tuple(result.flatten().tolist())) for result in results}) == len(results)
    assert len(results) == {"none": 1, "flips": 4, "d4": 8}[name]


def test_tta_is_the_mean_over_the_transforms(unet_folder):
    image = torch.from_numpy(picture(24, 40)).permute(2, 0, 1)[None]
    plain = load_predictor(unet_folder, device="cpu")
    expected = torch.stack(
        [inverse_transform(plain.probabilities(transform(image, *step)), *step) for step in TRANSFORMS["d4"]]
    ).mean(0)
    averaged = load_predictor(unet_folder, device="cpu", tta="d4").probabilities(image)
    torch.testing.assert_close(averaged, expected)
    assert (averaged - plain.probabilities(image)).abs().max() > 1e-5
    # with all eight transforms, the answer turns with the image
    turned = load_predictor(unet_folder, device="cpu", tta="d4").probabilities(torch.rot90(image, 1, (-2, -1)))
    torch.testing.assert_close(turned, torch.rot90(averaged, 1, (-2, -1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 3), (16, 16), (45, 33)])
@pytest.mark.parametrize("resolution", ["protocol", "native"])
def test_any_size_comes_back(size, resolution, unet_folder):
    predictor = load_predictor(unet_folder, device="cpu", resolution=resolution, tta="d4")
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
    import sys

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


def test_other_channel_counts_are_refused(brightness_model):
    with pytest.raises(InferenceError, match="takes 4 channels"):
        Predictor(brightness_model(in_channels=4), device="cpu")


def test_channel_order(unet_folder):
    image = picture(32, 32)
    rgb = load_predictor(unet_folder, device="cpu").probabilities_of_image(image)
    bgr = load_predictor(unet_folder, device="cpu", channel_order="bgr").probabilities_of_image(image)
    torch.testing.assert_close(
        bgr, load_predictor(unet_folder, device="cpu").probabilities_of_image(image[..., ::-1].copy())
    )
    assert (rgb - bgr).abs().max() > 1e-5


def test_bf16_is_close_and_float32_comes_out(unet_folder):
    image = picture(32, 32)
    full = load_predictor(unet_folder, device="cpu").probabilities_of_image(image)
    reduced = load_predictor(unet_folder, device="cpu", amp="bf16").probabilities_of_image(image)
    assert reduced.dtype == torch.float32
    assert 0 < (full - reduced).abs().max() < 0.05


def test_inference_leaves_no_graph(unet_folder):
    probabilities = load_predictor(unet_folder, device="cpu", tta="flips").probabilities_of_image(picture(9, 9))
    assert not probabilities.requires_grad


def test_backend_is_set(uctransnet_folder):
    image = picture(32, 32)
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
        ({"resolution": "full"}, "resolution must be one of protocol, native"),
        ({"tta": "d8"}, "tta must be one of none, flips, d4"),
        ({"amp": "fp16"}, "amp must be one of no, bf16"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"overlap": 1.0}, "overlap must lie in"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"device": "tpu9000"}, "device: .tpu9000. is not a device"),
    ],
)
def test_bad_settings(brightness_model, settings, message):
    with pytest.raises(InferenceError, match=message):
        Predictor(brightness_model(), **{"device": "cpu", **settings})


def test_missing_cuda_is_named(brightness_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InferenceError, match="device: cuda is not there; give auto or cpu"):
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
