"""What a study compares, over which seeds, and its runs with the training configuration of each."""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uctrans.models.registry import model_class
from uctrans.models.unet import NUM_SCALES
from uctrans.training import TrainConfig

SET_BY_THE_STUDY = ("model", "seed", "init_from", "resume")
SCORE_SIZES = ("protocol", "native")
RUNS_FOLDER = "runs"


class StudyError(ValueError):
    """A setting or an output folder that a study cannot work with; the message names the remedy."""


@dataclass(frozen=True)
class Variant:
    """One of the networks a study compares.

    Attributes:
        name: what the table calls it, and its folder.
        model: registry name.
        options: arguments of the network beside those that every training sets.
    """

    name: str
    model: str
    options: dict[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One training of a study: of a variant, with a seed."""

    variant: Variant
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.output)


@dataclass
class StudyConfig(TrainConfig, ABC):
    """Settings that all studies share: those of a training, which hold for every run, and the seeds.

    The study sets ``model``, ``seed`` and ``resume`` in every run, and every run starts from fresh weights.

    Args:
        output: Folder of the study, with a run folder for each variant and seed in runs/.
        seeds: How many seeds, counted from 0, or the seeds themselves: 5, or 3,7,11; [7] is the seed 7 alone.
        cross_validation: Folds, a shipped name or a JSON file: seed 0 trains on the first, seed 1 on the second;
            none trains all runs on the same images, those of the train split or of folds and fold.
        score_size: Size at which the test images are scored: protocol or native, see uctrans evaluate.
        score_resolution: What the network sees when score_size is native: protocol, the resized image, or native tiles.
        progress: Show the bar and the lines of every epoch too, beside the line of every run.

    Raises:
        StudyError: seeds or what is compared are empty, doubled or unknown, or a setting that the study itself sets.
        ConfigError: as for ``TrainConfig``.
    """

    seeds: int | tuple[int, ...] = 5
    cross_validation: str | None = None
    score_size: str = "protocol"
    score_resolution: str = "protocol"
    progress: bool = False

    def __post_init__(self):
        super().__post_init__()
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        for name in SET_BY_THE_STUDY:
            if getattr(self, name) != defaults[name]:
                raise StudyError(f"{name}: the study sets it in every run; leave it out")
        for name in ("score_size", "score_resolution"):
            if getattr(self, name) not in SCORE_SIZES:
                raise StudyError(
                    f"{name}: {getattr(self, name)!r} is not known; choose one of {', '.join(SCORE_SIZES)}"
                )
        if (self.score_size, self.score_resolution) == ("protocol", "native"):
            raise StudyError("score_resolution: native needs native scores; set score_size to native too")
        if isinstance(self.seeds, int) and self.seeds < 1:
            raise StudyError(f"seeds: {self.seeds} is too small; give at least 1")
        _check_list("seeds", self.seed_list, "5, or 3,7,11")
        if min(self.seed_list) < 0:
            raise StudyError(f"seeds: {min(self.seed_list)} is negative; give seeds from 0 up")
        if self.cross_validation is not None and self.folds is not None:
            raise StudyError("cross_validation: takes a fold for each seed; leave out folds and fold")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, in the order of the runs."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @abstractmethod
    def variants(self) -> list[Variant]:
        """What the study compares, in the order of the table."""

    def plan(self) -> list[PlannedRun]:
        """The runs, seed by seed: where a study is stopped, its networks have had about the same number of runs."""
        return [
            PlannedRun(variant, seed, self.run(variant, seed)) for seed in self.seed_list for variant in self.variants()
        ]

    def run(self, variant: Variant, seed: int) -> TrainConfig:
        """The training of one variant with one seed."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        own = {
            "data": str(Path(self.data).resolve()),  # as train keeps it
            "output": str(variant_folder(self.output, variant) / f"seed_{seed}"),
            "model": variant.model,
            "model_options": variant.options,
            "seed": seed,
        }
        if self.cross_validation is not None:
            own |= {"folds": self.cross_validation, "fold": seed}
        return TrainConfig(**shared | own)


@dataclass
class SkipStudyConfig(StudyConfig):
    """Settings of ``uctrans study skips``: the U-Net with none of its skips, all, each alone, and all but one."""

    def __post_init__(self):
        super().__post_init__()
        if "skips" in self.model_options:
            raise StudyError("model_options: skips is what the study varies; leave it out")

    def variants(self) -> list[Variant]:
        """The ten subsets of the skips."""
        every = range(1, NUM_SCALES + 1)
        subsets = {
            "none": [],
            "all": [*every],
            **{f"only_{skip}": [skip] for skip in every},
            **{f"all_but_{skip}": [other for other in every if other != skip] for skip in every},
        }
        return [Variant(name, "unet", self.model_options | {"skips": skips}) for name, skips in subsets.items()]


@dataclass
class ModelStudyConfig(StudyConfig):
    """Settings of ``uctrans study models``.

    Args:
        models: Names of the networks, see ``uctrans.list_models()``: unet,uctransnet.
        model_options: Further arguments of the networks, as a mapping or as JSON; each gets those that it takes.
    """

    models: tuple[str, ...] = ("unet", "uctransnet", "dual_branch_uctransnet")

    def __post_init__(self):
        super().__post_init__()
        _check_list("models", [name for name in self.models if name], "unet,uctransnet")
        try:
            taken = {name: inspect.signature(model_class(name)).parameters for name in self.models}
        except ValueError as error:
            raise StudyError(f"models: {error}") from error
        for option in self.model_options:
            if not any(option in parameters for parameters in taken.values()):
                raise StudyError(f"model_options: none of {', '.join(self.models)} takes {option}; leave it out")

    def variants(self) -> list[Variant]:
        """The networks, each with those of the options that it takes."""
        return [
            Variant(
                name,
                name,
                {
                    option: value
                    for option, value in self.model_options.items()
                    if option in inspect.signature(model_class(name)).parameters
                },
            )
            for name in self.models
        ]


def variant_folder(output: str | Path, variant: Variant) -> Path:
    """Where a study keeps the runs of a variant."""
    return Path(output) / RUNS_FOLDER / variant.name


def _check_list(name: str, items: list, example: str) -> None:
    if not items:
        raise StudyError(f"{name}: is empty; write it like {example}")
    if doubled := [str(item) for item in dict.fromkeys(items) if items.count(item) > 1]:
        raise StudyError(f"{name}: {', '.join(doubled)} is named more than once; name each once")
