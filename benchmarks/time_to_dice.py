"""Measure the seconds of training until the test images are segmented well enough, for each way to train.

    python -m benchmarks.time_to_dice -i DATA --dice 0.7999 -o .benchmarks/time_to_dice.jsonl

Every candidate trains under ``uctransnet-224`` by the project's own loop, validation included. When validation finds
the best weights so far, their Dice on the test images is taken while the clock is stopped. It decides nothing but the
end of the run, once it reaches the target: weights are chosen by the validation images alone.

The clock starts before the images are read, so that compiling and capturing count; PyTorch is imported and the device
is ready by then. Checkpoints are written as by ``uctrans train``, to a folder for temporary files, and logs are not.
Every run has a process of its own and is a line of the record. The same command makes the runs that are missing.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import uctrans
from uctrans.data import find_samples, get_protocol, load_tensors, read_image, read_mask
from uctrans.training import TrainConfig
from uctrans.training.build import plain_forward
from uctrans.training.distributed import processes
from uctrans.training.log import SilentLog
from uctrans.training.loop import (
    check_training_was_finite,
    complete_epoch,
    open_writer,
    save,
    train_epoch,
    validate,
)
from uctrans.training.run import Run
from uctrans.writing import write_png

from .candidates import OURS
from .records import ROOT, append_line, environment, read_lines

# Settings of ``uctrans train``. All have the loop, the channels-last layout and the fused Adam of the project:
# ``published`` stands for the operations and their precision.
CANDIDATES = {
    OURS: {"backend": "auto", "amp": "bf16"},
    "published": {"backend": "reference", "graph": False},
    "reference": {"backend": "reference", "amp": "bf16"},
    "composed": {"backend": "composed", "amp": "bf16"},
    "compiled": {"backend": "reference", "amp": "bf16", "compile": True},
    "ours compiled": {"backend": "auto", "amp": "bf16", "compile": True},
}
SHARED = ("model", "base_channels", "image_size", "batch_size", "epochs", "patience", "learning_rate", "device")
NO_SIGNAL = SimpleNamespace(name=None)


def time_to_dice(config: TrainConfig, dice: float, every: int = 1, longest: float = math.inf) -> dict[str, Any]:
    """Train until the best weights reach ``dice`` on the test images, or training or time is over.

    Args:
        config: settings of the run; its output folder is not used.
        dice: the target, 0 to 1.
        every: fewest epochs between two looks at the test images.
        longest: seconds on the clock after which no further epoch begins.

    Returns:
        ``reached``; ``seconds`` on the clock, in all, before training, of the first epoch and until the best weights
        are on the disk; ``epochs``; ``test_dice`` and ``val_dice`` of the best weights; and ``curve``: epoch, seconds,
        validation Dice, and test Dice or ``None``, of each epoch.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as for ``uctrans.training.train``.
    """
    with processes(config.device) as group, tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, output=folder)
        on_gpu = group.device.type == "cuda"
        if on_gpu:
            torch.zeros(1, device=group.device)
        synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        clock = Clock()
        with open_writer(config) as writer:
            run = Run(config, group)
            save(run, writer)
            writer.wait()
            synchronize()
            before_training = clock.read()
            clock.stop()
            test_data = load_tensors(
                find_samples(config.data, "test"), run.protocol, config.classes, config.palette, group.device
            )
            clock.resume()

            # Not the run's own: graphs that a look at the test images captures must not help validation.
            forward = plain_forward(run.validated_model, config)
            curve: list[tuple[int, float, float, float | None]] = []
            test_dice, last_look, first_epoch = math.nan, -every, None
            is_over = False
            while run.epoch < config.epochs and not run.is_out_of_patience and not is_over:
                log = EpochLog()
                train_epoch(run, log, NO_SIGNAL)
                check_training_was_finite(run)
                is_best = complete_epoch(run, log, started=time.perf_counter(), images_before=0)
                synchronize()
                clock.stop()
                first_epoch = first_epoch or clock.read() - before_training
                scored = None
                if is_best and run.epoch - last_look >= every:
                    totals = validate(run.validated_model, test_data, run.protocol, config, group, forward=forward)
                    scored = test_dice = totals.read(group)[1]
                    last_look = run.epoch
                curve.append((run.epoch, clock.read(), log.row["val_dice"], scored))
                is_over = test_dice >= dice or clock.read() >= longest
                clock.resume()
                if is_best:
                    save(run, writer, is_best=True)
            writer.wait()
            saved = clock.read()
        return {
            "reached": test_dice >= dice,
            "seconds": curve[-1][1],
            "seconds_before_training": before_training,
            "seconds_of_first_epoch": first_epoch,
            "seconds_until_saved": saved,
            "epochs": run.epoch,
            "test_dice": None if math.isnan(test_dice) else test_dice,
            "val_dice": None if math.isnan(run.best_dice) else run.best_dice,
            "curve": curve,
        }


class Clock:
    """Measures seconds since it was made, without those in which it was stopped."""

    def __init__(self):
        self._seconds, self._since = 0.0, time.perf_counter()

    def read(self) -> float:
        """Return the seconds so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def stop(self) -> None:
        """Stand still until :meth:`resume`."""
        self._seconds, self._since = self.read(), None

    def resume(self) -> None:
        """Run again."""
        self._since = time.perf_counter()


