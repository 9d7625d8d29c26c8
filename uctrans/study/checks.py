"""What a study makes sure of before it trains or writes anything."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uctrans.data import find_development_samples, find_samples, get_protocol, load_folds, make_folds
from uctrans.data.find import SPLITS
from uctrans.data.folds import Fold
from uctrans.data.instances import check_truth, find_instances
from uctrans.study.config import StudyConfig, StudyError
from uctrans.study.cost import count
from uctrans.study.files import COST, MARKER, Marker, MeasuredCost, Outcome, outcome, read_record
from uctrans.study.plan import PlannedRun, variant_folder
from uctrans.training import CheckpointError, ConfigError, TrainConfig, load_checkpoint
from uctrans.training.checkpoint import RUN_FILES
from uctrans.training.distributed import choose_device
from uctrans.training.run import check_backend_runs

# Settings that change no result, or of which each result says its own. Another data folder must hold the same images.
FREE = (
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
    "data",
)


SCORING_DEFAULTS = {"score_tta": "none"}  # of results from before there was such a setting


def check_study(config: StudyConfig, kind: str, plan: list[PlannedRun]) -> Marker:
    """Return what is to be kept in study.json, where the study may begin or go on.

    Raises:
        StudyError: the output folder holds something else, results of other settings or images, or a damaged file.
        ConfigError: a network cannot be built, or its backend or the device is not there.
        DataError: a fold, or a test image, its mask or its instance map, cannot be used.
    """
    folder = Path(config.output)
    _check_folder(folder)
    number = config.cross_validation
    marker = Marker(kind, fingerprint(config.data), number if isinstance(number, int) else None)
    before = _read_marker(folder, kind) or marker
    _check_marker(folder, before, marker)
    free = [name for name in FREE if name != "data" or before.images is not None]
    free += ["folds"] if marker.folds else []  # a file of the study, which may have moved
    names = _names_in_folds(config)
    if names is not None and before.names_in_folds not in (None, names):
        raise StudyError(
            f"folds: {config.folds_source or config.folds} no longer deals the images as it did when the study in "
            f"{folder} began; restore it, or name another output folder"
        )
    for run in plan:
        _check_run(run, free)
    first_runs = plan[: len(config.variants())]
    for run in first_runs:
        _check_cost(run, config, free)
    if not all(outcome(run).is_over for run in plan):
        device = choose_device(config.device)
        for run in first_runs:
            check_backend_runs(run.config, device)
        _check_test_images(config, first_runs)
    return dataclasses.replace(marker, names_in_folds=names or before.names_in_folds)


def fingerprint(data: str) -> str:
    """A text that tells whether a folder holds the same images, wherever it lies: of names and sizes in bytes.

    Raises:
        DataError: as for ``uctrans.data.find_samples``.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for sample in find_samples(data, split):
            sizes = [path.stat().st_size for path in (sample.image, sample.mask)]
            digest.update(f"{split} {sample.name} {sizes}\n".encode())
    return digest.hexdigest()


def _names_in_folds(config: StudyConfig) -> str | None:
    """A text that tells whether the folds of a study hold the same names; None where it has no folds."""
    if config.cross_validation is None and config.folds is None:
        return None
    folds = load_folds(config.folds, config.data) if config.cross_validation is None else folds_of(config)
    parts = [{part: sorted(fold[part]) for part in ("train", "val")} for fold in folds]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folds_of(config: StudyConfig) -> list[Fold]:
    """The folds of a study with cross-validation: those given, those kept in its folder, or new ones.

    Raises:
        DataError: they do not fit the images, or there are too few of these.
        StudyError: the file in the study's folder is no longer that of the study.
    """
    number = config.cross_validation
    if isinstance(number, int) and not Path(config.folds_source).exists():
        return make_folds([sample.name for sample in find_development_samples(config.data)], number)
    folds = load_folds(config.folds_source, config.data)
    if len(folds) != len(config.fold_list()):
        raise StudyError(f"{config.folds_source}: holds {len(folds)} folds, not {number}; restore or delete it")
    return folds


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"output: {folder} is a file; name a folder")
    if folder.exists() and not (folder / MARKER).exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise StudyError(f"output: {folder} holds files that no study wrote; name a new or empty folder")


def _read_marker(folder: Path, kind: str) -> Marker | None:
    """What study.json says, None where there is none."""
    path = folder / MARKER
    try:
        return read_record(path, Marker) if path.exists() else None
    except StudyError as error:  # without it the folder would be refused
        raise StudyError(f'{path}: is damaged; write {{"study": "{kind}"}} into it to go on') from error


