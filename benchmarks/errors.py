"""Errors in few words, for records."""

REASON_LENGTH = 500


def in_short(error: Exception) -> str:
    """The kind of an error and the beginning of its message; then those of the first error that led to it, if any.

    A failed capture of a graph raises further errors on its way up: the first one names the cause.
    """
    first: BaseException = error
    while (earlier := first.__cause__ or first.__context__) is not None:
        first = earlier
    shown = [error] if first is error else [error, first]
    return "; first ".join(f"{type(one).__name__}: {str(one)[:REASON_LENGTH]}" for one in shown)
