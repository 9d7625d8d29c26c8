"""Seconds of training until the test images are segmented well enough, for each way to train.

    python -m benchmarks.time_to_dice -i DATA --dice 0.7999 -o .benchmarks/time_to_dice.jsonl

Every candidate is trained under ``uctransnet-224`` by the project's own loop, validation included. Whenever validation
finds weights that are the best so far, their Dice on the test images is taken with the clock stopped, and nothing
follows from it but the end of the run once it reaches the target: weights are chosen by the validation images alone.
The clock runs from before the images are read, so that compiling and capturing are part of it; PyTorch is imported and
the device is awake by then. Checkpoints are written as by ``uctrans train``, before the first step and beside the
training after a best epoch, to a folder for temporary files; a file that is being written when the clock stops is
written on, and what is left of them in the end is told apart. Logs are not written. Every run is a line of the record
as it ends, in a process of its own; the same command goes on with those that are missing.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import uctrans
from uctrans.data import find_samples, load_tensors
from uctrans.training import TrainConfig
from uctrans.training.distributed import processes
from uctrans.training.log import SilentLog
from uctrans.training.loop import check_training_was_finite, complete_epoch, open_writer, save, train_epoch, validate
from uctrans.training.run import Run, plain_forward

from .errors import in_short
from .networks import OURS
from .records import ROOT, append_line, environment, read_lines

# Settings of ``uctrans train``; on a device without Triton ours is what a user gets there. All have the loop, the
# channels-last layout and the fused Adam of the project: ``published`` stands for the operations and their precision.
CANDIDATES = {
    OURS: {"backend": "auto", "amp": "bf16"},
    "published": {"backend": "reference", "graph": False},
    "reference bf16": {"backend": "reference", "amp": "bf16"},
    "composed bf16": {"backend": "composed", "amp": "bf16"},
    "compiled": {"backend": "reference", "amp": "bf16", "compile": True},
    "ours compiled": {"backend": "auto", "amp": "bf16", "compile": True},
}
SHARED = ("model", "base_channels", "image_size", "batch_size", "epochs", "patience", "learning_rate", "device")
NOT_STOPPED = SimpleNamespace(name=None)


def time_to_dice(config: TrainConfig, dice: float, every: int = 1) -> dict[str, Any]:
    """Train as ``config`` says until the kept weights reach ``dice`` on the test images, or training is over.

    Args:
        config: the run; its output folder is not used.
        dice: the target, 0 to 1.
        every: least epochs from one look at the test images to the next.

    Returns:
        ``reached``; ``seconds`` on the clock, in all, of its parts and until the kept weights are on the disk;
        ``epochs``; ``test_dice`` of the kept weights; and ``curve``: epoch, seconds, validation Dice, and test Dice or
        ``None``, of each epoch.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as for ``uctrans.training.train``.
    """
    with processes(config.device) as group, tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, output=folder)
        if group.device.type == "cuda":
            torch.zeros(1, device=group.device)
        synchronise = torch.cuda.synchronize if group.device.type == "cuda" else lambda: None
        clock = Clock()
        with open_writer(config) as writer:
            run = Run(config, group)
            save(run, writer)
            writer.wait()
            synchronise()
            built = clock.read()
            clock.stop()
            samples = find_samples(config.data, "test")
            test = load_tensors(samples, run.protocol, config.classes, config.palette, group.device)
            clock.go_on()

            # Not the run's own: what a look at the test images has captured must be of no use to validation.
            forward = plain_forward(run.validated_model, config)
            curve: list[list[float | None]] = []
            test_dice, looked_at = math.nan, -every
            first_epoch = None
            while run.epoch < config.epochs and not run.is_out_of_patience and not test_dice >= dice:
                log = EpochLog()
                train_epoch(run, log, NOT_STOPPED)
                check_training_was_finite(run)
                is_best = complete_epoch(run, log, started=time.perf_counter(), images_before=0)
                synchronise()
                clock.stop()
                first_epoch = first_epoch or clock.read() - built
                scored = None
                if is_best and run.epoch - looked_at >= every:
                    totals = validate(run.validated_model, test, run.protocol, config, group, forward=forward)
                    scored = test_dice = totals.read(group)[1]
                    looked_at = run.epoch
                curve.append([run.epoch, clock.read(), log.row["val_dice"], scored])
                clock.go_on()
                if is_best:
                    save(run, writer, is_best=True)
            writer.wait()
            saved = clock.read()
        return {
            "reached": test_dice >= dice,
            "seconds": curve[-1][1],
            "seconds_before_training": built,
            "seconds_of_first_epoch": first_epoch,
            "seconds_until_saved": saved,
            "epochs": run.epoch,
            "test_dice": None if math.isnan(test_dice) else test_dice,
            "val_dice": None if math.isnan(run.best_dice) else run.best_dice,
            "curve": curve,
        }


class Clock:
    """Seconds since it was made, without those in which it was stopped."""

    def __init__(self):
        self._seconds, self._since = 0.0, time.perf_counter()

    def read(self) -> float:
        """Seconds so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def stop(self) -> None:
        """Stand still."""
        self._seconds, self._since = self.read(), None

    def go_on(self) -> None:
        """Run again."""
        self._since = time.perf_counter()


