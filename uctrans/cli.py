"""The ``uctrans`` command: ``uctrans demo | prepare | train | evaluate | predict | export | share | study | ...``.

A command is a dataclass of settings and a function that takes it. The fields are the flags, the docstring is
their help, and ``--config FILE.yaml`` sets any of them (a flag wins over the file). A command's module is imported when
it runs, so ``uctrans --help`` works without the training extra.

Exit status: 0 done; 2 a mistake to be mended by the user, told in one line on stderr (``UCTRANS_DEBUG=1`` shows the
traceback); 130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
import difflib
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from types import FrameType, UnionType
from typing import Any, get_args, get_type_hints

DEBUG_VARIABLE = "UCTRANS_DEBUG"
USER_ERROR = 2
STOPPING_SIGNALS = ("SIGINT", "SIGTERM")


@dataclass(frozen=True)
class Command:
    """A subcommand: what it runs and how it is explained."""

    summary: str
    module: str
    settings: str  # name of the dataclass in the module
    function: str  # name of the function that takes one
    report: Callable[[Any], str]  # what to print of its result
    paths: dict[str, tuple[str, str]]  # field: (its flag --input or --output, help)
    examples: tuple[str, ...]
    hidden: tuple[str, ...] = ()  # fields that are no flags


def _report_files(files: Sequence[Any]) -> str:
    return f"Wrote {len(files)} files into {files[0].parent}" if files else "Nothing to write."


def _report_run(run: Any) -> str:
    best = (
        f"Best validation Dice {run.best_score:.4f} in epoch {run.best_epoch} of {run.epochs}"
        if run.best_epoch
        else f"No best weights yet after {run.epochs} epochs"
    )
    resume = f" Continue with: uctrans train -o {run.run_folder} --resume" if run.stopped_by.startswith("SIG") else ""
    return f"{best} (stopped by: {run.stopped_by}). Everything is in {run.run_folder}.{resume}"


_STUDY_PATHS = {
    "data": ("input", "dataset: {train,val,test}/{images,masks}, or images and masks side by side"),
    "output": ("output", "folder of the study; the same command goes on with what is in it"),
}
_SET_BY_A_STUDY = ("model", "seed", "init_from", "resume")

COMMANDS = {
    "demo": Command(
        summary="train, evaluate and predict on a small embedded dataset, in minutes on a CPU",
        module="uctrans.demo",
        settings="DemoConfig",
        function="run_demo",
        report=str,
        paths={"output": ("output", "folder for everything the demo writes")},
        examples=("uctrans demo -o demo",),
    ),
    "prepare monuseg": Command(
        summary="turn MoNuSeg annotations into masks and instance maps",
        module="uctrans.cli",
        settings="PrepareMonusegConfig",
        function="_prepare_monuseg",
        report=lambda images: f"Wrote the maps of {len(images)} images, {sum(image.nuclei for image in images)} nuclei",
        paths={
            "annotations": ("input", "folder of XML annotations, or one of them"),
            "output": ("output", "dataset with masks, which gets instance maps; or, with --images, folder for both"),
        },
        examples=(
            "uctrans prepare monuseg -i data/annotations -o data",
            "uctrans prepare monuseg -i monuseg/annotations --images monuseg/images -o monuseg",
        ),
    ),
    "train": Command(
        summary="train a model on a folder of images and masks",
        module="uctrans.training",
        settings="TrainConfig",
        function="train",
        report=_report_run,
        paths={
            "data": ("input", "dataset: {train,val,test}/{images,masks}, or images and masks side by side"),
            "output": ("output", "run folder: checkpoints, curves, the resolved config"),
        },
        examples=(
            "uctrans train -i data -o runs/first",
            "uctrans train -i data -o runs/unet --model unet --epochs 100",
            "uctrans train --config runs/first/config.yaml -o runs/second --seed 1",
            "uctrans train -o runs/first --resume",
        ),
    ),
    "evaluate": Command(
        summary="score a model on images with masks",
        module="uctrans.inference",
        settings="EvaluateConfig",
        function="evaluate",
        report=lambda result: f"{result.table()}\nEverything is in {result.output}",
        paths={
            "data": ("input", "dataset: {train,val,test}/{images,masks}, or images and masks side by side"),
            "output": ("output", "folder for metrics.csv, summary.json and pictures"),
        },
        examples=("uctrans evaluate -i data -o scores --model runs/first",),
    ),
    "predict": Command(
        summary="segment a folder of images, or one image",
        module="uctrans.inference",
        settings="PredictConfig",
        function="predict",
        report=_report_files,
        paths={
            "input": ("input", "folder of images, or one image"),
            "output": ("output", "folder for the masks and overlays"),
        },
        examples=("uctrans predict -i images -o masks --model runs/first",),
    ),
    "export": Command(
        summary="write a model for use without uctrans",
        module="uctrans.inference",
        settings="ExportConfig",
        function="export",
        report=_report_files,
        paths={
            "model": ("input", "run folder, saved model or checkpoint"),
            "output": ("output", "folder to write"),
        },
        examples=("uctrans export -i runs/first -o exported",),
    ),
    "share": Command(
        summary="put a model's weights into a folder to share, with a model card",
        module="uctrans.sharing",
        settings="ShareConfig",
        function="share",
        report=str,
        paths={
            "model": ("input", "run folder, or a folder of save_pretrained"),
            "output": ("output", "folder to write"),
        },
        examples=("uctrans share -i runs/first -o shared/first --evaluation scores",),
    ),
    "study skips": Command(
        summary="train U-Nets with none, all and some of their skips over seeds, and compare them",
        module="uctrans.study",
        settings="SkipStudyConfig",
        function="study_skips",
        report=str,
        paths=_STUDY_PATHS,
        examples=("uctrans study skips -i data -o studies/skips --seeds 5",),
        hidden=_SET_BY_A_STUDY,
    ),
    "study models": Command(
        summary="train several models with the same settings over seeds, and compare them",
        module="uctrans.study",
        settings="ModelStudyConfig",
        function="study_models",
        report=str,
        paths=_STUDY_PATHS,
        examples=("uctrans study models -i data -o studies/models --models unet,uctransnet --seeds 0,1,2",),
        hidden=_SET_BY_A_STUDY,
    ),
    "study recipes": Command(
        summary="train one model in several ways over seeds, and compare them run by run",
        module="uctrans.study",
        settings="RecipeStudyConfig",
        function="study_recipes",
        report=str,
        paths=_STUDY_PATHS,
        examples=("uctrans study recipes -i data -o studies/recipes --cross-validation monuseg --seeds 1",),
        hidden=tuple(field for field in _SET_BY_A_STUDY if field != "model"),
    ),
    "benchmark": Command(
        summary="time a model's backends against each other on this machine",
        module="uctrans.benchmark",
        settings="BenchmarkConfig",
        function="benchmark",
        report=str,
        paths={"output": ("output", "folder for benchmark.json; without it the table is only printed")},
        examples=("uctrans benchmark", "uctrans benchmark --model attention --sizes 224,512 --mode training"),
    ),
}


class _CommaList:
    """Type of a flag: a list as one writes it in a shell, or as a config file holds it; null and none give None.

    Args:
        item: type of the items.
        example: what the help shows.
        is_size: the items are height and width in pixels, and one number alone stays a number.
    """

    def __init__(self, item: type, example: str, is_size: bool = False):
        self.item, self.example, self.is_size = item, example, is_size

    def __call__(self, value: Any) -> Any:
        if value is None or value in ("null", "none"):
            return None
        parts = [part.strip(" '\"") for part in value.strip("[]()").split(",")] if isinstance(value, str) else value
        try:
            items = tuple(self.item(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
        except ValueError:
            raise ValueError(f"Got value: {value}") from None
        if self.is_size and len(items) > 2:
            raise ValueError(f"Got value: {value}")
        return items[0] if self.is_size and len(items) == 1 else items

    def __repr__(self) -> str:
        return self.example


class _Seeds(_CommaList):
    """Type of a flag: a number of seeds, or a list of them; ``[7]`` is a list of one."""

    def __call__(self, value: Any) -> Any:
        seeds = super().__call__(value)
        return seeds[0] if seeds and len(seeds) == 1 and "[" not in str(value) else seeds


# Fields that are written as a,b,c. jsonargparse reads YAML otherwise, in which a # begins a comment, and whose [a,b,c]
# is a pattern of file names to a shell.
LISTED = {
    "palette": (
        _CommaList(str, "a,b,c"),
        "colours of the classes in colour-coded masks, background first: '#000000,#ff0000'",
    ),
    "class_names": (_CommaList(str, "a,b,c"), "names of the classes, kept with the weights: background,nucleus"),
    "image_size": (
        _CommaList(int, "224 or 224,320", is_size=True),
        "height and width in pixels, or one number for a square; none takes the protocol's or the model's",
    ),
    "formats": (_CommaList(str, "a,b"), "torch (torch.export program), onnx, or both: torch,onnx"),
    "seeds": (
        _Seeds(int, "5 or 3,7,11"),
        "how many seeds, counted from 0, or the seeds themselves; [7] for one of them",
    ),
    "models": (
        _CommaList(str, "a,b"),
        "names of the models to compare: unet,uctransnet,dual_branch_uctransnet; uctransnet_from_unet starts from the "
        "trained unet of the same seed and fold, at the largest patience",
    ),
    "patience": (
        _CommaList(int, "50 or 50,100"),
        "epochs without a better validation Dice after which training stops; several share one training, which is "
        "scored at each",
    ),
    "sizes": (_CommaList(int, "224,512"), "sides of the square images, in pixels"),
    "backends": (
        _CommaList(str, "a,b"),
        "backends to compare: reference,composed; none takes all that this machine can run",
    ),
}

# What a value of a type is called in the message about one that is of another.
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class CommandLineError(ValueError):
    """The command line, or a config file it names, cannot be used."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass
