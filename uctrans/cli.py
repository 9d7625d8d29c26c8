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
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from uctrans.commands import COMMANDS
from uctrans.flags import build_parser, in_plain_words, near_flags, spelled_out

DEBUG_VARIABLE = "UCTRANS_DEBUG"
USER_ERROR = 2
STOPPING_SIGNALS = ("SIGINT", "SIGTERM")


class CommandLineError(ValueError):
    """The command line, or a config file it names, cannot be used."""


class Terminated(BaseException):
    """SIGTERM arrived."""


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


def _config_of_resumed_run(words: Sequence[str]) -> list[str]:
    """``--config`` with the config.yaml of the run that ``train`` is to resume, unless ``words`` name a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-i", "--input", "--data")
    parser.add_argument("-o", "--output")
    parser.add_argument("-c", "--config")
    parser.add_argument("--resume")
    given, _ = parser.parse_known_args(words)
    if given.config is not None or given.output is None or str(given.resume).lower() != "true":
        return []
    file = Path(given.output) / "config.yaml"
    if not file.exists() and given.input is None:
        raise CommandLineError(f"{file} does not exist, so there is no run to resume; name the folder of one")
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
    settings = COMMANDS[name].settings_class
    try:
        spelled = spelled_out(rest, settings)
        if name == "train":
            spelled = _config_of_resumed_run(spelled) + spelled
        namespace = parser.parse_args(spelled)
    except argparse.ArgumentError as error:
        hint = near_flags(rest, parser) or f"uctrans {name} --help lists the settings"
        raise CommandLineError(f"{in_plain_words(str(error), settings)} ({hint})") from error
    return name, settings(**{key: value for key, value in vars(namespace).items() if key != "config"})


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
    result = COMMANDS[name].run(settings)
    print(COMMANDS[name].report(result))
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
