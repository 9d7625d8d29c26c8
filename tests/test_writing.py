"""Files are whole or not there."""

import json
import math
import os
import platform
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage.io import imread

import uctrans
from uctrans.writing import (
    FolderError,
    locked,
    remove_unfinished,
    write_bytes,
    write_json,
    write_png,
    written_atomically,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/scores.txt"
    with written_atomically(path) as temporary:
        temporary.write_text("first")
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "first"

    def fail(error):
        with written_atomically(path) as temporary:
            temporary.write_text("sec")
            raise error

    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
        assert path.read_text() == "first"
        assert [entry.name for entry in path.parent.iterdir()] == ["scores.txt"]


def test_a_failed_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_new_names_are_put_on_the_disk_after_the_content(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def noted(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if is_folder else "content", (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_bytes(tmp_path / "a", b"new")
    assert synced == [("content", False), ("folder", True)]


def test_a_name_as_long_as_the_disk_allows_is_written(tmp_path):
    path = tmp_path / f"{'a' * 251}.bin"
    write_bytes(path, b"content")
    assert path.read_bytes() == b"content"


def test_what_killed_processes_left_is_removed(tmp_path):
    own = tmp_path / f".a-{platform.node()[:64]}-{os.getpid()}.bin"
    other, of_another_file = tmp_path / ".a-1.bin", tmp_path / ".b-1.bin"
    for left in (own, other, of_another_file):
        left.write_bytes(b"half of a longer file")
    write_bytes(tmp_path / "a.bin", b"new")
    assert not own.exists()
    assert other.exists()
    remove_unfinished(tmp_path / "a.bin")
    assert sorted(tmp_path.iterdir()) == [of_another_file, tmp_path / "a.bin"]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4), "uint8"), ((3, 4, 3), "uint8"), ((1, 1), "uint8"), ((3, 4), "uint16")]
)
def test_png_comes_back(shape, dtype, tmp_path):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    write_png(tmp_path / "new" / "a.png", pixels)
    assert np.array_equal(imread(tmp_path / "new" / "a.png"), pixels)


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": "ü"}, "d": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [None, 1.5, [None]], "b": {"c": "ü"}, "d": None}
    assert "NaN" not in text


def test_a_locked_folder_names_its_holder(tmp_path):
    holder = f"process {os.getpid()} on {re.escape(platform.node())} since "
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "a").touch()
        with (
            pytest.raises(FolderError, match=rf"^output: .*run is in use by {holder}.*; wait for its end"),
            locked(tmp_path / "run"),
        ):
            pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]
    with locked(tmp_path / "run"):
        pass


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path):
    program = (
        "import sys, pathlib; from uctrans.writing import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(uctrans.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(FolderError, match=f"in use by process {child.pid} on"), locked(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert list(tmp_path.iterdir())  # what the lock leaves
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
