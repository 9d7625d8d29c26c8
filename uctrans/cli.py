"""The ``uctrans`` command: ``uctrans demo | prepare | train | evaluate | predict | export | study``.

A command is a function that takes a dataclass of settings. Each field is a flag, the docstring is its help, and
``--config FILE.yaml`` sets any of them (a flag wins over the file). The function is imported when the command runs, so
``uctrans --help`` needs neither PyTorch nor the training extra.

Exit status: 0 success; 2 an error that the user can mend, printed in one line on stderr (``UCTRANS_DEBUG=1`` shows the
traceback); 130 and 143 stopped by SIGINT and SIGTERM. A command whose reader has closed the pipe, as in
``uctrans study | head``, continues without output and keeps its exit status.
"""

import argparse
import dataclasses
import difflib
import os
import pkgutil
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import FrameType, NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .extras import import_extra
from .reading import UnreadableError, check_yaml, read_yaml
from .system import escaped, explained, is_utf8, lasting_streams

DEBUG_VARIABLE = "UCTRANS_DEBUG"
USER_ERROR = 2
STOPPING_SIGNALS = ("SIGINT", "SIGTERM")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


class CommandLineError(ValueError):
    """The command line, or a config file that it names, cannot be used."""


class Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: One line for the help.
        run: Function that takes a dataclass of settings, as "module:name".
        examples: Command lines for the help.
        input: Field that -i and --input set, if any.
        network: Field whose value may be package.module:Class, if any.
        report: Function from the result to the text to print.
    """

    summary: str
    run: str
    examples: tuple[str, ...]
    input: str | None = None
    network: str | None = None
    report: Callable[[Any], str] = str

    def load(self) -> tuple[Callable[[Any], Any], type]:
        """Return the function and the class of its settings; import their module."""
        function = pkgutil.resolve_name(self.run)
        return function, next(iter(get_type_hints(function).values()))


@dataclass
class PrepareMonusegConfig:
    """Settings of ``uctrans prepare monuseg``.

    Args:
        annotations: Folder of XML annotations, or one of them.
        output: Dataset with masks, with or without train, val and test: every annotated image gets an instance map
            (one number for each nucleus) in instances/ next to masks/, and the masks stay as they are. If images are
            given: folder for masks/ (0 and 255) and instances/, both drawn from the outlines.
        images: Folder of the annotated images; makes masks too.
        overwrite: Replace existing files.
    """

    annotations: str
    output: str
    images: str | None = None
    overwrite: bool = False


def prepare(config: PrepareMonusegConfig) -> Any:
    """Write the maps of MoNuSeg annotations; return the images with their numbers of nuclei."""
    from .data import prepare_instances, prepare_monuseg

    if config.images is None:
        return prepare_instances(config.annotations, config.output, overwrite=config.overwrite)
    prepared = prepare_monuseg(config.annotations, config.images, config.output, overwrite=config.overwrite)
    if Path(config.images).resolve() != (Path(config.output) / "images").resolve():
        print(f"For training, put the images of {config.images} into {Path(config.output) / 'images'}.")
    return prepared


def _report_files(files: Sequence[Path]) -> str:
    return f"Wrote {len(files)} files into {files[0].parent}" if files else "Nothing to write."


def _report_run(run: Any) -> str:
    best = (
        f"Best validation Dice {run.best_score:.4f} in epoch {run.best_epoch} of {run.epochs}"
        if run.best_epoch
        else f"No best weights yet after {run.epochs} epochs"
    )
    model = f" --model {run.model}" if ":" in run.model else ""
    command = f" Continue with: uctrans train -o {run.run_folder} --resume{model}"
    resume = command if run.stopped_by.startswith("SIG") else ""
    return f"{best} (stopped by: {run.stopped_by}). Everything is in {run.run_folder}.{resume}"


COMMANDS = {
    "demo": Command(
        "find nuclei by the built-in model; train, evaluate and predict on an embedded dataset, in minutes on a CPU",
        run="uctrans.demo:run_demo",
        examples=("uctrans demo -o demo",),
    ),
    "prepare monuseg": Command(
        "turn MoNuSeg annotations into masks and instance maps",
        run="uctrans.cli:prepare",
        input="annotations",
        report=lambda images: f"Wrote the maps of {len(images)} images, {sum(image.nuclei for image in images)} nuclei",
        examples=(
            "uctrans prepare monuseg -i data/annotations -o data",
            "uctrans prepare monuseg -i monuseg/annotations --images monuseg/images -o monuseg",
        ),
    ),
    "train": Command(
        "train a model on a folder of images and masks",
        run="uctrans.training:train",
        input="data",
        network="model",
        report=_report_run,
        examples=(
            "uctrans train -i data -o runs/first",
            "uctrans train -i data -o runs/unet --model unet --epochs 100",
            "uctrans train -i data -o runs/mine --model mynet:MyNet",
            "uctrans train --config runs/first/config.yaml -o runs/second --seed 1",
            "uctrans train -o runs/first --resume",
        ),
    ),
    "evaluate": Command(
        "score a model on images with masks",
        run="uctrans.inference:evaluate",
        input="data",
        network="network",
        report=lambda result: f"{result.table()}\nEverything is in {result.output}",
        examples=("uctrans evaluate -i data -o scores --model runs/first",),
    ),
    "predict": Command(
        "segment a folder of images, or one image",
        run="uctrans.inference:predict",
        input="input",
        network="network",
        examples=(
            "uctrans predict -i images -o masks --model runs/first",
            "uctrans predict -i images -o nuclei --model nuclei --instances",
        ),
    ),
    "export": Command(
        "write a model for use without uctrans",
        run="uctrans.inference:export",
        input="model",
        network="network",
        report=_report_files,
        examples=("uctrans export -i runs/first -o exported",),
    ),
    "study models": Command(
        "train several models with the same settings over seeds, and compare them",
        run="uctrans.study:study_models",
        input="data",
        network="models",
        examples=("uctrans study models -i data -o studies/models --models unet,uctransnet --seeds 0,1,2",),
    ),
    "study skips": Command(
        "train U-Nets with none, all and some of their skips over seeds, and compare them",
        run="uctrans.study:study_skips",
        input="data",
        examples=("uctrans study skips -i data -o studies/skips --seeds 5",),
    ),
}


class CommaList:
    """Type of a flag whose field holds a tuple, written a,b: YAML reads a # as a comment, and a shell reads [ ].

    It also takes [a,b], and the lists of a config file. null and none give None, and one item alone gives the item,
    where the field takes them.

    Args:
        hint: Type of the field, such as ``int | tuple[int, ...] | None``.
    """

    def __init__(self, hint: Any):
        options = _options(hint)
        items = get_args(next(option for option in options if get_origin(option) is tuple))
        self.convert = items[0] if items[0] in (int, str) else lambda item: item
        self.length = None if items[-1] is Ellipsis else len(items)
        self.takes_none = NoneType in options
        self.takes_one = any(option in (int, str) for option in options)

    def __call__(self, value: Any) -> Any:
        """Return the value of the field; ValueError if ``value`` is not one."""
        if self.takes_none and (value is None or value in ("null", "none")):
            return None
        parts = [part.strip(" '\"") for part in value.strip("[]()").split(",")] if isinstance(value, str) else value
        try:
            items = tuple(self.convert(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
            if self.takes_one and len(items) == 1 and (self.length or "[" not in str(value)):
                return items[0]
            if self.length not in (None, len(items)):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"Got value: {value}") from None
        return items

    def __repr__(self) -> str:
        numbers = ("224", "224,320") if self.length else ("50", "50,100")
        one, several = numbers if self.convert is int else ("a", "a,b")
        return f"{one} or {several}" if self.takes_one else several


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _flag_fields(settings: type) -> list[dataclasses.Field]:
    """Return the fields that are flags, required ones first; the class names the others in ``not_flags``."""
    fields = [field for field in dataclasses.fields(settings) if field.name not in getattr(settings, "not_flags", ())]
    return sorted(fields, key=lambda field: not _is_required(field))


def _is_required(field: dataclasses.Field) -> bool:
    return field.default in (MISSING, "") and field.default_factory is MISSING


def build_parser(name: str) -> Any:
    """Return the jsonargparse parser of a command, with a flag for each field of its settings.

    Raises:
        ImportError: jsonargparse is not installed.
    """
    jsonargparse = import_extra("jsonargparse", "training")
    command = COMMANDS[name]
    _, settings = command.load()
    parser = jsonargparse.ArgumentParser(
        prog=f"uctrans {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="examples: " + "; ".join(command.examples),
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of the settings; flags win over it")
    parse_docstring = import_extra("docstring_parser", "training").parse
    documented = [item for kind in reversed(settings.__mro__) for item in parse_docstring(kind.__doc__ or "").params]
    explanations = {item.arg_name: " ".join(item.description.split()) for item in documented}
    hints = get_type_hints(settings)
    for field in _flag_fields(settings):
        spellings = [_flag(field.name)]  # the first is the name in a config file
        keywords: dict[str, Any] = {"help": explanations[field.name], "type": hints[field.name]}
        if field.name in (command.input, "output"):
            short, long = ("-i", "--input") if field.name == command.input else ("-o", "--output")
            spellings = list(dict.fromkeys((*spellings, short, long)))
            keywords["metavar"] = "PATH"
        elif hints[field.name] is bool:
            keywords |= {"action": jsonargparse.ActionYesNo(no_prefix="no-"), "nargs": "?"}
            del keywords["type"]
        elif any(get_origin(option) is tuple for option in _options(hints[field.name])):
            keywords |= {"type": CommaList(hints[field.name]), "metavar": "LIST"}
        if field.metadata.get("is_recorded"):
            keywords["help"] = argparse.SUPPRESS
        if _is_required(field):
            keywords["required"] = True
        else:
            keywords["default"] = field.default if field.default_factory is MISSING else field.default_factory()
        parser.add_argument(*spellings, **keywords)
    return parser


def parse(words: Sequence[str]) -> tuple[str, Any]:
    """Return the command that the words after ``uctrans`` name, and its settings.

    ``train --resume`` starts from the settings of the run in the output folder; flags win over them.

    Raises:
        CommandLineError: The command or a flag is unknown, a value has the wrong type, or a name is not UTF-8.
        ValueError: The settings refuse a value.
        ImportError: See `build_parser`.
    """
    if foreign := [word for word in words if not is_utf8(word)]:
        raise CommandLineError(f"{escaped(foreign[0])}: is not UTF-8; rename the file or folder")
    name, rest = _split_command(words)
    parser = build_parser(name)
    _, settings = COMMANDS[name].load()
    rest = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in rest]
    try:
        if name == "train":
            rest = _config_of_resumed_run(rest) + rest
        _check_values(rest)
        given = vars(parser.parse_args(rest))
    except argparse.ArgumentError as error:
        hint = _near_flags(rest, settings) or f"uctrans {name} --help lists the settings"
        message = _with_name_of_switch(str(error), rest, settings)
        raise CommandLineError(f"{_in_plain_words(message, settings)} ({hint})") from error
    _check_classes_are_named(words, rest, COMMANDS[name].network, given)
    return name, settings(**{field: value for field, value in given.items() if field != "config"})


def _split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the command at the start of ``words``, and the words after it."""
    for name in COMMANDS:
        count = len(name.split())
        if " ".join(words[:count]) == name:
            return name, list(words[count:])
    first_words = {name.split()[0]: name for name in COMMANDS}
    near = [first_words[word] for word in difflib.get_close_matches(words[0], first_words)]
    choices = [name for name in COMMANDS if name.split()[0] == words[0]] or list(COMMANDS)
    given = [word for word in words[:2] if not word.startswith("-")]
    remedy = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"
    raise CommandLineError(f"no such command: {' '.join(given)}; {remedy}")


