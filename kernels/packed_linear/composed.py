"""The block-diagonal linear map in plain PyTorch at its fastest: one product a scale, for all heads together.

The two gradients are written out for the operator, which torch's autograd does not see into.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_linear(tokens: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """(B, N, sum I), [(O, I)] -> (B, N, sum O), or with heads [(H, O, I)] -> (B, N, H, sum O)."""
    scales = tokens.split([weight.shape[-1] for weight in weights], dim=-1)
    mapped = []
    for place, (scale, weight) in enumerate(zip(scales, weights, strict=True)):
        # flatten(0, -2) joins heads and outputs, and leaves a weight without heads as it is.
        product = F.linear(scale, weight.flatten(0, -2), biases[place].flatten() if biases else None)
        mapped.append(product.unflatten(-1, weight.shape[:-1]))
    return torch.cat(mapped, dim=-1)


def token_gradient(gradient: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient by the tokens: (B, N, [H,] sum O), [([H,] O, I)] -> (B, N, sum I)."""
    scales = gradient.split([weight.shape[-2] for weight in weights], dim=-1)
    return torch.cat(
        [scale.flatten(2) @ weight.flatten(0, -2) for scale, weight in zip(scales, weights, strict=True)], dim=-1
    )


def weight_gradient(
    gradient: Tensor, tokens: Tensor, in_widths: Sequence[int], out_widths: Sequence[int], has_biases: bool
) -> Tensor:
    """The gradients by all weights and then by all biases, each flattened, one behind the other."""
    gradients = [scale.flatten(2).flatten(0, 1) for scale in gradient.split(list(out_widths), dim=-1)]
    inputs = [scale.flatten(0, 1) for scale in tokens.split(list(in_widths), dim=-1)]
    pieces = [(rows.t() @ columns).flatten() for rows, columns in zip(gradients, inputs, strict=True)]
    if has_biases:
        pieces += [rows.sum(dim=0) for rows in gradients]
    return torch.cat(pieces)
