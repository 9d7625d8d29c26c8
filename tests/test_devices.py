"""Device names: what auto means, and what a name that is wrong is answered with."""

import pytest
import torch

from uctrans.devices import find_device


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
