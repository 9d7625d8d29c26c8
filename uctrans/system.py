"""Handle what the operating system reports: error numbers, names that are not UTF-8, closed output streams."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_NO_PERMISSION = "permission is missing", "allow reading and writing there"
# Cause and remedy by error number.
CAUSES = {
    errno.ENOSPC: ("the disk is full", "free space"),
    errno.EDQUOT: ("the quota is used up", "free space or ask for a larger quota"),
    errno.EFBIG: (
        "a file would be larger than is allowed here",
        "raise the limit (ulimit -f unlimited), use a file system for larger files",
    ),
    errno.EROFS: ("the disk is read-only", "make it writable"),
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EIO: ("the disk or its connection failed", "check it"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENAMETOOLONG: ("a name is too long", "shorten it"),
}
READER_IS_GONE = (errno.EPIPE, errno.EIO)  # EIO is raised where a terminal was closed


def explained(error: Exception) -> str:
    """Return the message of an error in one line, with cause and remedy if it comes from the operating system."""
    text = " ".join(str(error).split())
    if not isinstance(error, OSError) or error.errno not in CAUSES:
        return text
    cause, remedy = CAUSES[error.errno]
    return f"{text}: {cause}; {remedy} or choose another output folder"


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def is_utf8(name: str | Path) -> bool:
    """Return whether the bytes of a file name are UTF-8; otherwise Python keeps some of them as lone surrogates."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str | Path) -> str:
    r"""Return a file name in which ``\udcXX`` stands for each byte XX that is not UTF-8."""
    return str(name).encode(errors="backslashreplace").decode()


class _LastingFile(io.FileIO):
    """An open file or pipe that drops what is written after its reader has gone."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_IS_GONE:
                raise
            return len(data)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Let this block go on in silence when the readers of stdout and stderr are gone, as in ``uctrans study | head``.

    Names that are not UTF-8 are written escaped. Streams without a file of the system stay as they are.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # which the block has raised already
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by the caller of the process
        return Path(os.devnull).open("w")
    try:
        file = _LastingFile(stream.fileno(), "w", closefd=False)
    except OSError:
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
