"""The public function of the skip path: what it takes, what it refuses, and which implementation runs."""

from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_dtypes_and_devices
from . import composed, reference


def skip_gate(
    encoder_feature: Tensor,
    tokens: Tensor | None,
    decoder_feature: Tensor,
    weight_skip: Tensor,
    bias_skip: Tensor,
    weight_decoder: Tensor,
    bias_decoder: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Add upsampled tokens to an encoder feature, gate its channels, and concatenate the upsampled decoder feature.

    With ``x = encoder_feature + up(tokens)`` and ``d = up(decoder_feature)`` (nearest neighbour, ``gap`` the mean over
    height and width): ``s = sigmoid((L_skip gap(x) + L_decoder gap(d)) / 2)``, and the result is ``[relu(s x), d]``.

    Args:
        encoder_feature: (B, C, H, W).
        tokens: (B, C, H/p, W/p), reconstructed tokens at any resolution that divides the feature's; ``None`` leaves the
            plain channel gate.
        decoder_feature: (B, D, H/q, W/q).
        weight_skip: (C, C).
        bias_skip: (C,).
        weight_decoder: (C, D).
        bias_decoder: (C,).
        backend: ``auto``, ``composed`` or ``reference`` (``triton`` is not there yet).

    Returns:
        (B, C + D, H, W).

    Raises:
        ValueError: shapes, grids or devices do not fit.
        TypeError: dtypes are mixed (outside autocast) or not floating point.
        NotImplementedError: the backend asked for cannot run.

    Source: UCTransNet (AAAI 2022), channel-wise cross attention (CCA).
    """
    tensors = {
        "encoder_feature": encoder_feature,
        "tokens": tokens,
        "decoder_feature": decoder_feature,
        "weight_skip": weight_skip,
        "bias_skip": bias_skip,
        "weight_decoder": weight_decoder,
        "bias_decoder": bias_decoder,
    }
    check_dtypes_and_devices(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    _check_feature(encoder_feature, tokens, "tokens")
    _check_feature(encoder_feature, decoder_feature, "decoder_feature")
    channels, decoder_channels = encoder_feature.shape[1], decoder_feature.shape[1]
    if tokens is not None and tokens.shape[1] != channels:
        raise ValueError(f"tokens have {tokens.shape[1]} channels, encoder_feature has {channels}")
    expected_shapes = {
        "weight_skip": (channels, channels),
        "bias_skip": (channels,),
        "weight_decoder": (channels, decoder_channels),
        "bias_decoder": (channels,),
    }
    for name, shape in expected_shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(tensors[name].shape)}")
    if backend == "triton":
        raise NotImplementedError("skip_gate has no Triton operator yet; use backend='composed' or 'auto'")
    implementation = reference if resolve_backend(backend, encoder_feature.device) == "reference" else composed
    return implementation.skip_gate(
        encoder_feature, tokens, decoder_feature, weight_skip, bias_skip, weight_decoder, bias_decoder
    )


def _check_feature(encoder_feature: Tensor, other: Tensor | None, name: str) -> None:
    if encoder_feature.ndim != 4:
        raise ValueError(f"encoder_feature must be (B, C, H, W); got {tuple(encoder_feature.shape)}")
    if other is None:
        return
    if other.ndim != 4 or other.shape[0] != encoder_feature.shape[0]:
        raise ValueError(
            f"{name} must be (B, channels, height, width) with B = {encoder_feature.shape[0]}; got {tuple(other.shape)}"
        )
    for axis in (2, 3):
        if other.shape[axis] == 0 or encoder_feature.shape[axis] % other.shape[axis]:
            raise ValueError(
                f"the grid of {name}, {tuple(other.shape[2:])}, does not tile encoder_feature, "
                f"{tuple(encoder_feature.shape[2:])}: each side must divide the feature's"
            )
