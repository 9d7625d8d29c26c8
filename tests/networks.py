"""Small networks that know nothing of uctrans, as other packages have them, and the options that build them."""

import torch
from torch import nn


class Halving(nn.Module):
    """Halves the map once, so that it takes images with even sides."""

    def __init__(self, bands, labels, width=4):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(bands, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(0.1))
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(2 * width, labels, 1)

    def forward(self, image):
        fine = self.fine(image)
        return self.head(torch.cat([fine, self.up(self.coarse(fine))], 1))


HALVING = "tests.networks:Halving"
HALVING_OPTIONS = {"bands": 3, "labels": 1}
ATTENTION_UNET = "monai.networks.nets:AttentionUnet"
ATTENTION_UNET_OPTIONS = {
    "spatial_dims": 2,
    "in_channels": 3,
    "out_channels": 1,
    "channels": [4, 8],
    "strides": [2],
}
NESTED_UNET = "monai.networks.nets:BasicUNetPlusPlus"  # returns a list of one tensor
NESTED_UNET_OPTIONS = {"spatial_dims": 2, "in_channels": 3, "out_channels": 1, "features": [4, 4, 4, 4, 4, 4]}
EXTERNAL = {
    HALVING: HALVING_OPTIONS,
    ATTENTION_UNET: ATTENTION_UNET_OPTIONS,
    NESTED_UNET: NESTED_UNET_OPTIONS,
}