def _config_of_resumed_run(words: Sequence[str]) -> list[str]:
    """Return ``--config`` with the config.yaml of the run that ``train`` resumes, unless ``words`` name a file."""
    given = _paths_and_resume(words)
    if given.config or given.output is None or str(given.resume).lower() not in ("true", "yes"):
        return []
    file = Path(given.output) / "config.yaml"
    if not file.exists() and given.input is None:
        if (last := file.with_name("last.pt")).exists():
            raise CommandLineError(
                f"{file} is missing, so {last} can only be continued with the settings of the run: give them again "
                "(-i DATA and the flags or --config it began with) with --resume; settings that differ are then listed"
            )
        raise CommandLineError(f"{file} does not exist, so there is no run to resume; name the folder of one")
    return [f"--config={file}"] if file.exists() else []


def _check_values(words: Sequence[str]) -> None:
    """Raise CommandLineError if ``words`` or a config file that they name would block or exhaust the memory.

    jsonargparse takes text for YAML, also as the value of a flag or of a field in a file.
    """
    try:
        for word in words:
            check_yaml(word.partition("=")[2] if word.startswith("-") else word, repr(word[:40]))
        for file in filter(os.path.exists, _paths_and_resume(words).config):
            for field, value in read_yaml(file).items():
                if field == "config":  # which jsonargparse would read unchecked
                    raise UnreadableError(f"{file}: names another config file")
                if isinstance(value, str):
                    check_yaml(value, f"{file}: {field}")
    except UnreadableError as error:
        raise CommandLineError(f"{error}; write it like a run's config.yaml") from error


