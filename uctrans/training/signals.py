"""SIGINT and SIGTERM as requests to stop after the current step, and the death of the parent as a SIGTERM."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_BETWEEN_LOOKS = 0.5


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM sets ``name``, the second one acts as it did before.

    Python handles signals in the main thread only, so in another thread they are not noticed.

    Attributes:
        name: The name of the signal, or None.
    """

    def __init__(self):
        self.name: str | None = None
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number, _frame) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextlib.contextmanager
def ending_with_parent(seconds_to_save: float = 7.0) -> Iterator[None]:
    """Send SIGTERM to this process when its parent dies during the block.

    A process that still runs after ``seconds_to_save``, because it waits for another one, ends without saving.
    """
    parent, is_over = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            if is_over.wait(SECONDS_BETWEEN_LOOKS):
                return
        os.kill(os.getpid(), signal.SIGTERM)
        if not is_over.wait(seconds_to_save):
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="watch over the parent", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
