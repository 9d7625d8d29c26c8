"""What every test shares: one thread a process, pictures without a display, and GPU tests only where there is a GPU."""

import os

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
