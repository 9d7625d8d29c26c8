"""Read configurations, weights and checkpoints that may be damaged, of another kind, or made to do harm.

Nothing in a file is executed. A network is built only if its weights are in the file, so a small file with large
numbers takes no memory.
"""

import contextlib
import hashlib
import os
import pickle
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from ..reading import UnreadableError, check_regular_file, read_json
from ..system import first_line
from .foreign import describe_file, describe_pickle

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DIGEST = "weights_sha256"  # key of the configuration
SECONDS_TO_REPLACE = 0.5  # that a process may take between the two files of a model
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DEPTH, MAX_VALUES = 64, 10**7  # of a checkpoint, whose lists may hold each other
MORE_THAN_WEIGHTS = 20  # parts of a network that are registered for each of its weights, at most
FEWEST_PARTS = 1000

Model = TypeVar("Model", bound=nn.Module)


class ModelFileError(ValueError):
    """A model file cannot be used; the message names the file and the remedy."""


class _ReplacedError(ModelFileError):
    """The weights are not those that the configuration was written with."""


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read ``config.json`` and ``model.safetensors`` of a saved model, which belong together.

    Raises:
        ModelFileError: a file is missing or damaged, or the two were not written together.
    """
    try:
        return _read_both(folder)
    except _ReplacedError:  # a training may have replaced one file between the two
        time.sleep(SECONDS_TO_REPLACE)
        return _read_both(folder)


def _read_both(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, path = read_config(folder), folder / WEIGHTS_FILE
    digest = config.pop(DIGEST, None)  # earlier versions wrote none
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            found = None if digest is None else hashlib.file_digest(file, "sha256").hexdigest()
            state = safetensors.torch.load_file(path)
            is_same_file = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: copy the weights into the folder of {CONFIG_FILE}") from None
    except UnreadableError as error:
        raise ModelFileError(f"{error}; give the folder of a saved model") from None
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:  # KeyError: an unknown dtype
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}): copy or save it again") from None
    if found != digest or not is_same_file:
        raise _ReplacedError(
            f"{path} is not the file that {CONFIG_FILE} was written with: it is damaged, or a process was stopped "
            "between the two; restore both, save the model again, or continue the run that writes them. If the weights "
            f"were replaced on purpose, remove {DIGEST} from {CONFIG_FILE}"
        )
    return config, state


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a saved model; raise :class:`ModelFileError` if it is missing or damaged."""
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelFileError(f"{folder} has no {CONFIG_FILE}: give a folder that save_pretrained wrote") from None
    except UnreadableError as error:
        raise ModelFileError(f"{error}; save the model again or restore the file") from None
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise ModelFileError(f"{path} does not name a model: it needs the key 'name' that save_pretrained writes")
    return config


def read_checkpoint(path: str | Path) -> Any:
    """Read a file of ``torch.save`` onto the CPU without executing anything in it; check its checksums.

    Raises:
        ModelFileError: the file is missing, truncated, damaged, not a checkpoint, or holds pickled objects.
    """
    # The authors' training code stores its scores as NumPy scalars; these are plain numbers.
    number_types = [type(np.dtype(name)) for name in ("float32", "float64", "int64")]
    rebuild_scalar = np.float64(0).__reduce__()[0]
    try:
        check_regular_file(path)
        _check_archive(Path(path))
        with torch.serialization.safe_globals([rebuild_scalar, np.dtype, *number_types]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if _extent(checkpoint, {}) > MAX_VALUES:
            raise ValueError("its values stand for too many")
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: check the path") from None
    except UnreadableError as error:
        raise ModelFileError(f"{error}; give a checkpoint") from None
    except pickle.UnpicklingError:
        # PyTorch's own message advises loading without weights_only, which would execute what the file holds.
        raise ModelFileError(f"{path} is {describe_file(Path(path)) or describe_pickle(Path(path))}") from None
    except Exception as error:  # arbitrary bytes make torch.load fail in any way
        damage = f"truncated or not a checkpoint ({first_line(error)}): copy or download it again"
        raise ModelFileError(f"{path} is {describe_file(Path(path)) or damage}") from None
    return checkpoint


def _check_archive(path: Path) -> None:
    """Check the checksums of the records, which ``torch.load`` does not, and that they are no larger than the file."""
    if not zipfile.is_zipfile(path):
        return  # of an early PyTorch, or no checkpoint, which torch.load tells
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        is_compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if is_compressed or sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile("its records are compressed, which those of torch.save are not")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of its record {damaged} is wrong")


def _extent(value: Any, known: dict[int, int], depth: int = 0) -> int:
    """Return the number of values in nested containers, counted in each place; ``known`` has that of containers by id.

    Containers may hold one another many times, so that a small file stands for more values than code can go through.
    """
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if depth > MAX_DEPTH:
        raise ValueError("its values are nested too deeply")
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_extent(item, known, depth + 1) for item in items)
    return known[id(value)]


