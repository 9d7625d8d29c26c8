"""Loss and Dice of segmentations: their sums over pixels in one read of logits and masks, and what is made of them."""

from .operator import segmentation_loss, segmentation_scores, segmentation_sums, segmentation_totals

__all__ = ["segmentation_loss", "segmentation_scores", "segmentation_sums", "segmentation_totals"]
