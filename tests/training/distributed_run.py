"""Train under torchrun; a program that test_distributed.py starts.

Usage: distributed_run.py CONFIG.yaml FOLDER [STEPS]. Each process leaves its number in
FOLDER/RANK.pid and its weights in FOLDER/RANK.pt. After STEPS
steps the first process sends SIGTERM to torchrun. The model "plain" has no batch norm and is trained without
augmentation, so that two processes see what one with twice the batch sees.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import uctrans
from uctrans.training import TrainConfig, loop, train

LONGEST_WAIT = 20  # seconds for torchrun to pass the signal on


@uctrans.register_model("plain")
class Plain(uctrans.SegmentationModel):
    def __init__(self, in_channels=3, classes=1, base_channels=4):
        super().__init__()
        self.in_channels, self.classes = in_channels, classes
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(in_channels, base_channels, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(base_channels, classes, 3, padding=1),
        )

    def forward(self, image):
        return self.layers(image)


def unchanged(images, masks):
    return images, masks


def stop_torchrun_after(steps: int) -> None:
    """Let the first process end torchrun after some steps, and go on once the signal has come back."""
    step, calls = loop.train_step, []

    def stopping(run, index):
        step(run, index)
        calls.append(index)
        if len(calls) == steps and run.group.is_main:
            handler, deadline = signal.getsignal(signal.SIGTERM), time.monotonic() + LONGEST_WAIT
            os.kill(os.getppid(), signal.SIGTERM)
            while signal.getsignal(signal.SIGTERM) == handler and time.monotonic() < deadline:
                time.sleep(0.01)

    loop.train_step = stopping


def keep_weights(kept: dict[str, torch.Tensor]) -> None:
    """Put the weights after each epoch into ``kept``."""
    complete = loop.complete_epoch

    def complete_and_keep(run, *arguments):
        result = complete(run, *arguments)
        kept.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
        return result

    loop.complete_epoch = complete_and_keep


def main(config_file: str, folder: str, steps: str = "0") -> None:
    config = TrainConfig.load_yaml(config_file)
    (Path(folder) / f"{os.environ.get('RANK', 0)}.pid").write_text(str(os.getpid()))
    stop_torchrun_after(int(steps))
    kept = {}
    keep_weights(kept)
    train(config, transform=unchanged if config.model == "plain" else None)
    torch.save(kept, Path(folder) / f"{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
