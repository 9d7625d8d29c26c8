"""Every operator once, forward and backward, at the smallest awkward shapes: what compute-sanitizer watches.

``python -m benchmarks.evidence.smallest``. A checker slows a kernel down a hundredfold, and what it looks for (accesses
out of bounds, races) shows at these shapes too: odd numbers of tokens and pixels, widths that are no power of two, a
scale wider than a tile. Results are compared with the composed form. Without a GPU the kernels run in Triton's
interpreter.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from uctrans.kernels import (
    batch_norm_relu,
    batch_norm_relu_pool,
    channel_attention,
    cross_layer_norm,
    packed_layer_norm,
    packed_linear,
    packed_mlp,
    projected_channel_attention,
    segmentation_scores,
    segmentation_sums,
    skip_gate,
)

SEGMENTS = (8, 33)
HIDDEN = (9, 40)
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

    def mlp(tokens: Tensor, residual: Tensor, *maps: Tensor, backend: str) -> Tensor:
        scales = len(SEGMENTS)
        return packed_mlp(
            tokens, residual, *(maps[i : i + scales] for i in range(0, 4 * scales, scales)), backend=backend
        )

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
        (
            "packed MLP",
            mlp,
            [
                *(normal(*tokens) for _ in range(2)),
                *(normal(hidden, width) / width**0.5 for width, hidden in zip(SEGMENTS, HIDDEN, strict=True)),
                *(normal(hidden) for hidden in HIDDEN),
                *(normal(width, hidden) / hidden**0.5 for width, hidden in zip(SEGMENTS, HIDDEN, strict=True)),
                *(normal(width) for width in SEGMENTS),
            ],
        ),
    ]
    height, width = (side * PATCH for side in GRID)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = [normal(BATCH, 5, height, width), normal(BATCH, 5, *GRID), normal(BATCH, 3, height // 2, width // 2)]
        maps = [feature.contiguous(memory_format=memory_format) for feature in maps]
        weights = [normal(5, 5), normal(5), normal(5, 3), normal(5)]
        layout = str(memory_format).removeprefix("torch.")
        found.append((f"skip gate, {layout}", skip_gate, maps + weights))
        parameters = [normal(5).float(), normal(5).float()]
        for is_training in (True, False):
            mode = "training" if is_training else "evaluation"
            leaves = [maps[0], *parameters]
            found.append((f"batch norm and ReLU, {mode}, {layout}", partial(_norm_relu, is_training), leaves))
            leaves = [maps[0][..., 1:, 1:].contiguous(memory_format=memory_format), *parameters]
            found.append(
                (f"batch norm, ReLU and pool, {mode}, {layout}", partial(_norm_relu_pool, is_training), leaves)
            )
        for classes in (1, 3):
            logits = normal(BATCH, classes, 7, 5).contiguous(memory_format=memory_format)
            masks = torch.randint(max(classes, 2), (BATCH, 7, 5), generator=generator, dtype=torch.uint8).to(device)
            found.append((f"loss and Dice, {classes} classes, {layout}", partial(_loss_and_dice, masks), [logits]))
    return found


def _norm_relu(training: bool, feature: Tensor, *parameters: Tensor, backend: str) -> tuple[Tensor, ...]:
    mean, variance = torch.zeros_like(parameters[0]), torch.ones_like(parameters[0])
    output = batch_norm_relu(feature, *parameters, mean, variance, training=training, backend=backend)
    return output, mean, variance


def _norm_relu_pool(training: bool, feature: Tensor, *parameters: Tensor, backend: str) -> tuple[Tensor, ...]:
    mean, variance = torch.zeros_like(parameters[0]), torch.ones_like(parameters[0])
    maps = batch_norm_relu_pool(feature, *parameters, mean, variance, training=training, backend=backend)
    return *maps, mean, variance


def _loss_and_dice(masks: Tensor, logits: Tensor, backend: str) -> tuple[Tensor, ...]:
    sums, counts = segmentation_sums(logits, masks, backend=backend)
    loss, dice = segmentation_scores(sums, counts, masks[0].numel(), backend=backend)
    return loss, sums, counts, dice


def outputs_and_gradients(function: Callable[..., object], leaves: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Outputs of the operator, and the gradients by all leaves of their product with fixed random numbers.

    Outputs that are not differentiable are compared alone.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    differentiable = [output for output in outputs if output.requires_grad]
    upstream = [torch.randn(output.shape, generator=generator).to(output) for output in differentiable]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(differentiable, leaves, upstream)]


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
