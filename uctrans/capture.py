"""CUDA graphs: work that is recorded once and then replayed, so that the host launches no kernel of it by itself.

What may be recorded has static shapes, works on tensors that stay where they are, and never waits for the device.
Memory of all recordings of a recorder comes from one pool: they must not run at the same time, and what a replay
returns is overwritten by the next one.
"""

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHAPES_KEPT = 8
RAISING = "error"  # a mode of torch.cuda.set_sync_debug_mode


class CaptureError(RuntimeError):
    """Work that cannot be recorded as a CUDA graph; the message says what it did."""


@dataclass(frozen=True)
class Recording:
    """Recorded work: ``replay()`` does it again and returns its result, the same tensors each time."""

    replay: Callable[[], Any]


class CudaRecorder:
    """Records work on the current CUDA device.

    Work goes three ways, each time on a stream beside the current one: it is warmed up, rehearsed, then recorded.

    Args:
        generators: random generators of the device, besides its default one, that the work draws from; they advance
            with every replay as if the work had been done plainly.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()):
        self.generators = tuple(generators)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Do the work plainly and return its result.

        Kernels are compiled, handles and optimizer states created, which a recording may not do.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def rehearse(self, work: Callable[[], Any]) -> Any:
        """Do the work plainly once more, and return its result, where nothing may wait for the device.

        A recording that fails leaves the process in a state that is hard to repair; here it fails before.

        Raises:
            CaptureError: the work waits for the device.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(RAISING)
        try:
            return self.warm_up(work)
        except RuntimeError as error:
            raise CaptureError(f"the work waits for the device, or fails: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, work: Callable[[], Any]) -> Recording:
        """Record the work without doing it.

        Raises:
            CaptureError: the work does what cannot be recorded.
        """
        # A graph that is destroyed in the midst of a recording would end it, and cycles are collected at any time.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = self._graph()
        with _without_collection(), torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                result = work()
            except Exception as error:
                self._abandon(graph)
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._abandon(graph)
                raise CaptureError(str(error)) from error

        def replay() -> Any:
            graph.replay()
            return result

        return Recording(replay)

    def _graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave a recording that failed, such that the generators and the device can be used again."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        # The failed recording may hold on to its pool, and the generators still take themselves to be recorded; both
        # end with the next recording that succeeds.
        self.pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError):
            empty = self._graph()
            empty.capture_begin(pool=self.pool)
            torch.zeros(1, device="cuda")
            empty.capture_end()


class CapturedForward:
    """A network for inference, called through one CUDA graph for each shape of input.

    A shape is computed plainly when it comes for the first and the second time and recorded when it comes again; the
    ``SHAPES_KEPT`` shapes used last are remembered. Weights that change in place are seen; a network that is moved, set
    to another backend or to training needs another ``CapturedForward``.

    Args:
        forward: input tensor to output tensor, without gradients. It should not hold what holds the
            ``CapturedForward``, so that graphs are freed with it and not by the next collection of cycles.
        recorder: what records, made for the device of the input.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], recorder: Any):
        self.forward, self.recorder = forward, recorder
        self._plain_calls: OrderedDict[tuple, int] = OrderedDict()
        self._recorded: dict[tuple, tuple[Recording, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The output for ``images``, in memory of its own.

        Raises:
            CaptureError: the network cannot be recorded.
        """
        key = (images.shape, images.stride(), images.dtype)
        calls = self._plain_calls.get(key, 0)
        self._plain_calls[key] = min(calls + 1, 2)
        self._plain_calls.move_to_end(key)
        if len(self._plain_calls) > SHAPES_KEPT:
            forgotten, _ = self._plain_calls.popitem(last=False)
            self._recorded.pop(forgotten, None)
        try:
            if calls == 0:
                return self.recorder.warm_up(lambda: self.forward(images))
            if calls == 1:
                return self.recorder.rehearse(lambda: self.forward(images))
            if key not in self._recorded:
                self._recorded[key] = self._record(images)
        except CaptureError as error:
            raise CaptureError(
                f"the network cannot be recorded as a CUDA graph ({error}); use it with graph off"
            ) from error
        recording, static = self._recorded[key]
        static.copy_(images)
        return recording.replay().clone()

    def _record(self, images: Tensor) -> tuple[Recording, Tensor]:
        # What is made under inference mode, the state of the random generator among it, could not be written outside of
        # it. Leaving inference mode switches gradients on.
        with torch.inference_mode(False), torch.no_grad():
            static = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype, device=images.device)
            static.copy_(images)
            return self.recorder.record(lambda: self.forward(static)), static


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
