"""Train the same run undisturbed and killed with SIGKILL again and again; a program that test_resume.py starts.

Usage: killed_runs.py STRAIGHT.yaml KILLED.yaml. Each run is a forked child, so that the packages are imported once.
"""

import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import uctrans.training.checkpoint
from uctrans.extras import import_extra
from uctrans.training import TrainConfig, load_checkpoint, train

ATTEMPTS = 5
LONGEST_LIFE = 1.0  # seconds


def main(straight: str, killed: str) -> None:
    torch.set_num_threads(1)
    for module in ("matplotlib.figure", "torch.utils.tensorboard", "tqdm", "skimage.io", "torch._dynamo"):
        import_extra(module, "training")
    assert wait(start(TrainConfig.load_yaml(straight))) == 0
    config = TrainConfig.load_yaml(killed)
    kill_at_each_replaced_file(config, range(1, 7))
    kill_at_random_moments(config)
    assert wait(start(resumed(config))) == 0


def kill_at_each_replaced_file(config: TrainConfig, numbers: range) -> None:
    """Let the n-th child die at the n-th file it replaces: before for odd n, after for even n."""
    for number in numbers:
        child = start(resumed(config), deadly_replace=number)
        status = wait(child)
        print(f"file {number}: {status}")
        assert status == -signal.SIGKILL


def kill_at_random_moments(config: TrainConfig) -> None:
    for _ in range(ATTEMPTS):
        life = random.uniform(0, LONGEST_LIFE)
        child = start(resumed(config))
        time.sleep(life)
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        epoch = load_checkpoint(Path(config.output) / "last.pt")["epoch"]
        print(f"after {life:.3f} s: {status}, epoch {epoch}")


def resumed(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, resume=(Path(config.output) / "last.pt").exists())


def start(config: TrainConfig, deadly_replace: int = 0) -> int:
    sys.stdout.flush()
    if child := os.fork():
        return child
    if deadly_replace:
        die_at(deadly_replace)
    try:
        train(config)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def die_at(number: int) -> None:
    replace, calls = Path.replace, []

    def deadly(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number and number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(self, target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    uctrans.training.checkpoint.Path.replace = deadly


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
