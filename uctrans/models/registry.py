"""Registry of models."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .base import SegmentationModel

ModelClass = TypeVar("ModelClass", bound=type[SegmentationModel])

NAMES_SHOWN = 20  # in a message
_MODELS: dict[str, type[SegmentationModel]] = {}


def register_model(name: str) -> Callable[[ModelClass], ModelClass]:
    """Return a class decorator that makes a model known to :func:`create_model` as ``name``.

    The decorated class also records the arguments it is built with as ``config``, from which a saved model is rebuilt.
    They must be values that JSON can hold, or arrays and sequences of them, which are recorded as lists.

    Raises:
        ValueError: the name is taken.
    """

    def register(model_class: ModelClass) -> ModelClass:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already; choose another name")
        model_class.name = name
        model_class.__init__ = _recording_config(model_class.__init__)
        _MODELS[name] = model_class
        return model_class

    return register


def list_models() -> list[str]:
    """Return the names that :func:`create_model` knows, sorted."""
    return sorted(_MODELS)


def model_class(name: str) -> type[SegmentationModel]:
    """Return the class behind a name; raise ``ValueError`` with the nearest names if there is none."""
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; {hint(name, list_models(), 'choose one of ')}")
    return _MODELS[name]


def create_model(name: str, **options: Any) -> SegmentationModel:
    """Build a model by name: ``create_model("uctransnet", classes=4, base_channels=32)``.

    Raises:
        ValueError: the name is unknown, or the value of an option does not fit.
        TypeError: the model has no such option.
    """
    kind = model_class(name)
    parameters = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise TypeError(f"{name} has no option {option!r}; {hint(option, list(parameters), 'it takes ')}")
    return kind(**options)


def _recording_config(initialise: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(initialise)

    @functools.wraps(initialise)
    def __init__(self: SegmentationModel, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = {key: as_json(value) for key, value in bound.arguments.items() if key != "self"}
        for key, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(key)
        initialise(self, **arguments)
        self.config = arguments  # last, so that the arguments of a subclass replace those it passes to its base

    return __init__


def as_json(value: Any) -> Any:
    """Return ``value`` as JSON holds it: sequences and arrays as new lists, NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [as_json(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def hint(name: str, known: list[str], otherwise: str) -> str:
    """Return "did you mean" with the names near ``name``, or ``otherwise`` with the first that are known."""
    by_lower_case = {item.lower(): item for item in known}
    near = [by_lower_case[item] for item in difflib.get_close_matches(name.lower(), by_lower_case)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise + ", ".join(known[:NAMES_SHOWN])
