"""A training step on PyTorch's device "meta", which computes shapes only, in place of a GPU.

A tensor that was left on the CPU, a value that is read, or a copy between host and device stops the step or is found
in the list of its operators: what would fail on a GPU, make the host wait, or not be recordable as a CUDA graph.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uctrans.data import SegmentationTensors
from uctrans.data.tensors import NativeImages
from uctrans.training import TrainConfig
from uctrans.training.distributed import Processes
from uctrans.training.loop import train_step
from uctrans.training.losses import EpochTotals
from uctrans.training.optimization import WeightAverage, build_optimizer
from uctrans.training.run import build_model, build_protocol

META = torch.device("meta")
GROUP = Processes(rank=0, count=1, device=META)
IMAGES, SIDE = 6, 48
SMALL = {"model_options": {"num_layers": 2, "num_heads": 2}, "base_channels": 4, "image_size": SIDE}
SETTINGS = {
    "unet": {"model": "unet", "base_channels": 4, "image_size": SIDE},
    "uctransnet": {"model": "uctransnet", **SMALL},
    "reference": {"model": "uctransnet", "backend": "reference", **SMALL},
    "dual-branch": {"model": "dual_branch_uctransnet", **SMALL},
    "average": {"model": "uctransnet", "ema_decay": 0.9, "channel_order": "bgr", **SMALL},
    "classes": {"model": "uctransnet", "classes": 3, **SMALL},
    "native": {"model": "uctransnet", "protocol": "native", **SMALL},
    "boundary": {"model": "uctransnet", "protocol": "native", "target": "boundary", **SMALL},
}


class Transfers(TorchDispatchMode):
    """Notes the operators that have tensors on the device and on the host."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options, results)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == "meta"]
        # A CPU tensor of no dimensions is a number that goes along with the launch, unless it is copied.
        is_copy = function.name() in ("aten::_to_copy", "aten::copy_", "aten::lift_fresh_copy")
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu" and (tensor.ndim > 0 or is_copy)]
        if on_device and on_host:
            self.found.append(str(function))
        self.operators += bool(on_device)
        return results


class TensorsOfPythonValues(TorchFunctionMode):
    """Notes tensors made of Python's values, which are copied to the device."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in self.MAKERS:
            self.found.append(function.__name__)
        return function(*arguments, **(options or {}))


def step_on_meta(config):
    """A training step as ``Run`` builds it."""
    protocol = build_protocol(config)
    model = build_model(config, protocol.image_size).to(META, memory_format=torch.channels_last)
    names = [f"image{number}" for number in range(IMAGES)]
    if protocol.keeps_resolution:
        pixels = IMAGES * SIDE * SIDE
        data = NativeImages(
            names,
            torch.zeros(3, pixels, dtype=torch.uint8, device=META),
            torch.zeros(pixels, dtype=torch.uint8, device=META),
            torch.zeros(IMAGES, dtype=torch.int64, device=META),
            torch.zeros(2, IMAGES, dtype=torch.int64, device=META),
        )
    else:
        data = SegmentationTensors(
            names,
            torch.zeros(IMAGES, 3, SIDE, SIDE, dtype=torch.uint8, device=META),
            torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.uint8, device=META),
            [(SIDE, SIDE)] * IMAGES,
        )
    run = SimpleNamespace(
        forward=model,
        model=model,
        optimizer=build_optimizer(config, model, META),
        average=WeightAverage(model, config.ema_decay) if config.ema_decay else None,
        train_data=data,
        protocol=protocol,
        augment_generator=torch.Generator(),
        totals=EpochTotals(META),
        group=GROUP,
        config=config,
    )
    return functools.partial(train_step, run)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_nothing_of_a_step_goes_between_host_and_device(changes):
    step = step_on_meta(TrainConfig(data="data", output="run", **changes))
    index = torch.zeros(4, dtype=torch.int64, device=META)
    step(index)  # the first makes the optimizer's state
    with Transfers() as transfers, TensorsOfPythonValues() as values:
        step(index)
    assert transfers.found == []
    assert values.found == []
    assert transfers.operators > 100


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.ones(3).to(META),
        lambda: torch.tensor([1.0, 2.0], device=META),
        lambda: torch.tensor(1.0).to(META),
        lambda: torch.ones(3, device=META).index_select(0, torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_the_check_sees_a_transfer(work):
    with Transfers() as transfers, TensorsOfPythonValues() as values:
        try:
            work()
        except RuntimeError:
            return
    assert transfers.found or values.found
