"""The folder of a study: what has been done in it, and whether a call may continue with it.

OUTPUT/study.json                 the kind of study, and digests of its images and folds
OUTPUT/folds.json                 the folds, where the study makes them
OUTPUT/table.csv  table.md  chart.png
OUTPUT/runs/NETWORK/seed_N/       a run folder of ``uctrans train``, with cross-validation seed_N/fold_K/, and in it
                  patience_P/best/    the best weights when this patience stopped the training
                  patience_P/test/    their evaluation on the test images
                  failed.txt          why the training diverged, if it did
OUTPUT/runs/NETWORK/seed_N/ensemble/patience_P/    the evaluation of the mean of the folds' probabilities
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import find_development_samples, find_samples, get_protocol, load_folds, make_folds
from ..data.find import SPLITS
from ..data.folds import Fold
from ..data.instances import check_truth, find_instances
from ..models.files import LAST_CHECKPOINT
from ..training import CheckpointError, ConfigError, TrainConfig, load_checkpoint
from ..writing import write_bytes
from .plan import FOLDS_FILE, PlannedEnsemble, PlannedRun, StudyConfig, StudyError

MARKER, FORMAT_VERSION = "study.json", 2
FAILED = "failed.txt"
# Settings that change no result. The images and folds may lie elsewhere: their digests are compared.
FREE = (
    "data",
    "folds",
    "output",
    "patience",
    "resume",
    "progress",
    "save_minutes",
    "device",
    "threads",
    "graph",
    "compile",
    "checkpointing",
)


@dataclass(frozen=True)
class Score:
    """An evaluation of a run or an ensemble on the test images."""

    mean: dict[str, float | None]  # over the images, by score; None where it is undefined for all of them
    count: dict[str, int]  # images of each mean
    images: int  # of the test split
    scored_at: str  # the pixels that were counted, in words
    scoring: dict[str, str]  # size, resolution and tta of ``EvaluateConfig``
    validation_dice: float | None  # the best during training; None for an ensemble


def read_score(folder: Path) -> Score | None:
    """Return the evaluation in a folder, or None if there is none; raise StudyError if it is damaged."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return Score(
            mean={**summary["mean"]},
            count={**summary["count"]},
            images=int(summary["images"]),
            scored_at=str(summary["scored_at"]),
            scoring={name: summary["settings"][name] for name in ("size", "resolution", "tta")},
            validation_dice=summary["model"]["metadata"].get("best_dice"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path}: is damaged ({error!r}); delete it, and the same command writes it again") from error


def read_scores(run: PlannedRun) -> dict[int, Score]:
    """Return the scores of a run by patience, those that exist."""
    scores = {patience: read_score(run.at(patience) / "test") for patience in run.patiences}
    return {patience: score for patience, score in scores.items() if score is not None}


def read_failure(run: PlannedRun) -> str | None:
    """Return why the training of a run diverged, or None if it did not.

    The result is also None if all patiences were scored before the training diverged.
    """
    path = run.folder / FAILED
    if not path.exists() or len(read_scores(run)) == len(run.patiences):
        return None
    return path.read_text(encoding="utf-8").strip()


def read_ensemble(ensemble: PlannedEnsemble, patience: int) -> Score | None:
    """Return the scores of an ensemble, or None if there are none or a member has been scored since."""
    paths = [run.at(patience) / "test" / "summary.json" for run in ensemble.needs]
    own = ensemble.at(patience) / "summary.json"
    if not own.exists() or not all(path.exists() for path in paths):
        return None
    is_stale = own.stat().st_mtime < max(path.stat().st_mtime for path in paths)
    return None if is_stale else read_score(ensemble.at(patience))


def patiences_to_score(ensemble: PlannedEnsemble) -> list[int]:
    """Return the patiences at which all members are scored and their ensemble is not."""
    common = set.intersection(*(set(read_scores(run)) for run in ensemble.needs))
    return [patience for patience in sorted(common) if read_ensemble(ensemble, patience) is None]


def is_over(job: PlannedRun | PlannedEnsemble) -> bool:
    """Return whether nothing is left to do for a run or an ensemble."""
    if isinstance(job, PlannedEnsemble):
        return all(is_over(run) for run in job.needs) and not patiences_to_score(job)
    return len(read_scores(job)) == len(job.patiences) or read_failure(job) is not None


