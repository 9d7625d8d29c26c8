"""What the commands share for writing: whole files or none, JSON that every reader takes, extras by name."""

import json
import math
import sys

import numpy as np
import pytest
from skimage.io import imread

from uctrans.extras import import_extra
from uctrans.inference.files import (
    InferenceError,
    output_folder,
    progress_bar,
    refuse_existing,
    write_json,
    write_png,
)
from uctrans.writing import written_atomically


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/scores.txt"
    with written_atomically(path) as temporary:
        temporary.write_text("first")
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "first"

    def fail():
        with written_atomically(path) as temporary:
            temporary.write_text("sec")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.txt"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": "ü"}, "d": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [None, 1.5, [None]], "b": {"c": "ü"}, "d": None}
    assert "NaN" not in text


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (1, 1)])
def test_png_comes_back(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(imread(tmp_path / "a.png"), pixels)


def test_output_folder(tmp_path):
    assert output_folder(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InferenceError, match="is a file"):
        output_folder(tmp_path / "file")
    with pytest.raises(InferenceError, match="No output folder"):
        output_folder("")


def test_existing_files_are_named(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    refuse_existing(paths, "a test")
    for path in paths[:4]:
        path.touch()
    with pytest.raises(InferenceError, match=r"4 of the files of a test exist already.*, \.\.\."):
        refuse_existing(paths, "a test")


def test_extras(monkeypatch):
    assert import_extra("json.decoder", "training").__name__ == "json.decoder"
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'pip install "uctrans\[training\]"'):
        progress_bar([], 0, "test", True)
    assert progress_bar([1], 1, "test", False) == [1]
