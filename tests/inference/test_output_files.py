"""What the commands share for writing: JSON that every reader takes, output folders, extras by name."""

import json
import math
import sys

import pytest

from uctrans.extras import import_extra
from uctrans.inference.files import (
    InferenceError,
    output_folder,
    progress_bar,
    refuse_existing,
    write_json,
)


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": "ü"}, "d": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [None, 1.5, [None]], "b": {"c": "ü"}, "d": None}
    assert "NaN" not in text


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