def build(kind: Callable[..., Model], config: Any, state: Any, source: object) -> Model:
    """Build the network that ``kind`` makes of a configuration, with the weights ``state``.

    Args:
        kind: class of the network.
        config: arguments of ``kind`` by name.
        state: state dict.
        source: file that errors name.

    Raises:
        ModelFileError: the configuration is not one of ``kind``, or the weights are not those of this network. It is
            raised before any weight is made.
    """
    sketch = sketch_of(kind, config, state, source)
    if sketch is not None:
        check_state(sketch, state, source)
        model = kind(**config)
    else:
        with _failing_as_configuration(kind, source):
            model = kind(**config)
    load_state(model, state, source)
    return model


def sketch_of(kind: Callable[..., Model], config: Any, state: Any, source: object) -> Model | None:
    """Build a network without the memory of its weights; return None if its code needs their values.

    Raises:
        ModelFileError: see :func:`build`; or the network has far more parts than the file has weights.
    """
    most = FEWEST_PARTS + MORE_THAN_WEIGHTS * (len(state) if isinstance(state, Mapping) else 0)
    try:
        with _failing_as_configuration(kind, source), torch.device("meta"), _Undrawn(), _counted(most, source):
            return kind(**config)
    except ModelFileError as error:
        if "meta" in str(error.__cause__):  # as PyTorch says where a value is asked for
            return None
        raise


class _Undrawn(TorchFunctionMode):
    """Draw no normal numbers, for which PyTorch loads modules for seconds if the tensor is on the meta device."""

    def __torch_function__(self, function: Any, _: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call ``function``, or return the tensor that it would fill."""
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def _failing_as_configuration(kind: Callable[..., nn.Module], source: object) -> Iterator[None]:
    """Turn the errors of a constructor, which gets arguments of any type, into a ModelFileError."""
    try:
        yield
    except ModelFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{source} does not configure a {kind.name!r} ({first_line(error)}): restore the file, or save the model "
            "again"
        ) from error


@contextlib.contextmanager
def _counted(most: int, source: object) -> Iterator[None]:
    """Raise ModelFileError as soon as networks of this thread register more than ``most`` weights and modules."""
    thread, count = threading.get_ident(), 0

    def note(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise ModelFileError(
                    f"{source} configures a network of many more weights than the file has: they do not belong "
                    "together; restore both, or save the model again"
                )

    with contextlib.ExitStack() as stack:
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
            registration.register_module_module_registration_hook,
        ):
            stack.callback(register(note).remove)
        yield


def load_state(model: nn.Module, state: Any, source: object) -> None:
    """Load a state dict; raise :class:`ModelFileError` with what differs, and ``source``, if it does not fit."""
    check_state(model, state, source)
    model.load_state_dict(state)


def check_state(model: nn.Module, state: Any, source: object) -> None:
    """Check that a state dict has the weights of ``model``, which may be on the meta device.

    Raises:
        ModelFileError: a weight is missing, unknown, of another shape or kind, or is not in the file; the message names
            ``source``.
    """
    check_tensors(state, source)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    common = sorted(own.keys() & state.keys())
    reshaped = [key for key in common if own[key].shape != state[key].shape]
    retyped = [key for key in common if own[key].is_floating_point() and state[key].dtype not in DTYPES]
    problems = {"missing": missing, "unknown": unexpected, "of another shape": reshaped, "of another type": retyped}
    if any(problems.values()):
        differences = [f"{len(keys)} {problem} (first: {keys[0]})" for problem, keys in problems.items() if keys]
        raise ModelFileError(
            f"{source} does not fit this model: entries {', '.join(differences)}. It belongs to another model or size; "
            f"create the model with the configuration it was saved with"
        )


def check_tensors(state: Any, source: object) -> None:
    """Raise :class:`ModelFileError` unless ``state`` is a dict of names and ordinary tensors, all in the file."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ModelFileError(f"{source} holds a {type(state).__name__} in place of a state dict: copy it again")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise ModelFileError(f"{source}: {name} is no ordinary tensor: save the state dict of the network again")
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(value.nbytes for value in state.values()) > 2 * sum(held.values()):
        raise ModelFileError(
            f"{source} holds few values that stand for many: save the state dict with tensors of their own"
        )


def check_finite(model: nn.Module, source: object) -> None:
    """Raise :class:`ModelFileError`, with the name of a weight, if one is not finite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ModelFileError(
                f"{source}: {name} has values that are not finite, so that every prediction would be wrong: train "
                "again with a lower learning rate, or take another checkpoint"
            )
