"""Train a network without batch norm under torchrun; a program that test_distributed.py starts.

Usage: distributed_run.py CONFIG.yaml FOLDER. Each process leaves its weights as FOLDER/RANK.pt. Augmentation is off, so
that two processes see what one with twice the batch sees.
"""

import os
import sys
from pathlib import Path

import torch

import uctrans
from uctrans.data import Protocol
from uctrans.training import TrainConfig, loop, train


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


def unchanged(protocol, images, masks, generator):
    return images, masks


def main(config_file: str, folder: str) -> None:
    Protocol.augment = unchanged
    config = TrainConfig.load_yaml(config_file)
    kept = {}
    complete = loop.complete_epoch

    def complete_and_keep(run, *arguments):
        result = complete(run, *arguments)
        kept.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
        return result

    loop.complete_epoch = complete_and_keep
    train(config)
    rank = int(os.environ.get("RANK", 0))
    torch.save(kept, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
