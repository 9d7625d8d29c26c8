"""The sums over pixels that segmentation losses and Dice scores are made of, in one read of logits and masks."""

from .operator import segmentation_scores, segmentation_sums

__all__ = ["segmentation_scores", "segmentation_sums"]
