"""Files are whole or not there, and importing the data package stays light."""

import subprocess
import sys

import numpy as np
import pytest

from uctrans.data.writing import write_bytes, write_png


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_makes_folders(tmp_path):
    write_png(tmp_path / "new" / "folder" / "a.png", np.zeros((2, 2), dtype=np.uint16))
    assert [entry.name for entry in (tmp_path / "new" / "folder").iterdir()] == ["a.png"]


def test_import_is_light():
    heavy = "skimage scipy defusedxml imageio PIL tifffile monai matplotlib"
    code = f"import sys, uctrans.data; print([name for name in '{heavy}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
