"""Files are whole or not there."""

import errno
import fcntl
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
    UNFINISHED,
    FolderError,
    locked,
    open_to_append,
    remove_unfinished,
    write_bytes,
    write_json,
    write_png,
    written_atomically,
    written_together,
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

    for error, message in (
        (OSError("disk full"), "^disk full$"),
        (OSError(errno.EFBIG, "File too large"), r"File too large: '.*new/scores\.txt'"),
        (KeyboardInterrupt(), ""),
    ):
        with pytest.raises(type(error), match=message):
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


@pytest.mark.parametrize(
    "name", ["a" * 251 + ".bin", "腺" * 83 + ".png", "a." + "b" * 253], ids=["ASCII", "CJK", "suffix"]
)
def test_a_name_as_long_as_the_disk_allows_is_written(tmp_path, name):
    write_bytes(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"


def test_a_planted_link_is_replaced_and_its_target_kept(tmp_path, monkeypatch):
    target, path = tmp_path / "target", tmp_path / "new" / "a.bin"
    target.write_bytes(b"keep")
    path.parent.mkdir()
    path.symlink_to(target)
    monkeypatch.setattr("secrets.token_hex", lambda length: "0" * 2 * length)
    with written_atomically(path) as temporary:
        taken = temporary
    taken.symlink_to(target)
    with pytest.raises(FileExistsError):
        write_bytes(path, b"through the link")
    monkeypatch.undo()
    write_bytes(path, b"new")
    assert (target.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"keep", b"new", False)


def test_temporary_names_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(3):
        with written_atomically(tmp_path / "a.bin") as temporary:
            names.add(temporary.name)
    assert len(names) == 3


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_files_that_are_written_together_get_their_names_in_order(tmp_path, monkeypatch):
    names = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (names.append(target.name), replace(self, target)))
    paths = [tmp_path / name for name in ("scores.csv", "figure.png", "summary.json")]
    with written_together(paths) as temporaries:
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.write_text(path.name)
        assert names == []
    assert names == ["scores.csv", "figure.png", "summary.json"]
    assert [path.read_text() for path in paths] == names

    with pytest.raises(KeyError), written_together(paths) as temporaries:
        temporaries[0].write_text("half")
        raise KeyError
    assert [path.read_text() for path in paths] == names
    assert sorted(tmp_path.iterdir()) == sorted(paths)


WRITE_FOR_EVER = """
import sys, pathlib
from uctrans.writing import written_atomically
with written_atomically(pathlib.Path(sys.argv[1]) / "a.bin") as path:
    path.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_killed_processes_left_is_removed_and_what_others_write_stays(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(uctrans.__file__).parents[1])}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline() == b"writing\n"
    (temporary,) = tmp_path.iterdir()
    with locked(tmp_path):
        assert temporary.read_bytes() == b"half"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert temporary.exists()
    with locked(tmp_path):
        assert not temporary.exists()


def test_without_locks_a_day_must_have_passed(tmp_path, monkeypatch):
    young, old = tmp_path / f"{UNFINISHED}young.bin", tmp_path / f"{UNFINISHED}old.bin"
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    write_bytes(tmp_path / "a.bin", b"new")
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == [young, tmp_path / "a.bin"]


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_a_planted_lock_is_refused_and_its_target_kept(tmp_path, plant):
    target = tmp_path / "target"
    target.write_bytes(b"keep")
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / ".lock", target)
    with pytest.raises(FolderError, match=r"run/\.lock is .*; remove it"), locked(tmp_path / "run"):
        pass
    assert target.read_bytes() == b"keep"


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


def test_nothing_is_appended_through_a_link(tmp_path):
    for text in ("first\n", "second\n"):
        with open_to_append(tmp_path / "log.txt") as file:
            file.write(text)
    (tmp_path / "planted.txt").symlink_to(tmp_path / "log.txt")
    with pytest.raises(OSError, match=r"planted\.txt"):
        open_to_append(tmp_path / "planted.txt")
    (tmp_path / "copy.txt").hardlink_to(tmp_path / "log.txt")
    with open_to_append(tmp_path / "log.txt") as file:
        file.write(os.fsdecode(b"caf\xe9\n"))
    assert (tmp_path / "copy.txt").read_text() == "first\nsecond\n"
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\ncaf\\udce9\n"


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
