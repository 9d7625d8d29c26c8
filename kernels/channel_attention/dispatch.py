"""Channel attention as operators of torch: which code runs on which device, shapes without data, gradients, autocast.

Two operators share everything but how key and value come. ``uctrans::channel_attention`` takes them as two tensors;
``uctrans::channel_attention_packed`` takes both in one, as one projection writes them, and returns one gradient, so
that no copy cuts them apart or puts them together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import is_interpreting
from ..formats import statistics_dtype
from ..registration import cast_under_autocast, define_gradient, define_operator, refuse_double_backward
from . import explicit
from .explicit import Saved

SETTINGS = "SymInt[] segments, float dropout_p, float eps"
SAVED = ", ".join(f"Tensor {name}" for name in Saved._fields)

# Tokens that the registers of one program hold. Beyond them a map is small beside the products that make it, and the
# operator forms it, one head at a time, with the matrix products of torch. Half precision with aligned rows goes
# further in forward, where there is one accumulator and not two.
LONGEST_FUSED = 256
LONGEST_FUSED_FORWARD = 640
ALIGNMENT = 16  # bytes that one thread reads at once
MOST_HEADS = 65535  # of all images together: the grid's limit


def has_aligned_rows(*tensors: Tensor) -> bool:
    """Whether the channels of every token lie next to each other and start on 16 bytes, in all of ``tensors``."""
    return all(
        tensor.stride(-1) == 1
        and all(
            offset * tensor.itemsize % ALIGNMENT == 0 for offset in (tensor.storage_offset(), *tensor.stride()[:-1])
        )
        for tensor in tensors
    )


def longest_fused_forward(query: Tensor, key: Tensor, value: Tensor) -> int:
    """The most tokens for which a kernel computes the output, at least :data:`LONGEST_FUSED`."""
    goes_further = query.dtype != torch.float32 and has_aligned_rows(query, key, value)
    return LONGEST_FUSED_FORWARD if goes_further else LONGEST_FUSED


def is_fused_forward(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel computes the output."""
    return can_launch(query) and query.shape[2] <= longest_fused_forward(query, key, value)


def is_fused_backward(query: Tensor) -> bool:
    """Whether kernels compute the gradients."""
    return can_launch(query) and query.shape[2] <= LONGEST_FUSED


def can_launch(query: Tensor) -> bool:
    """Whether kernels run here: on a GPU or in the interpreter, in a dtype and for so many heads as they hold."""
    has_place = query.is_cuda or is_interpreting()
    return has_place and query.dtype != torch.float64 and query.shape[0] * query.shape[1] <= MOST_HEADS


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    implementation = explicit
    if is_fused_forward(query, key, value):
        from . import triton as implementation  # not at the top: it needs the package triton
    with torch.cuda.device_of(query):
        output, saved = implementation.forward(query, key, value, segments, dropout_p, eps, seed)
    return output, *(saved if is_fused_backward(query) else saved.without_what_kernels_read())


