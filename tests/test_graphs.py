"""Networks called through CUDA graphs: outputs, memory, dropped shapes, and work that cannot be recorded.

Without a GPU, ``HostRecorder`` takes the place of CUDA graphs.
"""

import subprocess
import sys
import weakref

import pytest
import torch

import uctrans
from tests.support import HostRecorder
from uctrans.graphs import SHAPES_KEPT, CapturedForward, CaptureError, CudaRecorder


def network():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.GELU(), torch.nn.Conv2d(4, 2, 3)
    return torch.nn.Sequential(*layers).eval()


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_outputs_are_those_of_the_network_call_after_call():
    model, recorder = network(), HostRecorder()
    forward = CapturedForward(model, recorder)
    for seed in range(5):
        batch = images(2, 3, 32, 48, seed=seed)
        torch.testing.assert_close(forward(batch), model(batch).detach(), rtol=0, atol=0)
    assert (recorder.warm_ups, recorder.rehearsals, recorder.recordings, recorder.replays) == (1, 1, 1, 3)


def test_an_output_is_not_overwritten_by_the_next_call():
    forward = CapturedForward(network(), HostRecorder())
    outputs = [forward(images(1, 3, 32, 32, seed=seed)) for seed in range(4)]
    kept = [output.clone() for output in outputs]
    forward(images(1, 3, 32, 32, seed=9))
    assert all(torch.equal(output, copy) for output, copy in zip(outputs, kept, strict=True))
    assert not torch.equal(outputs[2], outputs[3])


