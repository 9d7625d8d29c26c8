"""A whole UCTransNet on Triton, forward and backward.

Without a GPU the kernels run in Triton's interpreter.
"""

import copy

import pytest
import torch

from uctrans import UCTransNet, set_backend
from uctrans.kernels.testing import assert_within_budget

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = {
    "image_size": 16,
    "base_channels": (4, 6),
    "patch_sizes": (4, 2),
    "num_layers": 1,
    "num_heads": 2,
    "mlp_ratio": 2,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def memory_format(request):
    return request.param


def model(memory_format):
    torch.manual_seed(0)
    network = UCTransNet(**CONFIG).to(DEVICE)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.to(memory_format=memory_format)


def images(draw=0, batch=1, width=16):
    generator = torch.Generator().manual_seed(draw)
    return torch.rand(batch, 3, 8, width, generator=generator).to(DEVICE)


def logits_and_gradients(network, backend, dtype, image, memory_format, transform=lambda function: function):
    network = set_backend(copy.deepcopy(network).to(dtype), backend)
    image = image.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    logits = transform(network)(image)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(image)
    gates = [*network.decoder[0].gate.parameters(), *network.head.parameters(), network.encoder.stem.conv.weight]
    return [logits.detach(), *torch.autograd.grad(logits, [image, *gates], weight)]


def test_as_exact_as_the_reference(memory_format):
    """Compare in evaluation, where batch norm does not amplify rounding; two draws are measured together."""
    network = model(memory_format).eval()
    runs = [("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
    drawn = [
        [logits_and_gradients(network, backend, dtype, images(draw), memory_format) for draw in range(2)]
        for backend, dtype in runs
    ]
    assert_within_budget(*([torch.stack(draws) for draws in zip(*results, strict=True)] for results in drawn))


def test_training_changes_the_same_buffers(memory_format):
    ours, published = (set_backend(model(memory_format), backend) for backend in ("triton", "reference"))
    with torch.no_grad():
        for draw in range(2):
            for network in (ours, published):
                network(images(draw, batch=2).contiguous(memory_format=memory_format))
    for (name, buffer), expected in zip(ours.named_buffers(), published.buffers(), strict=True):
        torch.testing.assert_close(
            buffer, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_compiles_whole():
    memory_format = torch.channels_last
    network, image = model(memory_format).train(), images(width=8)

    def compiled(module):
        return torch.compile(module, fullgraph=True, backend="aot_eager")

    plain = logits_and_gradients(network, "triton", torch.float32, image, memory_format)
    traced = logits_and_gradients(network, "triton", torch.float32, image, memory_format, compiled)
    for actual, expected in zip(traced, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
