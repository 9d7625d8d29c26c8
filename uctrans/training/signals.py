"""SIGINT, SIGTERM and the end of the available time, as requests to stop after the current step."""

import signal
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TIME_IS_UP = "time"


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM sets ``name``, the second one acts as it did before.

    Python handles signals in the main thread only; in another thread only ``stop_at`` counts.

    Args:
        stop_at: Time at which to stop, as of ``time.time()``, which all processes share; None means never.
    """

    def __init__(self, stop_at: float | None = None):
        self._stop_at = stop_at
        self._signal: str | None = None
        self._previous = {}

    @property
    def name(self) -> str | None:
        """The name of the signal, "time" if the time is up, or None."""
        if self._signal is None and self._stop_at is not None and time.time() >= self._stop_at:
            return TIME_IS_UP
        return self._signal

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number, _frame) -> None:
        self._signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
