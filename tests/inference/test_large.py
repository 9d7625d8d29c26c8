"""Images that are segmented in strips: the same results as of the whole, in files that are written row by row."""

import numpy as np
import pytest
import tifffile
import torch
from skimage.io import imread, imsave

from uctrans.data.read import Doubts
from uctrans.data.rows import open_rows
from uctrans.inference import InferenceError, PredictConfig, PredictionError, load_predictor, predict, writer

SIZE = (300, 270)


def picture(size=SIZE):
    levels = np.array([20, 127, 240], dtype=np.uint8)  # no mean of three is on the border of two classes
    coarse = np.random.default_rng(0).choice(levels, (*(-(-side // 10) for side in size), 3))
    return np.kron(coarse, np.ones((10, 10, 1), np.uint8))[: size[0], : size[1]]


@pytest.fixture
def slide(tmp_path):
    path = tmp_path / "slides/slide.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, picture(), photometric="rgb", tile=(64, 64), compression="zlib")
    return path


@pytest.fixture
def segment(use_model, brightness_model, slide, tmp_path):
    """A function that predicts the slide, or another image, into a folder of ``tmp_path``."""

    def run(folder="strips", source=slide, model=None, **settings):
        use_model(model or brightness_model())
        chosen = {"device": "cpu", "progress": False, "resolution": "native", "tile": 32, "strips_above": 1000}
        return predict(PredictConfig("model", str(source), str(tmp_path / folder), **chosen | settings))

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("tta", ["none", "d4"])
@pytest.mark.parametrize("overlap", [0.25, 0.6])
def test_probabilities_by_rows_are_those_of_the_whole(tta, overlap, unet_folder, tmp_path):
    path = tmp_path / "a.tif"
    image = picture((75, 90))
    tifffile.imwrite(path, image, photometric="rgb", tile=(16, 16))
    predictor = load_predictor(unet_folder, device="cpu", resolution="native", tile=32, tta=tta, overlap=overlap)
    predictor.tile = (32, 48)
    with open_rows(path, 3, None, Doubts()) as rows:
        parts = list(predictor.probabilities_by_rows(rows.read, rows.size))
    assert len(parts) > 2
    torch.testing.assert_close(torch.cat(parts, 1), predictor.probabilities_of_image(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("source", ["tif", "png"])
def test_masks_and_probabilities_are_those_of_the_whole(source, segment, slide, tmp_path):
    if source == "png":
        imsave(slide.with_suffix(".png"), picture(), check_contrast=False)
        slide.unlink()
        slide = slide.with_suffix(".png")
    written = segment(source=slide, probability="npy")
    assert [path.name for path in written] == ["slide.tif", "slide_overlay.png", "slide_probability.npy"]
    assert (written.images, written.pixels) == (1, SIZE[0] * SIZE[1])
    segment("whole", slide, probability="npy", strips_above=10**6)
    whole, strips = tmp_path / "whole", tmp_path / "strips"
    probabilities = np.load(whole / "slide_probability.npy")
    assert 0.1 < (probabilities > 0.5).mean() < 0.9
    np.testing.assert_allclose(np.load(strips / "slide_probability.npy"), probabilities, atol=1e-6)
    np.testing.assert_array_equal(imread(strips / "slide.tif"), imread(whole / "slide.png"))
    np.testing.assert_array_equal(imread(strips / "slide_overlay.png"), imread(whole / "slide_overlay.png"))
    with tifffile.TiffFile(strips / "slide.tif") as file:
        page = file.pages[0]
        assert (page.is_tiled, page.compression.name, page.dtype) == (True, "ADOBE_DEFLATE", np.uint8)
    segment("shown", slide, probability="png")
    shown = imread(tmp_path / "shown/slide_probability.tif")
    np.testing.assert_allclose(shown, probabilities[0] * 255, atol=0.501)


@pytest.mark.parametrize("palette", [None, ["#000000", "#ff0000", "#0000ff"]])
def test_classes_and_palettes(palette, segment, brightness_model, tmp_path):
    model = brightness_model(classes=3, metadata={"palette": palette})
    for folder, limit in (("strips", 1000), ("whole", 10**6)):
        segment(folder, model=model, probability="npy", strips_above=limit)
    mask = imread(tmp_path / "strips/slide.tif")
    assert mask.shape == (SIZE if palette is None else (*SIZE, 3))
    np.testing.assert_array_equal(mask, imread(tmp_path / "whole/slide.png"))
    probabilities = [np.load(tmp_path / folder / "slide_probability.npy") for folder in ("strips", "whole")]
    np.testing.assert_allclose(*probabilities, atol=1e-6)


def test_the_overlay_is_reduced(segment, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "OVERVIEW", 100)
    segment()
    overlay = imread(tmp_path / "strips/slide_overlay.png")
    assert overlay.shape == (100, 90, 3)
    changed = (overlay != picture()[::3, ::3]).any(-1)
    assert 0 < changed.mean() < 0.5


def test_small_and_large_images_of_a_folder(segment, slide, tmp_path):
    imsave(slide.parent / "small.png", picture((30, 30)), check_contrast=False)
    imsave(slide.parent / "tail.png", picture((20, 30)), check_contrast=False)
    masks = [path.name for path in segment(source=slide.parent)][::2]
    assert masks == ["slide.tif", "small.png", "tail.png"]
    assert segment(source=slide.parent).done_before == 3
    segment(source=slide.parent, strips_above=10**6, overwrite=True)
    endings = (".png", "_overlay.png")
    assert names(tmp_path / "strips") == [f"{name}{end}" for name in ("slide", "small", "tail") for end in endings]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"instances": True}, "instances: nuclei are numbered in an image as a whole; cut it into parts"),
        ({"resolution": "protocol"}, "resolution: protocol resizes the image as a whole; set it to native"),
        ({"scale": 2.0}, "scale: 2.0 resizes the image as a whole; resize the file instead"),
    ],
)
def test_what_needs_the_whole_image_costs_the_large_ones(settings, named, segment, slide, tmp_path):
    imsave(slide.parent / "small.png", picture((30, 30)), check_contrast=False)
    with pytest.raises(PredictionError, match=named) as caught:
        segment(source=slide.parent, **settings)
    assert "or raise strips_above, which is 1000, above 300 x 270 pixels" in str(caught.value)
    assert list(caught.value.failures) == [slide]
    assert "small.png" in names(tmp_path / "strips")
    assert not any(name.startswith("slide") for name in names(tmp_path / "strips"))


def test_a_raised_limit_continues(segment, slide, tmp_path):
    imsave(slide.parent / "small.png", picture((30, 30)), check_contrast=False)
    with pytest.raises(PredictionError, match="raise strips_above"):
        segment(source=slide.parent, instances=True)
    written = segment(source=slide.parent, instances=True, strips_above=10**6)
    assert (written.images, written.done_before) == (1, 1)
    assert "slide_instances.png" in names(tmp_path / "strips")


def test_a_limit_below_a_pixel(segment):
    with pytest.raises(InferenceError, match="strips_above: 0 is too small; give 1 pixel or more"):
        segment(strips_above=0)


def test_a_damaged_tile_leaves_no_file_of_its_image(segment, slide, tmp_path):
    imsave(slide.parent / "small.png", picture((30, 30)), check_contrast=False)
    with tifffile.TiffFile(slide) as file:
        offset = file.pages[0].dataoffsets[-1]
    content = bytearray(slide.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    slide.write_bytes(content)
    with pytest.raises(PredictionError, match=r"slide\.tif: cannot be read, it may be damaged"):
        segment(source=slide.parent, probability="npy")
    assert sorted(path.name for path in (tmp_path / "strips").iterdir()) == [
        ".uctrans-predict.jsonl",
        "small.png",
        "small_overlay.png",
        "small_probability.npy",
    ]


@pytest.mark.parametrize("place", ["add", "finish"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_writer_that_stops_in_the_middle_leaves_no_file(place, error, segment, tmp_path, monkeypatch):
    def fail(*_):
        raise error("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(writer.LargeOutputs, place, fail)
        with pytest.raises(error, match="stopped"):
            segment(probability="npy")
    assert [path.name for path in (tmp_path / "strips").iterdir()] == [".uctrans-predict.jsonl"]
    assert len(segment(probability="npy")) == 3


@pytest.fixture
def failing_model(brightness_model):
    """A function that returns a model which raises an error in the tenth batch of tiles."""

    class Failing(brightness_model):
        def forward(self, image):
            if len(self.seen) == 10:
                raise self.error
            return super().forward(image)

    def make(error):
        model = Failing()
        model.error = error
        return model

    return make


@pytest.mark.parametrize("error", [OSError("stopped"), KeyboardInterrupt("stopped")], ids=["error", "interrupt"])
def test_a_network_that_stops_in_the_middle_leaves_no_file(error, failing_model, segment, tmp_path):
    with pytest.raises(type(error), match="stopped"):
        segment(model=failing_model(error), probability="npy")
    assert [path.name for path in (tmp_path / "strips").iterdir()] == [".uctrans-predict.jsonl"]
    assert len(segment(probability="npy")) == 3


def test_a_network_without_memory_costs_the_image(failing_model, segment):
    with pytest.raises(PredictionError, match=r"slide\.tif: out of memory: use a device with more memory"):
        segment(model=failing_model(RuntimeError("CUDA out of memory")))
