"""The flags of a command, made of its dataclass of settings: types, help, spellings, and what is said of a mistake."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from itertools import zip_longest
from types import UnionType
from typing import Any, get_args, get_type_hints

from uctrans.commands import COMMANDS


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
}

# What a value of a type is called in the message about one that is of another.
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


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
    settings = command.settings_class
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
    parser.format_help = lambda: _hyphenated(ArgumentParser.format_help(parser))
    return parser


def _hyphenated(text: str) -> str:
    """Flags as one types them; the names of settings, as a config file has them, keep their underscores."""
    return re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), text)


def spelled_out(words: Sequence[str], settings: type) -> list[str]:
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


def _listed(settings: type) -> list[str]:
    """Fields of ``settings`` that are written as lists; a training has one patience, a study may have several."""
    types = get_type_hints(settings)
    return [field for field in LISTED if field in types and types[field] is not int]


def in_plain_words(message: str, settings: type) -> str:
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
    return _hyphenated(f"--{field}") + f": {value.strip()} does not fit; {wanted}"


def near_flags(words: Sequence[str], parser: Any) -> str:
    """ "did you mean" for the flags among ``words`` that the parser does not know, or nothing."""
    known = [option for action in parser._actions for option in action.option_strings]
    flags = [word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in words if word[:2] == "--"]
    near = [match for flag in flags if flag not in known for match in difflib.get_close_matches(flag, known, n=1)]
    return _hyphenated(f"did you mean {' and '.join(near)}?") if near else ""
