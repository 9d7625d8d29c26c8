"""The processes that ``torchrun`` starts, and the few exchanges between them that training needs.

DistributedDataParallel averages the gradients. In a single process all functions work and exchange nothing.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..devices import find_device
from ..writing import FolderError, locked
from .config import ConfigError
from .signals import ending_with_parent


@dataclass(frozen=True)
class Processes:
    """This process and the number of all processes of the run.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        device: Device on which this process computes.
        hosts: Group that exchanges values in main memory without the device; None in a single process.
    """

    rank: int
    count: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace ``tensor`` by its mean over the processes, without waiting for the device."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.count)
        return tensor

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace ``tensor`` by its sum over the processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in any process. Waits for the other processes, but not for the device."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, group=self.hosts)
        return flags.item() > 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return ``model`` with gradients averaged over the processes; all processes get the weights of rank 0."""
        if self.count == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Set the buffers of ``model`` (batch-norm statistics) to the values of rank 0."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started (NCCL between GPUs, otherwise gloo) and leave them at the end.

    Without ``torchrun`` this process is the only one. An existing process group is used and stays as it is. The device
    "cuda" means a different GPU in each process. When ``torchrun`` is killed, its processes get SIGTERM, and end within
    ten seconds.

    Raises:
        ConfigError: There is no such device, or ``torchrun`` has ended already.
    """
    try:
        device = find_device(device_name, default_index=int(os.environ.get("LOCAL_RANK", 0)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    is_owned = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    with contextlib.ExitStack() as stack:
        if is_owned:
            stack.enter_context(ending_with_parent())
            _check_torchrun_is_there()
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            stack.callback(dist.destroy_process_group)
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))
        else:
            yield Processes(0, 1, device)


def _check_torchrun_is_there() -> None:
    """Raise ConfigError if ``torchrun`` was killed while this process was starting, whose store is then closed."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError as error:
        raise ConfigError(
            f"torchrun: nothing answers at {address[0]}:{address[1]}, it has ended; start it again"
        ) from error


@contextlib.contextmanager
def locked_by_main(folder: Path, group: Processes) -> Iterator[None]:
    """Let the process that writes the files lock the folder; raise in all processes if it cannot."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if group.is_main:
            try:
                stack.enter_context(locked(folder))
            except FolderError as error:
                refusal = str(error)
        refusal = group.gather(refusal)[0]
        if refusal is not None:
            raise FolderError(refusal)
        yield


def with_sync_batch_norm(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return ``model`` with batch statistics taken over all processes; ConfigError if the device is not CUDA."""
    if device.type != "cuda":
        raise ConfigError(
            f"sync_batch_norm: PyTorch's SyncBatchNorm runs on CUDA only, not on {device.type}; "
            "switch sync_batch_norm off or train on a GPU"
        )
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
