"""Checkpoints are written beside the training: it goes on once its state is copied, and a thread writes the copy.

One save is written at a time and one more waits, so there are two copies of the state at most: in memory of the host,
pinned where the state lies on a CUDA device, of which PyTorch takes the next power of two of bytes for each tensor. A
newer save takes the place of the one that waits, which would have been replaced on the disk at once: a disk that is
slower than the epochs holds up no epoch, however many are the best so far.
But a best epoch that waits gives way only to a better one; a save that is none waits until it is being written.

The thread never calls CUDA, which could spoil a CUDA graph that the training is recording at that moment.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class StateCopy:
    """Memory on the host for the copy of a state, kept from one copy to the next: to pin memory takes long."""

    def __init__(self):
        self._tensors: dict[tuple, torch.Tensor] = {}

    def take(self, state: Any) -> Any:
        """Copy a nest of dicts, lists and tuples with its tensors; what the last call returned is overwritten."""
        copied = self._copied(state, ())
        if torch.cuda.is_initialized():
            # The next step writes what is copied here, so it had to wait for the copy in any case.
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, value: Any, place: tuple) -> Any:
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps what a state dict has besides its entries
            copied.update({key: self._copied(item, (*place, key)) for key, item in value.items()})
            return copied
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, (*place, number)) for number, item in enumerate(value))
        return self._copied_tensor(value, place) if isinstance(value, torch.Tensor) else value

    def _copied_tensor(self, tensor: torch.Tensor, place: tuple) -> torch.Tensor:
        kept = self._tensors.get(place)
        if kept is None or _layout(kept) != _layout(tensor):
            kept = self._tensors[place] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=tensor.is_cuda)


@dataclass(frozen=True)
class _Save:
    memory: StateCopy
    checkpoint: dict[str, Any]
    is_best: bool


class CheckpointWriter:
    """Context manager that hands checkpoints to ``write(checkpoint, is_best)`` in a thread; leaving it waits for all.

    What ``write`` raises is raised by the next call here, at the latest on leaving; where another error is on its way
    by then, that one is given a note.
    """

    def __init__(self, write: Callable[[dict[str, Any], bool], None]):
        self._write = write
        self._changed = threading.Condition()  # guards what follows
        self._free = [StateCopy(), StateCopy()]
        self._waiting: _Save | None = None
        self._is_writing = self._is_over = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)

    def save(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        """Take a copy of ``checkpoint``, to be written as soon as possible; raise what went wrong before."""
        with self._changed:
            self._changed.wait_for(lambda: is_best or self._waiting is None or not self._waiting.is_best)
            self._raise_failure()
            memory = self._free.pop() if self._waiting is None else self._waiting.memory
            self._waiting = None
        save = _Save(memory, memory.take(checkpoint), is_best)
        with self._changed:
            self._waiting = save
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until everything is on the disk; raise what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._is_writing)
            self._raise_failure()

    def __enter__(self) -> "CheckpointWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"besides: {failure}")
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
        self._thread.join()  # else it might be the last to hold pinned memory, and to give that back calls CUDA

    def _work(self) -> None:
        while (save := self._next()) is not None:
            failure = None
            try:
                self._write(save.checkpoint, save.is_best)
            except BaseException as error:  # raised again where the training is
                failure = error
            with self._changed:
                self._failure = self._failure or failure
                self._free.append(save.memory)
                self._is_writing = False
                self._changed.notify_all()
            save = None  # pinned memory is given back by the training, as that calls CUDA

    def _next(self) -> _Save | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._is_over)
            save, self._waiting = self._waiting, None
            self._is_writing = save is not None
            self._changed.notify_all()
            return save

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype
