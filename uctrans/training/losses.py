"""The loss of a run and the Dice score of validation, and their sums in an epoch.

Loss and score come from the same sums over pixels (:func:`uctrans.kernels.segmentation_sums`), so logits and masks are
read once. They are float32 (float64 for float64 logits) under autocast too, and never wait for the device.
"""

from collections.abc import Sequence

import torch

from .. import kernels
from ..data.instances import BOUNDARY_CLASSES, BOUNDARY_TARGET
from ..data.read import IGNORED
from .config import TrainConfig
from .distributed import Processes
from .own import NOTHING, Own


def loss_and_dice(
    logits: torch.Tensor,
    masks: torch.Tensor,
    *,
    dice_weight: float = 0.5,
    cross_entropy_weight: float = 0.5,
    totals: torch.Tensor | None = None,
    ignore_label: int | None = None,
    scored_classes: Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return :func:`uctrans.kernels.segmentation_loss` and :func:`image_dice` from one read of logits and masks."""
    sums, counts = kernels.segmentation_sums(logits, masks, ignore_label=ignore_label, backend=backend)
    if totals is None and ignore_label is not None:
        totals = kernels.segmentation_totals(masks, ignore_label=ignore_label)
    loss, dice = kernels.segmentation_scores(
        sums,
        counts,
        masks.shape[1] * masks.shape[2],
        totals=totals,
        dice_weight=dice_weight,
        cross_entropy_weight=cross_entropy_weight,
        backend=backend,
    )
    if scored_classes is not None:
        hits, predicted, actual = counts[:, :, list(scored_classes)]
        area = predicted + actual
        dice = torch.where(area > 0, 2 * hits / area, 1.0).mean(1)
    if ignore_label is not None:
        dice = dice.masked_fill((masks == ignore_label).flatten(1).all(1), torch.nan)
    return loss, dice


@torch.no_grad()
def image_dice(
    logits: torch.Tensor,
    masks: torch.Tensor,
    *,
    ignore_label: int | None = None,
    scored_classes: Sequence[int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the Dice score of each image, float32 (B,): probability above 0.5 (one class) or the largest logit.

    Args:
        logits: (B, classes, height, width).
        masks: bool or integer (B, height, width).
        ignore_label: pixels with this number in ``masks`` are not scored; an image of nothing else scores nan.
        scored_classes: classes to average over, such as those that some mask of the data has; by default the
            foreground classes.
        backend: implementation, see :func:`uctrans.kernels.segmentation_sums`.

    A class that neither mask nor prediction holds scores 1.

    Raises:
        ValueError: the shapes do not belong together.
        TypeError: the logits are not floating point, or the masks are floating point.
    """
    options = {"ignore_label": ignore_label, "scored_classes": scored_classes, "backend": backend}
    _loss, dice = loss_and_dice(logits, masks, **options)
    return dice


def scored_logits(logits: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Return the logits whose Dice is taken: for the target boundary those of the whole nucleus, (B, 1, H, W).

    A nucleus is everything but background; its mask is the labels above 0.
    """
    if config.target != BOUNDARY_TARGET:
        return logits
    logits = logits.float()
    background, nucleus = logits.split([1, BOUNDARY_CLASSES - 1], dim=1)
    return nucleus.logsumexp(1, keepdim=True) - background


def ignored_label(config: TrainConfig) -> int | None:
    """Return the label of ignored pixels in the masks of a run, or None if there are none."""
    return None if config.ignore_label is None else IGNORED


def configured_loss_and_dice(
    logits: torch.Tensor,
    masks: torch.Tensor,
    config: TrainConfig,
    totals: torch.Tensor | None = None,
    scored_classes: Sequence[int] | None = None,
    own: Own = NOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the caller's loss, or that with the weights of ``config``, a scalar, and the Dice of each image, (B,)."""
    options = {"ignore_label": ignored_label(config), "scored_classes": scored_classes, "backend": config.backend}
    if own.loss is not None:
        return own.loss_of(logits, masks), image_dice(scored_logits(logits.detach(), config), masks, **options)
    weights = {"dice_weight": config.dice_weight, "cross_entropy_weight": config.cross_entropy_weight}
    loss, dice = loss_and_dice(logits, masks, **weights, totals=totals, **options)
    if config.target == BOUNDARY_TARGET:
        dice = image_dice(scored_logits(logits.detach(), config), masks, **options)
    return loss, dice


class EpochTotals:
    """Sums of an epoch on the device: loss, Dice, images, steps; and the first step with a non-finite loss, or -1.

    With ``ignores``, images whose every pixel is ignored, which have no Dice, count in none of the sums.
    """

    NAMES = ("loss", "dice", "images", "steps", "first_bad")

    def __init__(self, device: torch.device, ignores: bool = False):
        self.ignores = ignores
        self.loss = torch.zeros((), device=device)
        self.dice = torch.zeros((), device=device)
        self.images = torch.zeros((), device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss: torch.Tensor, dice: torch.Tensor) -> None:
        """Add one step: its mean loss (scalar) and the Dice of each image (B,)."""
        if self.ignores:
            images = torch.isfinite(dice).sum()
            self.loss.addcmul_(loss, images)
            self.dice.add_(dice.nansum())
            self.images.add_(images)
        else:
            self.loss.add_(loss, alpha=len(dice))
            self.dice.add_(dice.sum())
            self.images.add_(len(dice))
        is_bad = loss - loss != 0  # two launches; torch.isfinite takes four
        torch.where(is_bad & (self.first_bad < 0), self.steps, self.first_bad, out=self.first_bad)
        self.steps.add_(1)

    def reset(self) -> None:
        """Start a new epoch, in place."""
        for name in self.NAMES:
            getattr(self, name).fill_(-1 if name == "first_bad" else 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sums as CPU tensors."""
        return {name: getattr(self, name).cpu() for name in self.NAMES}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the sums of a ``state_dict``."""
        for name in self.NAMES:
            getattr(self, name).copy_(state[name])

    def read(self, group: Processes) -> tuple[float, float]:
        """Return mean loss and mean Dice over all images of all processes. Waits for the device."""
        loss, dice, images = group.sum_(torch.stack([self.loss, self.dice, self.images])).tolist()
        return loss / images, dice / images
