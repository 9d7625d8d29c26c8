"""Settings of every test: one thread a process, pictures without a display, and GPU tests only where there is a GPU."""

import os
from importlib.util import find_spec

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
def interpreter_wraps_once():
    """Let Triton's interpreter wrap ``triton.language`` once a launch, not again in each call of a device function.

    That is most of its time, and finds everything wrapped already.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    wrap = interpreter._patch_lang

    def wrap_once(function):
        modules = [value for value in function.__globals__.values() if value in (language, language.core)]
        if any(language.core.is_builtin(module.load) for module in modules):
            return wrap(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", wrap_once)
        yield