def _paths_and_resume(words: Sequence[str]) -> argparse.Namespace:
    """Return ``input``, ``output``, ``config`` and ``resume`` as ``words`` give them, without checks."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-i", "--input", "--data")
    parser.add_argument("-o", "--output")
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--resume", nargs="?", const="true")
    return parser.parse_known_args(words)[0]


def _check_classes_are_named(words: Sequence[str], flags: Sequence[str], field: str | None, given: dict) -> None:
    """Raise if a package.module:Class comes from a config file alone: importing it runs code, so the user names it.

    Args:
        words: the words after ``uctrans``.
        flags: those after the command.
        field: the field that may name such a class.
        given: the values of all fields, from flags and files.
    """
    if field is None or given[field] is None:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(_flag(field), default="")
    flag_value = getattr(parser.parse_known_args(flags)[0], field)
    named = [name.strip(" []'\"") for name in flag_value.split(",")]  # a list may be written as JSON
    values = [given[field]] if isinstance(given[field], str) else given[field]
    for value in values:
        if ":" in value and value not in named:
            raise CommandLineError(
                f"{field}: a config file names the class {value}, and no name in a file has code imported; if you "
                f"trust this class, name it yourself: uctrans {shlex.join(words)} {_flag(field)} {','.join(values)}"
            )


def _with_name_of_switch(message: str, words: Sequence[str], settings: type) -> str:
    """Return ``message`` with the name of a switch that has a bad value in a config file: jsonargparse omits it."""
    found = re.fullmatch(r"Value not boolean: (.*)\.", message, flags=re.DOTALL)
    if not found:
        return message
    values = read_yaml(_paths_and_resume(words).config[-1])
    switches = [field for field, hint in get_type_hints(settings).items() if hint is bool]
    names = [field for field in switches if field in values and str(values[field]) == found[1]]
    return f'Parser key "{names[0]}": Got value: {found[1]}' if names else message


def _in_plain_words(message: str, settings: type) -> str:
    """Return what jsonargparse says about a value of the wrong type in plain words, and other messages as they are."""
    patterns = (r'Parser key "([\w-]+)":.*(?:Got|Given) value: (.*)', r"argument --([\w-]+).*: invalid .* value: (.*)")
    found = next(filter(None, (re.search(pattern, message, flags=re.DOTALL) for pattern in patterns)), None)
    hints = get_type_hints(settings)
    field = found[1].replace("-", "_") if found else None
    if field not in hints:
        return message
    options = _options(hints[field])
    if any(get_origin(option) is tuple for option in options):
        wanted = f"write it like {CommaList(hints[field])}"
    else:
        wanted = "give " + " or ".join(KINDS.get(option, str(option)) for option in options)
    return f"{_flag(field)}: {found[2].strip()} does not fit; {wanted}"


def _near_flags(words: Sequence[str], settings: type) -> str:
    """Return "did you mean" for the unknown flags among ``words``, or an empty string."""
    known = [*(_flag(field.name) for field in _flag_fields(settings)), "--input", "--output", "--config"]
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    near = [match for flag in flags if flag not in known for match in difflib.get_close_matches(flag, known, n=1)]
    return f"did you mean {' and '.join(near)}?" if near else ""


def _overview() -> str:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: uctrans [--help] [--version] COMMAND ...\n\n"
        f"UCTransNet for medical image segmentation.\n\ncommands:\n{listing}\n\n"
        "uctrans COMMAND --help lists its settings. To begin: uctrans demo"
    )


def _run(words: Sequence[str]) -> int:
    name, settings = parse(words)
    function, _ = COMMANDS[name].load()
    from .devices import explaining_short_memory

    with explaining_short_memory("free memory, or use a machine with more"):
        result = function(settings)
    print(COMMANDS[name].report(result), flush=True)
    stopped_by = getattr(result, "stopped_by", "")
    return 128 + signal.Signals[stopped_by] if stopped_by in STOPPING_SIGNALS else 0


def _is_for_user(error: Exception) -> bool:
    """Return whether the message says what the user can do; any other RuntimeError is a bug and keeps its traceback."""
    if not isinstance(error, RuntimeError):
        return True
    from torch import OutOfMemoryError

    from .graphs import CaptureError
    from .models import NetworkError
    from .training import TrainingError

    return isinstance(error, NotImplementedError | OutOfMemoryError | TrainingError | CaptureError | NetworkError)


def _with_notes(text: str, error: BaseException) -> str:
    """Return the text and the notes that were added to the error, such as how much is done."""
    return "; ".join([text, *getattr(error, "__notes__", ())])


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@lasting_streams()
def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        words: The words after ``uctrans``; None takes them from the process.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from . import __version__

        print(f"uctrans {__version__}")
        return 0
    from .writing import format_warning

    signal.signal(signal.SIGTERM, _raise_terminated)
    form_before, warnings.formatwarning = warnings.formatwarning, format_warning
    try:
        return _run(words)
    except KeyboardInterrupt as stop:
        print(_with_notes("uctrans: interrupted", stop), file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated as stop:
        print(_with_notes("uctrans: terminated", stop), file=sys.stderr)
        return 128 + signal.SIGTERM
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(DEBUG_VARIABLE) or not _is_for_user(error):
            raise
        print(_with_notes(f"uctrans: error: {explained(error)}", error), file=sys.stderr)
        return USER_ERROR
    finally:
        warnings.formatwarning = form_before
