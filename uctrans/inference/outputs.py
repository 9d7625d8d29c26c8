"""The files that a prediction writes for an image: their names and checks of these."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from ..data import Sample
from .journal import Entry, Journal, planned_entry
from .settings import InferenceError, refuse_existing

ENDINGS = {
    "mask": ".png",
    "overlay": "_overlay.png",
    "instances": "_instances.png",
    "instances overlay": "_instances_overlay.png",
    "png": "_probability.png",
    "npy": "_probability.npy",
}
LARGE_ENDINGS = ENDINGS | {"mask": ".tif", "png": "_probability.tif"}  # of an image that is segmented in strips


class Planned(NamedTuple):
    """An image file to segment.

    Attributes:
        sample: The image.
        files: The files to write by what they show, see `ENDINGS`.
        large_files: Those to write instead if the image is segmented in strips, see `LARGE_ENDINGS`.
    """

    sample: Sample
    files: dict[str, Path]
    large_files: dict[str, Path]

    @property
    def possible_files(self) -> list[Path]:
        """All files that may be written."""
        return list(dict.fromkeys((*self.files.values(), *self.large_files.values())))


def plan_files(samples: list[Sample], folder: Path, config: Any) -> list[Planned]:
    """Return the files to write for each image.

    Raises:
        InferenceError: They would replace an image or each other.
    """
    images = [sample.image for sample in samples]
    parents = {image.parent for image in images} | {image.resolve().parent for image in images if image.is_symlink()}
    if folder.resolve() in {parent.resolve() for parent in parents}:
        raise InferenceError(f"output: {folder} holds the images themselves; choose another folder")
    kinds = ["mask", "overlay"]
    if config.instances:
        kinds += ["instances", "instances overlay"]
    if config.probability != "none":
        kinds.append(config.probability)
    owners: dict[Path, Path] = {}
    plan = []
    for sample in samples:
        files, large_files = (
            {kind: folder / f"{sample.name}{endings[kind]}" for kind in kinds} for endings in (ENDINGS, LARGE_ENDINGS)
        )
        planned = Planned(sample, files, large_files)
        for path in planned.possible_files:
            if path in owners:
                raise InferenceError(
                    f"input: {owners[path]} and {sample.image} would both write {path.name}; rename one of them, or "
                    "predict them into different folders"
                )
            owners[path] = sample.image
        plan.append(planned)
    return plan


def divide_by_names(plan: list[Planned]) -> tuple[list[Planned], dict[Path, str]]:
    """Return the images whose files the output folder can name, and what is wrong with the others by image file."""
    possible, failures = [], {}
    for planned in plan:
        image = planned.sample.image
        try:
            for path in planned.possible_files:
                with contextlib.suppress(FileNotFoundError):
                    path.lstat()
        except OSError as error:
            failures[image] = f"{image}: {path.name} cannot be the name of a file ({error.strerror}); shorten the name"
        else:
            possible.append(planned)
    return possible, failures


def find_missing(plan: list[Planned], journal: Journal) -> list[Planned]:
    """Return the images that are not done.

    Raises:
        InferenceError: Files exist that this prediction has not made.
    """
    missing, foreign = [], []
    for planned in plan:
        existing = {path.name: path for path in planned.possible_files if path.exists()}
        entry = journal.find(planned.sample.name, planned.sample.image)
        if entry is None:
            foreign += existing.values()
        if entry is None or not entry.done or not existing.keys() >= set(entry.files):
            missing.append(planned)
    refuse_existing(foreign, "this prediction")
    return missing


def entry_of(planned: Planned, journal: Journal) -> Entry:
    """Return the entry of an image to segment, with its files, those that an earlier prediction made included."""
    sample = planned.sample
    before = journal.entries[sample.name].files if sample.name in journal.entries else ()
    known = {f"{sample.name}{ending}" for ending in (*ENDINGS.values(), *LARGE_ENDINGS.values())}
    names = {path.name for path in planned.possible_files} | (known & set(before))
    return planned_entry(sample.image, sorted(names))
