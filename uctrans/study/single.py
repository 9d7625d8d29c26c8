"""One run of a study: train it to each of its patiences in turn, keep the best weights there, and score them."""

import dataclasses
import inspect
import os
import shutil
import time
from pathlib import Path
from typing import Any

from uctrans.inference import EvaluateConfig, EvaluationResult, evaluate
from uctrans.models import ModelFileError
from uctrans.models.files import BEST_FOLDER
from uctrans.models.registry import model_class
from uctrans.study.checks import anew
from uctrans.study.config import StudyConfig, StudyError
from uctrans.study.files import FAILURE, RESULT, Failure, Result, outcome, write_record
from uctrans.study.plan import PlannedRun
from uctrans.training import RunResult, TrainConfig, TrainingError, load_checkpoint, train
from uctrans.training.checkpoint import save_checkpoint
from uctrans.training.log import read_metrics

CHECKPOINTS = ("last.pt", "best.pt")
SCORED = {"test": "test", "val": "validation"}  # split: its folder
ENDS = ("epochs", "early stopping")
PLACED_BY_THE_STUDY = ("data", "compile", "folds", "init_from")  # free in a study, though train keeps them


def train_and_score(run: PlannedRun, config: StudyConfig, stop_at: float | None = None) -> str:
    """Write the results or the failure of a run, going on with what is there.

    Returns:
        "", or what stopped the training before its end, see ``RunResult``; it is saved then.

    Raises:
        StudyError: a file of the run is damaged.
        ConfigError, DataError, CheckpointError, TrainingError: as for ``uctrans.training.train``, but for a training
            that diverges.
    """
    if run.starts_from is not None and (unet := outcome(run.starts_from).failure):
        reason = f"the U-Net that it starts from failed, {unet.finding}"
        write_record(run.folder / FAILURE, Failure(run.variant.name, run.seed, reason))
        return ""
    if run.trained_by is not None:
        _score_otherwise(run, config)
        return ""
    for patience in run.patiences:
        if (run.at(patience) / RESULT).exists():
            continue
        try:
            trained = train(dataclasses.replace(_begun_or_interrupted(run), patience=patience), stop_at=stop_at)
        except TrainingError as error:
            if error.__cause__ is not None:  # a file or the device, which would fail the other runs too
                raise
            write_record(run.folder / FAILURE, Failure(run.variant.name, run.seed, str(error)))
            return ""
        if trained.stopped_by not in ENDS:
            return trained.stopped_by
        _keep_best_weights(run.folder, run.at(patience))
        write_record(run.at(patience) / RESULT, _result(run, patience, config, trained))
    if not config.keep_checkpoints:
        for name in CHECKPOINTS:
            (run.folder / name).unlink(missing_ok=True)
    return ""


def score(model: str, run: PlannedRun, config: StudyConfig, folder: Path, split: str = "test") -> EvaluationResult:
    """Evaluate the weights of a run, or several as a,b, on the test or validation images, into ``folder``.

    Raises:
        StudyError: the weights cannot be read.
        DataError: as for ``uctrans.inference.evaluate``.
    """
    try:
        return evaluate(evaluation(model, run, config, folder, split))
    except ModelFileError as error:
        raise StudyError(f"{run.folder}: its best weights cannot be read; {anew(run.folder)} ({error})") from error


def evaluation(model: str, run: PlannedRun, config: StudyConfig, folder: Path, split: str = "test") -> EvaluateConfig:
    """How the weights of a run are evaluated, into ``folder``."""
    has_backends = "backend" in inspect.signature(model_class(run.variant.model)).parameters
    return EvaluateConfig(
        model=model,
        data=run.config.data,
        output=str(folder),
        split=split,
        folds=run.config.folds,
        fold=run.config.fold,
        size=run.scored["score_size"],
        resolution=run.scored["score_resolution"],
        tta=run.scored["score_tta"],
        batch_size=config.batch_size,
        backend=config.backend if has_backends else "auto",
        device=config.device,
        overwrite=True,
        progress=config.progress,
    )


def seconds_trained(run: PlannedRun) -> float:
    """How long a run has trained, in all calls together."""
    return sum(row["seconds"] for row in read_metrics(run.folder / "metrics.csv"))


def _begun_or_interrupted(run: PlannedRun) -> TrainConfig:
    """The configuration that begins a run or goes on with it, also where its data lie in another folder now."""
    path = run.folder / "last.pt"
    if not path.exists():
        return run.config
    checkpoint, now = load_checkpoint(path), run.config.to_dict()
    placed = {name: now[name] for name in PLACED_BY_THE_STUDY}
    if checkpoint["train_config"] | placed != checkpoint["train_config"]:
        checkpoint["train_config"] |= placed
        save_checkpoint(path, checkpoint)
    # A training that ended before its scores were written goes on too, and ends at once.
    return dataclasses.replace(run.config, resume=True)


def _score_otherwise(run: PlannedRun, config: StudyConfig) -> None:
    """Score the weights of the run that trained for this one, at each patience that it has results at."""
    scored = outcome(run).results
    for patience, result in outcome(run.trained_by).results.items():
        if patience in scored:
            continue
        (run.at(patience) / RESULT).unlink(missing_ok=True)  # of weights that are replaced now
        _keep_best_weights(run.trained_by.at(patience), run.at(patience))
        started = time.perf_counter()
        scores = _scores(run, patience, config)
        seconds = time.perf_counter() - started
        write_record(
            run.at(patience) / RESULT, dataclasses.replace(result, variant=run.variant.name, seconds=seconds, **scores)
        )


def _keep_best_weights(source: Path, folder: Path) -> None:
    """Keep what a larger patience may replace. Training writes new files and leaves the old ones as they are."""
    target = folder / BEST_FOLDER
    shutil.rmtree(target, ignore_errors=True)  # of a call that was stopped here
    shutil.copytree(source / BEST_FOLDER, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _result(run: PlannedRun, patience: int, config: StudyConfig, trained: RunResult) -> Result:
    started = time.perf_counter()
    scores = _scores(run, patience, config)
    return Result(
        variant=run.variant.name,
        seed=run.seed,
        best_epoch=trained.best_epoch,
        epochs=trained.epochs,
        stopped_by=trained.stopped_by,
        seconds=seconds_trained(run) + time.perf_counter() - started,
        **scores,
    )


def _scores(run: PlannedRun, patience: int, config: StudyConfig) -> dict[str, Any]:
    """What a ``Result`` tells of the weights at a patience: their scores, and how these were taken."""
    folder = run.at(patience)
    test, validation = (score(str(folder), run, config, folder / name, split) for split, name in SCORED.items())
    return {
        "scores": test.mean,
        "counts": test.count,
        "images": len(test.rows),
        "scored_at": test.scored_at,
        "scored": run.scored,
        "validation": validation.mean,
    }
