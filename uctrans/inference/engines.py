"""Engines: what computes the logits of a predictor.

``torch`` calls the network, ``compile`` calls it through `torch.compile`, ``onnx`` exports it and calls ONNX Runtime.
``auto`` is ``torch``, except on a CPU with the packages of the extra ``export``: there it takes an export that the
cache holds, and makes one as soon as the images so far would have paid for it.

The cache is the folder ``uctrans/onnx`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It keeps the exports used last, under
names that depend on weights, configuration, modules and versions.
"""

import contextlib
import copy
import hashlib
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__
from ..kernels.backend import ENVIRONMENT_VARIABLE
from ..layers import set_backend
from ..layers.plain import is_plain
from ..layers.switching import layers_with_backend
from ..models import ModelFileError
from ..models.base import probabilities
from ..system import first_line
from ..writing import written_atomically
from .journal import weights_digest
from .onnx_model import OnnxModel, require_onnxruntime
from .programs import (
    ONNX_PACKAGES,
    ExportError,
    ProgramInput,
    check_program,
    failing_as_export_error,
    quiet,
    require_onnx,
    size_multiple,
    trace,
    write_onnx,
)
from .settings import InferenceError, check_choice

ENGINES = ("auto", "torch", "compile", "onnx")
# Parameters times pixels that PyTorch computes before an export is made. UCTransNet at full width, on two cores: an
# export takes about 35 s, and saves 0.2 s of an image of 224 pixels, whose product is 3.3e12; narrower ones save less.
EXPORT_PAYS_AFTER = 5e14
CACHED_FILES = 8
KNOWN_PACKAGES = ("torch", "uctrans")  # whose modules' code does not change between two versions

Forward = Callable[[Tensor], Tensor]


def forward_of(engine: str, network: nn.Module, size: tuple[int, int], device: torch.device, amp: str) -> Forward:
    """Return a function of network inputs (B, C, H, W) to logits (B, classes, H, W).

    Args:
        engine: One of `ENGINES`.
        network: On ``device``, in evaluation mode.
        size: Height and width of most inputs.
        device: Where the inputs are.
        amp: "no" or "bf16", under which the function is called.

    Raises:
        InferenceError: The engine is unknown, or cannot run the network, the precision or on the device.
        ImportError: A package that the engine needs is not installed.
    """
    check_choice("engine", engine, ENGINES)
    files = [module for module in network.modules() if isinstance(module, OnnxModel)]
    if files:
        _check_file(files[0], engine, amp)
        return network
    if engine == "compile":
        return partial(_call_compiled, torch.compile(network))
    if engine == "onnx":
        _check_export(network, device, amp)
        return ExportedForward(network, size, device)
    if engine == "auto" and device.type == "cpu":
        with contextlib.suppress(InferenceError, ImportError):
            _check_export(network, device, amp)
            return AutomaticForward(network, ExportedForward(network, size, device))
    return network


def runs_in_torch(forward: Forward) -> bool:
    """Return whether PyTorch computes all of a function of `forward_of`, so that a CUDA graph can hold it."""
    is_file = isinstance(forward, nn.Module) and any(isinstance(part, OnnxModel) for part in forward.modules())
    return not is_file and not isinstance(forward, ExportedForward)


def _check_file(model: OnnxModel, engine: str, amp: str) -> None:
    if engine not in ("auto", "onnx"):
        raise InferenceError(f"engine: {model.path} runs on ONNX Runtime, not on {engine}; set engine to auto or onnx")
    if amp != "no":
        raise InferenceError(f"amp: {model.path} computes in the precision of the export; set amp to no")


def _check_export(network: nn.Module, device: torch.device, amp: str) -> None:
    """Raise InferenceError or ImportError if a network cannot be exported and run as it is asked for."""
    if amp != "no":
        raise InferenceError(
            f"amp: the engine onnx computes in float32, not in {amp}; set amp to no or engine to torch"
        )
    for layer in layers_with_backend(network):
        backend = layer.backend if layer.backend != "auto" else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        if backend not in ("auto", "composed"):
            raise InferenceError(
                f"backend: the engine onnx has operators of its own, not those of {backend}; set backend to auto, or "
                "engine to torch"
            )
    require_onnx()
    require_onnxruntime(device)


