"""Who runs in the channel-attention race: the operator, the paper's steps, and the best plain PyTorch offers.

Every candidate is a function of query, key and value (B, H, N, .) that returns the mean over heads (B, N, sum C). Each
is offered in one or more variants; the fastest that computes the right thing races.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from uctrans.kernels import channel_attention

from .timing import Call

EPS = 1e-5
OPERATOR = "operator"
CANDIDATES = (OPERATOR, "reference compiled", "sdpa", "reference", "composed")

# Kernels of mode="max-autotune" without its own graphs: the benchmark captures every candidate in the same way.
# On a CPU, where nothing is claimed, tuning would only take time.
COMPILE_MODES = {"cuda": "max-autotune-no-cudagraphs", "cpu": "default"}

# Of scaled_dot_product_attention; rows of its kernels must start on 16 bytes.
SDPA_ALIGNMENT = 8
SDPA_BACKENDS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One workload: sizes, dtype, dropout and device."""

    pixels: int
    batch: int
    dtype: torch.dtype
    dropout_p: float = 0.0
    segments: tuple[int, ...] = (64, 128, 256, 512)
    heads: int = 4
    patch: int = 16
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.pixels // self.patch) ** 2

    @property
    def key_channels(self) -> int:
        """Width of keys and values."""
        return sum(self.segments)

    @property
    def sizes(self) -> tuple[int, int, int, tuple[int, ...], int, torch.dtype]:
        """What the work depends on, in the order of :mod:`benchmarks.roofline`."""
        return self.batch, self.heads, self.tokens, self.segments, self.key_channels, self.dtype

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        return {
            "pixels": self.pixels,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dropout_p": self.dropout_p,
            "tokens": self.tokens,
            "heads": self.heads,
            "segments": list(self.segments),
            "device": self.device,
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.pixels}px-B{self.batch}-p{self.dropout_p:g}"


def calls(problem: Problem, count: int) -> list[Call]:
    """So many calls, each with a query, key, value and output gradient of its own, all standard normal numbers.

    All are contiguous, which the matrix products of the paper's steps like best; the operator takes any strides.
    """
    generator = torch.Generator(problem.device).manual_seed(0)
    channels, key_channels = sum(problem.segments), problem.key_channels
    lead = (problem.batch, problem.heads, problem.tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)

    drawn = []
    for _ in range(count):
        arguments = tuple(normal(*lead, width).requires_grad_() for width in (channels, key_channels, key_channels))
        drawn.append(Call(arguments, arguments, normal(problem.batch, problem.tokens, channels)))
    return drawn


def variants(candidate: str, problem: Problem) -> dict[str, Attend]:
    """The forms that ``candidate`` is offered in, by name; those of SDPA are compiled by :func:`compiled_sdpa`."""
    if candidate == OPERATOR:
        backend = operator_backend(problem.device)
        return {backend: on_backend(backend, problem)}
    if candidate in ("reference", "composed"):
        return {"eager": on_backend(candidate, problem)}
    if candidate == "reference compiled":
        return {COMPILE_MODES[problem.device]: compiled(on_backend("reference", problem), problem.device)}
    if candidate == "sdpa":
        return {name: sdpa_on(name, problem) for name in SDPA_BACKENDS}
    raise ValueError(f"unknown candidate {candidate!r}; choose one of {', '.join(CANDIDATES)}")


def operator_backend(device: str) -> str:
    """The backend that is raced as the operator: Triton on a GPU, elsewhere what a user gets there."""
    return "triton" if torch.device(device).type == "cuda" else "auto"


