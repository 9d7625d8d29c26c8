"""Channel attention: public functions, checks, choice of the form, cost model, and registration.

Two operators differ only in the layout of key and value. ``uctrans::channel_attention`` takes them as two tensors;
``uctrans::channel_attention_packed`` takes both in one, as one projection writes them, and returns one gradient, so
that no copy takes them apart or puts them together.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import choose_form, resolve_backend
from ..checks import (
    check_dtypes_and_devices,
    check_numbers_type,
    check_segments_type,
    check_sizes,
    check_tensor_lists,
    is_open,
)
from ..dropout import draw_seed
from ..formats import empty_heads_inside, key_and_value
from ..packed_linear import packed_linear
from ..registration import cast_under_autocast, register_gradient, register_operator
from . import composed, exported, reference


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Attend over channels, with instance-normalised similarity over packed scales, and average the heads.

    Per sample, head and scale, with ``Q`` (N x C), ``K`` and ``V`` (N x S): ``X = Q^T K / sqrt(S)``, ``Z`` = instance
    norm of ``X`` over the whole C x S map, ``P`` = softmax of ``Z`` over S, and the output is ``dropout(P) V^T``.

    Args:
        query: (B, H, N, sum C), the scales packed side by side along the last axis.
        key: (B, H, N, S).
        value: (B, H, N, S).
        segments: width of each scale along the packed axis; they add up to ``query.shape[-1]``.
        dropout_p: probability of dropping an entry of ``P``; 0 switches dropout off.
        seed: what the dropout mask follows from, the same mask on every backend: an int (modulo 2^64), or one int64 on
            the inputs' device. ``None`` draws from torch's generator. A CUDA graph replays an int as it was captured;
            ``None`` and a tensor that is written between replays give new masks.
        eps: added to the variance of the map; 0 adds nothing.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. ``auto`` takes ``triton`` on a GPU it runs on,
            and leaves float64 to ``composed``. Triton takes float32, float16 and bfloat16 and has no second derivative.
            In half precision, up to 256 tokens and with rows that start on 16 bytes, its forward forms no map. It keeps
            none for backward, which holds two maps of a few images at a time.

    Returns:
        (B, N, sum C) in the inputs' dtype, or autocast's.

    Raises:
        ValueError: shapes, devices, segments, ``dropout_p``, ``eps`` or ``backend`` do not fit; S and the width of a
            scale are both 1, for a map of one entry has no deviation to be divided by.
        TypeError: dtypes are mixed (under autocast: float64 with others) or none of float16, bfloat16, float32 and
            float64; ``segments`` or ``seed`` are not integers, ``dropout_p`` or ``eps`` not numbers.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.

    Source: UCTransNet (AAAI 2022), equations 1 to 3.
    """
    check_dtypes_and_devices(query=query, key=key, value=value)
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key must be (B, H, N, channels); got {tuple(query.shape)} and {tuple(key.shape)}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {tuple(key.shape)} and {tuple(value.shape)}")
    if query.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query and key must agree in batch, heads and tokens; got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    check_segments_type(segments)
    _check_widths("segments", segments, query.shape[-1], key.shape[3])
    check_sizes(tokens=query.shape[2], heads=query.shape[1], key_channels=key.shape[3])
    _check_numbers(dropout_p, eps)
    form = choose_form(backend, query, "channel_attention")
    seed = _seed_tensor(seed, query.device)
    operands = (query, key, value, list(segments), dropout_p, eps)
    if form != "triton":
        return (reference if form == "reference" else composed).channel_attention(*operands, seed)
    if seed is None and dropout_p > 0:
        seed = draw_seed(query.device)
    return torch.ops.uctrans.channel_attention(*operands, seed)[0]


