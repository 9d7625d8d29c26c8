"""Networks of other packages, and the user's own, as models of this one.

A network is named ``package.module:Class``. Importing its module runs code, so such a name must come from the caller:
from the command line, an argument, or the class itself; never from a file.
"""

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers import pad_to_multiple
from ..layers.arguments import check_counts
from .base import SegmentationModel
from .registry import as_json, hint, model_class

EXAMPLE = "monai.networks.nets:AttentionUnet"
POWERS_OF_TWO = tuple(2**power for power in range(1, 8))  # of which networks with strides need multiples


class NetworkError(RuntimeError):
    """A network of another package fails on an image; the message says on which."""


class ExternalModel(SegmentationModel):
    """Base of the models that hold a network of another package; ``ExternalModel.of(network)`` is the class for one.

    The network maps images (B, in_channels, H, W) to logits (B, classes, H, W), as a tensor or as a list or tuple of
    one tensor. The names of its weights begin with ``network.``.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits; 1 for a binary mask.
        options: arguments of the network's constructor by name; sequences arrive as lists.
        size_multiple: images are padded by their last row and column to multiples of this number of pixels, and the
            logits cropped.

    Attributes:
        name: ``package.module:Class``.
        network_class: class of the network.
        network: the network.

    Raises:
        ValueError: the network cannot be built from ``options``; the message says what its constructor takes.
    """

    network_class: type[nn.Module]

    def __init__(
        self, in_channels: int = 3, classes: int = 1, options: dict[str, Any] | None = None, size_multiple: int = 1
    ):
        super().__init__()
        check_counts(in_channels=in_channels, classes=classes, size_multiple=size_multiple)
        self.in_channels, self.classes, self.size_multiple = in_channels, classes, size_multiple
        options = as_json({} if options is None else options)
        self.network = _built(self.network_class, self.name, options)
        self.config = {
            "in_channels": in_channels,
            "classes": classes,
            "options": options,
            "size_multiple": size_multiple,
        }

    @classmethod
    def of(cls, network: str | type[nn.Module]) -> type["ExternalModel"]:
        """Return the class of the models that hold ``network``, a class or its name ``package.module:Class``.

        Raises:
            ValueError: there is no such class, its module cannot be imported, or it is no ``torch.nn.Module``.
        """
        found = _find_class(network) if isinstance(network, str) else network
        if not _is_network(found):
            given = network if isinstance(network, str) else f"a {type(network).__name__}"
            raise ValueError(f"{given} is no class of torch.nn.Module; name one, such as {EXAMPLE}")
        name = network if isinstance(network, str) else f"{found.__module__}:{found.__name__}"
        return type(found.__name__, (cls,), {"name": name, "network_class": found, "__module__": cls.__module__})

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of an image (B, in_channels, H, W).

        Raises:
            NetworkError: the network fails on the image, in evaluation mode, which takes images of any size.
            ValueError: the network returns anything but one tensor.
        """
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, self.size_multiple)
        try:
            output = self.network(padded)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.training:
                raise
            raise NetworkError(
                f"{self._failure(padded, error)}; give images of a size that it takes, or set size_multiple in the "
                "model's config.json to the number of pixels of which it needs multiples"
            ) from error
        logits = self._single(output)
        return logits if padded is image else logits[..., :height, :width]

    @torch.no_grad()
    def check(self, image_size: tuple[int, int]) -> None:
        """Raise unless the network turns random images of a size into logits, in training and in evaluation mode.

        The batch statistics of the network change.

        Raises:
            ValueError: the message says what is wrong, and which option to set.
        """
        if not any(weight.requires_grad for weight in self.parameters()):
            raise ValueError(f"{self.name} has no weights that can be trained; name another class")
        device = next(self.parameters()).device
        image = torch.rand(2, self.in_channels, *image_size, device=device)
        padded = pad_to_multiple(image, self.size_multiple)
        for is_training in (True, False):
            self.train(is_training)
            try:
                output = self.network(padded)
            except Exception as error:  # a network may fail in any way
                raise ValueError(f"{self._failure(padded, error)}; {self._remedy_for(image)}") from error
            self._check_logits(self._single(output), padded)

    def _failure(self, image: Tensor, error: Exception) -> str:
        return f"{self.name} fails on images {tuple(image.shape)} ({_in_one_line(error)})"

    def _single(self, output: Any) -> Tensor:
        """Return the one tensor of the network's output."""
        if isinstance(output, list | tuple) and len(output) == 1:
            output = output[0]
        if isinstance(output, Tensor):
            return output
        count = f" of {len(output)}" if isinstance(output, list | tuple | dict) else ""
        raise ValueError(
            f"{self.name} returns a {type(output).__name__}{count}; it must return logits (B, classes, H, W) as a "
            "tensor, or as a list of one: switch off what it returns besides (deep supervision, features), or name a "
            "class of your own that holds it and returns the logits"
        )

    def _check_logits(self, logits: Tensor, image: Tensor) -> None:
        expected = (image.shape[0], self.classes, *image.shape[-2:])
        returns = f"{self.name} returns {logits.dtype} {tuple(logits.shape)} for images {tuple(image.shape)}"
        if logits.shape == expected and logits.is_floating_point():
            return
        if logits.ndim != 4 or logits.shape[-2:] != image.shape[-2:] or not logits.is_floating_point():
            raise ValueError(f"{returns}; it must return floating-point logits {expected}: name another class")
        names = [name for name in _named_parameters(self.network_class) if "class" in name or name.startswith("out")]
        setting = " or ".join(names) or "its number of output channels"
        raise ValueError(
            f"{returns}, and the run has {self.classes} classes; set {setting} to {self.classes} in its options"
        )

    def _remedy_for(self, image: Tensor) -> str:
        """Return the remedy for a failure, by whether the network takes another size."""
        height, width = image.shape[-2:]
        for multiple in POWERS_OF_TWO:
            # An odd number of times, so that no larger power of two divides the sides.
            rows, columns = (multiple * (-(-side // multiple) | 1) for side in (height, width))
            try:
                self.network(image.new_zeros(*image.shape[:2], rows, columns))
            except Exception:  # a network may fail in any way
                continue
            return (
                f"it takes {rows} x {columns} pixels: give an image_size of multiples of {multiple}, or "
                f'"size_multiple": {multiple} in its options, which pads the images and crops the logits'
            )
        return "give options and an image_size with which it takes them"


def find_model_class(network: str | type[nn.Module]) -> type[SegmentationModel]:
    """Return the class of models for a name of :func:`list_models`, for ``package.module:Class``, or for a class.

    Raises:
        ValueError: there is no such network; the message has the nearest names.
    """
    if isinstance(network, str) and ":" not in network:
        try:
            return model_class(network)
        except ValueError as error:
            raise ValueError(f"{error}; or name any torch network like {EXAMPLE}") from None
    found = _find_class(network) if isinstance(network, str) else network
    is_registered = isinstance(found, type) and issubclass(found, SegmentationModel) and hasattr(found, "name")
    return found if is_registered else ExternalModel.of(network)


def _find_class(name: str) -> Any:
    """Import what ``package.module:Class`` names; ValueError if there is nothing of that name."""
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)) or module_name.endswith(".py"):
        raise ValueError(f"{name!r} names no class; write package.module:Class, such as {EXAMPLE} or mynet:MyNet")
    module = _imported(module_name, name)
    try:
        return getattr(module, class_name)
    except AttributeError:
        networks = [key for key, value in vars(module).items() if _is_network(value)]
        remedy = hint(class_name, networks, "its networks are ") if networks else "it has no torch.nn.Module"
        raise ValueError(f"{name}: {module_name} has no {class_name}; {remedy}") from None


def _is_network(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _imported(module_name: str, name: str) -> Any:
    """Import a module from where Python looks, or else from the current folder."""
    first, here = module_name.partition(".")[0], Path.cwd()
    is_here = (here / f"{first}.py").is_file() or (here / first).is_dir()
    if is_here and str(here) not in sys.path and importlib.util.find_spec(first) is None:
        sys.path.append(str(here))  # a console script does not look in the current folder
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the code of a module may fail in any way
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{name}: there is no module {error.name}; check the spelling, install its package, or change to the "
                "folder of your own file"
            ) from error
        raise ValueError(f"{name}: importing {module_name} fails ({_in_one_line(error)}); mend it") from error


def _built(network_class: type[nn.Module], name: str, options: dict[str, Any]) -> nn.Module:
    """Return a network built from the arguments of its constructor; ValueError if they do not fit."""
    if not isinstance(options, dict):
        raise ValueError(f"{name}: options are {options!r}; give a mapping of the arguments of its constructor")
    parameters = inspect.signature(network_class).parameters
    named = _named_parameters(network_class)
    required = [argument for argument, parameter in named.items() if parameter.default is parameter.empty]
    optional = [argument for argument in named if argument not in required]
    takes = f"it requires {', '.join(required) or 'none'}, and takes {', '.join(optional) or 'no other'}"
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if unknown := [option for option in options if option not in named and not takes_any]:
        raise ValueError(f"{name} has no argument {unknown[0]}; {takes}")
    if missing := [argument for argument in required if argument not in options]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; {takes}")
    try:
        json.dumps(options)
    except TypeError as error:
        raise ValueError(f"{name}: options hold what JSON cannot ({error}); give numbers, text and lists") from error
    try:
        network = network_class(**options)
    except Exception as error:  # a constructor may fail in any way
        raise ValueError(
            f"{name} cannot be built from {options} ({_in_one_line(error)}); change these options"
        ) from error
    if any(map(is_lazy, network.parameters())):
        raise ValueError(f"{name} has lazy layers, whose sizes only an image decides; name a class that gives them")
    return network


def _named_parameters(network_class: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(network_class).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
