"""Tests over arguments that hypothesis draws; skipped where it is not installed, as on some machines with a GPU."""

from collections.abc import Callable

import pytest

try:
    import hypothesis
    from hypothesis import strategies
except ImportError:
    hypothesis = None


def drawn(examples: int, arguments: Callable[..., dict]) -> Callable:
    """Run a test on so many examples; ``arguments`` takes hypothesis's ``strategies`` and returns one a parameter."""

    def decorate(test: Callable) -> Callable:
        if hypothesis is None:
            return pytest.mark.skip(reason="hypothesis is not installed: pip install hypothesis")(test)
        settings = hypothesis.settings(max_examples=examples, deadline=None)
        return settings(hypothesis.given(**arguments(strategies))(test))

    return decorate
