"""Prediction on image files: what is written, and what is refused before anything is."""

import pathlib

import numpy as np
import pytest
import torch
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError
from uctrans.inference import InferenceError, PredictConfig, PredictionError, predict

SQUARE = np.zeros((20, 30, 3), dtype=np.uint8)
SQUARE[5:15, 10:20] = 255


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    imsave(folder / "square.png", SQUARE, check_contrast=False)
    imsave(folder / "wide.tif", np.full((8, 40), 255, dtype=np.uint8), check_contrast=False)
    imsave(folder / "dot.png", np.zeros((1, 1, 3), dtype=np.uint8), check_contrast=False)
    return folder


@pytest.fixture
def segment(use_model, brightness_model, tmp_path):
    """A function that predicts into the folder ``masks``, by default with the binary brightness model."""

    def run(source, model=None, **settings):
        use_model(model or brightness_model())
        settings = {"device": "cpu", "progress": False, "resolution": "native", **settings}
        return predict(PredictConfig("model", str(source), str(tmp_path / "masks"), **settings))

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_masks_and_overlays(segment, images, tmp_path):
    written = segment(images)
    out = tmp_path / "masks"
    assert names(out) == sorted(path.name for path in written)
    assert names(out) == [f"{name}{end}.png" for name in ("dot", "square", "wide") for end in ("", "_overlay")]
    mask = imread(out / "square.png")
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, SQUARE[..., 0])
    assert imread(out / "dot.png").shape == (1, 1)
    assert (imread(out / "wide.png") == 255).all()
    changed = (imread(out / "square_overlay.png") != SQUARE).any(-1)
    rim = (SQUARE[..., 0] > 0).copy()
    rim[6:14, 11:19] = False
    assert np.array_equal(changed, rim)


def test_one_image(segment, images):
    assert [path.name for path in segment(images / "wide.tif")] == ["wide.png", "wide_overlay.png"]


@pytest.mark.parametrize("resolution", ["protocol", "native"])
def test_a_real_model_on_every_size(resolution, unet_folder, images, tmp_path):
    settings = {"device": "cpu", "resolution": resolution, "tta": "flips", "tile": 16, "probability": "npy"}
    predict(PredictConfig(str(unet_folder), str(images), str(tmp_path / "masks"), **settings))
    for name, shape in {"square": (20, 30), "wide": (8, 40), "dot": (1, 1)}.items():
        assert imread(tmp_path / f"masks/{name}.png").shape == shape
        probabilities = np.load(tmp_path / f"masks/{name}_probability.npy")
        assert probabilities.shape == (1, *shape)
        assert probabilities.dtype == np.float32
        assert np.array_equal(imread(tmp_path / f"masks/{name}.png") == 255, probabilities[0] > 0.5)


class ThreePartModel(torch.nn.Module):
    """Background, interior or border wherever the image is dark, white or gray."""

    def __init__(self):
        super().__init__()
        self.name, self.in_channels, self.classes, self.config = "three", 3, 3, {"image_size": 16}
        self.metadata = {"protocol": "native", "target": "boundary"}

    def forward(self, image):
        centres = torch.tensor([0.0, 1.0, 0.5]).view(1, -1, 1, 1)
        return -500 * (image.mean(1, keepdim=True) - centres).square()


def test_instances_of_a_boundary_aware_model(segment, tmp_path):
    """Two nuclei that touch."""
    parts = np.zeros((24, 40), dtype=np.uint8)
    parts[4:20, 4:36] = 127
    parts[7:17, 7:17] = parts[7:17, 23:33] = 255
    imsave(tmp_path / "two.png", parts[..., None].repeat(3, -1), check_contrast=False)
    segment(tmp_path / "two.png", ThreePartModel(), instances=True, probability="png", resolution="protocol")
    out = tmp_path / "masks"
    endings = ("", "_instances", "_instances_overlay", "_overlay", "_probability")
    assert names(out) == [f"two{end}.png" for end in endings]
    instances = imread(out / "two_instances.png")
    assert instances.dtype == np.uint16
    assert np.unique(instances).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(instances > 0, parts > 0)
    assert (instances[:, :20].max(), instances[:, 20:].min(where=parts[:, 20:] > 0, initial=9)) == (1, 2)
    np.testing.assert_array_equal(imread(out / "two.png"), (parts > 0) * 255)
    assert imread(out / "two_probability.png")[parts > 0].min() > 250
    lines = (imread(out / "two_instances_overlay.png") != parts[..., None]).any(-1)
    assert lines[10, 19]  # the outline between the two, where the mask has none
    assert not (imread(out / "two_overlay.png") != parts[..., None]).any(-1)[10, 19]


def test_instances_of_a_binary_model(segment, images, tmp_path):
    assert len(segment(images, instances=True, smallest_object=50)) == 12
    np.testing.assert_array_equal(imread(tmp_path / "masks/square_instances.png") > 0, SQUARE[..., 0] > 0)
    segment(images, instances=True, smallest_object=101, overwrite=True)
    assert imread(tmp_path / "masks/square_instances.png").max() == 0


