"""Exponential moving average of a network's weights."""

import copy

import torch


class WeightAverage:
    """Keep ``average = decay * average + (1 - decay) * weights``, starting at the weights given.

    Batch-norm statistics are averaged likewise; integer buffers are copied. ``self.model`` is a copy of the network
    that holds the averages, ready to be evaluated and saved.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Take in the present weights of ``model``, without waiting for the device."""
        averages, weights = list(_tensors(self.model)), list(_tensors(model))
        floating = [i for i, tensor in enumerate(averages) if tensor.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floating], [weights[i] for i in floating], 1 - self.decay)
        for average, weight in zip(averages, weights, strict=True):
            if not average.is_floating_point():
                average.copy_(weight)


def _tensors(model: torch.nn.Module):
    yield from model.parameters()
    yield from model.buffers()
