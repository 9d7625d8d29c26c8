"""Weights in a form to share: model.safetensors, config.json and a model card. Nothing is uploaded from here."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uctrans
from uctrans.data import parse_palette
from uctrans.inference import PredictConfig
from uctrans.inference.predictor import transforms_in_words
from uctrans.inference.settings import output_folder, refuse_existing
from uctrans.model_card import CARD, FOLDS, CardScores, ModelCard, write_card
from uctrans.models.base import CONFIG_FILE, WEIGHTS_FILE, read_config
from uctrans.models.files import BEST_FOLDER
from uctrans.training import TrainConfig
from uctrans.writing import written_atomically

SUMMARY = "summary.json"
NAME_ON_HUB = re.compile(r"[\w.-]+", re.ASCII)
# Settings that change no result, and those that the command names by itself.
NOT_IN_THE_COMMAND = ("data", "output", "device", "threads", "progress", "save_minutes", "resume")
PREDICTION = ("resolution", "tta", "threshold", "tile", "overlap", "channel_order")  # settings that masks depend on


class SharingError(ValueError):
    """Weights or scores that cannot be shared as they are; the message names the remedy."""


@dataclass
class ShareConfig:
    """Settings of `share`.

    Args:
        model: Run folder, or a folder of save_pretrained.
        output: Folder for model.safetensors, config.json and the card, README.md.
        evaluation: Folder that uctrans evaluate wrote for these weights, whose scores the card is to have.
        name: What the card calls the model; none takes the name of the output folder.
        dataset: What the card calls the images; none takes the name of their folder.
        license: Licence of the weights by its name on the hub, cc-by-nc-sa-4.0; none leaves a comment in its place.
        overwrite: Replace weights that the output folder already holds.
    """

    model: str
    output: str
    evaluation: str | None = None
    name: str | None = None
    dataset: str | None = None
    license: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Shared:
    """A folder to share; ``str()`` of it is what to print.

    Attributes:
        folder: with the weights.
        card: of them.
        remark: what is to be told of a card that was there before, or "".
    """

    folder: Path
    card: ModelCard
    remark: str

    def __str__(self) -> str:
        todo = "read it and name a licence in it" if self.card.license is None else "read it"
        return "\n".join(
            [
                *([self.remark] if self.remark else []),
                f"Weights, configuration and card are in {self.folder}. The card is {CARD}: {todo}, then upload with",
                f"    {upload_command(self.folder, self.card.title)}",
            ]
        )


def share(config: ShareConfig) -> Shared:
    """Put the weights of a training run into a folder to share.

    The card has what the run folder and the weights tell: architecture, protocol, versions, the command that trains
    such a model, validation Dice; and the scores of an evaluation, where one of these very weights is given.

    Raises:
        ModelFileError: there is no model, or it is damaged.
        SharingError: a checkpoint in place of a folder, a name that the hub does not take, or an evaluation that is
            none or is of other weights.
        InferenceError: the output is a file, or holds weights and ``overwrite`` is not set.
    """
    source = Path(config.model)
    uctrans.load_model(source)  # weights that do not load are not shared
    if source.is_file():
        raise SharingError(
            f"{source} is a single file; give the folder of the run, or one that save_pretrained of the model wrote"
        )
    if not (source / CONFIG_FILE).exists():
        source = source / BEST_FOLDER
    training = _training_of(source)
    folds = None if training is None else folds_file(training)
    folder = output_folder(config.output)
    if not config.overwrite:
        names = (WEIGHTS_FILE, CONFIG_FILE, CARD, *([] if folds is None else [FOLDS]))
        refuse_existing([folder / name for name in names], "shared weights")
    title = config.name or folder.resolve().name
    if NAME_ON_HUB.fullmatch(title) is None:
        raise SharingError(f"name: {title!r} is none that the hub takes; give one of letters, digits and . - _")
    model = read_config(source)
    card = ModelCard(
        title=title,
        model=model,
        checksum=checksum(source),
        selection="These are the weights of the epoch with the best validation Dice of a single run."
        if "best_dice" in model.get("metadata", {})
        else "How these weights were chosen is not known.",
        command=None if training is None else training_command(training),
        dataset=config.dataset or (None if training is None else Path(training.data).name),
        scores=None if config.evaluation is None else _scores(Path(config.evaluation), model),
        license=config.license,
        folds=folds,
    )
    return write_shared(folder, source, card)


def write_shared(folder: Path, source: Path, card: ModelCard) -> Shared:
    """Write or renew a folder to share, with the folds where they are a file.

    Each file is replaced as a whole; the weights are linked where the disk can.

    Args:
        folder: to write.
        source: folder of save_pretrained with the weights.
        card: of these weights.
    """
    with written_atomically(folder / WEIGHTS_FILE) as temporary:
        temporary.unlink(missing_ok=True)  # left by a process that was killed; a copy would go through a link
        try:
            os.link((source / WEIGHTS_FILE).resolve(), temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / WEIGHTS_FILE, temporary)
    with written_atomically(folder / CONFIG_FILE) as temporary:  # never linked: it may be edited where it lies
        shutil.copyfile(source / CONFIG_FILE, temporary)
    if card.folds is not None:
        with written_atomically(folder / FOLDS) as temporary:
            shutil.copyfile(card.folds, temporary)
    return Shared(folder, card, write_card(folder / CARD, card))


def upload_command(folder: Path, name: str) -> str:
    """What uploads a folder to the Hugging Face hub."""
    return f"hf upload OWNER/{name} {shlex.quote(str(folder))}"


def checksum(folder: Path) -> str:
    """SHA-256 of the weights in a folder of save_pretrained, hexadecimal."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folds_file(config: TrainConfig) -> Path | None:
    """The file of the folds of a run; None where it has none, or they come with the package."""
    return Path(config.folds) if config.folds is not None and Path(config.folds).is_file() else None


