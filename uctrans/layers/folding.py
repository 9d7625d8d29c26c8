"""Fold batch norms into the convolutions before them, for inference."""

import copy

import torch
from torch import Tensor, nn

from .blocks import ConvNormAct, ConvNormActPool, FoldedNorm
from .nested import DilatedConvNormAct
from .plain import is_plain, is_plain_batch_norm
from .tokens import Reconstruct

FOLDABLE = (ConvNormAct, ConvNormActPool, DilatedConvNormAct, Reconstruct)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return ``model`` with each batch norm in evaluation mode folded into the convolution before it.

    Results differ by rounding only. ``model`` itself stays as it is: its folded convolutions and the modules that hold
    them are copied, and all other modules and parameters are shared. Later changes of the copied weights have no
    effect on the result. A layer whose convolution or norm was replaced, or has hooks or parametrisations, is shared.

    Returns:
        The copy, for inference only; ``model`` itself if it has nothing to fold.
    """
    return _folded(model, {})


def _folded(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return :func:`fold_batch_norms` of a module; ``done`` keeps what several modules share in one copy."""
    if module not in done:
        if _is_foldable(module):
            replaced = {"conv": _absorb(module.conv, module.norm), "norm": FoldedNorm().eval()}
        else:
            folded = {name: _folded(child, done) for name, child in module.named_children()}
            replaced = {name: child for name, child in folded.items() if child is not getattr(module, name)}
        done[module] = module
        if replaced:
            done[module] = copy.copy(module)
            done[module]._modules = module._modules | replaced
    return done[module]


def _is_foldable(layer: nn.Module) -> bool:
    return (
        type(layer) in FOLDABLE
        and is_plain(layer, type(layer))
        and [*layer._modules][:2] == ["conv", "norm"]
        and is_plain(layer.conv, nn.Conv2d)
        and is_plain_batch_norm(layer.norm)
        and not layer.norm.training
    )


@torch.no_grad()
def _absorb(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return one convolution that computes ``norm(conv(x))``; its weights are computed in float64."""
    scale = _exact(norm.weight) * (_exact(norm.running_var) + norm.eps).rsqrt()
    bias = 0 if conv.bias is None else _exact(conv.bias)
    folded = copy.copy(conv)
    folded._parameters = {
        "weight": _parameter_like(conv.weight, _exact(conv.weight) * scale[:, None, None, None]),
        "bias": _parameter_like(conv.weight, _exact(norm.bias) + (bias - _exact(norm.running_mean)) * scale),
    }
    return folded


def _exact(values: Tensor) -> Tensor:
    return values.cpu().double()  # MPS has no float64


def _parameter_like(weight: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(weight.device, weight.dtype), requires_grad=False)
