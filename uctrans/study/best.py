"""The best run of each network of a study: the one with the best validation Dice. Test scores are never looked at."""

from dataclasses import dataclass
from pathlib import Path

from uctrans.models import ModelFileError
from uctrans.models.base import CONFIG_FILE, WEIGHTS_FILE, read_config
from uctrans.models.files import BEST_FOLDER
from uctrans.study.checks import anew
from uctrans.study.config import StudyConfig
from uctrans.study.files import Result
from uctrans.study.plan import PlannedRun, Variant
from uctrans.study.schedule import Schedule
from uctrans.training.log import read_metrics


@dataclass(frozen=True)
class BestRun:
    """The best run of a network, at the patience where it was best.

    Attributes:
        run: which.
        patience: where it was stopped.
        result: of it.
        validation_dice: for which it was chosen, as training measured it.
        peers: results of all runs of the network at this patience, its own among them.
        scored: number of runs of the network that it is the best of, at all patiences.
        failed: number of runs of the network that diverged.
        missing: number of runs of the network that are not over yet.
    """

    run: PlannedRun
    patience: int
    result: Result
    validation_dice: float
    peers: list[Result]
    scored: int
    failed: int
    missing: int

    @property
    def folder(self) -> Path:
        """What was kept of it; a folder that ``uctrans.load_model`` reads."""
        return self.run.at(self.patience)

    @property
    def weights(self) -> Path:
        """The folder of save_pretrained with its weights."""
        return self.folder / BEST_FOLDER

    @property
    def obstacle(self) -> str:
        """Why its weights cannot be used, with the remedy; "" where they can."""
        gone = [self.weights / name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (self.weights / name).exists()]
        return f"{gone[0]} is gone; {anew(self.run.folder)}" if gone else ""


def best_runs(config: StudyConfig, schedule: Schedule) -> dict[str, BestRun]:
    """The best run of every variant with results; a line is printed of one whose validation Dice was not kept."""
    found = {variant.name: _best_run(variant, config, schedule) for variant in config.variants()}
    return {name: best for name, best in found.items() if best is not None}


def _best_run(variant: Variant, config: StudyConfig, schedule: Schedule) -> BestRun | None:
    outcomes = [(run, schedule.of(run)) for run in schedule.plan if run.variant == variant]
    best: BestRun | None = None
    for patience in config.patiences:  # ascending: the smallest of those that came to the same weights
        peers = [(run, found.results[patience]) for run, found in outcomes if patience in found.results]
        for run, result in peers:
            dice = _validation_dice(run, patience, result)
            if dice is None:
                lost = f"{run.at(patience)} has lost its validation Dice"
                print(f"{variant.name}: no run is its best, {lost}; {anew(run.folder)}", flush=True)
                return None
            if best is None or dice > best.validation_dice:
                best = BestRun(
                    run,
                    patience,
                    result,
                    dice,
                    peers=[each for _, each in peers],
                    scored=sum(bool(found.results) for _, found in outcomes),
                    failed=sum(found.failure is not None for _, found in outcomes),
                    missing=sum(not found.is_over for _, found in outcomes),
                )
    return best


def _validation_dice(run: PlannedRun, patience: int, result: Result) -> float | None:
    """As it is kept with the weights, or else in the log of the training; None where both are lost."""
    try:
        dice = read_config(run.at(patience) / BEST_FOLDER).get("metadata", {}).get("best_dice")
    except ModelFileError:
        dice = None
    if dice is not None:
        return dice
    rows = read_metrics((run.trained_by or run).folder / "metrics.csv")
    return next((row["val_dice"] for row in rows if row["epoch"] == result.best_epoch), None)