class EpochLog(SilentLog):
    """Keeps the row of the latest epoch."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Keep the row."""
        self.row = row


def write_resized(data: str, folder: Path) -> int:
    """Write a data set at the size of ``uctransnet-224`` and return how many images it has.

    Training on the copy is training on the original: resizing changes nothing at that size.

    Raises:
        DataError: the data set has no train, val or test images, or a file cannot be read.
    """
    protocol, count = get_protocol(), 0
    for split in ("train", "val", "test"):
        for sample in find_samples(data, split):
            mask = protocol.resize_mask(read_mask(sample.mask), classes=1)
            name = f"{sample.name}.png"
            write_png(folder / split / "images" / name, protocol.resize_image(read_image(sample.image)))
            write_png(folder / split / "masks" / name, 255 * mask)
            count += 1
    return count


def settings_of(candidate: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run: those of the command line, shared by all candidates, and the candidate's own."""
    shared = {name: getattr(given, name) for name in SHARED if getattr(given, name) is not None}
    return shared | CANDIDATES[candidate] | {"seed": seed, "progress": False}


def run_of(candidate: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return what identifies a run in the record."""
    described = {"candidate": candidate, "seed": seed, "dice": given.dice, "every": given.every}
    return described | {
        "seconds": given.seconds,
        "data": Path(given.input).name,
        "settings": settings_of(candidate, seed, given),
    }


def missing(given: argparse.Namespace) -> list[tuple[str, int]]:
    """Return candidates and seeds of the command line that the record has no result of; failed ones are among them."""
    done = [line["run"] for line in read_lines(given.output) if "reached" in line.get("result", {})]
    planned = [(candidate, seed) for seed in range(given.seeds) for candidate in given.candidates]
    return [(candidate, seed) for candidate, seed in planned if run_of(candidate, seed, given) not in done]


def measure(candidate: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Make a run and return its line of the record."""
    config = TrainConfig(data=given.input, output="unused", **settings_of(candidate, seed, given))
    result = time_to_dice(config, given.dice, given.every, given.seconds or math.inf)
    return {"run": run_of(candidate, seed, given), "result": result, "environment": environment()}


def result_table(lines: list[dict[str, Any]]) -> str:
    """Return the latest of each run in Markdown, in the order they were first made."""
    latest = {json.dumps(line["run"], sort_keys=True): line for line in lines if "run" in line}
    parts = ("seconds_before_training", "seconds_of_first_epoch", "seconds_until_saved")
    titles = ["candidate", "seed", "target Dice", "seconds", "before training", "first epoch", "until saved"]
    rows = [[*titles, "epochs", "test Dice"], ["---", *["---:"] * 8]]
    for line in latest.values():
        run, result = line["run"], line["result"]
        row = [f"{run['settings']['model']}, {run['candidate']}", str(run["seed"]), f"{run['dice']:.4f}"]
        if "error" in result:
            rows.append([*row, result["error"], *[""] * 5])
            continue
        row.append(f"{result['seconds']:.1f}" if result["reached"] else f"not in {result['seconds']:.1f}")
        row += [f"{result[part]:.1f}" for part in parts]
        score = "-" if result["test_dice"] is None else f"{result['test_dice']:.4f}"
        rows.append([*row, str(result["epochs"]), score])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_dice", description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--input", required=True, help="data set with train, val and test images")
    parser.add_argument("-o", "--output", type=Path, default=".benchmarks/time_to_dice.jsonl", help="JSON lines")
    parser.add_argument("--dice", type=float, required=True, help="mean Dice over the test images to reach, 0 to 1")
    parser.add_argument("--every", type=int, default=1, help="fewest epochs between two looks at the test images")
    parser.add_argument("--seconds", type=float, help="a run that takes longer ends with the epoch")
    parser.add_argument("--candidates", type=_names, default=list(CANDIDATES), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=1, help="how many, counted from 0")
    parser.add_argument("--model", default="uctransnet", choices=uctrans.list_models())
    for name in ("base-channels", "image-size", "batch-size", "epochs", "patience"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--device")
    parser.add_argument("--one", type=_one, help=argparse.SUPPRESS)  # candidate and seed, in this process
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Make the runs that are missing, each in a process of its own, and print the table; return 1 where one failed."""
    words = sys.argv[1:] if words is None else words
    given = parsed(words)
    given.input = str(Path(given.input).resolve())
    if given.one is not None:
        append_line(given.output, measure(*given.one, given))
        return 0
    for candidate, seed in missing(given):
        command = [sys.executable, "-m", "benchmarks.time_to_dice", *words, "--one", f"{candidate},{seed}"]
        command += ["-i", given.input, "-o", str(given.output.resolve())]
        if (code := subprocess.run(command, cwd=ROOT).returncode) != 0:
            result = {"error": f"the process ended with {code}"}
            append_line(given.output, {"run": run_of(candidate, seed, given), "result": result})
    print(result_table(read_lines(given.output)))
    failed = [f"{candidate}, seed {seed}" for candidate, seed in missing(given)]
    if failed:
        print(f"failed, and tried again by the same command: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; choose of {', '.join(CANDIDATES)}")
    return names


def _one(text: str) -> tuple[str, int]:
    candidate, seed = text.rsplit(",", 1)
    return candidate, int(seed)


if __name__ == "__main__":
    sys.exit(main())
