"""The networks, their registry and their files."""

from .base import ModelFileError, SegmentationModel
from .checkpoint import read_checkpoint
from .checkpointing import set_checkpointing
from .dual_branch import DualBranchUCTransNet
from .files import load_model
from .registry import create_model, list_models, register_model
from .uctransnet import UCTransNet
from .unet import UNet
from .upstream import load_upstream, resize_positions, to_upstream

__all__ = [
    "DualBranchUCTransNet",
    "ModelFileError",
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
    "set_checkpointing",
    "to_upstream",
]