def test_more_nuclei_than_a_file_holds_stop_only_their_image(segment, brightness_model, tmp_path):
    (tmp_path / "images").mkdir()
    dots = np.zeros((520, 520), dtype=np.uint8)
    dots[::2, ::2] = 255
    for name, pixels in {"dots": dots, "square": SQUARE}.items():
        imsave(tmp_path / "images" / f"{name}.png", pixels, check_contrast=False)
    settings = {"instances": True, "smallest_object": 0, "seed_distance": 1}
    with pytest.raises(PredictionError, match="from 0 to 67600"):
        segment(tmp_path / "images", brightness_model(image_size=520), **settings)
    assert "square_instances.png" in names(tmp_path / "masks")
    assert not [name for name in names(tmp_path / "masks") if name.startswith("dots")]


def test_probability_picture(segment, images, tmp_path):
    segment(images, probability="png")
    assert np.array_equal(imread(tmp_path / "masks/square_probability.png"), SQUARE[..., 0])


def test_label_indices_and_palette_colours(brightness_model, segment, tmp_path):
    shades = np.array([[20, 127, 240]], dtype=np.uint8)[..., None].repeat(3, -1)
    imsave(tmp_path / "shades.png", shades, check_contrast=False)
    segment(tmp_path / "shades.png", brightness_model(classes=3), probability="png")
    assert imread(tmp_path / "masks/shades.png").tolist() == [[0, 1, 2]]
    assert imread(tmp_path / "masks/shades_probability.png").tolist() == [[0, 255, 255]]
    palette = {"palette": ["#000000", "#ff0000", "#0000ff"]}
    segment(tmp_path / "shades.png", brightness_model(classes=3, metadata=palette), overwrite=True)
    assert imread(tmp_path / "masks/shades.png").tolist() == [[[0, 0, 0], [255, 0, 0], [0, 0, 255]]]


def test_a_damaged_image_does_not_stop_the_others(segment, images, tmp_path):
    (images / "broken.png").write_bytes(b"no picture")
    with pytest.raises(PredictionError, match=r"1 images were not segmented, 6 files .*\n.*broken\.png") as caught:
        segment(images)
    assert list(caught.value.failures) == [images / "broken.png"]
    assert len(caught.value.written) == 6
    assert names(tmp_path / "masks") == sorted(path.name for path in caught.value.written)


def test_an_image_that_needs_too_much_memory_does_not_stop_the_others(segment, images, brightness_model):
    class Greedy(brightness_model):
        def forward(self, image):
            if image.shape[-2:] == (20, 30):
                torch.empty(2**58)
            return super().forward(image)

    with pytest.raises(PredictionError, match=r"png: out of memory: lower batch_size \(now 4\) or tile") as caught:
        segment(images, Greedy(), tile=64)
    assert list(caught.value.failures) == [images / "square.png"]
    assert sorted(path.stem for path in caught.value.written) == ["dot", "dot_overlay", "wide", "wide_overlay"]


def test_existing_files_are_kept(segment, images, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/square.png").write_bytes(b"mine")
    with pytest.raises(InferenceError, match=r"square\.png.*set overwrite"):
        segment(images)
    assert names(tmp_path / "masks") == ["square.png"]
    assert (tmp_path / "masks/square.png").read_bytes() == b"mine"
    segment(images, overwrite=True)
    assert imread(tmp_path / "masks/square.png").shape == (20, 30)


def test_two_images_of_one_name(segment, images, tmp_path):
    imsave(images / "square.tif", SQUARE, check_contrast=False)
    with pytest.raises(DataError, match=r"square\.tif"):
        segment(images)
    (images / "square.tif").unlink()
    imsave(images / "square_overlay.png", SQUARE, check_contrast=False)
    with pytest.raises(InferenceError, match=r"both write square_overlay\.png"):
        segment(images)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("source", ["images", "images/square.png"])
def test_the_folder_of_the_images_is_no_output(source, images, tmp_path):
    before = names(images)
    with pytest.raises(InferenceError, match="holds the images themselves"):
        predict(PredictConfig("model", str(tmp_path / source), str(images / "../images"), overwrite=True))
    assert names(images) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": "jpg"}, "probability: 'jpg' is not known; choose one of none, png, npy"),
        ({"threshold": 0.0}, "threshold: 0.0 is out of range"),
        ({"tta": "all"}, "tta: 'all' is not known"),
        ({"resolution": "full"}, "resolution: 'full' is not known"),
        ({"instances": True, "smallest_object": -1}, "smallest_object: -1 is negative"),
        ({"instances": True, "seed_distance": 0}, "seed_distance: 0 is too small"),
    ],
)
def test_bad_settings(settings, message, segment, images, tmp_path):
    with pytest.raises(InferenceError, match=message):
        segment(images, **settings)
    assert not (tmp_path / "masks").exists()


def test_bad_paths(images, tmp_path):
    output = str(tmp_path / "masks")
    with pytest.raises(DataError, match="nothing-here"):
        predict(PredictConfig("model", str(tmp_path / "nothing-here"), output))
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        predict(PredictConfig(str(tmp_path / "nowhere"), str(images), output, device="cpu", progress=False))
    with pytest.raises(InferenceError, match="is a file"):
        predict(PredictConfig("model", str(images), str(images / "dot.png")))


def test_a_failed_write_leaves_no_part_of_a_file(segment, images, tmp_path, monkeypatch):
    write = pathlib.Path.write_bytes

    def fail(path, content):
        write(path, content[:4])
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        segment(images)
    assert names(tmp_path / "masks") == []
