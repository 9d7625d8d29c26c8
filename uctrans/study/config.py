"""What a study compares, over which seeds and folds, with which patiences, and the runs that makes."""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from uctrans.data import load_folds
from uctrans.inference.evaluate import score_sizes
from uctrans.inference.predictor import RESOLUTIONS, TRANSFORMS
from uctrans.models.registry import list_models, model_class
from uctrans.models.unet import NUM_SCALES
from uctrans.study.plan import PlannedRun, Variant, fold_folder, seed_folder
from uctrans.training import TrainConfig

SET_BY_THE_STUDY = ("model", "seed", "init_from", "resume")
SCORING = ("score_size", "score_resolution", "score_tta")
FOLDS = "folds.json"
UNET, FROM_UNET = "unet", "_from_unet"


class StudyError(ValueError):
    """A setting or an output folder that a study cannot work with; the message names the remedy."""


@dataclass
class StudyConfig(TrainConfig, ABC):
    """Settings that all studies share: those of a training, which hold for every run, and the seeds.

    The study sets ``model``, ``seed``, ``init_from`` and ``resume`` in every run.

    Args:
        output: Folder of the study, with a run folder for each variant, seed and fold in runs/.
        patience: Epochs without a better validation Dice after which training stops: 50, or several, 50,100. One
            training serves all: it is scored where the smallest stops it, and goes on to the next.
        seeds: How many seeds, counted from 0, or the seeds themselves: 5, or 3,7,11; [7] is the seed 7 alone.
        cross_validation: Every seed trains once on each fold of a shipped name, monuseg, or of a JSON file; a number
            makes that many folds of the images of train and val, the same for all seeds, and keeps them in folds.json
            of the study. None trains all runs on the same images, those of the train split or of folds and fold;
            folds without fold is the same as cross_validation.
        score_size: Size at which images are scored: protocol, native, or a protocol that resizes, see uctrans evaluate.
        score_resolution: What the network sees when score_size is native: protocol, the resized image, or native tiles.
        score_tta: Test-time transforms whose probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        processes: Runs at a time, each in a process of its own, on the same device; 1 runs them in this process.
            On a CPU they share its threads, where threads is none.
        minutes: Time for this call: no run is begun that would not fit, and what still runs then is saved and stopped.
            The table tells what there is; the same command goes on. None takes as long as it takes.
        keep_checkpoints: Keep last.pt and best.pt of finished runs, which take several times the room of the weights.
            Without them a finished run cannot go on to a larger patience.
        dataset_name: What the cards of shared weights call the images; none takes the name of their folder.
        license: Licence of the shared weights by its name on the hub, cc-by-nc-sa-4.0; none leaves a comment in its
            place.
        progress: Show the bar and the lines of every epoch too, beside the line of every run.

    Raises:
        StudyError: seeds or what is compared are empty, doubled or unknown, or a setting that the study itself sets.
        ConfigError: as for ``TrainConfig``.
    """

    set_by_the_study = SET_BY_THE_STUDY
    baseline = None  # the variant whose scores those of the others are compared with, run by run

    patience: int | tuple[int, ...] = 50
    seeds: int | tuple[int, ...] = 5
    cross_validation: int | str | None = None
    score_size: str = "protocol"
    score_resolution: str = "protocol"
    score_tta: str = "none"
    processes: int = 1
    minutes: float | None = None
    keep_checkpoints: bool = True
    dataset_name: str | None = None
    license: str | None = None
    progress: bool = False

    def __post_init__(self):
        if self.folds is not None and self.fold is None and self.cross_validation is None:  # every fold, then
            self.cross_validation, self.folds = self.folds, None
        super().__post_init__()
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        for name in self.set_by_the_study:
            if getattr(self, name) != defaults[name]:
                raise StudyError(f"{name}: the study sets it in every run; leave it out")
        check_scoring(self.scoring)
        if isinstance(self.seeds, int) and self.seeds < 1:
            raise StudyError(f"seeds: {self.seeds} is too small; give at least 1")
        check_list("seeds", self.seed_list, "5, or 3,7,11")
        if min(self.seed_list) < 0:
            raise StudyError(f"seeds: {min(self.seed_list)} is negative; give seeds from 0 up")
        check_list("patience", list(self.patiences), "50, or 50,100")
        if self.cross_validation is not None and self.folds is not None:
            raise StudyError("cross_validation: takes every fold itself; leave out folds and fold")
        if isinstance(self.cross_validation, str) and self.cross_validation.isdecimal():
            self.cross_validation = int(self.cross_validation)
        if isinstance(self.cross_validation, int) and self.cross_validation < 2:
            raise StudyError(f"cross_validation: {self.cross_validation} is too small; give 2 folds or more, or none")
        if self.processes < 1:
            raise StudyError(f"processes: {self.processes} is too small; give at least 1")
        if self.processes > 1 and self.progress:
            raise StudyError("progress: the bars of several processes would mix; set progress or processes, not both")
        if self.minutes is not None and self.minutes <= 0:
            raise StudyError(f"minutes: {self.minutes} is no time; give some, or none for as long as it takes")

    @property
    def scoring(self) -> dict[str, str]:
        """The settings that a score depends on beside those of the training."""
        return {name: getattr(self, name) for name in SCORING}

    @property
    def seed_list(self) -> list[int]:
        """The seeds, in the order of the runs."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def patiences(self) -> tuple[int, ...]:
        """The patiences, ascending."""
        return tuple(sorted(self.patience)) if isinstance(self.patience, tuple) else (self.patience,)

    @property
    def folds_source(self) -> str | None:
        """What ``folds`` is in every run: a shipped name, a file of the user's, or the one in the study's folder."""
        if isinstance(self.cross_validation, int):
            return str(Path(self.output).resolve() / FOLDS)
        return self.cross_validation

    def fold_list(self) -> list[int] | list[None]:
        """The folds that each seed trains on; [None] without cross-validation. DataError where they cannot be read."""
        if self.cross_validation is None:
            return [None]
        is_number = isinstance(self.cross_validation, int)
        return list(range(self.cross_validation if is_number else len(load_folds(self.cross_validation))))

    @abstractmethod
    def variants(self) -> list[Variant]:
        """What the study compares, in the order of the table."""

    def plan(self) -> list[PlannedRun]:
        """The runs, seed by seed and fold by fold: where a study is stopped, its networks have had about as many each.

        Raises:
            DataError: the folds cannot be read.
        """
        places = [(seed, fold) for seed in self.seed_list for fold in self.fold_list()]
        return [self.run(variant, seed, fold) for seed, fold in places for variant in self.variants()]

    def run(self, variant: Variant, seed: int, fold: int | None = None) -> PlannedRun:
        """The training of one variant with one seed, on one fold."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        settings |= {
            "data": str(Path(self.data).resolve()),  # as train keeps it
            "output": str(fold_folder(seed_folder(self.output, variant, seed), fold)),
            "model": variant.model,
            "model_options": variant.options,
            "seed": seed,
            "patience": self.patiences[0],
        }
        scored = self.scoring | {name: value for name, value in variant.changes.items() if name in SCORING}
        settings |= {name: value for name, value in variant.changes.items() if name not in SCORING}
        if fold is not None:
            settings |= {"folds": self.folds_source, "fold": fold}
        unet = self._run_of(UNET, seed, fold) if variant.from_unet else None
        if unet is not None:
            # One training serves all patiences and has one start: the U-Net that was trained for the longest.
            settings["init_from"] = str(unet.at(self.patiences[-1]).resolve())
        trained_by = self._run_of(variant.trained_as, seed, fold) if variant.trained_as else None
        return PlannedRun(variant, seed, fold, TrainConfig(**settings), self.patiences, scored, unet, trained_by)

    def _run_of(self, name: str, seed: int, fold: int | None) -> PlannedRun:
        return self.run(next(variant for variant in self.variants() if variant.name == name), seed, fold)


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
        models: Names of the networks, see ``uctrans.list_models()``: unet,uctransnet. uctransnet_from_unet is a
            UCTransNet that starts from the best weights of the U-Net of the same seed and fold, at the largest
            patience, which a study with it keeps.
        model_options: Further arguments of the networks, as a mapping or as JSON; each gets those that it takes.
    """

    models: tuple[str, ...] = ("unet", "uctransnet", "dual_branch_uctransnet")

    def __post_init__(self):
        super().__post_init__()
        check_list("models", [name for name in self.models if name], "unet,uctransnet")
        try:
            taken = {name: _options_of(_network(name)) for name in self.models}
        except ValueError as error:
            raise StudyError(f"models: {error}") from error
        for option in self.model_options:
            if not any(option in parameters for parameters in taken.values()):
                raise StudyError(f"model_options: none of {', '.join(self.models)} takes {option}; leave it out")
        for name in self.models:
            if name != _network(name):
                self._check_from_unet(name)

    def _check_from_unet(self, name: str) -> None:
        if not model_class(_network(name)).can_start_from_unet:
            raise StudyError(f"models: {name}: {_network(name)} cannot start from a U-Net; leave it out")
        if UNET not in self.models:
            raise StudyError(f"models: {name} starts from the U-Net of its seed and fold; name {UNET} too")
        if "skips" in self.model_options:
            raise StudyError(f"model_options: {name} starts from a U-Net with all skips; leave out skips")

    def variants(self) -> list[Variant]:
        """The networks, each with those of the options that it takes."""
        variants = []
        for name in self.models:
            network = _network(name)
            taken = _options_of(network)
            options = {option: value for option, value in self.model_options.items() if option in taken}
            variants.append(Variant(name, network, options, from_unet=name != network))
        return variants


def _network(name: str) -> str:
    """The registry name of a network that is to be compared."""
    return name if name in list_models() else name.removesuffix(FROM_UNET)


def _options_of(network: str) -> list[str]:
    return list(inspect.signature(model_class(network)).parameters)


def check_scoring(scoring: dict[str, str], source: str = "") -> None:
    """Raise StudyError where one of the settings `SCORING` is unknown, or they do not go together."""
    choices = {"score_size": score_sizes(), "score_resolution": RESOLUTIONS, "score_tta": list(TRANSFORMS)}
    for name, allowed in choices.items():
        if scoring[name] not in allowed:
            raise StudyError(f"{source}{name}: {scoring[name]!r} is not known; choose one of {', '.join(allowed)}")
    if scoring["score_resolution"] == "native" and scoring["score_size"] != "native":
        raise StudyError(f"{source}score_resolution: native needs native scores; set score_size to native too")


def check_list(name: str, items: list, example: str) -> None:
    """Raise StudyError where items are missing, or named twice."""
    if not items:
        raise StudyError(f"{name}: is empty; write it like {example}")
    if doubled := [str(item) for item in dict.fromkeys(items) if items.count(item) > 1]:
        raise StudyError(f"{name}: {', '.join(doubled)} is named more than once; name each once")
