"""The networks, their registry and their files."""

from .base import SegmentationModel
from .dual_branch import DualBranchUCTransNet
from .external import ExternalModel, NetworkError
from .files import load_model
from .published import load_upstream, to_upstream
from .registry import create_model, list_models, register_model
from .uctransnet import UCTransNet, resize_positions
from .unet import UNet
from .weights import ModelFileError, read_checkpoint

__all__ = [
    "DualBranchUCTransNet",
    "ExternalModel",
    "ModelFileError",
    "NetworkError",
    "SegmentationModel",
    "UCTransNet",
    "UNet",
    "create_model",
    "list_models",
    "load_model",
    "load_upstream",
    "read_checkpoint",
    "register_model",
    "resize_positions",
    "to_upstream",
]
