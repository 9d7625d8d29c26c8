"""UCTransNet for medical image segmentation, over fused channel-attention operators."""

from .layers import set_backend
from .models import (
    ModelFileError,
    SegmentationModel,
    UCTransNet,
    UNet,
    create_model,
    list_models,
    load_model,
    load_upstream,
    register_model,
    resize_positions,
    to_upstream,
)

__version__ = "0.1.0"

__all__ = [
    "ModelFileError",
    "SegmentationModel",
    "UCTransNet",
    "UNet",
    "__version__",
    "create_model",
    "list_models",
    "load_model",
    "load_upstream",
    "register_model",
    "resize_positions",
    "set_backend",
    "to_upstream",
]
