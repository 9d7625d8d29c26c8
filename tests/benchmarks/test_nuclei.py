"""The model that the package ships: made from a run, scored by kind of image, timed."""

import json

import numpy as np
import pytest
import torch
from skimage.io import imsave

import uctrans
from benchmarks import nuclei
from uctrans.models import files

DARK = np.full((32, 32, 3), 20, dtype=np.uint8)
DARK[4:20, 4:20] = 200
STAINED = np.full((32, 32, 3), (230, 200, 220), dtype=np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a small network with a record of its images, and a package without models."""
    torch.manual_seed(0)
    model = uctrans.create_model("uctransnet", classes=3, base_channels=2, image_size=128, num_layers=1, num_heads=1)
    images = {"train": {"0123456789abcdef": "patient-7"}, "val": {}}
    model.metadata = {"protocol": "native", "target": "boundary", "image_size": [128, 128], "images": images}
    model.save_pretrained(tmp_path / "run/best")
    for module in (nuclei, files):
        monkeypatch.setattr(module, "BUILT_IN_MODELS", tmp_path / "package")
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path):
    truth = np.zeros((32, 32), dtype=np.uint8)
    truth[4:20, 4:20] = 1
    for kind, maps in {
        "images": (DARK, 255 - DARK, STAINED),
        "masks": [truth * np.uint8(255)] * 3,
        "instances": [truth.astype(np.uint16)] * 3,
    }.items():
        folder = tmp_path / "data/test" / kind
        folder.mkdir(parents=True)
        for name, pixels in zip("abc", maps, strict=True):
            imsave(folder / f"{name}.png", pixels, check_contrast=False)
    return tmp_path / "data"


def test_kinds_of_images():
    assert [nuclei.kind_of(image) for image in (DARK, 255 - DARK, STAINED)] == [
        "fluorescence",
        "bright field",
        "stained",
    ]


def test_a_run_becomes_the_built_in_model_and_is_scored_by_kind(run, data, capsys):
    nuclei.main(["--run", str(run), "-i", str(data), "--threads", "1"])
    installed = run.parent / "package/nuclei"
    assert (installed / "model.safetensors").stat().st_size < 0.7 * (run / "best/model.safetensors").stat().st_size
    assert json.loads((installed / "config.json").read_text())["metadata"]["images"] == {
        "train": {"0123456789abcdef": ""},
        "val": {},
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Wrote {installed}"
    assert lines[1] == "| images | number | Dice | AP at IoU 0.5 | AJI | PQ |"
    assert [line.split(" | ")[:2] for line in lines[3:7]] == [
        ["| all", "3"],
        ["| fluorescence", "1"],
        ["| bright field", "1"],
        ["| stained", "1"],
    ]
    assert lines[7].endswith("s for an image of 512 x 512 pixels, threads: 1")


def test_nothing_to_do_is_an_error(capsys):
    with pytest.raises(SystemExit):
        nuclei.main([])
    assert "give --run, -i or both" in capsys.readouterr().err
