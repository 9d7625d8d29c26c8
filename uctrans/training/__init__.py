"""Training: configuration, losses, the loop with its step, checkpoints and logs."""

from ..kernels import segmentation_loss
from .checkpoint import CheckpointError, load_checkpoint
from .config import ConfigError, TrainConfig
from .log import TrainingError
from .loop import RunResult, train
from .losses import image_dice

__all__ = [
    "CheckpointError",
    "ConfigError",
    "RunResult",
    "TrainConfig",
    "TrainingError",
    "image_dice",
    "load_checkpoint",
    "segmentation_loss",
    "train",
]
