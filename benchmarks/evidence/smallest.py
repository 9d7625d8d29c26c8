"""Every operator once, forward and backward, at the smallest awkward shapes: what compute-sanitizer watches.

``python -m benchmarks.evidence.smallest``. A checker slows a kernel down a hundredfold, and what it looks for (accesses
out of bounds, races) shows at these shapes too: odd numbers of tokens and pixels, widths that are no power of two, a
scale wider than a tile. Results are compared with the composed form. Without a GPU the kernels run in Triton's
interpreter.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uctrans.kernels import (
    channel_attention,
    cross_layer_norm,
    packed_layer_norm,
    packed_linear,
    projected_channel_attention,
    skip_gate,
)

SEGMENTS = (8, 33)
TOKENS = 17
HEADS = 2
BATCH = 2
WIDTH = sum(SEGMENTS)
GRID, PATCH = (2, 3), 4
SEED = 3
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest value

Case = tuple[str, Callable[..., object], list[Tensor]]


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """Name, operator of leaves and backend, and the leaves, standard normal numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    def attend(*leaves: Tensor, backend: str) -> Tensor:
        return channel_attention(*leaves, SEGMENTS, dropout_p=0.1, seed=SEED, backend=backend)

    def project(tokens: Tensor, context: Tensor, key_value: Tensor, *queries: Tensor, backend: str) -> Tensor:
        settings = {"dropout_p": 0.1, "seed": SEED, "backend": backend}
        return projected_channel_attention(tokens, context, queries, key_value, **settings)

    def norm(*leaves: Tensor, backend: str) -> Tensor:
        return packed_layer_norm(leaves[0], SEGMENTS, *leaves[1:], backend=backend)

    def norms(*leaves: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return cross_layer_norm(leaves[0], SEGMENTS, *leaves[1:], backend=backend)

    def linear(tokens: Tensor, *maps: Tensor, backend: str) -> Tensor:
        return packed_linear(tokens, maps[: len(SEGMENTS)], maps[len(SEGMENTS) :], backend=backend)

    tokens = (BATCH, TOKENS, WIDTH)
    packed = (BATCH, HEADS, TOKENS, WIDTH)
    found = [
        ("channel attention", attend, [normal(*packed) for _ in range(3)]),
        (
            "projected channel attention",
            project,
            [
                *(normal(*tokens) for _ in range(2)),
                normal(2, HEADS, WIDTH, WIDTH) / WIDTH**0.5,
                *(normal(HEADS, width, width) / width**0.5 for width in SEGMENTS),
            ],
        ),
        ("packed layer norm", norm, [normal(*tokens), normal(WIDTH), normal(WIDTH)]),
        ("cross layer norm", norms, [normal(*tokens), *(normal(WIDTH) for _ in range(4))]),
        (
            "packed linear",
            linear,
            [
                normal(*tokens),
                *(normal(HEADS, width + 1, width) / width**0.5 for width in SEGMENTS),
                *(normal(HEADS, width + 1) for width in SEGMENTS),
            ],
        ),
    ]
    height, width = (side * PATCH for side in GRID)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = [normal(BATCH, 5, height, width), normal(BATCH, 5, *GRID), normal(BATCH, 3, height // 2, width // 2)]
        maps = [feature.contiguous(memory_format=memory_format) for feature in maps]
        weights = [normal(5, 5), normal(5), normal(5, 3), normal(5)]
        found.append((f"skip gate, {str(memory_format).removeprefix('torch.')}", skip_gate, maps + weights))
    return found


def outputs_and_gradients(function: Callable[..., object], leaves: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Outputs of the operator, and the gradients by all leaves of their product with fixed random numbers."""
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).to(output.device, output.dtype) for output in outputs]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def main() -> None:
    """Run them all; fail at the first whose results are wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    for dtype in dtypes:
        for name, function, leaves in cases(device, dtype):
            actual = outputs_and_gradients(function, leaves, "triton")
            expected = outputs_and_gradients(function, leaves, "composed")
            for place, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
                error = (result.float() - wanted.float()).abs().max().item()
                allowed = TOLERANCES[dtype] * wanted.float().abs().max().item()
                assert error <= allowed, f"{name}, {dtype}: result {place} is off by {error}, allowed {allowed}"
            print(f"{name}, {dtype}: as composed", flush=True)


if __name__ == "__main__":
    main()
