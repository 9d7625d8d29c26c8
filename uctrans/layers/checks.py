"""Checks of what the layers and models are made with."""

import numbers
from collections.abc import Sequence
from typing import Any


def is_whole_number(value: Any) -> bool:
    """Whether ``value`` is an integer of Python's or numpy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_counts(**counts: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless all are whole numbers of at least 1."""
    for name, count in counts.items():
        if not is_whole_number(count):
            raise TypeError(f"{name} must be an int, such as 4; got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")


def check_probabilities(**probabilities: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless all are numbers in [0, 1)."""
    for name, probability in probabilities.items():
        if not isinstance(probability, numbers.Real) or isinstance(probability, bool):
            raise TypeError(f"{name} must be a number, such as 0.1; got {probability!r}")
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"{name} must be in [0, 1); got {probability}")


def check_sequence(name: str, values: Any, what: str) -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple; ``what`` says in the message what belongs in it."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list or tuple, {what}; got {type(values).__name__}")


def check_whole_numbers(name: str, values: Any, what: str) -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple of whole numbers; ``what`` they must be, an example."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(is_whole_number, values)):
        raise TypeError(f"{name} must be {what}; got {values!r}")
