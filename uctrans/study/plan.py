"""The runs of a study: of which network, with which seed, on which fold, and where each is kept."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uctrans.training import TrainConfig

RUNS_FOLDER = "runs"


@dataclass(frozen=True)
class Variant:
    """One of the networks, or of the ways to train one, that a study compares.

    Attributes:
        name: what the table calls it, and its folder.
        model: registry name.
        options: arguments of the network beside those that every training sets.
        from_unet: whether it starts from the U-Net of the same seed and fold.
        changes: settings of training and scoring in which it differs from the study.
        trained_as: the variant whose training is its own too, where the two differ in scoring alone.
    """

    name: str
    model: str
    options: dict[str, Any]
    from_unet: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    trained_as: str | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One training of a study, which is scored wherever one of the patiences would have stopped it.

    Attributes:
        variant: which network.
        seed: of the training.
        fold: it trains on, None without cross-validation.
        config: the training, with the smallest of the patiences.
        patiences: ascending.
        scored: the settings that its scores depend on beside those of the training.
        starts_from: the run of the U-Net that it starts from.
        trained_by: the run that trains for it too, and that it only scores otherwise.
    """

    variant: Variant
    seed: int
    fold: int | None
    config: TrainConfig
    patiences: tuple[int, ...]
    scored: dict[str, str]
    starts_from: "PlannedRun | None" = None
    trained_by: "PlannedRun | None" = None

    @property
    def comes_after(self) -> "PlannedRun | None":
        """The run that must be over before it can begin."""
        return self.starts_from or self.trained_by

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.output)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.variant.name}, {self.label}"

    @property
    def label(self) -> str:
        """Seed and fold in words."""
        return f"seed {self.seed}" + ("" if self.fold is None else f", fold {self.fold}")

    def at(self, patience: int) -> Path:
        """Where the weights and scores of a patience are kept; a folder that ``uctrans.load_model`` reads."""
        return self.folder / f"patience_{patience}"


def variant_folder(output: str | Path, variant: Variant) -> Path:
    """Where a study keeps the runs of a variant."""
    return Path(output) / RUNS_FOLDER / variant.name


def seed_folder(output: str | Path, variant: Variant, seed: int) -> Path:
    """Where a study keeps the run of a variant with a seed, or one for each fold."""
    return variant_folder(output, variant) / f"seed_{seed}"


def fold_folder(seed: Path, fold: int | None) -> Path:
    """The run folder of a fold in that of its seed, which it is itself without folds."""
    return seed if fold is None else seed / f"fold_{fold}"
