"""Write files so that a reader, or a power cut, never meets half of one."""

import contextlib
import glob
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LONGEST_STEM = 100  # of a temporary name, which must fit into the 255 bytes that most file systems allow


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    The temporary file lies in the same folder, which is made if it is missing, and has the same extension. Its content
    is on the disk before it gets its name, and the name before this function returns. An error leaves the old file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:LONGEST_STEM]}-{os.getpid()}{path.suffix}")
    temporary.unlink(missing_ok=True)  # left by a killed process that had the same number
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        if os.name == "posix":
            _sync(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove the temporary files of ``path`` that killed processes left; no other process may be writing it."""
    for temporary in path.parent.glob(f".{glob.escape(path.stem[:LONGEST_STEM])}-*{path.suffix}"):
        temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; make its folder if it is missing."""
    with written_atomically(path) as temporary:
        temporary.write_bytes(content)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8, or (H, W) uint16, as a PNG file, atomically."""
    import imageio.v3

    write_bytes(path, imageio.v3.imwrite("<bytes>", pixels, extension=".png"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically; numbers that JSON does not know (nan, infinities) become null."""
    text = json.dumps(_without_nan(content), indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _sync(path: Path, access: int) -> None:
    descriptor = os.open(path, access)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
