"""SIGINT and SIGTERM as a request to stop at the next safe place."""

import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM sets ``name``, a second one acts as it would without us.

    Signals can be handled in the main thread only; elsewhere this does nothing and ``name`` stays None.
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