def _call_compiled(compiled: Forward, inputs: Tensor) -> Tensor:
    try:
        return compiled(inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise InferenceError(
            f"engine: torch.compile cannot compile the network ({first_line(error)}); install what it needs, a C++ "
            "compiler on a CPU and Triton on a GPU, or set engine to torch"
        ) from error


class ExportedForward:
    """A network that ONNX Runtime runs, exported when the first image of a size comes, or taken from the cache.

    Images of the usual size have a program that is fastest for it; others share one of open size.

    Args:
        network: In evaluation mode; its weights are read when it is exported.
        size: Usual height and width.
        device: ``cpu`` or a CUDA device.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], device: torch.device):
        self.network, self.size, self.device = network, size, device
        self._programs: dict[ProgramInput, OnnxModel | None] = {}  # None if it is not in the cache

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return logits; raise ExportError if the network cannot be exported."""
        return self.program_for(inputs)(inputs)

    def program_for(self, inputs: Tensor) -> OnnxModel:
        """Return the program for an input; raise ExportError if the network cannot be exported."""
        taken = self.taken_for(inputs)
        if not self.is_ready(inputs):
            self._programs[taken] = self._export(taken)
        return self._programs[taken]

    def is_ready(self, inputs: Tensor) -> bool:
        """Return whether the program for an input has been made or is in the cache."""
        taken = self.taken_for(inputs)
        if taken not in self._programs:
            self._programs[taken] = self._from_cache(taken)
        return self._programs[taken] is not None

    def taken_for(self, inputs: Tensor) -> ProgramInput:
        """Return what the program for an input takes."""
        size, grid = tuple(inputs.shape[-2:]), size_multiple(self.network)
        smallest = 2 * grid  # of a program of open size
        if size in (self.size, self.size[::-1]) or min(_padded(size, grid)) < smallest:
            return ProgramInput(size, "batch", grid)
        traced = tuple(max(side, smallest) for side in _padded(self.size, grid))
        return ProgramInput(traced, "size", grid)

    def _export(self, taken: ProgramInput) -> OnnxModel:
        # Gradients and inference mode are off: what is traced in inference mode cannot be saved.
        with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with failing_as_export_error("network cannot be copied to the CPU", taken.dynamic):
                network = copy.deepcopy(self.network).cpu()
            if layers_with_backend(network):
                set_backend(network, "composed")
            with quiet():
                write_onnx(trace(network, taken), path, network, taken, digest=self._digest(taken))
                runs = _Probabilities(OnnxModel(path)), _Probabilities(network)
                check_program(*runs, [(1, *taken.size)], "onnx", taken.dynamic)
            return OnnxModel(self._kept(path, taken), self.device)

    def _from_cache(self, taken: ProgramInput) -> OnnxModel | None:
        if not any(cache_folder().glob("*.onnx")) or self._digest(taken) is None:
            return None
        path = self._cache_file(taken)
        try:
            model = OnnxModel(path, self.device)
        except ModelFileError:  # missing or damaged
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used last
        return model if model.digest == self._digest(taken) else None

    def _kept(self, path: Path, taken: ProgramInput) -> Path:
        """Copy a file into the cache and return the copy; return the file itself where that cannot be."""
        if self._digest(taken) is None:
            return path
        try:
            with written_atomically(self._cache_file(taken)) as temporary:
                shutil.copyfile(path, temporary)
            for old in sorted(cache_folder().glob("*.onnx"), key=lambda file: -file.stat().st_mtime)[CACHED_FILES:]:
                old.unlink()
        except OSError as error:
            warnings.warn(f"{cache_folder()} cannot keep the export for the next time: {error}", stacklevel=2)
            return path
        return self._cache_file(taken)

    def _cache_file(self, taken: ProgramInput) -> Path:
        return cache_folder() / f"{self._digest(taken)}.onnx"

    def _digest(self, taken: ProgramInput) -> str | None:
        """Return a name for the program, or None if code that has no version decides what it computes."""
        if self._network_identity is None:
            return None
        return hashlib.sha256(f"{self._network_identity} {taken}".encode()).hexdigest()

    @cached_property
    def _network_identity(self) -> str | None:
        for module in self.network.modules():
            kind = type(module)
            if kind.__module__.partition(".")[0] not in KNOWN_PACKAGES or not is_plain(module, kind):
                return None
        versions = [__version__, torch.__version__, *(version(package) for package in ONNX_PACKAGES)]
        return f"{weights_digest(self.network)} {versions} {self.network}"


class _Probabilities(nn.Module):
    """The probabilities of a network: the logits of an ensemble that is certain differ by rounding of its mean."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.in_channels = network, network.in_channels

    def forward(self, image: Tensor) -> Tensor:
        return probabilities(self.network(image))


class AutomaticForward:
    """PyTorch, and ONNX Runtime where an export is ready or pays.

    Nobody knows how many images will come; as many as came so far is the guess that at worst doubles the cost of an
    export that was not worth it.

    Args:
        network: In evaluation mode, on the CPU.
        exported: The same network on ONNX Runtime.
        pays_after: Parameters times pixels that PyTorch computes before an export is made.
    """

    def __init__(self, network: nn.Module, exported: ExportedForward, pays_after: float = EXPORT_PAYS_AFTER):
        self.network, self.pays_after = network, pays_after
        self._exported: ExportedForward | None = exported
        self._parameters = sum(parameter.numel() for parameter in network.parameters())
        self._computed: Counter[ProgramInput] = Counter()

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return logits; warn if an export would pay and cannot be made."""
        if self._exported is not None:
            taken = self._exported.taken_for(inputs)
            try:
                if self._exported.is_ready(inputs) or self._computed[taken] >= self.pays_after:
                    return self._exported(inputs)
            except (ExportError, ImportError, ModelFileError, OSError) as error:  # a package may be installed in part
                self._exported = None
                warnings.warn(f"{error}; PyTorch runs the network instead of ONNX Runtime", stacklevel=2)
            self._computed[taken] += self._parameters * inputs[:, 0].numel()
        return self.network(inputs)


def cache_folder() -> Path:
    """Return the folder of cached exports, which may not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # an account without a home
            base = tempfile.gettempdir()
    return Path(base) / "uctrans" / "onnx"


def _padded(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return tuple(side + -side % multiple for side in size)
