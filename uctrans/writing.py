"""Write files so that a reader, or a power cut, never meets half of one; keep a folder for one process."""

import contextlib
import glob
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl = None

LONGEST_STEM = 100  # of a temporary name, which must fit into the 255 bytes that most file systems allow
LONGEST_HOST = 64  # in a temporary name
LOCK_FILE = ".lock"


class FolderError(ValueError):
    """A folder cannot be written to, or another process writes there; the message says which, and since when."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep a folder for this process until the block ends, and all processes that inherited the yielded descriptor.

    The folder is made if it is missing, and removed if the block leaves it empty. The operating system frees the lock
    of a process that has died. On Windows, and on a file system without locks, nothing is locked.

    Raises:
        FolderError: another process holds the folder, or it cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_FILE
    try:
        descriptor = _open_locked(path)
    except OSError as error:
        raise FolderError(f"output: {folder} cannot be made a folder or written to ({error}); name another") from error
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {time.ctime()}".encode())
        yield descriptor
    finally:
        if fcntl is not None:
            path.unlink(missing_ok=True)  # while it is locked, so that no other process has locked it
        os.close(descriptor)
        with contextlib.suppress(OSError):  # they hold files
            for empty in made:
                empty.rmdir()


def _open_locked(path: Path) -> int:
    """Return a descriptor of the lock file, which no other process has locked; the lock ends when it is closed."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the process that had made the folder has just removed it
            continue
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise FolderError(
                f"output: {path.parent} is in use by {holder}; wait for its end, stop it, or name another folder"
            ) from error
        except OSError:  # a file system without locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # the process that had locked this file has just removed it


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    The temporary file lies in the same folder, which is made if it is missing, and has the same extension. Its content
    is on the disk before it gets its name, and the name before this function returns. An error leaves the old file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    process = f"{platform.node()[:LONGEST_HOST]}-{os.getpid()}"
    temporary = path.with_name(f".{path.stem[:LONGEST_STEM]}-{process}{path.suffix}")
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


def format_warning(message: Warning | str, *_: Any) -> str:
    """Return a warning as one line of the program's own, for ``warnings.formatwarning``."""
    return f"uctrans: warning: {' '.join(str(message).split())}\n"


def _sync(path: Path, access: int) -> None:
    descriptor = os.open(path, access)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
