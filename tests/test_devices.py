"""Device names: what auto means, and what a name that is wrong is answered with; and errors of short memory."""

import errno

import numpy as np
import pytest
import torch

from uctrans.devices import explaining_short_memory, find_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_is_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_auto_is_cuda_with_one(two_gpus):
    assert find_device("auto") == torch.device("cuda")
    assert find_device("auto", default_index=1) == torch.device("cuda", 1)
    assert find_device("cuda:1", default_index=0) == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["tpu", "", "cuda:first"])
def test_a_name_that_is_no_device(name):
    with pytest.raises(ValueError, match=f"device: '{name}' is not a device; give auto, cpu, cuda, cuda:1 or mps"):
        find_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "cpu:1", "meta"])
def test_a_device_that_is_not_there(name, two_gpus):
    with pytest.raises(ValueError, match=f"device: {name} is not there; give auto or cpu$"):
        find_device(name)


def test_more_processes_than_gpus(two_gpus):
    with pytest.raises(ValueError, match=r"device: cuda:2 is not there; .*start no more processes than GPUs"):
        find_device("auto", default_index=2)


def ask_torch():
    torch.empty(2**58)


def ask_numpy():
    np.empty(2**58, dtype=np.uint8)


def ask_python():
    bytearray(2**60)


def fail_with(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "work",
    [
        ask_torch,
        ask_numpy,
        ask_python,
        fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        fail_with(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")),
        fail_with(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")),
        fail_with(OSError(errno.ENOMEM, "Cannot allocate memory")),
        fail_with(MemoryError()),
    ],
    ids=["torch", "numpy", "python", "cuda", "mps", "cublas", "system", "silent"],
)
def test_short_memory_of_any_kind_gets_the_innermost_remedy(work):
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"^out of memory: lower batch_size \(.+\)$"),
        explaining_short_memory("do something else"),
        explaining_short_memory("lower batch_size"),
    ):
        work()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left"), KeyError(1)])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explaining_short_memory("lower batch_size"):
        raise error
    assert raised.value is error
