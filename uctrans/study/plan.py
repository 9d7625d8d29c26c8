"""The settings of a study, and the runs that follow from them: every network with every seed on every fold."""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import load_folds
from ..inference.comparison import score_sizes
from ..inference.predictor import RESOLUTIONS, TRANSFORMS
from ..models.external import ExternalModel, find_model_class
from ..models.registry import list_models
from ..models.unet import NUM_SCALES
from ..training import TrainConfig

FOLDS_FILE = "folds.json"
UNET, FROM_UNET = "unet", "_from_unet"


class StudyError(ValueError):
    """A setting or an output folder that a study cannot work with; the message names the remedy."""


@dataclass(frozen=True)
class Variant:
    """One of the networks that a study compares."""

    name: str  # in the table
    model: str  # name of the network
    options: dict[str, Any]  # arguments of the network in addition to those that every training sets
    from_unet: bool = False  # whether it starts from the trained U-Net of the same seed and fold

    @property
    def folder(self) -> str:
        """Name of the folder of its runs: package.module.Class for package.module:Class."""
        return self.name.replace(":", ".")


@dataclass(frozen=True)
class PlannedRun:
    """One training, which is scored where each of the patiences stops it."""

    variant: Variant
    seed: int
    fold: int | None  # None without cross-validation
    config: TrainConfig  # with the smallest patience
    patiences: tuple[int, ...]  # ascending
    needs: tuple["PlannedRun", ...]  # the run of the U-Net that it starts from, if it does, which must be over before

    @property
    def folder(self) -> Path:
        """The run folder, as ``uctrans train`` writes it."""
        return Path(self.config.output)

    @property
    def label(self) -> str:
        """Seed and fold in words."""
        return f"seed {self.seed}" + ("" if self.fold is None else f", fold {self.fold}")

    @property
    def name(self) -> str:
        """The name of the run in messages."""
        return f"{self.variant.name}, {self.label}"

    def at(self, patience: int) -> Path:
        """Return the folder of the best weights and the scores of a patience, which ``uctrans.load_model`` reads."""
        return self.folder / f"patience_{patience}"


@dataclass(frozen=True)
class PlannedEnsemble:
    """The mean of the probabilities of the runs of a network with one seed on all folds."""

    needs: tuple[PlannedRun, ...]  # its members, which must be over before it can be scored

    @property
    def name(self) -> str:
        """The name of the ensemble in messages."""
        return f"{self.needs[0].variant.name}, seed {self.needs[0].seed}, ensemble of {len(self.needs)} folds"

    def at(self, patience: int) -> Path:
        """Return the folder of the scores of a patience."""
        return self.needs[0].folder.parent / "ensemble" / f"patience_{patience}"


Job = PlannedRun | PlannedEnsemble


