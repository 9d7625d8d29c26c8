"""Settings of every test: one thread a process, pictures without a display, and GPU tests only where there is a GPU."""

import itertools
import os
import signal
from importlib.util import find_spec
from pathlib import Path

# Read when torch and matplotlib load, so they come before the first import of either; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. Read when triton loads, so it comes before any test does.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Skip what is marked gpu on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def interpreter_for_tests():
    """Change Triton's interpreter, where it runs the kernels: see tests/kernels/interpreter.py."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from tests.kernels.interpreter import make_right_for_bfloat16, refuse_integers_as_masks, wrap_once

    with pytest.MonkeyPatch.context() as patch:
        make_right_for_bfloat16(patch)
        refuse_integers_as_masks(patch)
        wrap_once(patch)
        yield


@pytest.fixture
def is_killed_at():
    """A function that does work in a child, killed before a change of a file's name; it returns whether it was."""

    def do(number, work):
        child = os.fork()
        if child == 0:
            try:
                changes = itertools.count()
                for name in ("replace", "unlink"):
                    setattr(Path, name, _killing(getattr(Path, name), changes, number))
                work()
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    return do


def _killing(change, changes, number):
    def changed(*arguments, **options):
        if next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)

    return changed