class PrepareMonusegConfig:
    """Settings of ``uctrans prepare monuseg``.

    Attributes:
        annotations: Folder of XML annotations, or one of them.
        output: A dataset with masks, split into train, val and test or not: every annotated image gets an instance map
            (one number a nucleus) in instances/ beside masks/, and the masks stay as they are. Where images are given:
            the folder for masks/ (0 and 255) and instances/, both made of the outlines.
        images: Folder of the images that the annotations belong to, to have masks made as well.
        overwrite: Replace what would be written and is there already.
    """

    annotations: str
    output: str
    images: str | None = None
    overwrite: bool = False


def _prepare_monuseg(config: PrepareMonusegConfig) -> Any:
    from uctrans.data import prepare_instances, prepare_monuseg

    if config.images is None:
        return prepare_instances(config.annotations, config.output, overwrite=config.overwrite)
    prepared = prepare_monuseg(config.annotations, config.images, config.output, overwrite=config.overwrite)
    if Path(config.images).resolve() != (Path(config.output) / "images").resolve():
        print(f"For training, put the images of {config.images} into {Path(config.output) / 'images'}.")
    return prepared


def _overview() -> str:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: uctrans [--help] [--version] COMMAND ...\n\n"
        f"UCTransNet for medical image segmentation.\n\ncommands:\n{listing}\n\n"
        "uctrans COMMAND --help lists its settings. To begin: uctrans demo"
    )


