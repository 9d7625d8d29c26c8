"""The folder of a study: what has been done in it, and whether a call may continue with it.

OUTPUT/study.json                 the kind of study, its settings, and digests of its images and folds
OUTPUT/folds.json                 the folds, if the study makes them
OUTPUT/table.csv  differences.csv  table.md  chart.png
OUTPUT/runs/NETWORK/seed_N/       a run folder of ``uctrans train``, with cross-validation seed_N/fold_K/, and in it
                  patience_P/best/    the best weights when this patience stopped the training
                  patience_P/test/    their evaluation on the test images
                  failed.txt          why the training diverged, if it did
OUTPUT/runs/NETWORK/seed_N/ensemble/patience_P/    the evaluation of the mean of the folds' probabilities
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..data import find_development_samples, find_samples, get_protocol, load_folds, make_folds
from ..data.find import SPLITS
from ..data.folds import Fold
from ..data.instances import check_truth, find_instances
from ..reading import read_json
from ..training import TrainConfig
from ..training.config import CHANGEABLE_ON_RESUME
from ..writing import write_json
from .plan import FOLDS_FILE, Job, PlannedEnsemble, PlannedRun, StudyConfig, StudyError

MARKER, FORMAT_VERSION = "study.json", 3
FAILED = "failed.txt"
DECISIVE = {
    "epochs",
    "learning_rate",
    "min_learning_rate",
    "amp",
    "init_from",
}  # a resumed run may change these, a study may not


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary.json of ``evaluate`` in a folder, or None without the file; raise StudyError if damaged."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = read_json(path)
        needed = {name: summary[name] for name in ("mean", "count", "images", "scored_at", "model")}
        return needed | {"known_images": summary.get("known_images") or {}}
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path}: is damaged ({error!r}); delete it, and the same command writes it again") from error


def read_scores(run: PlannedRun) -> dict[int, dict[str, Any]]:
    """Return the evaluations of a run by patience, those that exist."""
    summaries = {patience: read_summary(run.at(patience) / "test") for patience in run.patiences}
    return {patience: summary for patience, summary in summaries.items() if summary is not None}


def read_failure(run: PlannedRun) -> str | None:
    """Return why the training of a run diverged, or None if it did not.

    The result is also None if all patiences were scored before the training diverged.
    """
    path = run.folder / FAILED
    if not path.exists() or len(read_scores(run)) == len(run.patiences):
        return None
    return path.read_text(encoding="utf-8").strip()


def read_ensemble(ensemble: PlannedEnsemble, patience: int) -> dict[str, Any] | None:
    """Return the evaluation of an ensemble, or None if it or that of a member is missing."""
    paths = [run.at(patience) / "test" / "summary.json" for run in ensemble.needs]
    return read_summary(ensemble.at(patience)) if all(path.exists() for path in paths) else None


def patiences_to_score(ensemble: PlannedEnsemble) -> list[int]:
    """Return the patiences at which all members are scored and their ensemble is not."""
    common = set.intersection(*(set(read_scores(run)) for run in ensemble.needs))
    return [patience for patience in sorted(common) if read_ensemble(ensemble, patience) is None]


def is_over(job: Job) -> bool:
    """Return whether nothing is left to do for a run or an ensemble."""
    if isinstance(job, PlannedEnsemble):
        return all(is_over(run) for run in job.needs) and not patiences_to_score(job)
    return len(read_scores(job)) == len(job.patiences) or read_failure(job) is not None


def check_study(config: StudyConfig, kind: str, plan: list[PlannedRun]) -> dict[str, Any]:
    """Check that the study may begin, or continue, in its output folder.

    A study that has no file of a run yet begins with any settings and images, as its mended command would.

    Returns:
        The content of study.json for ``begin``.

    Raises:
        StudyError: The folder holds something else, results of other settings, images or folds, or a damaged file.
        ConfigError: The config.yaml of an interrupted run is damaged.
        DataError: The images, masks, instance maps or folds cannot be used.
    """
    folder = Path(config.output)
    is_marked = (folder / MARKER).exists()
    if not is_marked and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise StudyError(f"output: {folder} holds files that no study wrote; name a new or empty folder")
    is_begun = is_marked and any(path.is_file() for path in (folder / "runs").rglob("*"))
    if is_marked and not is_begun:
        (folder / FOLDS_FILE).unlink(missing_ok=True)
    marker = _marker(config, kind)
    if is_begun:
        marker = _continued(folder / MARKER, marker)
    unfinished = [run for run in plan if not is_over(run)]
    for run in unfinished:
        _check_patience(run)
    if unfinished:
        samples = find_samples(config.data, "test")
        protocol = get_protocol(
            config.protocol,
            channels=config.in_channels,
            intensity_range=config.intensity_range,
            ignore_label=config.ignore_label,
        )
        keeps_resolution = protocol.keeps_resolution
        is_native = config.score_size == "native" or (config.score_size == "protocol" and keeps_resolution)
        check_truth(samples, find_instances(samples) if is_native else {}, config.classes, config.palette, protocol)
    return marker


def begin(config: StudyConfig, marker: dict[str, Any]) -> None:
    """Write study.json, and folds.json if the study makes its folds, into the output folder."""
    folder = Path(config.output)
    if isinstance(config.cross_validation, int):
        write_json(folder / FOLDS_FILE, {"folds": _folds(config)})
    write_json(folder / MARKER, marker)


def _folds(config: StudyConfig) -> list[Fold]:
    """Return the folds that the runs of a study use; raise DataError if they do not fit the images."""
    if not isinstance(config.cross_validation, int):
        source = config.cross_validation or config.folds
        return [] if source is None else load_folds(source, config.data)
    if Path(config.folds_source).exists():
        folds = load_folds(config.folds_source, config.data)
        if len(folds) == config.cross_validation:
            return folds
    return make_folds([sample.name for sample in find_development_samples(config.data)], config.cross_validation)


def _marker(config: StudyConfig, kind: str) -> dict[str, Any]:
    """Return what must be the same in all calls; settings of a network only in those that have it."""
    images = [
        [split, sample.name, *(path.stat().st_size for path in (sample.image, sample.mask))]
        for split in SPLITS
        for sample in find_samples(config.data, split)
    ]
    folds = [{part: sorted(fold[part]) for part in ("train", "val")} for fold in _folds(config)]
    free = {*CHANGEABLE_ON_RESUME, *config.not_flags, "model_options"} - DECISIVE
    names = {field.name for field in dataclasses.fields(TrainConfig)} - free
    settings = {name: value for name, value in config.to_dict().items() if name in names or name.startswith("score_")}
    for variant in config.variants():
        settings[f"model_options of {variant.name}"] = variant.options
        if variant.from_unet:
            settings[f"patience of the U-Net that starts {variant.name}"] = config.patience[-1]
    digests = {"images": _digest(images), "folds": _digest(folds)}
    return {"version": FORMAT_VERSION, "study": kind, **digests, "settings": json.loads(json.dumps(settings))}


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _continued(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Return the marker of a study and of this call together; raise StudyError if the call asks for another study."""
    try:
        before = read_json(path)
        version = before.get("version")
    except (ValueError, AttributeError) as error:
        raise StudyError(f"{path}: is damaged ({error}); restore it, or name another output folder") from error
    folder = path.parent
    if version != FORMAT_VERSION:
        raise StudyError(
            f"output: another version of uctrans began the study in {folder}, and this one cannot continue it; "
            "name another output folder"
        )
    if now.keys() - before.keys() or not isinstance(before["settings"], dict):
        raise StudyError(f"{path}: is damaged (it lacks entries); restore it, or name another output folder")
    if before["study"] != now["study"]:
        raise StudyError(f"output: {folder} holds a study of {before['study']}; name another folder")
    if before["images"] != now["images"]:
        raise StudyError(
            f"data: the study in {folder} began with other images or masks (names, splits and sizes in bytes are "
            "compared); restore them, or name another output folder"
        )
    if before["folds"] != now["folds"]:
        raise StudyError(
            f"cross_validation: the study in {folder} began with other folds; give the former value and restore the "
            "file of folds, or name another output folder"
        )
    former, settings = before["settings"], before["settings"] | now["settings"]
    if changed := [name for name in former if former[name] != settings[name]]:
        changes = "; ".join(f"{name}: {former[name]!r} -> {settings[name]!r}" for name in changed)
        raise StudyError(
            f"output: the study in {folder} began with other settings: {changes}. Give the former ones, or "
            "name another output folder"
        )
    return now | {"settings": settings}


def _check_patience(run: PlannedRun) -> None:
    """Raise StudyError if the training of a run is beyond a patience that is still to be scored."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    trained = TrainConfig.load_yaml(path, network=run.config.model).patience
    missing = min(set(run.patiences) - set(read_scores(run)))
    if missing < trained:
        raise StudyError(
            f"patience: {run.folder} was trained with patience {trained} already, and its weights at {missing} were "
            f"not kept; give patiences of {trained} and more, or name another output folder"
        )
