"""Time the backends of a model, or of its attention block, against each other on this machine.

Backends take turns, so that whatever else the machine does hits all of them, and ratios are taken within a turn. The
weights and the inputs are the same for all.
"""

import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uctrans.kernels.backend import obstacle_to_triton
from uctrans.layers import ChannelAttention, set_backend
from uctrans.models import create_model, list_models
from uctrans.models.registry import model_class

ATTENTION = "attention"
MODES = ("inference", "training")
PATCH = 16
SCALES = (1, 2, 4, 8)  # widths in base channels
HEADS = 4
WARMUP_ROUNDS = 2
BASELINE = "reference"


def _has_backends(model: str) -> bool:
    return "backend" in inspect.signature(model_class(model)).parameters


class BenchmarkError(ValueError):
    """A setting of the benchmark does not fit; the message names the remedy."""


@dataclass
class BenchmarkConfig:
    """Settings of `benchmark`.

    Args:
        model: A model with backends (uctransnet), or "attention" for one channel attention block alone.
        base_channels: Channels of the finest scale.
        sizes: Sides of the square images, in pixels.
        batch: Images at once.
        mode: inference, or training (forward and backward).
        backends: Backends to compare; none takes all that this machine can run.
        rounds: Turns of each backend; the median counts.
        device: auto, cpu, cuda, cuda:1.
        threads: CPU threads of PyTorch; none leaves its default.
        output: Folder for benchmark.json; none prints the table only.
    """

    model: str = "uctransnet"
    base_channels: int = 64
    sizes: tuple[int, ...] = (224,)
    batch: int = 1
    mode: str = "inference"
    backends: tuple[str, ...] | None = None
    rounds: int = 10
    device: str = "auto"
    threads: int | None = None
    output: str | None = None

    def __post_init__(self):
        comparable = [*filter(_has_backends, list_models()), ATTENTION]
        if self.model not in comparable:
            raise BenchmarkError(
                f"model: {self.model!r} has no backends to compare; choose one of {', '.join(comparable)}"
            )
        if self.mode not in MODES:
            raise BenchmarkError(f"mode: {self.mode!r} is not known; choose one of {', '.join(MODES)}")
        if not self.sizes:
            raise BenchmarkError("sizes: is empty; give at least one image side such as 224")
        for name in ("base_channels", "batch", "rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BenchmarkError(f"{name}: {getattr(self, name)} is too small; give at least 1")
        if min(self.sizes) < 1:
            raise BenchmarkError(f"sizes: {min(self.sizes)} has no pixels; give image sides such as 224")
        if self.model == ATTENTION and any(size % PATCH for size in self.sizes):
            raise BenchmarkError(f"sizes: the attention block alone takes multiples of {PATCH}; got {list(self.sizes)}")


@dataclass(frozen=True)
class Timing:
    """One backend at one size.

    Attributes:
        backend: Its name.
        size: Side of the image, in pixels.
        milliseconds: Time of every round.
        ratios: Time of the baseline over this backend's, round by round: above 1 is faster than the baseline.
    """

    backend: str
    size: int
    milliseconds: list[float]
    ratios: list[float]


@dataclass(frozen=True)
class BenchmarkResult:
    """All timings, and what they were taken on."""

    config: BenchmarkConfig
    machine: dict[str, Any]
    timings: list[Timing]

    def __str__(self) -> str:
        """The table: medians over the rounds, and the quartiles of the ratios."""
        config = self.config
        lines = [
            f"{config.model}, {config.base_channels} base channels, batch {config.batch}, {config.mode}; "
            + ", ".join(f"{key} {value}" for key, value in self.machine.items()),
            f"{'size':>6}  {'backend':<10} {'median ms':>10} {'images/s':>9}  {'speed-up':>8}  (quartiles)",
        ]
        for timing in self.timings:
            median, ratio = statistics.median(timing.milliseconds), statistics.median(timing.ratios)
            low, high = _quartiles(timing.ratios)
            lines.append(
                f"{timing.size:>6}  {timing.backend:<10} {median:>10.2f} {1000 * config.batch / median:>9.2f}  "
                f"{ratio:>7.2f}x  ({low:.2f} to {high:.2f})"
            )
        lines.append(
            f"Speed-up is over {self.timings[0].backend}, in the same round; medians of {config.rounds} rounds."
        )
        return "\n".join(lines)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def available_backends(device: torch.device) -> list[str]:
    """The backends that run on ``device``, the baseline first."""
    return [BASELINE, "composed", *(["triton"] if obstacle_to_triton(device) is None else [])]


def benchmark(config: BenchmarkConfig) -> BenchmarkResult:
    """Time every backend at every size.

    Returns:
        The timings; ``str()`` of it is the table. With ``config.output`` they are in ``benchmark.json`` there too.

    Raises:
        BenchmarkError: a setting that does not fit, or a backend or device that is not there.
    """
    device = _device(config.device)
    backends = _chosen_backends(config, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        timings = [timing for size in config.sizes for timing in _time_size(config, size, backends, device)]
        result = BenchmarkResult(config, _machine(device), timings)
    finally:
        torch.set_num_threads(threads)
    if config.output is not None:
        _write(result, Path(config.output))
    return result


def _chosen_backends(config: BenchmarkConfig, device: torch.device) -> list[str]:
    available = available_backends(device)
    chosen = list(config.backends or available)
    missing = [backend for backend in chosen if backend not in available]
    if missing:
        raise BenchmarkError(
            f"backends: {', '.join(missing)} cannot run on {device.type} here; choose of {', '.join(available)}"
        )
    return chosen


def _time_size(config: BenchmarkConfig, size: int, backends: list[str], device: torch.device) -> list[Timing]:
    torch.manual_seed(0)
    module, inputs = _subject(config, size)
    module, inputs = module.to(device), [tensor.to(device) for tensor in inputs]
    step = _training_step(module, inputs) if config.mode == "training" else _inference_step(module, inputs)
    milliseconds: dict[str, list[float]] = {backend: [] for backend in backends}
    for turn in range(-WARMUP_ROUNDS, config.rounds):
        # Every other round runs backwards: no backend always follows the same one.
        for backend in backends if turn % 2 == 0 else reversed(backends):
            set_backend(module, backend)
            elapsed = _milliseconds(step, device)
            if turn >= 0:
                milliseconds[backend].append(elapsed)
    baseline = milliseconds[backends[0]]
    return [
        Timing(backend, size, times, [base / own for base, own in zip(baseline, times, strict=True)])
        for backend, times in milliseconds.items()
    ]


def _subject(config: BenchmarkConfig, size: int) -> tuple[nn.Module, list[Tensor]]:
    """What is timed, and its inputs: normal random values, which is what a network works on."""
    if config.model != ATTENTION:
        model = create_model(config.model, base_channels=config.base_channels, image_size=size)
        return model, [torch.randn(config.batch, model.in_channels, size, size)]
    channels = [config.base_channels * scale for scale in SCALES]
    tokens = torch.randn(2, config.batch, (size // PATCH) ** 2, sum(channels))
    return ChannelAttention(channels, HEADS, dropout=0.1, backend="auto"), list(tokens)


def _inference_step(module: nn.Module, inputs: list[Tensor]) -> Callable[[], None]:
    module.eval()

    def step() -> None:
        with torch.inference_mode():
            module(*inputs)

    return step


def _training_step(module: nn.Module, inputs: list[Tensor]) -> Callable[[], None]:
    module.train()

    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(*inputs).square().mean().backward()

    return step


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchmarkError(f"device: {name!r} is not a device; give auto, cpu, cuda or cuda:1") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise BenchmarkError(f"device: {name} is not there; give auto or cpu")
    return device


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _write(result: BenchmarkResult, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".benchmark.json"
    temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "benchmark.json")
