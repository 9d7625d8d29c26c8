"""Small networks that know nothing of uctrans, as other packages have them, and the options that build them."""

import torch
from torch import nn


class Halving(nn.Module):
    """Halves the map once, so that it takes images with even sides; its constructor reads a value of a tensor."""

    def __init__(self, bands, labels, width=4):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(bands, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        rate = torch.linspace(0, 0.2, 3)[1].item()
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(rate))
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(2 * width, labels, 1)

    def forward(self, image):
        fine = self.fine(image)
        return self.head(torch.cat([fine, self.up(self.coarse(fine))], 1))


class Pooled(Halving):
    """Normalises the mean of the map over the batch, which takes two images or more."""

    def __init__(self, bands, labels, width=4):
        super().__init__(bands, labels, width)
        self.norm = nn.BatchNorm2d(bands)

    def forward(self, image):
        return super().forward(image + self.norm(image.mean((2, 3), keepdim=True)))


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
