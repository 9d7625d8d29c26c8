"""The public function of the skip path: what it takes, what it refuses, and which implementation runs."""

from functools import reduce

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_dtypes_and_devices
from ..formats import output_dtype
from . import composed, dispatch, reference  # noqa: F401 (dispatch registers the operator)


def skip_gate(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None = None,
    bias_decoder: Tensor | None = None,
    *,
    concatenate: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Add upsampled tokens to an encoder feature, gate its channels, and concatenate the upsampled decoder feature.

    With ``x = encoder_feature + up(tokens)`` and ``d = up(decoder_feature)`` (nearest neighbour, ``gap`` the mean over
    height and width): ``s = sigmoid((L_skip gap(x) + L_decoder gap(d)) / 2)``, and the result is ``[relu(s x), d]``.

    Args:
        encoder_feature: (B, C, H, W), of any height and width, contiguous or channels-last.
        tokens: (B, C, H/p, W/p), reconstructed tokens at any resolution that divides the feature's; ``None`` leaves the
            plain channel gate.
        decoder_feature: (B, D, H/q, W/q), of any resolution that divides the feature's; ``None``, with no weights
            either, leaves a gate by the skip alone, and nothing to concatenate.
        weight_skip: (C, C).
        bias_skip: (C,).
        weight_decoder: (C, D).
        bias_decoder: (C,).
        concatenate: ``False`` returns ``relu(s x)`` alone.
        backend: ``auto``, ``triton``, ``composed`` or ``reference``. Triton takes float32, float16 and bfloat16,
            computes in float32 and has no second derivative; ``auto`` leaves float64 to ``composed``.

    Returns:
        (B, C + D, H, W), or (B, C, H, W) without a decoder half, in the maps' dtype; under autocast in the widest of
        theirs and autocast's.

    Raises:
        ValueError: shapes, grids or devices do not fit, or part of the decoder's arguments is missing.
        TypeError: dtypes are mixed (outside autocast) or not floating point.
        NotImplementedError: the backend asked for cannot run, or a gradient of a gradient is asked of ``triton``.

    Source: UCTransNet (AAAI 2022), channel-wise cross attention (CCA).
    """
    _check(encoder_feature, tokens, decoder_feature, weight_skip, bias_skip, weight_decoder, bias_decoder)
    arguments = (
        encoder_feature,
        tokens,
        decoder_feature,
        weight_skip,
        bias_skip,
        weight_decoder,
        bias_decoder,
        concatenate,
    )
    chosen = _resolve(backend, encoder_feature)
    if chosen == "triton":
        # As in the published steps: under autocast the gate comes in autocast's dtype, and meets maps in theirs.
        maps = [feature for feature in (encoder_feature, tokens, decoder_feature) if feature is not None]
        dtype = reduce(torch.promote_types, (feature.dtype for feature in maps), output_dtype(encoder_feature))
        output, _gate, _means = torch.ops.uctrans.skip_gate(*arguments, dtype)
        return output
    return (reference if chosen == "reference" else composed).skip_gate(*arguments)


def _resolve(backend: str, encoder_feature: Tensor) -> str:
    chosen = resolve_backend(backend, encoder_feature.device)
    if chosen == "triton" and encoder_feature.dtype == torch.float64:
        if backend == "triton":
            raise NotImplementedError("the Triton skip path computes in float32; use backend='composed'")
        return "composed"
    return chosen


def _check(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor | None,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor | None,
    bias_decoder: Tensor | None,
) -> None:
    decoder = {
        "decoder_feature": decoder_feature,
        "weight_decoder": weight_decoder,
        "bias_decoder": bias_decoder,
    }
    missing = [name for name, tensor in decoder.items() if tensor is None]
    if missing and len(missing) < len(decoder):
        raise ValueError(f"{', '.join(decoder)} belong together: give all or none; missing: {', '.join(missing)}")
    tensors = {"encoder_feature": encoder_feature, "tokens": tokens, "weight_skip": weight_skip, "bias_skip": bias_skip}
    tensors = {name: tensor for name, tensor in (tensors | decoder).items() if tensor is not None}
    check_dtypes_and_devices(**tensors)
    if encoder_feature.ndim != 4 or 0 in encoder_feature.shape[1:]:
        raise ValueError(f"encoder_feature must be (B, C, H, W), only B may be 0; got {tuple(encoder_feature.shape)}")
    for name in ("tokens", "decoder_feature"):
        if name in tensors:
            _check_grid(encoder_feature, tensors[name], name)
    channels = encoder_feature.shape[1]
    if tokens is not None and tokens.shape[1] != channels:
        raise ValueError(f"tokens have {tokens.shape[1]} channels, encoder_feature has {channels}")
    expected_shapes = {"weight_skip": (channels, channels), "bias_skip": (channels,), "bias_decoder": (channels,)}
    if decoder_feature is not None:
        expected_shapes["weight_decoder"] = (channels, decoder_feature.shape[1])
    for name, shape in expected_shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(tensors[name].shape)}")


def _check_grid(encoder_feature: Tensor, coarse: Tensor, name: str) -> None:
    """``coarse`` must have the samples of ``encoder_feature``, and pixels that tile it."""
    batch = encoder_feature.shape[0]
    if coarse.ndim != 4 or coarse.shape[0] != batch or coarse.shape[1] == 0:
        raise ValueError(f"{name} must be (B, channels, height, width) with B = {batch}; got {tuple(coarse.shape)}")
    if any(side == 0 or full % side for full, side in zip(encoder_feature.shape[2:], coarse.shape[2:], strict=True)):
        raise ValueError(
            f"the grid of {name}, {tuple(coarse.shape[2:])}, does not tile encoder_feature, "
            f"{tuple(encoder_feature.shape[2:])}: each side must divide the feature's"
        )
