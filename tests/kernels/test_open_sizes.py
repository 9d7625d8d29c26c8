"""Programs that torch.export traces with open sizes compute what the operators compute."""

import pytest
import torch
from torch.export import Dim, export

from uctrans.kernels import (
    batch_norm_relu,
    channel_attention,
    projected_channel_attention,
    segmentation_sums,
    skip_gate,
)


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return channel_attention(query, key, value, [3, 5], backend="composed")


class ProjectedAttention(torch.nn.Module):
    def forward(self, tokens, context, fine, coarse, key_value):
        return projected_channel_attention(tokens, context, [fine, coarse], key_value, backend="composed")


class Gate(torch.nn.Module):
    def forward(self, feature, weight, bias):
        return skip_gate(feature, None, None, weight, bias, None, None, backend="composed")


class NormRelu(torch.nn.Module):
    def forward(self, feature, weight, bias):
        return batch_norm_relu(feature, weight, bias, None, None, training=True, backend="composed")


class Sums(torch.nn.Module):
    def forward(self, logits, target):
        return segmentation_sums(logits, target, backend="composed")


def tensors(*shapes):
    return tuple(torch.randn(shape) for shape in shapes)


def projected(batch, tokens):
    """Tokens, a context whose keys share a large offset, and the weights of 2 scales and 2 heads."""
    context = torch.randn(batch, tokens, 8) + 3
    return torch.randn(batch, tokens, 8), context, *tensors((2, 3, 3), (2, 5, 5), (2, 2, 8, 8))


def masks(*shape):
    return torch.randint(0, 3, shape, dtype=torch.uint8)


BATCH, TOKENS, HEIGHT, WIDTH = Dim("batch"), Dim("tokens"), Dim("height"), Dim("width")
ATTENTION = {0: BATCH, 2: TOKENS}
PROJECTED = {0: BATCH, 1: TOKENS}
MAP = {0: BATCH, 2: HEIGHT, 3: WIDTH}
CASES = {
    "attention": (
        Attention(),
        lambda n: tensors((n, 2, 4 + n, 8), (n, 2, 4 + n, 8), (n, 2, 4 + n, 8)),
        (ATTENTION, ATTENTION, ATTENTION),
    ),
    "projected_attention": (
        ProjectedAttention(),
        lambda n: projected(n, tokens=4 + n),
        (PROJECTED, PROJECTED, {}, {}, {}),
    ),
    "projected_attention_of_few_tokens": (
        ProjectedAttention(),
        lambda n: projected(n, tokens=4),
        ({0: BATCH}, {0: BATCH}, {}, {}, {}),
    ),
    "gate": (Gate(), lambda n: tensors((n, 4, 2 + n, 4 + n), (4, 4), (4,)), (MAP, {}, {})),
    "norm_relu": (NormRelu(), lambda n: tensors((n, 4, 2 + n, 4 + n), (4,), (4,)), (MAP, {}, {})),
    "sums": (
        Sums(),
        lambda n: (*tensors((n, 3, 2 + n, 4 + n)), masks(n, 2 + n, 4 + n)),
        (MAP, {0: BATCH, 1: HEIGHT, 2: WIDTH}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_open_sizes(name):
    module, draw, open_sizes = CASES[name]
    program = export(module, draw(2), dynamic_shapes=open_sizes, strict=False).module()
    for count in (2, 5):
        inputs = draw(count)
        torch.testing.assert_close(program(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)
