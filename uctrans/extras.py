"""Packages that only an optional extra brings, imported when they are used."""

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module that belongs to an optional extra.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f'{package} is needed here and is not installed: pip install "uctrans[{extra}]", or in a checkout '
            f'pip install ".[{extra}]"'
        ) from error
