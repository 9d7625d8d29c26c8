"""Small models for the tests of this folder."""

import torch

import uctrans

SMALL = {
    "dual_branch_uctransnet": {
        "base_channels": 4,
        "image_size": 32,
        "dilations": (2, 2, 2, 1),
        "num_layers": 1,
        "num_heads": 2,
    },
    "unet": {"base_channels": 4},
    "uctransnet": {"base_channels": 4, "image_size": 32, "num_layers": 2, "num_heads": 2},
}
NAMES = sorted(SMALL)

# For tests that take long on four scales and show no more there; a U-Net always has four.
FEW_SCALES = {
    "dual_branch_uctransnet": {"patch_sizes": (2,), "depths": (1,), "dilations": 2},
    "unet": {"base_channels": 2},
    "uctransnet": {"patch_sizes": (4, 2), "num_layers": 1},
}


def build(name, **options):
    """Build a small model, with the same weights in every call."""
    torch.manual_seed(0)
    return uctrans.create_model(name, **(SMALL[name] | options))


def randomised(model):
    """Draw weights, statistics and positions that differ from each other, from 0 and from 1; set evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    return model.eval()
