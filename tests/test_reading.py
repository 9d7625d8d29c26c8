"""Files that would block a reader, never end, or expand beyond the memory are refused before they are read."""

import json
import os
import socket
from pathlib import Path

import pytest

from uctrans.data import DataError, load_folds
from uctrans.reading import MAX_JSON_BYTES, MAX_YAML_BYTES, UnreadableError, check_regular_file, read_json, read_yaml
from uctrans.training import ConfigError, TrainConfig

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def put_irregular(folder, kind):
    """Return a path that is no file, of one of `IRREGULAR`."""
    path = folder / "x.y"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # the path of a socket is limited to 108 bytes
            server.bind(path.name)
    return path


IRREGULAR = {
    "folder": "is a folder",
    "pipe": "is a named pipe",
    "link": "is a named pipe",
    "device": "is a device",
    "socket": "is a socket",
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_paths_that_are_no_files(tmp_path, kind):
    path = put_irregular(tmp_path, kind)
    for read in (check_regular_file, read_json, read_yaml):
        with pytest.raises(UnreadableError, match=rf"x\.y: {IRREGULAR[kind]}, not a file"):
            read(path)
    with pytest.raises(
        DataError, match=r"x\.y: is neither a file" if kind == "folder" else rf"x\.y: {IRREGULAR[kind]}"
    ):
        load_folds(path)


def test_files_that_are_missing(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for read in (check_regular_file, read_json, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
        with pytest.raises(OSError, match=r"symbolic links.*loop"):
            read(tmp_path / "loop")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ALIASES, r"holds the alias \*a, in whose place the value belongs"),
        ("a: &a [*a]", r"holds the alias \*a"),
        ("a: " + "[" * 100, "is nested in more than 20 levels"),
        ("a: " + "[" * 100_000, "is (nested in|not YAML)"),
        ("- " * 100_000, "is nested in more than 20 levels"),
        ("a: " + "1" * 10_000, "is not YAML"),
        ("a: 2026-13-41", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("a: " + "x" * MAX_YAML_BYTES, "is larger than"),
        ("", "holds no 'field: value' lines"),
        ("- a", "holds no 'field: value' lines"),
    ],
    ids=[
        "aliases",
        "circle",
        "brackets",
        "very deep",
        "dashes",
        "digits",
        "date",
        "tag",
        "null",
        "large",
        "empty",
        "list",
    ],
)
def test_yaml_that_is_refused(tmp_path, text, problem):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=rf"config\.yaml: {problem}"):
        read_yaml(path)
    with pytest.raises(ConfigError, match=rf"(?s)config\.yaml: {problem}.*name a file like a run's config\.yaml"):
        TrainConfig.load_yaml(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' * 100_000, "is nested too deeply"),
        ("1" * 10_000, "is not JSON"),
        ('{"a"', "is not JSON"),
    ],
    ids=["lists", "objects", "digits", "torn"],
)
def test_json_that_is_refused(tmp_path, text, problem):
    path = tmp_path / "folds.json"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=rf"folds\.json: {problem}"):
        read_json(path)
    with pytest.raises(DataError, match=rf"folds\.json: {problem}.*write one with the result of make_folds"):
        load_folds(path)


def test_large_and_foreign_text(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # a hole in the file, which takes no space
    with pytest.raises(UnreadableError, match=r"a\.json: is larger than 67108864 bytes"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    for read in (read_json, read_yaml):
        with pytest.raises(UnreadableError, match=r"a\.json: is not (JSON|YAML) \('utf-8' codec"):
            read(path)


def test_plain_values_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_text(json.dumps({"a": [1, {"b": "ü"}]}), encoding="utf-8")
    link = tmp_path / "link"
    link.symlink_to(path)
    check_regular_file(link)
    assert read_json(link) == read_yaml(str(link)) == {"a": [1, {"b": "ü"}]}
    assert Path(link).is_symlink()
