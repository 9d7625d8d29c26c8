"""CUDA graphs: work that is recorded once and then replayed, so that the host launches no kernel of it by itself.

What may be recorded has static shapes, works on tensors that stay where they are, and never waits for the device.
Memory of all recordings of a recorder comes from one pool: they must not run at the same time, and what a replay
returns is overwritten by the next one.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHAPES_KEPT = 8


@dataclass(frozen=True)
class Recording:
    """Recorded work: ``replay()`` does it again and returns its result, the same tensors each time."""

    replay: Callable[[], Any]


class CudaRecorder:
    """Records work on the current CUDA device.

    Args:
        generators: random generators of the device, besides its default one, that the work draws from; they advance
            with every replay as if the work had been done plainly.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()):
        self.generators = tuple(generators)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Do the work plainly, on a stream beside the current one, and return its result.

        Once per kind of work before it is recorded: kernels are compiled, handles and optimizer states created, which a
        recording may not do.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Any]) -> Recording:
        """Record the work without doing it.

        Raises:
            RuntimeError: the work does what cannot be recorded, such as reading a value on the host.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()

        def replay() -> Any:
            graph.replay()
            return result

        return Recording(replay)


class CapturedForward:
    """A network for inference, called through one CUDA graph for each shape of input.

    A shape is computed plainly when it comes for the first time, recorded when it comes again, and the
    ``SHAPES_KEPT`` shapes used last are remembered. Weights that change in place are seen; a network that is moved, set
    to another backend or to training needs another ``CapturedForward``.

    Args:
        forward: input tensor to output tensor, without gradients.
        recorder: what records, made for the device of the input.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], recorder: Any):
        self.forward, self.recorder = forward, recorder
        self._shapes: OrderedDict[tuple, tuple[Recording, Tensor] | None] = OrderedDict()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The output for ``images``, in memory of its own.

        Raises:
            RuntimeError: the network cannot be recorded.
        """
        key = (images.shape, images.stride(), images.dtype)
        if key not in self._shapes:
            output = self.recorder.warm_up(lambda: self.forward(images))
            self._shapes[key] = None
            if len(self._shapes) > SHAPES_KEPT:
                self._shapes.popitem(last=False)
            return output
        self._shapes.move_to_end(key)
        if self._shapes[key] is None:
            self._shapes[key] = self._record(images)
        recording, static = self._shapes[key]
        static.copy_(images)
        return recording.replay().clone()

    def _record(self, images: Tensor) -> tuple[Recording, Tensor]:
        # A tensor made under inference mode could not be written outside of it.
        with torch.inference_mode(False):
            static = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype, device=images.device)
        static.copy_(images)
        try:
            return self.recorder.record(lambda: self.forward(static)), static
        except RuntimeError as error:
            raise RuntimeError(
                f"the network cannot be recorded as a CUDA graph ({error}); use it with graph off"
            ) from error
