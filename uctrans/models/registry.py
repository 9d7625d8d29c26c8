"""Models by name."""

import difflib
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
        near = difflib.get_close_matches(name, _MODELS)
        hint = f"did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}; {hint or 'choose one of ' + ', '.join(list_models())}")
    return _MODELS[name]


def create_model(name: str, **options: Any) -> SegmentationModel:
    """Build a model by name: ``create_model("uctransnet", classes=4, base_channels=32)``.

    Raises:
        ValueError: the name is unknown, or an option's value does not fit.
        TypeError: the model has no such option.
    """
    return model_class(name)(**options)
