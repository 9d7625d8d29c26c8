"""The model of nuclei that comes with the package: its files, what it finds, what a training takes of it."""

import numpy as np
import pytest
from skimage.draw import disk
from skimage.io import imread, imsave

import uctrans
from uctrans import cli
from uctrans.inference import PredictConfig, predict
from uctrans.inference.metrics import object_f1
from uctrans.models.files import BUILT_IN_MODELS, built_in_models

LARGEST_FOLDER = 8_000_000  # bytes
CENTRES = ((20, 20), (24, 60), (70, 30), (80, 76), (50, 100), (104, 104))


@pytest.fixture(scope="module")
def model():
    return uctrans.load_model("nuclei")


@pytest.fixture(scope="module")
def truth():
    """Six nuclei, 22 pixels across."""
    labels = np.zeros((128, 128), dtype=np.uint8)
    for number, centre in enumerate(CENTRES, start=1):
        labels[disk(centre, 11)] = number
    return labels


def test_the_files_are_small_and_name_no_image(model):
    assert built_in_models() == ["nuclei"]
    files = {path.name: path.stat().st_size for path in (BUILT_IN_MODELS / "nuclei").iterdir()}
    assert files.keys() == {"model.safetensors", "config.json", "README.md"}
    assert sum(files.values()) < LARGEST_FOLDER
    images = model.metadata["images"]
    assert {part: len(known) for part, known in images.items()} == {"train": 471, "val": 68}
    assert {name for known in images.values() for name in known.values()} == {""}


@pytest.mark.parametrize(
    ("dtype", "background", "nuclei", "settings"),
    [(np.uint8, 12, 120, {}), (np.uint16, 3000, 30000, {}), (np.uint16, 200, 3000, {"intensity_range": (0, 4095)})],
    ids=["8 bits", "16 bits", "12 bits"],
)
def test_bright_nuclei_on_a_dark_ground(dtype, background, nuclei, settings, truth, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.02 * nuclei, truth.shape)
    image = np.where(truth > 0, nuclei, background) + noise
    imsave(tmp_path / "a.tif", image.clip(0).astype(dtype), check_contrast=False)
    settings = {"device": "cpu", "instances": True, "progress": False, **settings}
    predict(PredictConfig("nuclei", str(tmp_path / "a.tif"), str(tmp_path / "out"), **settings))
    assert object_f1(imread(tmp_path / "out/a_instances.png"), truth, threshold=0.7) == 1


def test_a_dark_image_without_nuclei_is_left_empty(model, tmp_path):
    noise = np.random.default_rng(0).normal(12, 3, (128, 128)).clip(0, 255)
    imsave(tmp_path / "a.png", noise.astype(np.uint8), check_contrast=False)
    predict(PredictConfig("nuclei", str(tmp_path / "a.png"), str(tmp_path / "out"), device="cpu", progress=False))
    assert imread(tmp_path / "out/a.png").max() == 0


def test_small_nuclei_are_found_at_a_scale(truth, tmp_path):
    small = truth[::4, ::4]
    imsave(tmp_path / "a.png", np.where(small > 0, 120, 12).astype(np.uint8), check_contrast=False)
    found = {}
    for scale in (1.0, 4.0):
        out = str(tmp_path / f"out{scale}")
        settings = {"scale": scale, "smallest_object": 5, "instances": True, "device": "cpu", "progress": False}
        predict(PredictConfig("nuclei", str(tmp_path / "a.png"), out, **settings))
        found[scale] = object_f1(imread(f"{out}/a_instances.png"), small, threshold=0.5)
    assert found[4.0] == 1
    assert found[4.0] >= found[1.0]


def test_another_target_keeps_its_own_head(model):
    narrow = {"base_channels": 16, "num_layers": 3}
    own = uctrans.create_model("uctransnet", classes=1, image_size=64, **narrow)
    assert own.start_from(model) == ["head.weight", "head.bias"]
    with pytest.raises(uctrans.ModelFileError, match="base_channels 16 and not 8"):
        uctrans.create_model("uctransnet", classes=3, **narrow | {"base_channels": 8}).start_from(model)


def test_an_unknown_name_lists_those_that_are_built_in(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    imsave(tmp_path / "images/a.png", np.zeros((8, 8), dtype=np.uint8), check_contrast=False)
    words = ["predict", "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out"), "--model", "nucleus"]
    assert cli.main(words) == cli.USER_ERROR
    assert "nucleus does not exist: give a run folder" in (message := capsys.readouterr().err)
    assert "comes with the package (nuclei)" in message