def _forward_packed(query: Tensor, key_value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _forward(query, *_key_and_value(key_value), *arguments)


def _backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = _empty_heads_inside(query), _empty_heads_inside(key), _empty_heads_inside(value)
    _write_gradients(gradient, query, key, value, rest, grad_query, grad_key, grad_value)
    return grad_query, grad_key, grad_value


def _backward_packed(gradient: Tensor, query: Tensor, key_value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_query, grad_key_value = _empty_heads_inside(query), key_value.new_empty(key_value.shape)
    key, value = _key_and_value(key_value)
    _write_gradients(gradient, query, key, value, rest, grad_query, *_key_and_value(grad_key_value))
    return grad_query, grad_key_value


def _write_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, rest: Sequence[Any], *results: Tensor
) -> None:
    *saved, segments, dropout_p = rest
    if is_fused_backward(query):
        from . import triton

        with torch.cuda.device_of(query):
            triton.backward(gradient, query, key, value, Saved(*saved), segments, dropout_p, *results)
        return
    computed = explicit.backward(gradient, query, key, value, Saved(*saved), segments, dropout_p)
    for result, tensor in zip(results, computed, strict=True):
        result.copy_(tensor)


def _key_and_value(key_value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, 2, H, S) -> two views (B, H, N, S)."""
    key, value = key_value.transpose(1, 3).unbind(2)
    return key, value


def _empty_heads_inside(tensor: Tensor) -> Tensor:
    """Like (B, H, N, C), laid out as (B, N, H, C): how projections write their results and read their gradients."""
    batch, heads, tokens, channels = tensor.shape
    return tensor.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    batch, heads, tokens, channels = query.shape
    _, dropout_p, _, _ = arguments
    exact = statistics_dtype(query)
    saved = Saved(
        head_outputs=query.new_empty(batch, heads, tokens, channels),
        temperatures=query.new_empty(batch, heads, channels, dtype=exact),
        log_sums=query.new_empty(batch, heads, channels, dtype=exact),
        query_token_means=query.new_empty(batch, heads, channels, dtype=exact),
        key_token_means=query.new_empty(batch, heads, key.shape[-1], dtype=exact),
        key_gram=query.new_empty(batch, heads, tokens + 1, tokens + 1, dtype=explicit.gram_dtype(query.dtype)),
        key_means=query.new_empty(batch, heads, tokens + 1, dtype=exact),
        row_keys=query.new_empty((2, batch, heads, channels) if dropout_p > 0 else 0, dtype=torch.int32),
    )
    if not is_fused_backward(query):
        saved = saved.without_what_kernels_read()
    return query.new_empty(batch, tokens, channels), *saved


def _fake_forward_packed(query: Tensor, key_value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_forward(query, *_key_and_value(key_value), *arguments)


def _fake_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads_inside(query), _empty_heads_inside(key), _empty_heads_inside(value)


def _fake_backward_packed(gradient: Tensor, query: Tensor, key_value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_heads_inside(query), key_value.new_empty(key_value.shape)


def _define(name: str, inputs: Sequence[str], functions: dict[str, Any]) -> None:
    """Define ``uctrans::name`` and its backward; ``inputs`` are the differentiable ones."""
    tensors = ", ".join(f"Tensor {tensor}" for tensor in inputs)
    define_operator(
        name,
        f"({tensors}, {SETTINGS}, Tensor? seed) -> (Tensor output, {SAVED})",
        implementations=dict.fromkeys(("CPU", "CUDA"), functions["forward"]),
        fake=functions["fake_forward"],
    )
    define_operator(
        f"{name}_backward",
        f"(Tensor gradient, {tensors}, {SAVED}, SymInt[] segments, float dropout_p) -> "
        f"({', '.join(['Tensor'] * len(inputs))})",
        implementations=dict.fromkeys(("CPU", "CUDA"), functions["backward"]),
        fake=functions["fake_backward"],
    )
    backward_operator = getattr(torch.ops.uctrans, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, segments, dropout_p, _eps, _seed = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.settings = (segments, dropout_p)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        no_gradients = (None,) * 4  # segments, dropout_p, eps, seed
        if gradient is None:
            return (None,) * len(inputs) + no_gradients
        return (*backward_operator(gradient, *ctx.saved_tensors, *ctx.settings), *no_gradients)

    define_gradient(name, setup_context, backward)
    refuse_double_backward(f"{name}_backward", "channel_attention")
    cast_under_autocast(name)


_define(
    "channel_attention",
    ("query", "key", "value"),
    {
        "forward": _forward,
        "fake_forward": _fake_forward,
        "backward": _backward,
        "fake_backward": _fake_backward,
    },
)
_define(
    "channel_attention_packed",
    ("query", "key_value"),
    {
        "forward": _forward_packed,
        "fake_forward": _fake_forward_packed,
        "backward": _backward_packed,
        "fake_backward": _fake_backward_packed,
    },
)
