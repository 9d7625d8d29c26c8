"""Work in a thread ahead of its use: order, overlap, bounded memory, and an end in every case."""

import contextlib
import signal
import threading
import weakref

import numpy as np
import pytest

from uctrans.pipeline import in_thread

SECONDS = 20  # until a test that would wait for ever fails


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, although a shell that starts tests in the background has it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")}


def test_results_come_in_order():
    assert list(in_thread(lambda item: item * item, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert list(in_thread(str, [])) == []
    assert not threads()


def test_reading_computing_and_writing_overlap():
    """Each stage waits for another one to work on another item, which would never come if they took turns."""
    reading, computing, writing = ([threading.Event() for _ in range(6)] for _ in range(3))

    def read(item):
        reading[item].set()
        return item

    def compute(items):
        for item in items:
            computing[item].set()
            assert item == 5 or reading[item + 1].wait(SECONDS)
            assert item == 0 or writing[item - 1].wait(SECONDS)
            yield item

    def write(item):
        writing[item].set()
        assert item == 5 or computing[item + 1].wait(SECONDS)
        return item

    assert list(in_thread(write, compute(in_thread(read, range(6))))) == list(range(6))


def test_few_items_are_alive_at_once():
    alive, most = weakref.WeakSet(), 0

    class Image:
        def __init__(self):
            nonlocal most
            self.pixels = np.zeros(1000)
            alive.add(self)
            most = max(most, len(alive))

    def compute(images):
        for image in images:
            del image
            yield Image()

    for _ in in_thread(lambda result: None, compute(in_thread(lambda _: Image(), range(50)))):
        pass
    assert most <= 6


@pytest.mark.parametrize("failing", ["read", "compute", "write"])
@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_an_error_in_any_stage_ends_all(failing, place):
    done = []

    def work(stage, item):
        if (stage, item) == (failing, place):
            raise OSError(f"{stage} {item}")
        return item

    def compute(items):
        for item in items:
            yield work("compute", item)

    images = in_thread(lambda item: work("read", item), range(10))
    results = in_thread(lambda item: work("write", item), compute(images))
    with pytest.raises(OSError, match=f"{failing} {place}"), contextlib.closing(images), contextlib.closing(results):
        done += results
    assert done == list(range(len(done)))
    assert place - 2 <= len(done) <= place  # two may be waiting to be written
    assert not threads()


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_an_interrupt_at_any_stage_ends_all(stage, interrupts):
    """The signal comes while the thread of the stage works; what it has begun is completed, and nothing after it is."""
    begun, ended = [], []

    def work(item):
        begun.append(item)
        if item == 3:
            signal.raise_signal(signal.SIGINT)  # handled by the main thread, wherever that waits
        ended.append(item)
        return item

    def same(item):
        return item

    def compute(items):
        for item in items:
            yield work(item) if stage == "compute" else item

    images = in_thread(work if stage == "read" else same, range(1000))
    results = in_thread(work if stage == "write" else same, compute(images))
    with pytest.raises(KeyboardInterrupt), contextlib.closing(images), contextlib.closing(results):
        for _ in results:
            pass
    assert not threads()
    assert len(begun) < 1000
    assert stage == "compute" or begun == ended


def test_closing_begins_nothing_more():
    begun = []
    results = in_thread(begun.append, range(100))
    next(results)
    results.close()
    assert len(begun) <= 3
    assert not threads()
