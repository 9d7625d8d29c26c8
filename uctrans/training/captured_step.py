"""A training step as CUDA graphs, one for each size of batch: the host copies an index and replays.

The recorded steps are the plain step's operations on the same tensors, with the same random numbers, so a run that
is resumed may change from one to the other.
"""

from typing import Any

import torch

from uctrans.graphs import CaptureError, CudaRecorder, Recording
from uctrans.training.config import TrainConfig
from uctrans.training.distributed import Processes
from uctrans.training.errors import TrainingError
from uctrans.training.step import TrainStep

PLAIN_STEPS = 2


class CapturedStep:
    """Callable like the ``TrainStep`` it is made of.

    The first two steps of a size are done plainly, as warm-up and rehearsal: they are steps of the training like any
    other, so nothing has to be undone. Recording does nothing by itself, and every later step replays.
    """

    def __init__(self, step: TrainStep, recorder: Any = None):
        self.step = step
        self.recorder = recorder or CudaRecorder([step.generator])
        self._plain_steps: dict[int, int] = {}
        self._recorded: dict[int, tuple[Recording, torch.Tensor]] = {}

    def __call__(self, index: torch.Tensor) -> None:
        """Train on the images at ``index``, int64 (B,) on the device.

        Raises:
            TrainingError: the step cannot be recorded; the message says what to do.
        """
        size = len(index)
        done = self._plain_steps.get(size, 0)
        try:
            if done < PLAIN_STEPS:
                self._plain_steps[size] = done + 1
                do_plainly = self.recorder.warm_up if done == 0 else self.recorder.rehearse
                do_plainly(lambda: self.step(index))
                return
            if size not in self._recorded:
                self._recorded[size] = self._record(index)
        except CaptureError as error:
            raise TrainingError(
                f"graph: the training step cannot be recorded as a CUDA graph ({error}); resume with graph off"
            ) from error
        recording, static_index = self._recorded[size]
        static_index.copy_(index)
        recording.replay()

    def _record(self, index: torch.Tensor) -> tuple[Recording, torch.Tensor]:
        static_index = index.clone()
        # Gradients of the last plain step would lie outside of the recording's memory.
        self.step.optimizer.zero_grad(set_to_none=True)
        return self.recorder.record(lambda: self.step(static_index)), static_index


def obstacle_to_capture(config: TrainConfig, group: Processes) -> str | None:
    """Why the training step is not captured in CUDA graphs, or None where it is."""
    if not config.graph:
        return "graph is off"
    if group.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {group.device.type}"
    if group.count > 1:
        return "several processes exchange gradients in the midst of a step"
    return None