@dataclass
class StudyConfig(TrainConfig):
    """Settings of a study: those of every run, and its own.

    The study sets ``model``, ``seed`` and ``resume`` in every run.

    Args:
        output: Folder of the study. It holds a run folder for each network, seed and fold in runs/.
        patience: Epochs without a better validation Dice after which training stops: 50, or several, 50,100. One
            training serves all of them: it is scored where the smallest stops it, and continues to the next.
        seeds: Number of seeds, counted from 0, or the seeds themselves: 5, or 3,7,11; [7] is the seed 7 alone.
        cross_validation: Train every seed once on each fold. A number makes that many folds of the images of train and
            val, the same for all seeds, and keeps them in folds.json of the study; monuseg takes the folds that come
            with the package, and a JSON file those in it. none trains all runs on the same images. folds without fold
            means the same.
        score_size: Size at which images are scored: protocol, native, or a protocol that resizes, see uctrans evaluate.
        score_resolution: What the network sees when score_size is native: protocol, the resized image, or native tiles.
        score_tta: Test-time transforms whose probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        processes: Number of runs at a time, each in a process of its own, on the same device. On a CPU they share its
            threads unless threads is given.
        minutes: Time for this call. No run begins that is not expected to end in time, and a run that is still
            training then is saved and stopped. The same command continues. none sets no limit.
        keep_checkpoints: Keep last.pt and best.pt of finished runs, which take several times the space of the weights.
            Without them a finished run cannot continue to a larger patience.
        progress: Show the progress bar and the lines of every epoch in addition to the line of every run.

    Raises:
        StudyError: Seeds, patiences or networks are empty, doubled or unknown; or a setting is given that the study
            itself sets.
        ConfigError: As for ``TrainConfig``.
    """

    not_flags = ("model", "seed", "resume")

    patience: int | tuple[int, ...] = 50
    seeds: int | tuple[int, ...] = 5
    cross_validation: int | str | None = None
    score_size: str = "protocol"
    score_resolution: str = "protocol"
    score_tta: str = "none"
    processes: int = 1
    minutes: float | None = None
    keep_checkpoints: bool = True
    progress: bool = False

    def __post_init__(self):
        patiences = tuple(self.patience) if isinstance(self.patience, list | tuple) else (self.patience,)
        _check_list("patience", patiences, "50, or 50,100")
        if self.folds is not None and self.fold is None and self.cross_validation is None:
            self.cross_validation, self.folds = self.folds, None
        self.patience = min(patiences)  # a training has one
        super().__post_init__()
        if not self.data:
            raise StudyError("data: is empty; name a folder")
        self.patience = tuple(sorted(patiences))
        if isinstance(self.cross_validation, str) and self.cross_validation.isdecimal():
            self.cross_validation = int(self.cross_validation)
        for field in dataclasses.fields(TrainConfig):
            if field.name in self.not_flags and getattr(self, field.name) != field.default:
                raise StudyError(f"{field.name}: the study sets it in every run; leave it out")
        for name, least in (("seeds", 1), ("cross_validation", 2), ("processes", 1)):
            if isinstance(value := getattr(self, name), int) and value < least:
                raise StudyError(f"{name}: {value} is too small; give at least {least}")
        _check_list("seeds", self.seed_list, "5, or 3,7,11")
        if min(self.seed_list) < 0:
            raise StudyError(f"seeds: {min(self.seed_list)} is negative; give seeds from 0 up")
        if self.cross_validation is not None and self.folds is not None:
            raise StudyError("cross_validation: takes every fold itself; leave out folds and fold")
        if self.processes > 1 and self.progress:
            raise StudyError("progress: the bars of several processes would mix; set progress or processes, not both")
        if self.minutes is not None and self.minutes <= 0:
            raise StudyError(f"minutes: {self.minutes} is too small; give a positive number, or none for no limit")
        choices = {"score_size": score_sizes(), "score_resolution": RESOLUTIONS, "score_tta": list(TRANSFORMS)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise StudyError(f"{name}: {value!r} is not known; choose one of {', '.join(allowed)}")
        if self.score_resolution == "native" and self.score_size != "native":
            raise StudyError("score_resolution: native needs native scores; set score_size to native too")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, in the order of the runs."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    @property
    def folds_source(self) -> str | None:
        """The ``folds`` of every run: a shipped name, a file of the user, or the file in the study's folder."""
        if isinstance(self.cross_validation, int):
            return str(Path(self.output).resolve() / FOLDS_FILE)
        return self.cross_validation

    def fold_list(self) -> list[int] | list[None]:
        """Return the folds that each seed trains on, or [None]; raise DataError if they cannot be read."""
        if self.cross_validation is None or isinstance(self.cross_validation, int):
            return [None] if self.cross_validation is None else list(range(self.cross_validation))
        return list(range(len(load_folds(self.cross_validation))))

    def variants(self) -> list[Variant]:
        """Return what the study compares, in the order of the table."""
        raise NotImplementedError

    def plan(self) -> list[PlannedRun]:
        """Return the runs, ordered by seed and fold, so that a stopped study has about as many runs of each network.

        Raises:
            DataError: The folds cannot be read.
        """
        places = [(seed, fold) for seed in self.seed_list for fold in self.fold_list()]
        return [self.run(variant, seed, fold) for seed, fold in places for variant in self.variants()]

    def ensembles(self) -> list[PlannedEnsemble]:
        """Return the ensembles of folds, one for each network and seed; none without cross-validation."""
        if self.cross_validation is None:
            return []
        return [
            PlannedEnsemble(tuple(self.run(variant, seed, fold) for fold in self.fold_list()))
            for seed in self.seed_list
            for variant in self.variants()
        ]

    def run(self, variant: Variant, seed: int, fold: int | None = None) -> PlannedRun:
        """Return the training of one network with one seed, on one fold."""
        folder = Path(self.output) / "runs" / variant.folder / f"seed_{seed}"
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        settings |= {
            "output": str(folder if fold is None else folder / f"fold_{fold}"),
            "model": variant.model,
            "model_options": variant.options,
            "seed": seed,
            "patience": self.patience[0],
        }
        if fold is not None:
            settings |= {"folds": self.folds_source, "fold": fold}
        needs = ()
        if variant.from_unet:
            unet = self.run(next(other for other in self.variants() if other.name == UNET), seed, fold)
            # One training serves all patiences, so it has one start: the U-Net that was trained for the longest.
            settings["init_from"] = str(unet.at(self.patience[-1]).resolve())
            needs = (unet,)
        return PlannedRun(variant, seed, fold, TrainConfig(**settings), self.patience, needs)


@dataclass
class SkipStudyConfig(StudyConfig):
    """Settings of ``uctrans study skips``: the U-Net with none of its skips, all, each alone, and all but one."""

    def __post_init__(self):
        super().__post_init__()
        if "skips" in self.model_options:
            raise StudyError("model_options: the study varies skips; leave it out")

    def variants(self) -> list[Variant]:
        """Return the ten subsets of the skips."""
        every = range(1, NUM_SCALES + 1)
        subsets = {
            "none": [],
            "all": [*every],
            **{f"only_{skip}": [skip] for skip in every},
            **{f"all_but_{skip}": [other for other in every if other != skip] for skip in every},
        }
        return [Variant(name, UNET, self.model_options | {"skips": skips}) for name, skips in subsets.items()]


@dataclass
class ModelStudyConfig(StudyConfig):
    """Settings of ``uctrans study models``.

    Args:
        models: Names of the networks, see ``uctrans.list_models()``: unet,uctransnet. uctransnet_from_unet is a
            UCTransNet that starts from the best weights of the U-Net of the same seed and fold at the largest patience.
            package.module:Class is any torch network, see uctrans train.
        model_options: Further arguments of the networks, as a mapping or as JSON; each network gets those it takes.
            Under the name of a network stand those of this network alone: {"unet": {"skips": [1, 2]}}.
    """

    models: tuple[str, ...] = ("unet", "uctransnet", "dual_branch_uctransnet")

    def __post_init__(self):
        super().__post_init__()
        _check_list("models", [name for name in self.models if name], "unet,uctransnet")
        for name in self.models:
            if not isinstance(own := self.model_options.get(name, {}), dict):
                raise StudyError(f"model_options: {name} has {own!r}; give a mapping of the options of this network")
        try:
            variants = self.variants()
        except ValueError as error:
            raise StudyError(f"models: {error}") from error
        for option in self.model_options:
            if option not in self.models and not any(option in variant.options for variant in variants):
                raise StudyError(f"model_options: none of {', '.join(self.models)} takes {option}; leave it out")
        for name, model in [(variant.name, variant.model) for variant in variants if variant.from_unet]:
            if not find_model_class(model).can_start_from_unet:
                raise StudyError(f"models: {name}: {model} cannot start from a U-Net; leave it out")
            if UNET not in self.models:
                raise StudyError(f"models: {name} starts from the U-Net of its seed and fold; name {UNET} too")
            if any("skips" in variant.options for variant in variants if variant.name in (name, UNET)):
                raise StudyError(f"model_options: {name} starts from a U-Net with all skips; leave out skips")
            if self.init_from is not None:
                raise StudyError(f"init_from: {name} starts from a U-Net of the study; leave one of them out")

    def variants(self) -> list[Variant]:
        """Return the networks, each with those of the options that it takes."""
        variants = []
        for name in self.models:
            model = name if name in list_models() or ":" in name else name.removesuffix(FROM_UNET)
            kind = find_model_class(model)
            taken = inspect.signature(kind.network_class if issubclass(kind, ExternalModel) else kind).parameters
            options = {option: value for option, value in self.model_options.items() if option in taken}
            options |= self.model_options.get(name, {})
            variants.append(Variant(name, model, options, from_unet=name != model))
        return variants


def _check_list(name: str, items: list | tuple, example: str) -> None:
    if not items:
        raise StudyError(f"{name}: is empty; write it like {example}")
    if doubled := [str(item) for item in dict.fromkeys(items) if items.count(item) > 1]:
        raise StudyError(f"{name}: {', '.join(doubled)} is named more than once; name each once")