@contextlib.contextmanager
def only_call(folder: Path) -> Iterator[int]:
    """Lock a folder until the block ends, and all processes that inherited the descriptor it yields have ended too.

    Raises:
        StudyError: Another call works in the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                f"output: another call of this study works in {folder}; wait for its end, or name another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def check_study(config: StudyConfig, kind: str, plan: list[PlannedRun]) -> None:
    """Check that the study may begin, or continue, in its output folder, which need not exist.

    Raises:
        StudyError: The folder holds something else, results of other settings, images or folds, or a damaged file.
        DataError: The images, masks, instance maps or folds cannot be used.
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"output: {folder} is a file; name a folder")
    is_begun = (folder / MARKER).exists()
    if not is_begun and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise StudyError(f"output: {folder} holds files that no study wrote; name a new or empty folder")
    marker = _marker(config, kind)
    if is_begun:
        _check_marker(folder, marker)
    for run in plan:
        _check_run(run)
    if not all(is_over(run) for run in plan):
        samples = find_samples(config.data, "test")
        keeps_resolution = get_protocol(config.protocol).keeps_resolution
        is_native = config.score_size == "native" or (config.score_size == "protocol" and keeps_resolution)
        check_truth(samples, find_instances(samples) if is_native else {}, config.classes, config.palette)


def begin(config: StudyConfig, kind: str) -> None:
    """Write study.json, and folds.json where the study makes its folds, into the output folder."""
    folder = Path(config.output)
    if isinstance(config.cross_validation, int):
        write_bytes(folder / FOLDS_FILE, json.dumps({"folds": _folds(config)}, indent=2).encode())
    write_bytes(folder / MARKER, json.dumps(_marker(config, kind), indent=2).encode())


def _marker(config: StudyConfig, kind: str) -> dict[str, Any]:
    images = [
        [split, sample.name, *(path.stat().st_size for path in (sample.image, sample.mask))]
        for split in SPLITS
        for sample in find_samples(config.data, split)
    ]
    folds = [{part: sorted(fold[part]) for part in ("train", "val")} for fold in _folds(config)]
    return {"version": FORMAT_VERSION, "study": kind, "images": _digest(images), "folds": _digest(folds)}


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _folds(config: StudyConfig) -> list[Fold]:
    """Return the folds that the runs of a study use; raise DataError where they do not fit the images."""
    if not isinstance(config.cross_validation, int):
        source = config.cross_validation or config.folds
        return [] if source is None else load_folds(source, config.data)
    if Path(config.folds_source).exists():
        folds = load_folds(config.folds_source, config.data)
        if len(folds) == config.cross_validation:
            return folds
    return make_folds([sample.name for sample in find_development_samples(config.data)], config.cross_validation)


def _check_marker(folder: Path, now: dict[str, Any]) -> None:
    path = folder / MARKER
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        version = before.get("version")
    except (ValueError, AttributeError) as error:
        raise StudyError(f"{path}: is damaged ({error}); restore it, or name another output folder") from error
    if version != FORMAT_VERSION:
        raise StudyError(
            f"output: another version of uctrans began the study in {folder}, and this one cannot continue it; "
            "name another output folder"
        )
    if before.get("study") != now["study"]:
        raise StudyError(f"output: {folder} holds a study of {before.get('study')}; name another folder")
    if before.get("images") != now["images"]:
        raise StudyError(
            f"data: the study in {folder} began with other images or masks (names, splits and sizes in bytes are "
            "compared); restore them, or name another output folder"
        )
    if before.get("folds") != now["folds"]:
        raise StudyError(
            f"cross_validation: the study in {folder} began with other folds; give the former value and restore the "
            "file of folds, or name another output folder"
        )


def _check_run(run: PlannedRun) -> None:
    """Raise StudyError if a run was made with other settings, or was interrupted and cannot continue."""
    again = f"delete the folder {run.folder}, and the same command trains this run again"
    scores, path = read_scores(run), run.folder / "config.yaml"
    if not path.exists():
        if scores:
            raise StudyError(f"{path}: is missing, so the settings of the scores beside it are unknown; {again}")
        return
    try:
        before = TrainConfig.load_yaml(path)
    except ConfigError as error:
        raise StudyError(f"{path}: is damaged ({error}); {again}") from error
    _refuse_changes(run.folder, _comparable(before), _comparable(run.config))
    for patience, score in scores.items():
        _refuse_changes(run.at(patience), score.scoring, run.scoring)
    if is_over(run):
        return
    missing = next(patience for patience in run.patiences if patience not in scores)
    if missing < before.patience:
        raise StudyError(
            f"patience: {run.folder} was trained with patience {before.patience} already, and its weights at {missing} "
            f"were not kept; give patiences of {before.patience} and more, or name another output folder"
        )
    try:
        load_checkpoint(run.folder / LAST_CHECKPOINT)
    except CheckpointError as error:
        raise StudyError(f"{run.folder}: its {LAST_CHECKPOINT} cannot be used ({error}); {again}") from error


def _comparable(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide a result, wherever the study lies."""
    settings = {name: value for name, value in config.to_dict().items() if name not in FREE}
    return settings | {"init_from": config.init_from and Path(config.init_from).name}


def _refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := [name for name in now if before[name] != now[name]]:
        changes = "; ".join(f"{name}: {before[name]!r} -> {now[name]!r}" for name in changed)
        raise StudyError(
            f"{path}: was made with other settings: {changes}. Give the former ones, or name another output folder"
        )