def test_weights_that_change_in_place_are_seen():
    model = network()
    forward = CapturedForward(model, HostRecorder())
    batch = images(1, 3, 32, 32)
    before = [forward(batch) for _ in range(3)][-1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(forward(batch), before)
    torch.testing.assert_close(forward(batch), model(batch).detach(), rtol=0, atol=0)


def test_a_shape_that_comes_once_is_not_recorded_and_few_are_kept():
    recorder = HostRecorder()
    forward = CapturedForward(network(), recorder)
    for side in range(32, 32 + 16 * (SHAPES_KEPT + 3), 16):
        forward(images(1, 3, side, 32))
    assert recorder.recordings == 0
    for _ in range(3):  # the first of the sizes was forgotten
        assert recorder.recordings == 0
        forward(images(1, 3, 32, 32))
    assert recorder.recordings == 1


def test_a_shape_that_is_forgotten_gives_its_graph_back():
    forward = CapturedForward(network(), HostRecorder())
    for side in range(32, 32 + 16 * (SHAPES_KEPT + 3), 16):
        for _ in range(3):
            forward(images(1, 3, side, 32))
    assert len(forward._shapes) == SHAPES_KEPT
    assert all(shape.recording is not None for shape in forward._shapes.values())


def test_the_shape_that_was_used_last_stays():
    recorder = HostRecorder()
    forward = CapturedForward(network(), recorder)
    for side in range(48, 48 + 16 * 2 * SHAPES_KEPT, 16):
        forward(images(1, 3, 32, 32))
        forward(images(1, 3, side, 32))
    assert recorder.recordings == 1
    assert recorder.replays == 2 * SHAPES_KEPT - 2


def forward_of_sizes(recordings_that_fit, size=4000):
    """Return a network of which ``recordings_that_fit`` fit into memory; they grow with the batch."""
    recorder = HostRecorder(free=2 * recordings_that_fit * size, size_of=lambda result: size * result.shape[0] - 192)
    return CapturedForward(lambda batch: batch * 2, recorder), recorder  # an input of 48 numbers is 192 bytes


def replays_of(forward, recorder, batch):
    """Check the outputs of four calls, and return how many of them were replays."""
    before = recorder.replays
    for _ in range(4):
        assert torch.equal(forward(batch), batch * 2)
    return recorder.replays - before


def test_recordings_that_were_not_used_for_longest_make_room():
    forward, recorder = forward_of_sizes(recordings_that_fit=2)
    first, second, third = (images(1, 3, *sides) for sides in ((4, 4), (2, 8), (8, 2)))
    for batch in (first, second):
        assert replays_of(forward, recorder, batch) == 2
    forward(first)
    assert replays_of(forward, recorder, third) == 2
    recordings = recorder.recordings
    assert replays_of(forward, recorder, first) == 4
    assert recorder.recordings == recordings == recorder.pools == 3
    assert replays_of(forward, recorder, second) == 2  # it was forgotten, and comes as if for the first time
    assert recorder.recordings == 4


def test_a_shape_that_is_too_large_alone_is_computed_plainly_and_others_stay():
    forward, recorder = forward_of_sizes(recordings_that_fit=2)
    small, large = images(1, 3, 4, 4), images(3, 3, 4, 4)
    assert replays_of(forward, recorder, small) == 2
    assert replays_of(forward, recorder, large) == 0
    assert recorder.recordings == 2
    done = recorder.warm_ups, recorder.rehearsals
    assert replays_of(forward, recorder, large) == 0
    assert replays_of(forward, recorder, small) == 4
    assert (recorder.recordings, (recorder.warm_ups, recorder.rehearsals)) == (2, done)


def test_a_recording_as_large_as_half_of_what_is_free_is_kept():
    for size, replays in ((1000, 2), (1001, 0)):
        recorder = HostRecorder(free=2 * (1000 + 4 * 48), size_of=lambda result, size=size: size)
        forward = CapturedForward(lambda batch: batch * 2, recorder)
        assert replays_of(forward, recorder, images(1, 3, 4, 4)) == replays


@pytest.mark.parametrize("calls", [0, 1, 2], ids=["warm-up", "rehearsal", "recording"])
def test_where_memory_is_too_short_beside_recordings_they_are_forgotten(calls):
    forward, recorder = forward_of_sizes(recordings_that_fit=9)
    small, large, is_short = images(1, 3, 4, 4), images(3, 3, 4, 4), False

    def network_that_needs_all(batch):
        if is_short and len(batch) == 3 and any(shape.recording for shape in forward._shapes.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch * 2

    forward.forward = network_that_needs_all
    assert replays_of(forward, recorder, small) == 2
    for _ in range(calls):
        forward(large)
    is_short = True
    assert replays_of(forward, recorder, large) == 0
    assert replays_of(forward, recorder, small) == 2  # it was forgotten, and is recorded again


def test_a_network_for_which_there_is_too_little_memory_says_so():
    def large(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CapturedForward(large, HostRecorder())(images(1, 3, 4, 4))


def test_memory_of_what_is_forgotten_is_free_at_once():
    alive = []

    class Result(torch.Tensor):
        pass

    def network_of_its_own(batch):
        result = (batch * 2).as_subclass(Result)
        alive.append(weakref.ref(result))
        return result

    forward, recorder = forward_of_sizes(recordings_that_fit=1)
    forward.forward = network_of_its_own
    for sides in ((4, 4), (2, 8), (8, 2)):
        replays_of(forward, recorder, images(1, 3, *sides))
    assert recorder.recordings == 3
    assert sum(reference() is not None for reference in alive) == 1


def test_another_layout_or_dtype_is_another_recording():
    recorder = HostRecorder()
    forward = CapturedForward(lambda batch: batch * 2, recorder)
    batch = images(1, 3, 32, 32)
    for one in (batch, batch.to(memory_format=torch.channels_last), batch.half()) * 3:
        assert torch.equal(forward(one), one * 2)
    assert recorder.recordings == 3


def test_a_recording_of_inference_mode_serves_outside_of_it():
    forward = CapturedForward(network(), HostRecorder())
    with torch.inference_mode():
        for seed in range(4):
            forward(images(1, 3, 32, 32, seed=seed))
    output = forward(images(1, 3, 32, 32))
    torch.testing.assert_close(output, network()(images(1, 3, 32, 32)).detach(), rtol=0, atol=0)
    assert not output.is_inference()


def test_a_network_that_reads_a_value_cannot_be_recorded():
    forward = CapturedForward(lambda batch: batch * batch.max().item(), HostRecorder())
    forward(images(1, 3, 8, 8))
    with pytest.raises(CaptureError, match=r"cannot be recorded as a CUDA graph .* graph off"):
        forward(images(1, 3, 8, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["unet", "uctransnet", "dual_branch_uctransnet"])
def test_on_a_gpu_outputs_are_those_of_the_network(name):
    torch.manual_seed(0)
    model = uctrans.create_model(name, base_channels=16).cuda().eval()
    forward = CapturedForward(model, CudaRecorder())
    with torch.inference_mode():
        for seed in range(4):
            for shape in ((2, 3, 224, 224), (1, 3, 96, 160)):
                batch = images(*shape, seed=seed).cuda()
                torch.testing.assert_close(forward(batch), model(batch), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_recording_of_inference_mode_serves_outside_of_it():
    model = network().cuda()
    forward = CapturedForward(model, CudaRecorder())
    batch = images(1, 3, 32, 32).cuda()
    with torch.inference_mode():
        for _ in range(4):
            forward(batch)
    torch.testing.assert_close(forward(batch), model(batch).detach(), rtol=1e-4, atol=1e-4)
    draws = CudaRecorder().record(lambda: torch.rand(3, device="cuda")).replay
    first, second = draws().clone(), draws().clone()
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_on_a_gpu_the_size_of_a_recording_is_memory_that_is_free_again_without_it():
    def large(batch):
        return (batch.repeat(1 << 20, 1) * 2).sum(0)  # 64 MiB twice

    def reserved():
        assert recorder.free_memory() > 0  # gives back what this process does not use; others use the GPU too
        return torch.cuda.memory_reserved()

    recorder, batch = CudaRecorder(), torch.rand(16, device="cuda")
    before = reserved()
    recorder.begin_pool()
    recording = recorder.record(lambda: large(batch))
    assert 2**27 <= recording.size < 2**28
    assert reserved() == before + recording.size
    del recording
    assert reserved() <= before


# In a process of its own, because a recording that fails may break later ones.
AFTER_A_FAILURE = """
import torch
from uctrans.graphs import CaptureError, CudaRecorder

recorder, batch = CudaRecorder(), torch.rand(8, device="cuda")
try:
    recorder.rehearse(lambda: batch * batch.max().item())
    raise SystemExit("the rehearsal passed")
except CaptureError as error:
    assert "waits for the device" in str(error), error
assert torch.cuda.get_sync_debug_mode() == 0
try:
    recorder.record(lambda: torch.rand(8, device="cuda") * batch.max().item())
    raise SystemExit("the recording passed")
except CaptureError as error:
    print("failed with", error)
for way in (recorder.rehearse, recorder.record):
    try:
        way(lambda: torch.empty(1 << 50, device="cuda"))
        raise SystemExit("there was enough memory")
    except torch.OutOfMemoryError as error:
        print("failed with", error)
torch.nn.functional.dropout(torch.rand(8, device="cuda"))
replay = recorder.record(lambda: torch.nn.functional.dropout(batch) + 1).replay
replay(), torch.cuda.synchronize()
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""


@pytest.mark.gpu
def test_on_a_gpu_work_continues_after_a_recording_that_failed():
    ended = subprocess.run([sys.executable, "-c", AFTER_A_FAILURE], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
