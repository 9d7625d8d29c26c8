"""Train the same run undisturbed and killed with SIGKILL again and again; a program that test_resume.py starts.

Usage: killed_runs.py STRAIGHT.yaml KILLED.yaml. Each run is a forked child, so that the packages are imported once.
"""

import dataclasses
import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from uctrans.extras import import_extra
from uctrans.training import TrainConfig, load_checkpoint, train

MOMENTS = (
    ("before", "last.pt"),
    ("before", "model.safetensors"),
    ("before", "config.json"),
    ("before", "best.pt"),
    ("after", "best.pt"),
    ("after", "last.pt"),
)
ATTEMPTS = 4
LONGEST_LIFE = 0.3  # seconds
LONGEST_WAIT_FOR_THE_DISK = 0.03  # seconds a file, so that the training is ahead of what is on the disk


def main(straight: str, killed: str) -> None:
    torch.set_num_threads(1)
    for module in ("matplotlib.figure", "torch.utils.tensorboard", "tqdm", "skimage.io", "torch._dynamo"):
        import_extra(module, "training")
    assert wait(start(TrainConfig.load_yaml(straight))) == 0
    config = TrainConfig.load_yaml(killed)
    kill_at_each_file(config)
    kill_at_random_moments(config)
    assert wait(start(resumed(config))) == 0


def kill_at_each_file(config: TrainConfig) -> None:
    """Let a child die at each of ``MOMENTS``: before or after it replaces a file of that name for the first time."""
    for when, name in MOMENTS:
        status = wait(start(resumed(config), change_disk=functools.partial(die, when, name)))
        print(f"{when} {name}: {status}, {left_by(config)}")
        assert status == -signal.SIGKILL


def kill_at_random_moments(config: TrainConfig) -> None:
    """Kill children some time after they have saved for the first time."""
    path = Path(config.output) / "last.pt"
    for _ in range(ATTEMPTS):
        life, before = random.uniform(0, LONGEST_LIFE), path.stat().st_mtime_ns
        child = start(resumed(config), change_disk=slow_down)
        while path.stat().st_mtime_ns == before and is_running(child):
            time.sleep(0.001)
        time.sleep(life)
        os.kill(child, signal.SIGKILL)
        print(f"{life:.3f} s later: {wait(child)}, {left_by(config)}")


def left_by(config: TrainConfig) -> str:
    path = Path(config.output) / "last.pt"
    return f"epoch {load_checkpoint(path)['epoch']}" if path.exists() else "nothing"


def resumed(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, resume=(Path(config.output) / "last.pt").exists())


def start(config: TrainConfig, change_disk: Callable[[], None] = lambda: None) -> int:
    sys.stdout.flush()
    if child := os.fork():
        return child
    change_disk()
    try:
        train(config)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def die(when: str, name: str) -> None:
    replace = Path.replace

    def deadly(self: Path, target: Path) -> Path:
        if when == "after":
            replace(self, target)
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target) if when == "before" else target

    Path.replace = deadly


def slow_down() -> None:
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        time.sleep(random.uniform(0, LONGEST_WAIT_FOR_THE_DISK))
        return replace(self, target)

    Path.replace = slow


def is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
