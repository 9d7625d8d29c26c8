"""Skip gate: public function, checks, choice of the form, and registration.

``uctrans::skip_gate`` returns the output and the tensors that backward needs. Autocast leaves maps as they are: kernels
read any dtype, and the output's is an argument, so that nothing is cast in memory.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..backend import choose_form
from ..checks import check_dtypes_and_devices
from ..formats import empty_map, output_dtype
from ..registration import register_gradient, register_operator
from . import composed, reference

# Entries of the encoder's map, 256 KiB in float32, up to which the published steps are as fast as those of composed or
# up to 1.8 times as fast on a CPU: composed saves passes over maps, and takes more calls and autograd functions for it.
SMALL_MAP = 2**16


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
    form = choose_form(backend, encoder_feature, "skip_gate")
    if form != "triton":
        is_small = not torch.compiler.is_compiling() and encoder_feature.numel() <= SMALL_MAP
        return (reference if form == "reference" or is_small else composed).skip_gate(*arguments)
    # As in the published steps: under autocast the gate comes in autocast's dtype, and meets maps in theirs.
    maps = [feature for feature in (encoder_feature, tokens, decoder_feature) if feature is not None]
    dtype = reduce(torch.promote_types, (feature.dtype for feature in maps), output_dtype(encoder_feature))
    output, _gate, _means = torch.ops.uctrans.skip_gate(*arguments, dtype)
    return output


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
    """Raise ValueError unless ``coarse`` has the samples of ``encoder_feature``, and pixels that tile it."""
    batch = encoder_feature.shape[0]
    if coarse.ndim != 4 or coarse.shape[0] != batch or coarse.shape[1] == 0:
        raise ValueError(f"{name} must be (B, channels, height, width) with B = {batch}; got {tuple(coarse.shape)}")
    if any(side == 0 or full % side for full, side in zip(encoder_feature.shape[2:], coarse.shape[2:], strict=True)):
        raise ValueError(
            f"the grid of {name}, {tuple(coarse.shape[2:])}, does not tile encoder_feature, "
            f"{tuple(encoder_feature.shape[2:])}: each side must divide the feature's"
        )


@register_operator(
    "skip_gate",
    "(Tensor encoder_feature, Tensor? tokens, Tensor? decoder_feature, Tensor weight_skip, Tensor bias_skip, "
    "Tensor? weight_decoder, Tensor? bias_decoder, bool concatenate, ScalarType dtype) -> "
    "(Tensor output, Tensor gate, Tensor means)",
    launcher=f"{__package__}.triton:forward",
)
def _fake_forward(
    encoder_feature: Tensor, tokens: Tensor | None, decoder_feature: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, concatenate, dtype = arguments
    batch, channels, height, width = encoder_feature.shape
    columns = channels if decoder_feature is None else channels + decoder_feature.shape[1]
    output = empty_map(encoder_feature, columns if concatenate else channels, height, width, dtype)
    gate, means = (encoder_feature.new_empty(batch, size, dtype=torch.float32) for size in (channels, columns))
    return output, gate, means


@register_operator(
    "skip_gate_backward",
    "(Tensor gradient, Tensor encoder_feature, Tensor? tokens, Tensor weight_skip, Tensor? weight_decoder, "
    "Tensor gate, Tensor means, SymInt[] decoder_grid) -> Tensor[]",
    launcher=f"{__package__}.triton:backward",
    backward_of="skip_gate",
)
def _fake_backward(
    gradient: Tensor,
    encoder_feature: Tensor,
    tokens: Tensor | None,
    weight_skip: Tensor,
    weight_decoder: Tensor | None,
    gate: Tensor,
    means: Tensor,
    decoder_grid: list[int],
) -> list[Tensor]:
    maps = [encoder_feature] if tokens is None else [encoder_feature, tokens]
    gradients = [empty_map(feature, *feature.shape[1:], feature.dtype) for feature in maps]
    if decoder_grid:
        decoder_channels = means.shape[1] - gate.shape[1]
        gradients.append(empty_map(encoder_feature, decoder_channels, *decoder_grid, encoder_feature.dtype))
    weights = [weight_skip] if weight_decoder is None else [weight_skip, weight_decoder]
    return gradients + [weight.new_empty(size) for weight in weights for size in (weight.shape, weight.shape[:1])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    encoder_feature, tokens, decoder_feature, weight_skip, _, weight_decoder, *_ = inputs
    _, gate, means = output
    ctx.save_for_backward(encoder_feature, tokens, weight_skip, weight_decoder, gate, means)
    ctx.decoder_grid = [] if decoder_feature is None else list(decoder_feature.shape[2:])
    ctx.is_given = [isinstance(argument, Tensor) for argument in inputs]
    ctx.mark_non_differentiable(gate, means)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * len(ctx.is_given)
    gradients = iter(torch.ops.uctrans.skip_gate_backward(gradient, *ctx.saved_tensors, ctx.decoder_grid))
    return tuple(next(gradients) if is_given else None for is_given in ctx.is_given)


register_gradient("skip_gate", _save, _gradients)
