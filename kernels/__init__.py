"""The operators of UCTransNet, usable alone: ``from uctrans.kernels import channel_attention, skip_gate``.

``uctrans.kernels.channel_attention`` is the function; the folder of the same name is imported from, as in ``from
uctrans.kernels.channel_attention import reference``.
"""

from .backend import BACKENDS, check_backend, resolve_backend
from .batch_norm_relu import batch_norm_relu, batch_norm_relu_pool
from .channel_attention import channel_attention, projected_attention_maps, projected_channel_attention
from .packed_layer_norm import cross_layer_norm, packed_layer_norm
from .packed_linear import packed_linear
from .packed_mlp import packed_mlp
from .segmentation_loss import segmentation_loss, segmentation_scores, segmentation_sums, segmentation_totals
from .skip_gate import skip_gate

__all__ = [
    "BACKENDS",
    "batch_norm_relu",
    "batch_norm_relu_pool",
    "channel_attention",
    "check_backend",
    "cross_layer_norm",
    "packed_layer_norm",
    "packed_linear",
    "packed_mlp",
    "projected_attention_maps",
    "projected_channel_attention",
    "resolve_backend",
    "segmentation_loss",
    "segmentation_scores",
    "segmentation_sums",
    "segmentation_totals",
    "skip_gate",
]
