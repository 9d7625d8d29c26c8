"""What a network costs: parameters, operations of a forward pass, time and memory of a training step."""

import dataclasses
import gc
import statistics
import time
from dataclasses import dataclass

import torch

from uctrans.data import get_protocol
from uctrans.training import TrainConfig
from uctrans.training.distributed import processes
from uctrans.training.run import Run, build_model

WARM_UP_STEPS = 4  # after two a step may be recorded as a CUDA graph, which takes longer than the step
TIMED_STEPS = 7


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: their number.
        flop: operations of the forward pass of one image, as PyTorch's FlopCounterMode counts them.
        seconds_a_step: median over ``TIMED_STEPS`` training steps.
        peak_memory: bytes PyTorch held at most on the GPU in these steps, data set included; None on a CPU, where
            PyTorch keeps no count and the size of the process would tell of everything it ever did.
        device: what it was measured on, and how where that is not as usual there.
    """

    parameters: int
    flop: int
    seconds_a_step: float
    peak_memory: int | None
    device: str


def count(config: TrainConfig) -> tuple[int, int]:
    """Parameters, and operations of the forward pass of one image at the size of the run, without computing anything.

    Counted on the published sequence of operations (backend ``reference``): the same number on every machine.

    Raises:
        ConfigError: the network cannot be built.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    height, width = get_protocol(config.protocol, config.image_size).image_size
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, backend="reference"), (height, width)).eval()
        image = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def measure(config: TrainConfig) -> Cost:
    """Count, and time training steps as a run of ``config`` does them; writes nothing, and keeps no weights.

    Raises:
        ConfigError, DataError: as for ``uctrans.training.train``.
    """
    parameters, flop = count(config)
    with processes(config.device) as group:
        is_cuda = group.device.type == "cuda"
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(group.device)
        run = Run(config, group)
        run.begin_epoch()
        batch = run.batch(0)
        seconds = [_seconds(run, batch) for _ in range(WARM_UP_STEPS + TIMED_STEPS)][WARM_UP_STEPS:]
        peak_memory = torch.cuda.max_memory_allocated(group.device) if is_cuda else None
        device = torch.cuda.get_device_name(group.device) if is_cuda else str(group.device)
        device += ", no CUDA graphs" if is_cuda and run.obstacle_to_capture is not None else ""
        del run, batch
        if is_cuda:  # the processes of a study need the memory that this one would keep
            gc.collect()
            torch.cuda.empty_cache()
    if not is_cuda:
        threads = torch.get_num_threads()
        device += f", {threads} thread{'s' if threads > 1 else ''}"
    device += ", compiled" if config.compile else ", checkpointing" if config.checkpointing else ""
    return Cost(parameters, flop, statistics.median(seconds), peak_memory, device)


def _seconds(run: Run, batch: torch.Tensor) -> float:
    _synchronize(batch.device)
    started = time.perf_counter()
    run.step(batch)
    _synchronize(batch.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
