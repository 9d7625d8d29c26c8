"""Checks that the commands share: output folders, files that exist, extras by name."""

import sys

import pytest

from uctrans.extras import import_extra
from uctrans.inference import InferenceError
from uctrans.inference.settings import output_folder, progress_bar, refuse_existing


def test_output_folder(tmp_path):
    assert output_folder(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InferenceError, match=r"output: .*file is a file; name a folder"):
        output_folder(tmp_path / "file")
    with pytest.raises(InferenceError, match="output: no folder is given; name one"):
        output_folder("")


def test_existing_files_are_named(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    refuse_existing(paths, "a test")
    for path in paths[:4]:
        path.touch()
    with pytest.raises(
        InferenceError, match=r"a, .*c and 1 more: 4 of the files of a test exist already; .* overwrite"
    ):
        refuse_existing(paths, "a test")


def test_extras(monkeypatch):
    assert import_extra("json.decoder", "training").__name__ == "json.decoder"
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'pip install "uctrans\[training\]"'):
        progress_bar([], 0, "test", True)
    assert progress_bar([1], 1, "test", False) == [1]