def _check_marker(folder: Path, before: Marker, now: Marker) -> None:
    if before.study != now.study:
        raise StudyError(f"output: {folder} holds another study, of {before.study}; name another folder")
    if before.images not in (None, now.images):
        raise StudyError(
            f"data: its images or masks are not those the study in {folder} began with (names, splits and sizes in "
            "bytes are compared); restore them, or name another output folder"
        )
    if before.folds != now.folds:
        begun = f"{before.folds} folds of its own" if before.folds else "no folds of its own"
        raise StudyError(
            f"cross_validation: the study in {folder} was begun with {begun}; give the former value, or name another "
            "output folder"
        )


def _check_run(run: PlannedRun, free: list[str]) -> None:
    """Raise StudyError where a run was made with other settings, or was interrupted and cannot go on."""
    ended = outcome(run)
    settings = _settings_of_ended(run.folder) if ended.is_over else _settings_of_open(run.folder)
    if settings is not None:
        _refuse_other_settings(run.folder, settings, run.config, free)
        _refuse_patience_gone_by(run, ended, settings)
    elif ended.results and run.trained_by is None:
        raise StudyError(
            f"{run.folder}: holds scores, but config.yaml is lost, which tells how they were trained; restore it, or "
            f"{anew(run.folder)}"
        )
    for patience, result in ended.results.items():
        _refuse_changes(run.at(patience), SCORING_DEFAULTS | result.scored, run.scored)


def _refuse_patience_gone_by(run: PlannedRun, ended: Outcome, settings: dict[str, Any]) -> None:
    """Raise StudyError where a training has gone past the place at which a patience would have stopped it."""
    gone_by = [patience for patience in run.patiences if patience not in ended.results]
    if not ended.is_over and gone_by[0] < settings["patience"]:
        raise StudyError(
            f"patience: {run.folder} was trained with patience {settings['patience']} already, and the weights at "
            f"{gone_by[0]} are lost; give patiences of {settings['patience']} and more, or name another output folder"
        )


def _settings_of_open(folder: Path) -> dict[str, Any] | None:
    """Settings of a run that is to begin or go on, None where nothing is there yet."""
    if (folder / "last.pt").exists():
        return _settings_in_checkpoint(folder)
    if found := [name for name in RUN_FILES if (folder / name).exists()]:
        raise StudyError(f"{folder}: holds {', '.join(found)}, but last.pt is lost; {anew(folder)}")
    return None


def _settings_of_ended(folder: Path) -> dict[str, Any] | None:
    """Settings of a run that has ended, None where the files that tell them are gone."""
    file = folder / "config.yaml"
    if file.exists():
        try:
            return TrainConfig.load_yaml(file).to_dict()
        except ConfigError as error:
            raise StudyError(f"{file}: is damaged ({error}); delete it, last.pt tells the settings too") from error
    return _settings_in_checkpoint(folder) if (folder / "last.pt").exists() else None


def _settings_in_checkpoint(folder: Path) -> dict[str, Any]:
    try:
        return load_checkpoint(folder / "last.pt")["train_config"]
    except CheckpointError as error:
        raise StudyError(f"{folder}: its last.pt cannot be used; {anew(folder)} ({error})") from error


def anew(folder: Path) -> str:
    """The remedy for a run that is beyond repair."""
    return f"delete the folder {folder}, and the same command trains this run anew"


def _check_cost(run: PlannedRun, config: StudyConfig, free: list[str]) -> None:
    """Raise StudyError where a cost was measured with other settings, ConfigError where the network cannot be built."""
    path = variant_folder(config.output, run.variant) / COST
    if not path.exists():
        count(run.config)
        return
    _refuse_other_settings(
        path, read_record(path, MeasuredCost).settings, run.config, [*free, "seed", "fold", "init_from"]
    )


def _refuse_other_settings(path: Path, before: dict[str, Any], config: TrainConfig, free: list[str]) -> None:
    """Raise StudyError where settings differ; those that there were not yet before have their defaults."""
    defaults = TrainConfig(data=config.data, output=config.output).to_dict()
    _refuse_changes(path, *map(_wherever_it_lies, (defaults | before, config.to_dict())), free)


def _wherever_it_lies(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with only the end, patience_P, of the path of a U-Net in the study, which may have moved."""
    path = settings["init_from"]
    return settings | {"init_from": None if path is None else Path(path).name}


def _refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any], free: Sequence[str] = ()) -> None:
    names = [name for name in before | now if name not in free and before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names)
        raise StudyError(
            f"{path}: was made with other settings: {changes}. Give the former ones, or name another output folder"
        )


def _check_test_images(config: StudyConfig, runs: Sequence[PlannedRun]) -> None:
    """Raise DataError where a test image, its mask or, where it will be scored, its instance map cannot be used."""
    samples = find_samples(config.data, "test")
    is_native = any(
        run.scored["score_size"] == "native"
        or (run.scored["score_size"] == "protocol" and get_protocol(run.config.protocol).keeps_resolution)
        for run in runs
    )
    check_truth(samples, find_instances(samples) if is_native else {}, config.classes, config.palette)
