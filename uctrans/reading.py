"""Read files that anyone may have written: regular files only, and text of limited size, depth and expansion."""

import contextlib
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from .extras import import_extra

MAX_JSON_BYTES = 1 << 26  # the folds of a million images
MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 20
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableError(ValueError):
    """A file cannot be read as what it should be; the message begins with its path and says why, without a remedy."""


def check_regular_file(path: str | os.PathLike) -> None:
    """Check that opening a file cannot block and that reading it comes to an end; follow links.

    Raises:
        UnreadableError: the path is a folder, named pipe, socket or device.
        OSError: the file is missing, or cannot be looked at.
    """
    mode = Path(path).stat().st_mode
    for is_kind, name in KINDS:
        if is_kind(mode):
            raise UnreadableError(f"{path}: is {name}, not a file")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        UnreadableError: the path is no regular file, or the file is not JSON, has a key twice, is nested too deeply, or
            too large.
        OSError: the file is missing, or cannot be opened.
    """
    content = _read_bytes(path, MAX_JSON_BYTES)
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise UnreadableError(f"{path}: is nested too deeply to be read") from error
    except ValueError as error:
        raise UnreadableError(f"{path}: is not JSON ({error})") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {key[:100]!r} twice")
    return values


def read_yaml(path: str | os.PathLike) -> dict[Any, Any]:
    """Read a YAML file of fields and plain values, without aliases, which can stand for more values than the file has.

    Raises:
        UnreadableError: the path is no regular file, or the file is not YAML, has no fields, holds tags of Python or
            aliases, is nested too deeply, or too large.
        OSError: the file is missing, or cannot be opened.
        ImportError: PyYAML is not installed.
    """
    yaml = import_extra("yaml", "training")
    content = _read_bytes(path, MAX_YAML_BYTES)
    try:
        text = content.decode("utf-8")
        check_yaml(text, path)
        values = yaml.load(text, _loader(yaml))
    except UnreadableError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, too many digits, a date that does not exist
        raise UnreadableError(f"{path}: is not YAML ({error})") from error
    if not isinstance(values, dict):
        raise UnreadableError(f"{path}: holds no 'field: value' lines")
    return values


def check_yaml(text: str, source: object) -> None:
    """Check that a text, if it is YAML, has no alias and is nested in few levels.

    Raises:
        UnreadableError: it is not so; the message begins with ``source``.
        ImportError: PyYAML is not installed.
    """
    yaml = import_extra("yaml", "training")
    anchors, depth = set(), 0
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(text, _loader(yaml)):
            if isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
                raise UnreadableError(f"{source}: holds the alias *{event.anchor}, in whose place the value belongs")
            anchors.add(getattr(event, "anchor", None))
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise UnreadableError(f"{source}: is nested in more than {MAX_YAML_DEPTH} levels")


def _loader(yaml: Any) -> type:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """Return the content of a regular file that has at most ``limit`` bytes."""
    check_regular_file(path)
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnreadableError(f"{path}: is larger than {limit} bytes")
    return content