def _split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command that ``words`` begin with, and the words after it."""
    for name in COMMANDS:
        count = len(name.split())
        if " ".join(words[:count]) == name:
            return name, list(words[count:])
    first_words = {name.split()[0]: name for name in COMMANDS}
    near = [first_words[word] for word in difflib.get_close_matches(words[0], first_words)]
    choices = [name for name in COMMANDS if name.split()[0] == words[0]] or near or list(COMMANDS)
    given = [word for word in words[:2] if not word.startswith("-")]
    raise CommandLineError(f"no such command: {' '.join(given)}; choose one of {', '.join(choices)}")


def _listed(settings: type) -> list[str]:
    """Fields of ``settings`` that are written as lists; a training has one patience, a study may have several."""
    types = get_type_hints(settings)
    return [field for field in LISTED if field in types and types[field] is not int]


def _settings_class(command: Command) -> type:
    return getattr(importlib.import_module(command.module), command.settings)


def build_parser(name: str) -> Any:
    """The jsonargparse parser of the command ``name`` (a key of `COMMANDS`).

    Raises:
        ImportError: jsonargparse is not installed.
    """
    try:
        from jsonargparse import ArgumentParser
    except ModuleNotFoundError as error:
        raise ImportError(
            f'the command line needs {error.name}, which is not installed: pip install "uctrans[training]"'
        ) from error
    command = COMMANDS[name]
    settings = _settings_class(command)
    parser = ArgumentParser(
        prog=f"uctrans {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="examples: " + "; ".join(command.examples),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the settings; flags win over it")
    types, defaults = get_type_hints(settings), {field.name: field.default for field in fields(settings)}
    for field, (flag, explanation) in command.paths.items():
        default = {"required": True} if defaults[field] in (MISSING, "") else {"default": defaults[field]}
        # The first spelling is the name in a config file.
        spellings = dict.fromkeys((f"--{field}", f"-{flag[0]}", f"--{flag}"))
        parser.add_argument(*spellings, type=types[field], metavar="PATH", help=explanation, **default)
    listed = {field: LISTED[field] for field in _listed(settings)}
    for field, (kind, explanation) in listed.items():
        parser.add_argument(f"--{field}", type=kind, default=defaults[field], metavar="LIST", help=explanation)
    parser.add_class_arguments(settings, skip={*command.paths, *listed, *command.hidden})
    return parser


def _spelled_out(words: Sequence[str], settings: type) -> list[str]:
    """Flags as the parser knows them: underscores for hyphens, and a value for ``--switch`` and ``--no-switch``."""
    switches = {name for name, kind in get_type_hints(settings).items() if kind is bool}
    spelled = []
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        if not equals and flag[2:] in switches and following.startswith("-"):
            spelled.append(f"{flag}=true")
        elif not equals and flag.startswith("--no_") and flag[5:] in switches:
            spelled.append(f"--{flag[5:]}=false")
        else:
            spelled.append(flag + equals + value)
    return spelled


def _config_of_resumed_run(words: Sequence[str]) -> list[str]:
    """``--config`` with the config.yaml of the run that ``train`` is to resume, unless ``words`` name a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-o", "--output")
    parser.add_argument("-c", "--config")
    parser.add_argument("--resume")
    given, _ = parser.parse_known_args(words)
    if given.config is not None or given.output is None or str(given.resume).lower() != "true":
        return []
    file = Path(given.output) / "config.yaml"
    return [f"--config={file}"] if file.exists() else []


