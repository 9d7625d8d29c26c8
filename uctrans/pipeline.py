"""Work that overlaps: a thread computes the results to come while the last one is used.

A chain of generators is a pipeline: with ``in_thread(read, paths)`` as the source of a loop that computes, and
``in_thread(write, results)`` around that loop, a series takes as long as the slowest of the three.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_thread(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``function(item)`` for each item in order; one thread computes one result ahead of the one asked for.

    The items are taken in the calling thread, so an iterator of items works while the thread does. No more than two
    results or items wait, however many there are. Close the generator (``contextlib.closing``) to end its thread when
    the results are not used up: the call that runs is waited for, and no other begins.

    Raises:
        Exception: ``function`` raised it for the item whose result is due, or ``items`` did.
    """
    waiting: deque[Future[Result]] = deque()
    thread = ThreadPoolExecutor(1)
    try:
        for item in items:
            waiting.append(thread.submit(function, item))
            del item  # which may be an image, while the next one is made
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
