"""Checks of the arguments that layers and models are built with."""

import numbers
from collections.abc import Sequence
from typing import Any

from ..kernels.checks import is_whole_number


def check_counts(**counts: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless all values are whole numbers of at least 1."""
    for name, count in counts.items():
        if not is_whole_number(count):
            raise TypeError(f"{name} must be an int, such as 4; got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")


def check_probabilities(**probabilities: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless all values are numbers in [0, 1)."""
    for name, probability in probabilities.items():
        if not isinstance(probability, numbers.Real) or isinstance(probability, bool):
            raise TypeError(f"{name} must be a number, such as 0.1; got {probability!r}")
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"{name} must be in [0, 1); got {probability}")


def check_sequence(name: str, values: Any, content: str) -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple; ``content`` describes its items in the message."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list or tuple, {content}; got {type(values).__name__}")


def check_whole_numbers(name: str, values: Any, description: str) -> None:
    """Raise ``TypeError`` unless ``values`` is a list or tuple of whole numbers; ``description`` gives an example."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(is_whole_number, values)):
        raise TypeError(f"{name} must be {description}; got {values!r}")
