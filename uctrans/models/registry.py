"""Models by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .base import SegmentationModel

ModelClass = TypeVar("ModelClass", bound=type[SegmentationModel])

_MODELS: dict[str, type[SegmentationModel]] = {}


def register_model(name: str) -> Callable[[ModelClass], ModelClass]:
    """Class decorator: make a model known to :func:`create_model` as ``name``."""

    def register(model_class: ModelClass) -> ModelClass:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already")
        model_class.name = name
        _MODELS[name] = model_class
        return model_class

    return register


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    return sorted(_MODELS)


def model_class(name: str) -> type[SegmentationModel]:
    """The class behind a name; ``ValueError`` with the nearest names where there is none."""
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; {_hint(name, list_models(), 'choose one of ')}")
    return _MODELS[name]


def create_model(name: str, **options: Any) -> SegmentationModel:
    """Build a model by name: ``create_model("uctransnet", classes=4, base_channels=32)``.

    Raises:
        ValueError: the name is unknown, or an option's value does not fit.
        TypeError: the model has no such option.
    """
    kind = model_class(name)
    parameters = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise TypeError(f"{name} has no option {option!r}; {_hint(option, list(parameters), 'it takes ')}")
    return kind(**options)


def _hint(name: str, known: list[str], otherwise: str) -> str:
    by_lower_case = {item.lower(): item for item in known}
    near = [by_lower_case[item] for item in difflib.get_close_matches(name.lower(), by_lower_case)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise + ", ".join(known)
