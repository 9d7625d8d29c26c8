"""Packages that only training needs, imported when they are used."""

import importlib
from types import ModuleType


def import_extra(module: str) -> ModuleType:
    """Import a module of the extra "training"; ImportError names the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f'training needs {package}, which is not installed: pip install "uctrans[training]"'
        ) from error
