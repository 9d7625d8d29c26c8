"""CUDA graphs: record work once and replay it, so that the host launches all of its kernels in one call.

Work can be recorded if it has static shapes, uses tensors that stay where they are, and never waits for the device.
Recordings take their memory from pools that nothing else can use. Recordings that share a pool must not run at the same
time, and each replay overwrites what the one before returned.
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
SHARE_OF_FREE_MEMORY = 0.5  # for all recordings of a network, measured when the first one is made
RAISING = "error"  # a mode of torch.cuda.set_sync_debug_mode


class CaptureError(RuntimeError):
    """Work that cannot be recorded as a CUDA graph; the message says why."""


@dataclass(frozen=True)
class Recording:
    """Recorded work.

    Attributes:
        replay: repeats the work and returns its result, the same tensors each time.
        size: bytes by which its pool has grown.
    """

    replay: Callable[[], Any]
    size: int


class CudaRecorder:
    """Record work on the current CUDA device.

    Work is warmed up, rehearsed, then recorded, each time on a side stream. All recordings up to a call of
    ``begin_pool`` share a pool of memory.

    Args:
        generators: random generators of the device, besides its default one, that the work draws from; they advance
            with every replay as if the work had run without a graph.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()):
        self.generators = tuple(generators)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def begin_pool(self) -> None:
        """Take memory from a new pool from now on. The memory of a pool is freed with the last of its recordings."""
        self.pool = torch.cuda.graph_pool_handle()

    def free_memory(self) -> int:
        """Return the free bytes of the device, including those that PyTorch's allocator holds in reserve."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def warm_up(self, work: Callable[[], Any]) -> Any:
        """Do the work without a graph and return its result.

        This compiles kernels and creates handles and optimizer states, which must not happen in a recording.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def rehearse(self, work: Callable[[], Any]) -> Any:
        """Do the work without a graph, raise if it waits for the device, and return its result.

        A recording that fails leaves the process in a state that is hard to repair; a rehearsal fails before it.

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
            CaptureError: the work cannot be recorded.
            torch.OutOfMemoryError: there is too little memory for its pool.
        """
        # Destroying another graph would end a recording, and garbage collection may do so at any time.
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
        """End a failed recording in a way that the generators and the device can be used again."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        # The failed recording may keep its pool, and the generators still believe they are recorded; the next
        # recording that succeeds ends both.
        self.begin_pool()
        with contextlib.suppress(RuntimeError):
            empty = self._graph()
            empty.capture_begin(pool=self.pool)
            torch.zeros(1, device="cuda")
            empty.capture_end()


@dataclass
class _Shape:
    """A shape of input: how often it was computed without a graph, and its recording with the tensor it reads."""

    calls_without_graph: int = 0
    recording: Recording | None = None
    images: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of the recording and its input."""
        return 0 if self.recording is None else self.recording.size + self.images.untyped_storage().nbytes()


class CapturedForward:
    """A network for inference, called through one CUDA graph for each shape of input.

    A shape is computed without a graph in its first two calls and recorded in the third. The ``SHAPES_KEPT`` shapes
    used last are remembered. Their recordings may take ``SHARE_OF_FREE_MEMORY`` of the memory that was free before the
    first of them, and more only while one is being made; the least recently used ones are dropped. A shape whose
    recording alone takes more is computed without a graph from then on. So is a shape for which there is too little
    memory beside the recordings, and all recordings are dropped then. Weights may change in place. A network that is
    moved, or set to another backend or to training, needs another ``CapturedForward``.

    Args:
        forward: computes an output tensor from an input tensor, without gradients. It should not refer to the object
            that holds the ``CapturedForward``; otherwise graphs are freed only by the garbage collector.
        recorder: a :class:`CudaRecorder` made for the device of the input.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], recorder: Any):
        self.forward, self.recorder = forward, recorder
        self._shapes: OrderedDict[tuple, _Shape] = OrderedDict()  # the one used last is last
        self._too_large: set[tuple] = set()
        self._size_kept: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the output for ``images`` in memory that no later call overwrites.

        Raises:
            CaptureError: the network cannot be recorded.
            torch.OutOfMemoryError: there is too little memory, even without recordings.
        """
        key = (images.shape, images.stride(), images.dtype)
        try:
            return self._call(key, images)
        except torch.OutOfMemoryError:
            pass  # continue after this block: the error keeps alive what the call has made
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
            if shape.calls_without_graph < 2:
                shape.calls_without_graph += 1
                do = self.recorder.warm_up if shape.calls_without_graph == 1 else self.recorder.rehearse
                return do(lambda: self.forward(images))
            if shape.recording is None:
                self._record(shape, images)
                self._make_room(key)  # recording has waited for the device, so no dropped recording is running
        except CaptureError as error:
            raise CaptureError(
                f"the network cannot be recorded as a CUDA graph ({error}); use it with graph off"
            ) from error
        if key in self._too_large:
            del shape  # frees the memory of the recording
            return self.forward(images)
        shape.images.copy_(images)
        return shape.recording.replay().clone()

    def _record(self, shape: _Shape, images: Tensor) -> None:
        if self._size_kept is None:
            self._size_kept = SHARE_OF_FREE_MEMORY * self.recorder.free_memory()
        # Tensors made in inference mode, such as the state of the random generator, could not be written outside of it.
        # Leaving inference mode switches gradients on, hence no_grad.
        with torch.inference_mode(False), torch.no_grad():
            static = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype, device=images.device)
            static.copy_(images)
            self.recorder.begin_pool()
            shape.recording = self.recorder.record(lambda: self.forward(static))
            shape.images = static

    def _make_room(self, latest: tuple) -> None:
        """Drop recordings until the latest one fits beside them, or drop the latest if it is too large alone."""
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
