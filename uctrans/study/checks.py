"""What a study makes sure of before it trains or writes anything."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uctrans.data import find_samples, get_protocol, load_folds
from uctrans.data.files import SPLITS
from uctrans.data.instances import check_truth, find_instances
from uctrans.study.config import PlannedRun, StudyConfig, StudyError, variant_folder
from uctrans.study.cost import count
from uctrans.study.files import COST, MARKER, Marker, MeasuredCost, Result, outcome, read_record
from uctrans.training import CheckpointError, ConfigError, TrainConfig, load_checkpoint
from uctrans.training.build import check_backend_runs
from uctrans.training.distributed import choose_device
from uctrans.training.loop import RUN_FILES

# Settings that change no result. Another data folder must hold the same images.
FREE = (
    "output",
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


def check_study(config: StudyConfig, kind: str, plan: list[PlannedRun]) -> Marker:
    """Return what is to be kept in study.json, where the study may begin or go on.

    Raises:
        StudyError: the output folder holds something else, results of other settings or images, or a damaged file.
        ConfigError: a network cannot be built, or its backend or the device is not there.
        DataError: a fold, or a test image, its mask or its instance map, cannot be used.
    """
    folder = Path(config.output)
    _check_folder(folder)
    marker = Marker(kind, fingerprint(config.data))
    before = _read_marker(folder, kind) or marker
    _check_marker(folder, before, marker)
    free = [name for name in FREE if name != "data" or before.images is not None]
    _check_folds(config)
    for run in plan:
        _check_run(run, config, free)
    first_runs = plan[: len(config.variants())]
    for run in first_runs:
        _check_cost(run, config, free)
    if any(outcome(run.folder) is None for run in plan):
        device = choose_device(config.device)
        for run in first_runs:
            check_backend_runs(run.config, device)
        _check_test_images(config)
    return marker


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


def scoring(config: StudyConfig) -> dict[str, str]:
    """The settings that a score depends on beside those of the training."""
    return {"score_size": config.score_size, "score_resolution": config.score_resolution}


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


def _check_folds(config: StudyConfig) -> None:
    if config.cross_validation is None:
        return
    folds, highest = len(load_folds(config.cross_validation, config.data)), max(config.seed_list)
    if highest >= folds:
        raise StudyError(
            f"seeds: {config.cross_validation} has {folds} folds and none for seed {highest}; "
            f"give seeds of 0 to {folds - 1}"
        )


def _check_run(run: PlannedRun, config: StudyConfig, free: list[str]) -> None:
    """Raise StudyError where a run was made with other settings, or was interrupted and cannot go on."""
    ended = outcome(run.folder)
    settings = _settings_of_open(run.folder) if ended is None else _settings_of_ended(run.folder)
    if settings is not None:
        _refuse_other_settings(run.folder, settings, run.config, free)
    if isinstance(ended, Result):
        _refuse_changes(run.folder, ended.scored, scoring(config))


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
    _refuse_other_settings(path, read_record(path, MeasuredCost).settings, run.config, [*free, "seed", "fold"])


def _refuse_other_settings(path: Path, before: dict[str, Any], config: TrainConfig, free: list[str]) -> None:
    """Raise StudyError where settings differ; those that there were not yet before have their defaults."""
    defaults = TrainConfig(data=config.data, output=config.output).to_dict()
    _refuse_changes(path, defaults | before, config.to_dict(), free)


def _refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any], free: Sequence[str] = ()) -> None:
    names = [name for name in before | now if name not in free and before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names)
        raise StudyError(
            f"{path}: was made with other settings: {changes}. Give the former ones, or name another output folder"
        )


def _check_test_images(config: StudyConfig) -> None:
    """Raise DataError where a test image, its mask or, where it will be scored, its instance map cannot be used."""
    samples = find_samples(config.data, "test")
    is_native = config.score_size == "native" or get_protocol(config.protocol, config.image_size).keeps_resolution
    check_truth(samples, find_instances(samples) if is_native else {}, config.classes, config.palette)
