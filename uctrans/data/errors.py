"""The one exception for everything that is wrong with a user's data."""


class DataError(ValueError):
    """A file or folder cannot be used; the message names it and says what to do."""


def shorten(names, limit=5):
    """Join names with commas, at most ``limit`` of them, then how many more there are."""
    names = [str(name) for name in names]
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
