"""Channel attention between its projections: the operator, the published steps, composed, and PyTorch's own attention.

python -m pytest benchmarks/test_channel_attention.py -m gpu --benchmark-only
"""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from uctrans.kernels import channel_attention

from .harness import FLOP_OF_A_MULTIPLY_ADD, OPERATOR, PATCH, SEGMENTS, Call, Case, Work, comparisons, operator_backend

EPS = 1e-5
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Products of C x S x N multiply-adds of a head. Forward: scores, output. Backward, with no stored map: the scores
# again, the map's gradient, and the gradients of query, key and value.
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
# Passes over the inputs, and over the output: backward reads the inputs and writes their gradients.
INPUT_PASSES = {"forward": 1, "backward": 2, "both": 3}
OUTPUT_PASSES = {"forward": 1, "backward": 1, "both": 2}

NO_KERNEL = ("No viable backend", "No available kernel")
SDPA_ALIGNMENT = 8  # channels; rows of the fused kernels must start on 16 bytes


def attention(
    pixels: int,
    batch: int,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    segments: tuple[int, ...] = SEGMENTS,
    heads: int = 4,
    device: str = "cuda",
    **options: object,
) -> Case:
    """Return the case of square images: queries of all scales, keys and values as wide as all of them together."""
    tokens, channels = (pixels // PATCH) ** 2, sum(segments)

    def draw(generator: torch.Generator) -> Call:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        arguments = tuple(normal(batch, heads, tokens, channels).requires_grad_() for _ in range(3))
        return Call(arguments, (normal(batch, tokens, channels),))

    def work(passes: str) -> Work:
        product = FLOP_OF_A_MULTIPLY_ADD * batch * heads * channels**2 * tokens
        inputs, output = 3 * batch * heads * tokens * channels, batch * tokens * channels
        moved = INPUT_PASSES[passes] * inputs + OUTPUT_PASSES[passes] * output
        return Work(PRODUCTS[passes] * product, moved * dtype.itemsize)

    operator = partial(channel_attention, segments=segments, eps=EPS)
    backends = {OPERATOR: operator_backend(device), "reference": "reference", "composed": "composed"}
    candidates = {name: partial(operator, dropout_p=dropout_p, backend=backend) for name, backend in backends.items()}
    fused = partial(sdpa, segments=segments, dropout_p=dropout_p)
    candidates["sdpa"] = fused
    if device == "cuda":
        candidates["sdpa cudnn"] = partial(fused, backend=SDPBackend.CUDNN_ATTENTION)
    return Case(
        name="channel attention",
        sizes={"pixels": pixels, "batch": batch, "dropout": dropout_p},
        device=device,
        dtype=dtype,
        candidates=candidates,
        exact=partial(operator, backend="reference"),
        draw=draw,
        work=work,
        tolerance=TOLERANCES[dtype],
        dropout_p=dropout_p,
        **options,
    )


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    backend: SDPBackend | None = None,
) -> Tensor:
    """Compute channel attention by one call of ``scaled_dot_product_attention`` for all scales and heads.

    Instance norm only scales the scores of a scale, so it goes into the query. Channels are the sequence and tokens the
    head dimension, which the fused kernels want last in memory and a multiple of eight.
    """
    tokens = query.shape[2]
    variances = score_variances(query, key, segments)
    widened = [
        variance.unsqueeze(-1).expand(-1, -1, width) for variance, width in zip(variances, segments, strict=True)
    ]
    sharpness = (torch.cat(widened, dim=-1) + EPS).rsqrt() / math.sqrt(key.shape[-1])  # [B, H, sum C]
    tempered = query * sharpness.unsqueeze(-2).to(query.dtype)
    arguments = [_channels_as_sequence(tensor) for tensor in (tempered, key, value)]
    if backend is None:
        mixed = F.scaled_dot_product_attention(*arguments, dropout_p=dropout_p, scale=1.0)
    else:
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(*arguments, dropout_p=dropout_p, scale=1.0)
    return mixed[..., :tokens].mean(dim=1).transpose(1, 2)  # [B, H, sum C, N + padding] -> [B, N, sum C]


def score_variances(query: Tensor, key: Tensor, segments: Sequence[int]) -> list[Tensor]:
    """Return the biased variance of each scale's scores ``Q^T K / sqrt(S)``, one (B, H) a scale, float32 or better.

    Up to about half as many tokens as key channels, Gram matrices of the tokens are cheaper than the scores.
    """
    statistics = torch.promote_types(query.dtype, torch.float32)
    width_of_keys = key.shape[-1]
    if 2 * query.shape[2] > width_of_keys:
        scores = query.transpose(-1, -2) @ key / math.sqrt(width_of_keys)  # [B, H, sum C, S]
        return [block.to(statistics).var((-1, -2), correction=0) for block in scores.split(segments, dim=2)]
    mean_key = key.mean(dim=-1, keepdim=True)
    row_means = (query.transpose(-1, -2) @ mean_key).squeeze(-1).to(statistics)  # [B, H, sum C]
    centred = key - mean_key
    key_gram = (centred @ centred.transpose(-1, -2)).to(statistics)  # [B, H, N, N]
    variances = []
    for block, means in zip(query.split(segments, dim=-1), row_means.split(segments, dim=-1), strict=True):
        within_rows = ((block @ block.transpose(-1, -2)) * key_gram).sum((-1, -2)) / (block.shape[-1] * width_of_keys)
        variances.append((within_rows + means.var(-1, correction=0)) / width_of_keys)
    return variances


def _channels_as_sequence(tokens_first: Tensor) -> Tensor:
    """(B, H, N, C) -> (B, H, C, N), contiguous, N padded with zeros."""
    padding = -tokens_first.shape[2] % SDPA_ALIGNMENT
    return F.pad(tokens_first.transpose(-1, -2), (0, padding)).contiguous()


ON_GPU = {"compiled": ("reference", "sdpa")}
CASES = [
    *(
        attention(64, 2, torch.float32, p, (8, 16, 32, 64), device="cpu", compiled=("reference",) * (p == 0))
        for p in (0.0, 0.1)
    ),
    # The most important first, for a session that is short.
    *(attention(224, batch, torch.bfloat16, p, **ON_GPU) for p in (0.0, 0.1) for batch in (32, 4)),
    attention(224, 1, torch.bfloat16, **ON_GPU),
    *(attention(pixels, 4, torch.bfloat16, **ON_GPU) for pixels in (240, 384, 512, 1024)),
    *(attention(224, batch, torch.float32, **ON_GPU) for batch in (32, 4)),
]


@pytest.mark.parametrize(("case", "passes", "candidate"), comparisons(CASES))
def test_channel_attention(compare, case, passes, candidate):
    try:
        compare(case, passes, candidate)
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_KERNEL):
            raise
        pytest.skip(f"PyTorch has no such attention for this case: {error}")