class EpochLog(SilentLog):
    """Keeps the row of the epoch that ended last."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Take it."""
        self.row = row


def settings_of(candidate: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Settings of the run of a candidate: what the command line shares among all, and its own."""
    shared = {name: getattr(given, name) for name in SHARED if getattr(given, name) is not None}
    return shared | CANDIDATES[candidate] | {"seed": seed, "progress": False}


def missing(given: argparse.Namespace) -> list[tuple[str, int]]:
    """Candidates and seeds of the command line whose runs are not in the record."""
    # What failed is tried again.
    done = [line["run"] for line in read_lines(Path(given.output)) if "reached" in line.get("result", {})]
    planned = [(candidate, seed) for seed in range(given.seeds) for candidate in given.candidates]
    return [(candidate, seed) for candidate, seed in planned if run_of(candidate, seed, given) not in done]


def run_of(candidate: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What a run is, in the record: a line with the same is its result."""
    described = {"candidate": candidate, "seed": seed, "dice": given.dice, "every": given.every}
    return described | {"data": Path(given.input).name, "settings": settings_of(candidate, seed, given)}


def measure(candidate: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """The line of a run, its result or why there is none."""
    config = TrainConfig(data=given.input, output="unused", **settings_of(candidate, seed, given))
    try:
        result = time_to_dice(config, given.dice, given.every)
    except Exception as error:  # the record says what it was, the others run all the same, and the exit status is 1
        traceback.print_exc()
        result = {"error": in_short(error)}
    device = torch.device("cuda" if torch.cuda.is_available() and given.device in (None, "auto", "cuda") else "cpu")
    return {"run": run_of(candidate, seed, given), "result": result, "environment": environment(device)}


def table(lines: list[dict[str, Any]]) -> str:
    """Runs as Markdown, the latest of each, in the order they were first made."""
    latest = {json.dumps(line["run"], sort_keys=True): line for line in lines if "run" in line}
    rows = [
        "| candidate | seed | target Dice | seconds | before training | first epoch | until saved | epochs "
        "| test Dice |",
        f"| --- {'| ---: ' * 8}|",
    ]
    for line in latest.values():
        run, result = line["run"], line["result"]
        what = f"| {run['settings']['model']}, {run['candidate']} | {run['seed']} | {run['dice']:.4f} | "
        if "error" in result:
            rows.append(f"{what}{result['error'].splitlines()[0]} | | | | | |")
            continue
        seconds = f"{result['seconds']:.1f}" if result["reached"] else f"not in {result['seconds']:.1f}"
        score = "-" if result["test_dice"] is None else f"{result['test_dice']:.4f}"
        names = ("seconds_before_training", "seconds_of_first_epoch", "seconds_until_saved")
        parts = " | ".join(f"{result[name]:.1f}" for name in names)
        rows.append(f"{what}{seconds} | {parts} | {result['epochs']} | {score} |")
    return "\n".join(rows)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_dice", description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--input", required=True, help="data set with train, val and test images")
    parser.add_argument("-o", "--output", default=".benchmarks/time_to_dice.jsonl", help="JSON lines to append to")
    parser.add_argument("--dice", type=float, required=True, help="mean Dice over the test images to reach, 0 to 1")
    parser.add_argument("--every", type=int, default=1, help="least epochs between two looks at the test images")
    parser.add_argument("--candidates", type=_names, default=list(CANDIDATES), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=1, help="how many, counted from 0")
    parser.add_argument("--model", default="uctransnet", choices=uctrans.list_models())
    parser.add_argument("--base-channels", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--epochs", type=int, help="most epochs of a run")
    parser.add_argument("--patience", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--device")
    parser.add_argument("--one", type=_one, help=argparse.SUPPRESS)  # candidate and seed, in this process
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, each in a process of its own, and print the table of all; 1 where one failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parsed(arguments)
    given.input = str(Path(given.input).resolve())
    record = Path(given.output)
    if given.one is not None:
        append_line(record, measure(*given.one, given))
        return 0
    for candidate, seed in missing(given):
        command = [sys.executable, "-m", "benchmarks.time_to_dice", *arguments, "--one", f"{candidate},{seed}"]
        command += ["-i", given.input, "-o", str(record.resolve())]
        if (code := subprocess.run(command, cwd=ROOT).returncode) != 0:
            line = {"run": run_of(candidate, seed, given), "result": {"error": f"the process ended with {code}"}}
            append_line(record, line)
    print(table(read_lines(record)))
    failed = [f"{candidate}, seed {seed}" for candidate, seed in missing(given)]
    if failed:
        print(f"failed, and tried again by the same command: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise argparse.ArgumentTypeError(f"no candidate {unknown[0]!r}; there are {', '.join(CANDIDATES)}")
    return names


def _one(text: str) -> tuple[str, int]:
    candidate, seed = text.rsplit(",", 1)
    return candidate, int(seed)


if __name__ == "__main__":
    sys.exit(main())
