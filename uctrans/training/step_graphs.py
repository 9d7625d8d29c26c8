"""The training step as CUDA graphs, one for each size of its input: the host copies the input and replays.

A graph does the operations of the plain step on the same tensors and with the same random numbers, so a resumed run
may change from one to the other.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..graphs import CaptureError, Recording
from .config import TrainConfig
from .distributed import Processes
from .log import TrainingError

PLAIN_STEPS = 2


class StepGraphs:
    """Records a training step for each size of its input and replays it.

    The first two steps of a size run plainly, as warm-up and rehearsal. They are ordinary steps of the training, so
    nothing has to be undone. Recording computes nothing; the third step is the first replay.

    Args:
        optimizer: Optimizer of the step.
        recorder: See :class:`uctrans.graphs.CudaRecorder`; it knows the generators that the step draws from.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recorder: Any):
        self.optimizer, self.recorder = optimizer, recorder
        self._plain_steps: dict[tuple, int] = {}
        self._recorded: dict[tuple, tuple[Recording, list[torch.Tensor]]] = {}

    def run(self, step: Callable[..., None], *inputs: torch.Tensor) -> None:
        """Do ``step``, the same in each call, with ``inputs`` on the device: an index of images, or a batch.

        Raises:
            TrainingError: the step cannot be recorded; the message says what to do.
        """
        size = tuple(tensor.shape for tensor in inputs)
        done = self._plain_steps.get(size, 0)
        try:
            if done < PLAIN_STEPS:
                self._plain_steps[size] = done + 1
                do_plainly = self.recorder.warm_up if done == 0 else self.recorder.rehearse
                do_plainly(lambda: step(*inputs))
                return
            if size not in self._recorded:
                self._recorded[size] = self._record(step, inputs)
        except CaptureError as error:
            raise TrainingError(
                f"graph: the training step cannot be recorded as a CUDA graph ({error}); resume with graph off"
            ) from error
        recording, static_inputs = self._recorded[size]
        for static, tensor in zip(static_inputs, inputs, strict=True):
            static.copy_(tensor)
        recording.replay()

    def _record(
        self, step: Callable[..., None], inputs: tuple[torch.Tensor, ...]
    ) -> tuple[Recording, list[torch.Tensor]]:
        static_inputs = [tensor.clone() for tensor in inputs]
        # The gradients of the last plain step would lie outside the memory of the recording.
        self.optimizer.zero_grad(set_to_none=True)
        return self.recorder.record(lambda: step(*static_inputs)), static_inputs


def obstacle_to_graphs(config: TrainConfig, group: Processes) -> str | None:
    """Return why the training step is not recorded as CUDA graphs, or None if it is."""
    if not config.graph:
        return "graph is off"
    if group.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {group.device.type}"
    if group.count > 1:
        return "several processes exchange gradients during a step"
    return None
