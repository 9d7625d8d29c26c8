"""Training: configuration, losses, the training step, the loop, checkpoints and logs."""

from uctrans.training.checkpoint import load_checkpoint
from uctrans.training.config import TrainConfig
from uctrans.training.errors import CheckpointError, ConfigError, TrainingError
from uctrans.training.loop import RunResult, train
from uctrans.training.losses import image_dice, segmentation_loss

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