def projected_channel_attention(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_value_weight: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Project and apply :func:`channel_attention`, multiplying in the cheaper order.

    A program that ``torch.export`` traces (``strict=False``) with an open number of tokens holds one order for all of
    them, that of long sequences: its cost beyond the other's is bounded, where the other's grows with the tokens.

    Args:
        tokens: (B, N, sum C), normalised tokens of all scales, packed; the queries come from them.
        context: (B, N, S), the normalised concatenation; keys and values come from it.
        query_weights: one (H, C, C) a scale; ``query = tokens @ weight^T`` as in ``torch.nn.Linear``, without bias.
        key_value_weight: (2, H, S, S), the weights of the keys, then those of the values.
        dropout_p: see :func:`channel_attention`.
        seed: see :func:`channel_attention`.
        eps: see :func:`channel_attention`.
        backend: see :func:`channel_attention`. The order of long sequences is all matrix products, which ``triton``
            leaves to torch, as ``composed`` does.

    Returns:
        (B, N, sum C).

    Raises:
        ValueError: see :func:`channel_attention`.
        TypeError: see :func:`channel_attention`.
        NotImplementedError: see :func:`channel_attention`.
    """
    _check_projected(tokens, context, query_weights, key_value_weight)
    _check_numbers(dropout_p, eps)
    form = choose_form(backend, tokens, "projected_channel_attention")
    seed = _seed_tensor(seed, tokens.device)
    operands = (tokens, context, list(query_weights), key_value_weight, dropout_p, eps, seed)
    if form == "reference":
        return reference.projected_channel_attention(*operands)
    segments = [weight.shape[-1] for weight in query_weights]
    token_count, heads = tokens.shape[1], key_value_weight.shape[1]
    correlates = is_open(token_count) or correlating_is_cheaper(token_count, heads, segments, context.shape[-1])
    if torch.compiler.is_exporting() and form == "composed" and dropout_p == 0 and eps > 0:
        run = exported.correlate_then_attend if correlates else exported.project_then_attend
        return run(tokens, context, query_weights, key_value_weight, eps)
    if correlates:
        return composed.correlate_then_attend(*operands)
    if form == "composed":
        return composed.project_then_attend(*operands)
    # The three projections write what the operator reads, and it writes the gradients that they read: no copies.
    query = packed_linear(tokens, query_weights, backend="triton").transpose(1, 2)  # [B, H, N, sum C]
    key_value = F.linear(context, key_value_weight.flatten(0, 2)).unflatten(-1, key_value_weight.shape[:3])
    if seed is None and dropout_p > 0:
        seed = draw_seed(tokens.device)
    return torch.ops.uctrans.channel_attention_packed(query, key_value, segments, dropout_p, eps, seed)[0]


def projected_attention_maps(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_value_weight: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> list[Tensor]:
    """Return the softmax maps that :func:`projected_channel_attention` mixes with: one (B, C, S) a scale.

    They are means over heads, before dropout. Arguments and errors are those of :func:`projected_channel_attention`;
    ``triton`` and ``composed`` are the same here, also in float64.
    """
    _check_projected(tokens, context, query_weights, key_value_weight)
    _check_numbers(dropout_p=0.0, eps=eps)
    implementation = reference if resolve_backend(backend, tokens.device) == "reference" else composed
    return implementation.projected_attention_maps(tokens, context, list(query_weights), key_value_weight[0], eps)


def correlating_is_cheaper(tokens: int, heads: int, segments: Sequence[int], key_channels: int) -> bool:
    """Return whether multiplying the tokens with each other first takes fewer multiplications than projecting first."""
    return tokens >= fewest_tokens_to_correlate(heads, segments, key_channels)


def fewest_tokens_to_correlate(heads: int, segments: Sequence[int], key_channels: int) -> int:
    """Return the least number of tokens for which it is cheaper to multiply them with each other before anything else.

    Both orders hold the same maps, so only matrix products count. With 4 heads and channels (64, 128, 256, 512) the
    balance tips at 589 tokens, a 400-pixel image under 16-pixel patches.
    """
    query_channels = sum(segments)
    query_projection = heads * sum(width * width for width in segments)
    key_projection = heads * key_channels * key_channels
    score_product = heads * query_channels * key_channels
    projecting_a_token = query_projection + 2 * key_projection + 2 * score_product
    correlating_a_token = 2 * query_channels * key_channels  # the correlation, and the last product with the tokens
    correlating_at_all = (
        query_projection * key_channels
        + 2 * score_product * key_channels  # key weights before the softmax, value weights after it
    )
    return correlating_at_all // (projecting_a_token - correlating_a_token) + 1


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    if seed is None:
        return None
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:  # torch.seed() returns up to 2^64 - 1
            seed = (seed + 2**63) % 2**64 - 2**63
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        given = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed must be an int, a tensor of one int64, or None; got {given}")
    if seed.numel() != 1 or seed.device != device:
        raise ValueError(f"seed must be one int64 on {device}; got {tuple(seed.shape)} on {seed.device}")
    return seed.reshape(1)


def _check_projected(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_value_weight: Tensor
) -> None:
    check_tensor_lists(query_weights=query_weights)
    named_weights = {f"query_weights[{scale}]": weight for scale, weight in enumerate(query_weights)}
    check_dtypes_and_devices(tokens=tokens, context=context, key_value_weight=key_value_weight, **named_weights)
    if tokens.ndim != 3 or context.ndim != 3 or tokens.shape[:2] != context.shape[:2]:
        raise ValueError(
            f"tokens and context must be (B, N, channels) over the same B and N; "
            f"got {tuple(tokens.shape)} and {tuple(context.shape)}"
        )
    shape, key_channels = tuple(key_value_weight.shape), context.shape[-1]
    if len(shape) != 4 or shape[0] != 2 or shape[2:] != (key_channels, key_channels):
        raise ValueError(f"key_value_weight must be (2, H, S, S) with S = {key_channels}; got {shape}")
    heads = shape[1]
    for scale, weight in enumerate(query_weights):
        if weight.ndim != 3 or weight.shape[0] != heads or weight.shape[1] != weight.shape[2]:
            raise ValueError(f"query_weights[{scale}] must be (H, C, C) with H = {heads}; got {tuple(weight.shape)}")
    widths = [weight.shape[-1] for weight in query_weights]
    _check_widths("the widths of query_weights", widths, tokens.shape[-1], key_channels)
    check_sizes(tokens=tokens.shape[1], heads=heads, key_channels=key_channels)


def _check_widths(name: str, widths: Sequence[int], channels: int, key_channels: int) -> None:
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"{name} must be one positive width a scale; got {list(widths)}")
    if sum(widths) != channels:
        raise ValueError(f"{name} {list(widths)} add up to {sum(widths)}, but the packed axis has {channels}")
    if key_channels == 1 and any(width == 1 for width in widths):
        raise ValueError("a scale of one channel needs keys of more than one: a map of one entry has no deviation")


def _check_numbers(dropout_p: float, eps: float) -> None:
    check_numbers_type(dropout_p=dropout_p, eps=eps)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0; got {eps}")


SETTINGS = "SymInt[] segments, float dropout_p, float eps, Tensor? seed"
# For each row, the mean of the map that it belongs to and one over its standard deviation: (B, H, sum C) float32.
SAVED = "Tensor score_means, Tensor temperatures"
BACKWARD_SETTINGS = "Tensor? seed, SymInt[] segments, float dropout_p"


@register_operator(
    "channel_attention",
    f"(Tensor query, Tensor key, Tensor value, {SETTINGS}) -> (Tensor output, {SAVED})",
    launcher=f"{__package__}.triton:forward",
)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, channels = query.shape
    score_means, temperatures = (query.new_empty(batch, heads, channels, dtype=torch.float32) for _ in range(2))
    return query.new_empty(batch, tokens, channels), score_means, temperatures


@register_operator(
    "channel_attention_packed",
    f"(Tensor query, Tensor key_value, {SETTINGS}) -> (Tensor output, {SAVED})",
    launcher=f"{__package__}.triton:forward_packed",
)
def _fake_forward_packed(query: Tensor, key_value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(query, *key_and_value(key_value), *settings)


@register_operator(
    "channel_attention_backward",
    f"(Tensor gradient, Tensor query, Tensor key, Tensor value, {SAVED}, {BACKWARD_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor)",
    launcher=f"{__package__}.triton:backward",
    backward_of="channel_attention",
)
def _fake_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads_inside(query), empty_heads_inside(key), empty_heads_inside(value)


@register_operator(
    "channel_attention_packed_backward",
    f"(Tensor gradient, Tensor query, Tensor key_value, {SAVED}, {BACKWARD_SETTINGS}) -> (Tensor, Tensor)",
    launcher=f"{__package__}.triton:backward_packed",
    backward_of="channel_attention",
)
def _fake_backward_packed(gradient: Tensor, query: Tensor, key_value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_heads_inside(query), key_value.new_empty(key_value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, segments, dropout_p, _eps, seed = inputs
    _, *saved = output
    ctx.save_for_backward(*tensors, *saved, seed)
    ctx.settings = (segments, dropout_p)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _backward(operator: Any, ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * len(ctx.needs_input_grad)
    no_gradients = (None,) * 4  # segments, dropout_p, eps, seed
    return *operator(gradient, *ctx.saved_tensors, *ctx.settings), *no_gradients


for _name in ("channel_attention", "channel_attention_packed"):
    _backward_operator = getattr(torch.ops.uctrans, f"{_name}_backward")
    register_gradient(_name, _save_for_backward, partial(_backward, _backward_operator))
    cast_under_autocast(_name)
