"""Packages that only an optional extra brings, imported when they are used."""

import importlib
import importlib.util
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
        raise ImportError(_remedy(package, extra)) from error


def require_extra(package: str, extra: str) -> None:
    """Raise the ImportError of `import_extra` if a package is not installed, without importing it."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(_remedy(package, extra))


def _remedy(package: str, extra: str) -> str:
    return (
        f'{package} is needed here and is not installed: pip install "uctrans[{extra}]", or in a checkout '
        f'pip install ".[{extra}]"'
    )
