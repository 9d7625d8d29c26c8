"""Evidence from a GPU in one command: tests, sanitizer, benchmarks, profile, in one record that grows part by part.

    python -m benchmarks.gpu_evidence                  (make gpu)
    python -m benchmarks.gpu_evidence --list
    python -m benchmarks.gpu_evidence --dry-run        (on a CPU: the same parts, with next to nothing to do)

Needs torch, triton, numpy, pytest and pytest-benchmark, and no installation. The folder ``--output`` gets
``evidence.json`` with every outcome and sample, ``evidence.md`` with the same as tables, ``log.txt`` with what was
printed, and the lines that a session started again goes on from: the same command again runs what is left.
"""

import argparse
import difflib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .evidence.children import ROOT, environment, python
from .evidence.parts import Part
from .evidence.plan import dry_parts, gpu_parts
from .evidence.record import PAGE_FILE, EvidenceError, EvidenceRecord
from .evidence.session import Session, listing
from .records import sources

MINUTES = 9.0
ASK = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
RESULTS = ROOT / "benchmarks" / "results"
DRY_OUTPUT = ROOT / ".benchmarks" / "dry-run"


def main(words: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> int:
    """Run what the command line asks for; returns the exit status, 1 if a part failed and 2 if nothing could run."""
    arguments = _parser().parse_args(words)
    parts = parts or (dry_parts() if arguments.dry_run else gpu_parts())
    try:
        parts = _chosen(parts, arguments.parts)
        again = [part.name for part in _chosen(parts, arguments.again)] if arguments.again else []
        gpu = None
        if not arguments.list and not arguments.dry_run:
            gpu = gpu_name()
        folder = arguments.output or (DRY_OUTPUT if arguments.dry_run else RESULTS / _folder_name(gpu or "GPU"))
        if arguments.list:
            print(listing(parts, arguments.minutes, folder))
            return 0
        record = EvidenceRecord(folder, arguments.dry_run)
        if record.gpu not in (None, gpu):
            raise EvidenceError(f"{folder} holds evidence of {record.gpu}, and this is {gpu}; choose another --output")
    except EvidenceError as error:
        print(error, file=sys.stderr)
        return 2
    for name in again:
        record.forget(name)
    if arguments.again_failed:
        for part in parts:
            record.forget_failures(part.name)
    record.start_run(gpu=gpu, minutes=arguments.minutes, parts=[part.name for part in parts])
    try:
        is_well = Session(parts, record, arguments.minutes, sources()).run()
    except KeyboardInterrupt:
        print(f"\nstopped; {record.folder} has what there is, and the same command goes on")
        return 130
    left = [part.name for part in parts if not record.is_complete(part.name)]
    print(f"{folder / PAGE_FILE}" + (f"; not complete: {', '.join(left)}, the same command goes on" if left else ""))
    return 0 if is_well else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=MINUTES, help="for all parts together (default: %(default)g)"
    )
    parser.add_argument("--output", "-o", type=Path, help="folder (default: benchmarks/results/NAME-OF-THE-GPU)")
    parser.add_argument("--parts", type=_names, metavar="A,B", help="only these, in their usual order")
    parser.add_argument("--again", type=_names, metavar="A,B", help="forget what is known of these, and repeat them")
    parser.add_argument(
        "--again-failed",
        action="store_true",
        help="repeat tests and benchmarks that failed or crashed, and parts that failed as a whole; keep the rest",
    )
    parser.add_argument("--list", action="store_true", help="list the parts with what each may cost, and stop")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny: shows that the parts work")
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"minutes must be positive; got {text}")
    return minutes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _chosen(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """The parts of these names; all of them where none is named."""
    known = [part.name for part in parts]
    for name in names or []:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise EvidenceError(f"there is no part {name!r}{hint} There are {', '.join(known)}.")
    return [part for part in parts if not names or part.name in names]


def gpu_name() -> str:
    """The name of the GPU, asked for in a process of its own: this one takes nothing of the GPU."""
    asked = subprocess.run(python("-c", ASK), env=environment(), capture_output=True, text=True)
    if asked.returncode == 0 and asked.stdout.strip():
        return asked.stdout.strip()
    words = asked.stderr.strip().splitlines()
    why = f"torch {torch.__version__} of {sys.executable} " + (f"says: {words[-1]}" if words else "sees none")
    raise EvidenceError(
        f"No CUDA GPU: {why}. Run it where there is one, with the Python that has torch for it "
        "(make gpu PYTHON=/path/to/python); --dry-run tries the parts here."
    )


def _folder_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
