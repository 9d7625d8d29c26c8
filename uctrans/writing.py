"""Write files so that a reader, or a power cut, never meets half of one; keep a folder for one process."""

import contextlib
import json
import math
import os
import platform
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .system import escaped, is_utf8

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl = None

UNFINISHED = ".unfinished-"  # begins the name of every temporary file
LONGEST_EXTENSION = 16  # bytes of a temporary name, which must fit into the 255 that most file systems allow
ABANDONED_SECONDS = 24 * 3600  # age of a temporary file to remove where files cannot be locked
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
LOCK_FILE = ".lock"
PNG_COMPRESSION = 4  # of 0..9; the usual 6 takes twice the time and makes a stained image 1 % smaller


class FolderError(ValueError):
    """A folder cannot be written to, or another process writes there; the message says which, and since when."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep a folder for this process until the block ends, and all processes that inherited the yielded descriptor.

    The folder is made if it is missing, and removed if the block leaves it empty. Temporary files that killed processes
    left in it are removed. The operating system frees the lock of a process that has died. On Windows, and on a file
    system without locks, nothing is locked.

    Raises:
        FolderError: another process holds the folder, it cannot be made or written to, or its name is not UTF-8.
    """
    if not is_utf8(folder):
        raise FolderError(f"output: {escaped(folder)}: is not UTF-8; rename it or name another")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_FILE
    try:
        descriptor = _open_locked(path)
    except OSError as error:
        raise FolderError(f"output: {folder} cannot be made a folder or written to ({error}); name another") from error
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {time.ctime()}".encode())
        remove_unfinished(folder)
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
        if path.is_symlink():
            raise FolderError(f"output: {path} is a link, which would be written through; remove it")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o666)
        except FileNotFoundError:  # the process that had made the folder has just removed it
            continue
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise FolderError(f"output: {path} is no file of its own, so nothing is written to it; remove it")
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

    The temporary file is new, has a random name with the extension of ``path``, and lies in the same folder, which is
    made if it is missing. Its content is on the disk before it gets its name, and the name before this function
    returns. An error leaves the old file, and an OSError names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    extension = path.suffix if len(os.fsencode(path.suffix)) <= LONGEST_EXTENSION else ""
    temporary, descriptor = _open_temporary(path.parent, extension)
    with os.fdopen(descriptor) as lock:
        if fcntl is None:  # Windows renames no open file
            lock.close()
        try:
            yield temporary
            _sync(temporary, os.O_RDWR)
            temporary.replace(path)
            if os.name == "posix":
                _sync(path.parent, os.O_RDONLY)
        except OSError as error:
            if error.errno is not None and error.filename is None:  # as writing leaves it
                error.filename = str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_together(paths: Sequence[Path], removed: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Yield a temporary path for each of ``paths``; they replace them one after the other when the block ends.

    A process that is killed in between leaves the first ones new and the others old. So the last file should tell
    whether the others belong to it, or be among those that are removed.

    Args:
        paths: files to write, as :func:`written_atomically` does.
        removed: former files to remove when the contents of all new ones are on the disk, before the first gets its
            name.
    """
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(written_atomically(path)) for path in reversed(paths)][::-1]
        yield temporaries
        for temporary in temporaries:
            _sync(temporary, os.O_RDWR)
        for path in removed:
            path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files in ``folder`` whose processes were killed; those of running processes stay."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # it was completed or removed in between, or is not ours to write
            descriptor = os.open(path, os.O_RDWR | NOT_FOLLOWED)
            try:
                if _lock_or_find_old(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock_or_find_old(descriptor: int) -> bool:
    """Return whether no process is writing the file: it can be locked; or, where no file can be, it is old."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return time.time() - os.fstat(descriptor).st_mtime > ABANDONED_SECONDS


def _open_temporary(folder: Path, extension: str) -> tuple[Path, int]:
    """Return a new file and its descriptor, which locks it if the file system can."""
    while True:
        path = folder / f"{UNFINISHED}{secrets.token_hex(8)}{extension}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOT_FOLLOWED, 0o666)
        if fcntl is None:
            return path, descriptor
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # another process has removed it as abandoned before it was locked


def open_to_append(path: Path) -> TextIO:
    """Open a text file to append to, which may be new, as UTF-8; bytes of names that are not UTF-8 are escaped.

    A file with further names, as a copy of its folder by hard links has them, is copied first, and they keep theirs.

    Raises:
        OSError: the file cannot be written to, or is a symbolic link.
    """
    if path.is_file() and path.lstat().st_nlink > 1:
        write_bytes(path, path.read_bytes())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NOT_FOLLOWED, 0o666)
    return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace", newline="")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; make its folder if it is missing."""
    with written_atomically(path) as temporary:
        temporary.write_bytes(content)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8, or (H, W) uint16, as a PNG file, atomically."""
    import imageio.v3

    write_bytes(path, imageio.v3.imwrite("<bytes>", pixels, extension=".png", compress_level=PNG_COMPRESSION))


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