def training_command(config: TrainConfig) -> str:
    """The ``uctrans train`` that repeats a run; what depends on the machine is a word in capitals."""
    words = ["uctrans", "train", "-i", "DATA", "-o", "RUN"]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in NOT_IN_THE_COMMAND or value == default:
            continue
        flag = field.name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}"]
        if not isinstance(value, bool):
            words.append(shlex.quote(_written(field.name, value)))
    return " ".join(words)


def prediction_flags(settings: dict[str, Any]) -> str:
    """The flags with which ``uctrans predict`` predicts as an evaluation with these settings did."""
    defaults = {field.name: field.default for field in dataclasses.fields(PredictConfig)}
    flags = {name: settings[name] for name in PREDICTION if settings.get(name, defaults[name]) != defaults[name]}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())


def scored_in_words(scored_at: str, tta: str) -> str:
    """How scores were taken: the pixels that were counted, and what probabilities are the mean of, if anything."""
    words = transforms_in_words(tta)
    return f"{scored_at}, each probability {words}" if words else scored_at


def _written(name: str, value: Any) -> str:
    """A setting as the command line takes it."""
    if value is None:
        return "null"
    if name == "init_from":
        return "INITIAL_WEIGHTS"
    if name == "folds" and (Path(value).suffix or Path(value).is_file()):
        return FOLDS if Path(value).is_file() else "FOLDS.json"
    if name == "palette":
        return ",".join(parse_palette(value))
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _training_of(source: Path) -> TrainConfig | None:
    """The configuration of the run that the weights are the best of; None where they are of none."""
    file = source.parent / "config.yaml"
    return TrainConfig.load_yaml(file) if source.name == BEST_FOLDER and file.exists() else None


def _scores(folder: Path, model: dict[str, Any]) -> CardScores:
    """The scores of an evaluation of this very model."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        evaluated = summary["model"]
        scores = CardScores(
            means=summary["mean"],
            counts=summary["count"],
            images=summary["images"],
            split=summary["settings"]["split"],
            scored_at=scored_in_words(summary["scored_at"], summary["settings"]["tta"]),
            flags=prediction_flags(summary["settings"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SharingError(
            f"evaluation: {folder / SUMMARY} cannot be used ({error!r}); evaluate these weights with uctrans evaluate, "
            "and name the folder it writes"
        ) from error
    if {"name": evaluated["name"], **evaluated["config"], "metadata": evaluated["metadata"]} != model:
        raise SharingError(
            f"evaluation: {folder} is of another model or other weights; evaluate these with uctrans evaluate"
        )
    return scores