def on_backend(backend: str, problem: Problem) -> Attend:
    """``channel_attention`` of ``problem`` on one of its backends."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        settings = {"dropout_p": problem.dropout_p, "eps": EPS, "backend": backend}
        return channel_attention(query, key, value, problem.segments, **settings)

    return attend


def compiled(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """``function`` as torch compiles it for fixed shapes, on a GPU tuned to the full; a graph break is an error."""
    return torch.compile(function, mode=COMPILE_MODES[device], fullgraph=True, dynamic=False)


def sdpa_on(backend_name: str, problem: Problem, compile_it: bool = False) -> Attend:
    """:func:`sdpa` held to one backend of ``scaled_dot_product_attention``, or left to torch's choice."""
    backend = SDPA_BACKENDS[backend_name]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if backend is None:
            return sdpa(query, key, value, problem.segments, problem.dropout_p, EPS)
        with sdpa_kernel(backend):
            return sdpa(query, key, value, problem.segments, problem.dropout_p, EPS)

    return compiled(attend, problem.device) if compile_it else attend


def sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[int], dropout_p: float, eps: float) -> Tensor:
    """Channel attention on torch's own fused kernels, as well as they allow: one call for all scales and heads.

    Instance norm only scales the scores of a row, so it goes into the query. Channels are the sequence and tokens the
    head dimension, which the kernels want last in memory and a multiple of eight.
    """
    tokens = query.shape[2]
    variance = torch.cat(
        [
            scale_variance.unsqueeze(-1).expand(-1, -1, width)
            for scale_variance, width in zip(score_variances(query, key, segments), segments, strict=True)
        ],
        dim=-1,
    )  # [B, H, sum C]
    sharpness = (variance + eps).rsqrt() / math.sqrt(key.shape[-1])
    tempered = query * sharpness.unsqueeze(-2).to(query.dtype)
    mixed = F.scaled_dot_product_attention(
        _channels_as_sequence(tempered),
        _channels_as_sequence(key),
        _channels_as_sequence(value),
        dropout_p=dropout_p,
        scale=1.0,
    )  # [B, H, sum C, N + padding]
    return mixed[..., :tokens].mean(dim=1).transpose(1, 2)


def score_variances(query: Tensor, key: Tensor, segments: Sequence[int]) -> list[Tensor]:
    """Biased variance of each scale's map of scores ``Q^T K / sqrt(S)``: one (B, H) a scale, in float32 or better.

    Up to about half as many tokens as key channels, Gram matrices of the tokens are cheaper than the map itself.
    """
    key_channels = key.shape[-1]
    if 2 * query.shape[2] > key_channels:
        scores = query.transpose(-1, -2) @ key / math.sqrt(key_channels)  # [B, H, sum C, S]
        return [block.to(_statistics(query)).var((-1, -2), correction=0) for block in scores.split(segments, dim=2)]
    mean_key = key.mean(dim=-1, keepdim=True)
    row_means = (query.transpose(-1, -2) @ mean_key).squeeze(-1).to(_statistics(query))  # [B, H, sum C]
    centred = key - mean_key
    key_gram = (centred @ centred.transpose(-1, -2)).to(_statistics(query))  # [B, H, N, N]
    variances = []
    for block, means in zip(query.split(segments, dim=-1), row_means.split(segments, dim=-1), strict=True):
        within_rows = ((block @ block.transpose(-1, -2)) * key_gram).sum((-1, -2)) / (block.shape[-1] * key_channels)
        variances.append((within_rows + means.var(-1, correction=0)) / key_channels)
    return variances


def sdpa_choice(problem: Problem) -> str:
    """Which backend torch chooses for :func:`sdpa` of this problem."""
    heads_and_channels = (problem.batch, problem.heads, problem.key_channels)
    width = -(-problem.tokens // SDPA_ALIGNMENT) * SDPA_ALIGNMENT
    tensor = torch.empty(*heads_and_channels, width, dtype=problem.dtype, device=problem.device, requires_grad=True)
    choice = torch._fused_sdp_choice(tensor, tensor, tensor, dropout_p=problem.dropout_p, scale=1.0)
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def _channels_as_sequence(tokens_first: Tensor) -> Tensor:
    """(B, H, N, C) -> (B, H, C, N), contiguous, N padded with zeros."""
    padding = -tokens_first.shape[2] % SDPA_ALIGNMENT
    return F.pad(tokens_first.transpose(-1, -2), (0, padding)).contiguous()


def _statistics(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
