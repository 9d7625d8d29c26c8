"""CUDA graphs: work that is recorded once and then replayed, so that the host launches no kernel of it by itself.

What may be recorded has static shapes, works on tensors that stay where they are, and never waits for the device.
Memory of recordings comes from pools of their own, which nothing else can use. Recordings may share a pool: they must
not run at the same time then, and what a replay returns is overwritten by the next one.
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
SHARE_OF_FREE_MEMORY = 0.5  # for all recordings of a network, of what is free when the first is made
RAISING = "error"  # a mode of torch.cuda.set_sync_debug_mode


class CaptureError(RuntimeError):
    """Work that cannot be recorded as a CUDA graph; the message says what it did."""


@dataclass(frozen=True)
class Recording:
    """Recorded work.

    Attributes:
        replay: does the work again and returns its result, the same tensors each time.
        size: bytes by which its pool has grown.
    """

    replay: Callable[[], Any]
    size: int


class CudaRecorder:
    """Records work on the current CUDA device.

    Work goes three ways, each time on a stream beside the current one: it is warmed up, rehearsed, then recorded. All
    that is recorded until ``begin_pool`` is called shares a pool of memory.

    Args:
        generators: random generators of the device, besides its default one, that the work draws from; they advance
            with every replay as if the work had been done plainly.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()):
        self.generators = tuple(generators)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def begin_pool(self) -> None:
        """Take memory from a new pool from now on: that of a pool is free again once all its recordings are gone."""
        self.pool = torch.cuda.graph_pool_handle()

    def free_memory(self) -> int:
        """Bytes that are free on the device, those included that PyTorch keeps for later."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

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
            torch.OutOfMemoryError: there is too little memory for it, recorded or not.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(RAISING)
        try:
            return self.warm_up(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"the work waits for the device, or fails: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, work: Callable[[], Any]) -> Recording:
        """Record the work without doing it.

        Raises:
            CaptureError: the work does what cannot be recorded.
            torch.OutOfMemoryError: there is too little memory for its pool beside what else is there.
        """
        # A graph that is destroyed in the midst of a recording would end it, and cycles are collected at any time.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        graph = self._graph()
        with _without_collection(), torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                result = work()
            except torch.OutOfMemoryError:
                self._abandon(graph)
                raise
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

        return Recording(replay, torch.cuda.memory_reserved() - reserved)

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
        self.begin_pool()
        with contextlib.suppress(RuntimeError):
            empty = self._graph()
            empty.capture_begin(pool=self.pool)
            torch.zeros(1, device="cuda")
            empty.capture_end()


@dataclass
class _Shape:
    """What is known of a shape of input: how often it was computed plainly, and its recording with its input."""

    plain_calls: int = 0
    recording: Recording | None = None
    images: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of the recording and its input."""
        return 0 if self.recording is None else self.recording.size + self.images.untyped_storage().nbytes()


class CapturedForward:
    """A network for inference, called through one CUDA graph for each shape of input.

    A shape is computed plainly when it comes for the first and the second time and recorded when it comes again; the
    ``SHAPES_KEPT`` shapes used last are remembered. Their recordings take ``SHARE_OF_FREE_MEMORY`` of the memory that
    was free before the first of them, and beyond it only while one is made: those that were not used for longest go. A
    shape that takes more alone is computed plainly from then on, and so is one for which there is too little memory
    beside the recordings, which all go then. Weights that change in place are seen; a network that
    is moved, set to another backend or to training needs another ``CapturedForward``.

    Args:
        forward: input tensor to output tensor, without gradients. It should not hold what holds the
            ``CapturedForward``, so that graphs are freed with it and not by the next collection of cycles.
        recorder: what records, made for the device of the input.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], recorder: Any):
        self.forward, self.recorder = forward, recorder
        self._shapes: OrderedDict[tuple, _Shape] = OrderedDict()  # the one used last is last
        self._too_large: set[tuple] = set()
        self._size_kept: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The output for ``images``, in memory of its own.

        Raises:
            CaptureError: the network cannot be recorded.
            torch.OutOfMemoryError: there is too little memory, even without recordings.
        """
        key = (images.shape, images.stride(), images.dtype)
        try:
            return self._call(key, images)
        except torch.OutOfMemoryError:
            pass  # after this block, as the error holds on to what the call has made
        self._shapes.clear()
        self._too_large.add(key)
        self.recorder.free_memory()
        return self.forward(images)

    def _call(self, key: tuple, images: Tensor) -> Tensor:
        if key in self._too_large:
            return self.forward(images)
        shape = self._shapes.setdefault(key, _Shape())
        self._shapes.move_to_end(key)
        if len(self._shapes) > SHAPES_KEPT:
            self._shapes.popitem(last=False)
        try:
            if shape.plain_calls < 2:
                shape.plain_calls += 1
                do_plainly = self.recorder.warm_up if shape.plain_calls == 1 else self.recorder.rehearse
                return do_plainly(lambda: self.forward(images))
            if shape.recording is None:
                self._record(shape, images)
                self._make_room(key)  # recording has waited for the device: no replay of what goes is under way
        except CaptureError as error:
            raise CaptureError(
                f"the network cannot be recorded as a CUDA graph ({error}); use it with graph off"
            ) from error
        if key in self._too_large:
            del shape  # and with it the memory of the recording
            return self.forward(images)
        shape.images.copy_(images)
        return shape.recording.replay().clone()

    def _record(self, shape: _Shape, images: Tensor) -> None:
        if self._size_kept is None:
            self._size_kept = SHARE_OF_FREE_MEMORY * self.recorder.free_memory()
        # What is made under inference mode, the state of the random generator among it, could not be written outside of
        # it. Leaving inference mode switches gradients on.
        with torch.inference_mode(False), torch.no_grad():
            static = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype, device=images.device)
            static.copy_(images)
            self.recorder.begin_pool()
            shape.recording = self.recorder.record(lambda: self.forward(static))
            shape.images = static

    def _make_room(self, latest: tuple) -> None:
        """Forget what is too much beside the latest recording, or that one where it is too much alone."""
        if self._shapes[latest].size > self._size_kept:
            del self._shapes[latest]
            self._too_large.add(latest)
        excess = sum(shape.size for shape in self._shapes.values()) - self._size_kept
        for key in [key for key, shape in self._shapes.items() if shape.recording is not None]:
            if excess <= 0:
                break
            excess -= self._shapes.pop(key).size


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