def parse(words: Sequence[str]) -> tuple[str, Any]:
    """The command that the words after ``uctrans`` name, and its settings.

    ``train --resume`` starts from the settings of the run in the output folder; flags win over them.

    Raises:
        CommandLineError: an unknown command or flag, or a value of the wrong type.
        ValueError: a value that the command's settings refuse.
        ImportError: see `build_parser`.
    """
    name, rest = _split_command(words)
    parser = build_parser(name)
    settings = _settings_class(COMMANDS[name])
    try:
        spelled = _spelled_out(rest, settings)
        if name == "train":
            spelled = _config_of_resumed_run(spelled) + spelled
        namespace = parser.parse_args(spelled)
    except argparse.ArgumentError as error:
        hint = _near_flags(rest, parser) or f"uctrans {name} --help lists the settings"
        raise CommandLineError(f"{_in_plain_words(str(error), settings)} ({hint})") from error
    return name, settings(**{key: value for key, value in vars(namespace).items() if key != "config"})


def _in_plain_words(message: str, settings: type) -> str:
    """What jsonargparse says of a value of the wrong type, in the words of the command line; other messages as is."""
    patterns = (r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', r"argument --(\w+): invalid .* value: (.*)")
    found = next(filter(None, (re.search(pattern, message, flags=re.DOTALL) for pattern in patterns)), None)
    types = get_type_hints(settings)
    if found is None or found[1] not in types:
        return message
    field, value = found.groups()
    if field in _listed(settings):
        wanted = f"write it like {LISTED[field][0]}"
    else:
        kinds = get_args(types[field]) if isinstance(types[field], UnionType) else (types[field],)
        wanted = "give " + " or ".join(KINDS.get(kind, str(kind)) for kind in kinds)
    return f"--{field}: {value.strip()} does not fit; {wanted}"


def _near_flags(words: Sequence[str], parser: Any) -> str:
    """ "did you mean" for the flags among ``words`` that the parser does not know, or nothing."""
    known = [option for action in parser._actions for option in action.option_strings]
    flags = [word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in words if word[:2] == "--"]
    near = [match for flag in flags if flag not in known for match in difflib.get_close_matches(flag, known, n=1)]
    return f"did you mean {' and '.join(near)}?" if near else ""


def _explained(error: Exception) -> str:
    """The message of an error in one line, with a remedy where the operating system gives none."""
    remedy = {
        errno.ENOSPC: ": the disk is full; free space or choose another output folder",
        errno.EDQUOT: ": the quota is used up; free space or choose another output folder",
        errno.EROFS: ": choose an output folder that can be written",
        errno.EACCES: ": choose a folder you may read and write",
    }
    suffix = remedy.get(error.errno, "") if isinstance(error, OSError) else ""
    return " ".join(str(error).split()) + suffix


def _run(words: Sequence[str]) -> int:
    name, settings = parse(words)
    command = COMMANDS[name]
    result = getattr(importlib.import_module(command.module), command.function)(settings)
    print(command.report(result))
    stopped_by = getattr(result, "stopped_by", "")
    return 128 + signal.Signals[stopped_by] if stopped_by in STOPPING_SIGNALS else 0


def _is_for_user(error: Exception) -> bool:
    """Whether the message says what the user can do; any other RuntimeError is a bug and keeps its traceback."""
    if not isinstance(error, RuntimeError):
        return True
    from torch import OutOfMemoryError

    from uctrans.inference import ExportError
    from uctrans.training import TrainingError

    return isinstance(error, NotImplementedError | OutOfMemoryError | TrainingError | ExportError)


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        words: what stands after ``uctrans``; None takes it from the process.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from uctrans import __version__

        print(f"uctrans {__version__}")
        return 0
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("uctrans: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print("uctrans: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(DEBUG_VARIABLE) or not _is_for_user(error):
            raise
        print(f"uctrans: error: {_explained(error)}", file=sys.stderr)
        return USER_ERROR
