"""The public functions of channel attention: what they take, what they refuse, and which implementation runs."""

from collections.abc import Sequence

from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_dtypes_and_devices
from . import composed, reference


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Channel-wise cross attention with instance-normalised similarity over packed scales, mean over heads.

    Per sample, head and scale, with ``Q`` (N x C), ``K`` and ``V`` (N x S): ``X = Q^T K / sqrt(S)``, ``Z`` = instance
    norm of ``X`` over the whole C x S map, ``P`` = softmax of ``Z`` over S, and the output is ``dropout(P) V^T``.

    Args:
        query: (B, H, N, sum C), the scales packed side by side along the last axis.
        key: (B, H, N, S).
        value: (B, H, N, S).
        segments: width of each scale along the packed axis; they add up to ``query.shape[-1]``.
        dropout_p: probability of dropping an entry of ``P``, drawn from torch's generator; 0 switches dropout off.
        eps: added to the variance of the map.
        backend: ``auto``, ``composed`` or ``reference`` (``triton`` is not there yet).

    Returns:
        (B, N, sum C) in the inputs' dtype, any strides.

    Raises:
        ValueError: shapes, devices, segments, ``dropout_p`` or ``backend`` do not fit.
        TypeError: dtypes are mixed (outside autocast) or not floating point.
        NotImplementedError: the backend asked for cannot run.

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
    _check_segments(segments, query.shape[-1])
    _check_sizes(tokens=query.shape[2], heads=query.shape[1], key_channels=key.shape[3])
    _check_dropout(dropout_p)
    implementation = reference if resolve_backend(backend, query.device) == "reference" else composed
    return implementation.channel_attention(query, key, value, list(segments), dropout_p, eps)


def projected_channel_attention(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """:func:`channel_attention` with its three projections, free to multiply in the cheaper order.

    Args:
        tokens: (B, N, sum C), normalised tokens of all scales, packed; the queries come from them.
        context: (B, N, S), the normalised concatenation; keys and values come from it.
        query_weights: one (H, C, C) a scale; ``query = tokens @ weight^T`` as in ``torch.nn.Linear``, without bias.
        key_weight: (H, S, S).
        value_weight: (H, S, S).
        dropout_p: see :func:`channel_attention`.
        eps: see :func:`channel_attention`.
        backend: see :func:`channel_attention`.

    Returns:
        (B, N, sum C).

    Raises:
        ValueError: shapes, devices, ``dropout_p`` or ``backend`` do not fit.
        TypeError: dtypes are mixed (outside autocast) or not floating point.
        NotImplementedError: the backend asked for cannot run.
    """
    _check_projected(tokens, context, query_weights, key_weight, value_weight)
    _check_dropout(dropout_p)
    operands = (tokens, context, list(query_weights), key_weight, value_weight, dropout_p, eps)
    if resolve_backend(backend, tokens.device) == "reference":
        return reference.projected_channel_attention(*operands)
    widths = [weight.shape[-1] for weight in query_weights]
    if correlating_is_cheaper(tokens.shape[1], key_weight.shape[0], widths, context.shape[-1]):
        return composed.correlate_then_attend(*operands)
    return composed.project_then_attend(*operands)


def projected_attention_maps(
    tokens: Tensor,
    context: Tensor,
    query_weights: Sequence[Tensor],
    key_weight: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> list[Tensor]:
    """The softmax maps that :func:`projected_channel_attention` mixes with: one (B, C, S) a scale, mean over heads.

    Dropout is not applied. Arguments and errors are those of :func:`projected_channel_attention`.
    """
    _check_projected(tokens, context, query_weights, key_weight, key_weight)
    implementation = reference if resolve_backend(backend, tokens.device) == "reference" else composed
    return implementation.projected_attention_maps(tokens, context, list(query_weights), key_weight, eps)


def correlating_is_cheaper(tokens: int, heads: int, segments: Sequence[int], key_channels: int) -> bool:
    """Whether multiplying the tokens with each other first takes fewer multiplications than projecting them first.

    Both orders hold the same maps, so only matrix products count. With 4 heads and channels (64, 128, 256, 512) the
    balance tips at 589 tokens, a 400-pixel image under 16-pixel patches.
    """
    query_channels = sum(segments)
    query_projection = heads * sum(width * width for width in segments)
    key_projection = heads * key_channels * key_channels
    score_product = heads * query_channels * key_channels
    project_first = tokens * (query_projection + 2 * key_projection + 2 * score_product)
    correlate_first = (
        2 * tokens * query_channels * key_channels  # the correlation, and the last product with the tokens
        + query_projection * key_channels
        + 2 * score_product * key_channels  # key weights before the softmax, value weights after it
    )
    return correlate_first < project_first


def _check_projected(
    tokens: Tensor, context: Tensor, query_weights: Sequence[Tensor], key_weight: Tensor, value_weight: Tensor
) -> None:
    named_weights = {f"query_weights[{scale}]": weight for scale, weight in enumerate(query_weights)}
    named_weights |= {"key_weight": key_weight, "value_weight": value_weight}
    check_dtypes_and_devices(tokens=tokens, context=context, **named_weights)
    if tokens.ndim != 3 or context.ndim != 3 or tokens.shape[:2] != context.shape[:2]:
        raise ValueError(
            f"tokens and context must be (B, N, channels) over the same B and N; "
            f"got {tuple(tokens.shape)} and {tuple(context.shape)}"
        )
    heads, key_channels = key_weight.shape[0], context.shape[-1]
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        if tuple(weight.shape) != (heads, key_channels, key_channels):
            raise ValueError(f"{name} must be (H, S, S) with S = {key_channels}; got {tuple(weight.shape)}")
    for scale, weight in enumerate(query_weights):
        if weight.ndim != 3 or weight.shape[0] != heads or weight.shape[1] != weight.shape[2]:
            raise ValueError(f"query_weights[{scale}] must be (H, C, C) with H = {heads}; got {tuple(weight.shape)}")
    _check_segments([weight.shape[-1] for weight in query_weights], tokens.shape[-1])
    _check_sizes(tokens=tokens.shape[1], heads=heads, key_channels=key_channels)


def _check_segments(segments: Sequence[int], channels: int) -> None:
    if not segments or any(width < 1 for width in segments):
        raise ValueError(f"segments must be one positive width a scale; got {list(segments)}")
    if sum(segments) != channels:
        raise ValueError(f"segments {list(segments)} add up to {sum(segments)}, but the packed axis has {channels}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")


def _check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
