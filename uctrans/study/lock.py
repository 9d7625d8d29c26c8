"""One call at a time works in the folder of a study."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from uctrans.study.config import StudyError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None


@contextlib.contextmanager
def only_call(folder: Path) -> Iterator[None]:
    """Lock a folder until the block, or this process in whatever way, ends.

    Raises:
        StudyError: another call works in it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                f"output: another call of this study works in {folder}; wait for its end, or name another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
