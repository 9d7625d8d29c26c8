"""Optimizer, learning rate and the moving average of the weights."""

import copy
import math

import torch

from .config import TrainConfig

FUSED_DEVICES = ("cpu", "cuda", "mps")


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1: a cosine from the highest to the lowest that restarts.

    SGDR: stochastic gradient descent with warm restarts (Loshchilov and Hutter, ICLR 2017), equation 5, with all
    periods equal. In the first ``warmup_epochs`` epochs it is multiplied by a factor that rises in equal steps to 1.
    """
    period = config.restart_period or config.epochs
    phase = (epoch - 1) % period / period
    span = config.learning_rate - config.min_learning_rate
    cosine = config.min_learning_rate + span * (1 + math.cos(math.pi * phase)) / 2
    return cosine * min(1.0, epoch / (config.warmup_epochs + 1))


def build_optimizer(config: TrainConfig, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return Adam or AdamW: fused where the device supports it, and fit for CUDA graphs on CUDA."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=device.type in FUSED_DEVICES,
        capturable=device.type == "cuda",
    )
    fit_to_device(optimizer, device)
    return optimizer


def fit_to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Choose the implementation for ``device``, also if the optimizer's state was saved on another kind of device.

    On CUDA the learning rate is a tensor, so that it can change between replays of a captured step.
    """
    on_cuda = device.type == "cuda"
    for parameters in optimizer.param_groups:
        rate = float(parameters["lr"])
        parameters["lr"] = torch.tensor(rate, device=device) if on_cuda else rate
        parameters["fused"] = device.type in FUSED_DEVICES
        parameters["capturable"] = on_cuda


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameters, in place if it is a tensor."""
    for parameters in optimizer.param_groups:
        if isinstance(parameters["lr"], torch.Tensor):
            parameters["lr"].fill_(value)
        else:
            parameters["lr"] = value


class WeightAverage:
    """Exponential moving average ``average = decay * average + (1 - decay) * weights``, from the first weights on.

    Batch-norm statistics are averaged likewise; integer buffers are copied. ``model`` is a copy of the network that
    holds the averages and can be evaluated and saved.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Add the present weights of ``model`` to the average, without waiting for the device."""
        averages, weights = ([*network.parameters(), *network.buffers()] for network in (self.model, model))
        floating = [number for number, tensor in enumerate(averages) if tensor.is_floating_point()]
        counters = [number for number, tensor in enumerate(averages) if not tensor.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floating], [weights[i] for i in floating], 1 - self.decay)
        if counters:
            torch._foreach_copy_([averages[i] for i in counters], [weights[i] for i in counters])
