"""Draw the networks: ``python -m uctrans.models.drawing --output docs/models`` (``make pictures``).

Writes a picture of every registered model into the folder, and rewrites the tables of the page beside it, which for
``docs/models`` is ``docs/models.md``. With ``--model`` it draws that one, with any options, and leaves the page alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ...writing import written_atomically
from ..registry import list_models
from . import draw, trace_model, with_tables


def main(words: list[str] | None = None) -> int:
    """Write pictures and tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m uctrans.models.drawing", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--model", help="draw this one alone")
    parser.add_argument("--options", type=_options, default={}, help="""of the model, as JSON: '{"skips": [1]}'""")
    arguments = parser.parse_args(words)
    if arguments.options and not arguments.model:
        parser.error("--options are those of one model: name it with --model")
    names = [arguments.model] if arguments.model else list_models()
    try:
        traces = {name: trace_model(name, **arguments.options) for name in names}
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    texts = {arguments.output / f"{name}.svg": draw(trace) for name, trace in traces.items()}
    if not arguments.model:
        page = arguments.output.with_suffix(".md")
        if not page.is_file():
            parser.error(f"{page}, the page of the tables, is not there: give the folder beside it, or one --model")
        texts[page] = with_tables(page.read_text(encoding="utf-8"), traces)
    for path, text in texts.items():
        with written_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"must be an object of options; got {text}")
    return options


if __name__ == "__main__":
    sys.exit(main())
