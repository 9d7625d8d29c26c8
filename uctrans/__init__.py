"""UCTransNet for medical image segmentation, built on fused channel-attention operators.

Names are imported on first use, so that ``uctrans.kernels`` and ``uctrans.layers`` can be imported without the models.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .layers import set_backend, set_checkpointing
    from .models import (
        DualBranchUCTransNet,
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

__all__ = [
    "DualBranchUCTransNet",
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
    "set_checkpointing",
    "to_upstream",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = "layers" if name in ("set_backend", "set_checkpointing") else "models"
    return getattr(importlib.import_module(f"{__name__}.{package}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
