"""SIGINT and SIGTERM as requests to stop after the current step."""

import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
