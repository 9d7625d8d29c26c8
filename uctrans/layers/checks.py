"""Checks of what the layers and models are made with."""

import numbers
from collections.abc import Sequence
from typing import Any


def check_counts(**counts: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless all are whole numbers of at least 1."""
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral):
            raise TypeError(f"{name} must be an int; got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")


def check_probabilities(**probabilities: float) -> None:
    """Raise ``ValueError`` unless all are in [0, 1)."""
    for name, probability in probabilities.items():
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"{name} must be in [0, 1); got {probability}")


def check_sequence(name: str, values: Any, what: str) -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple; ``what`` says in the message what belongs in it."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list or tuple, {what}; got {type(values).__name__}")
