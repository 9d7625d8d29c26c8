"""The channel gate (CCA) between a skip feature and the decoder."""

from torch import Tensor, nn

from ..kernels import check_backend, skip_gate
from ..kernels.skip_gate.composed import gate_by_maps
from .arguments import check_counts
from .plain import is_plain_linear


class ChannelGate(nn.Module):
    """Weight the channels of a skip feature by a gate from skip and decoder, and concatenate the decoder feature.

    The operator computes the linear maps, too. One that was replaced, or has hooks or parametrisations, is called as a
    module, on every backend; the rest then runs as ``composed``.

    Args:
        skip_channels: width of the skip feature.
        decoder_channels: width of the decoder feature; ``None`` computes the gate from the skip alone.
        backend: see :func:`uctrans.kernels.resolve_backend`.
        concatenate: append the upsampled decoder feature to the gated skip; ``False`` returns the gated skip alone.

    Source: UCTransNet (AAAI 2022), channel-wise cross attention (CCA).
    """

    def __init__(
        self, skip_channels: int, decoder_channels: int | None, backend: str = "auto", *, concatenate: bool = True
    ):
        super().__init__()
        check_counts(skip_channels=skip_channels)
        if decoder_channels is not None:
            check_counts(decoder_channels=decoder_channels)
        self.skip = nn.Linear(skip_channels, skip_channels)
        self.decoder = None if decoder_channels is None else nn.Linear(decoder_channels, skip_channels)
        self.concatenate = concatenate
        self.backend = check_backend(backend)

    def forward(
        self, encoder_feature: Tensor, decoder_feature: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Return the gated skip and the upsampled decoder feature, (B, C + D, H, W).

        Args:
            encoder_feature: (B, C, H, W).
            decoder_feature: (B, D, H/q, W/q), or ``None`` if the gate has no ``decoder_channels``.
            tokens: (B, C, H/p, W/p), upsampled and added to the encoder feature first; ``None`` for nothing to add.

        Raises:
            ValueError: shapes or devices do not fit.
            TypeError: dtypes do not fit.
        """
        if decoder_feature is not None and self.decoder is None:
            raise ValueError(
                "decoder_feature: this gate was made for no decoder feature (decoder_channels=None); leave it out"
            )
        if decoder_feature is None and self.decoder is not None:
            raise ValueError("decoder_feature is missing: this gate was made for one (decoder_channels); give it")
        maps = [self.skip] if self.decoder is None else [self.skip, self.decoder]
        if not all(is_plain_linear(linear, has_bias=True) for linear in maps):
            return gate_by_maps(encoder_feature, tokens, decoder_feature, self.skip, self.decoder, self.concatenate)
        return skip_gate(
            encoder_feature,
            tokens,
            decoder_feature,
            self.skip.weight,
            self.skip.bias,
            None if self.decoder is None else self.decoder.weight,
            None if self.decoder is None else self.decoder.bias,
            concatenate=self.concatenate,
            backend=self.backend,
        )
