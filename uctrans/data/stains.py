"""Haematoxylin, eosin and DAB from colours and back, for batches on any device.

The colours of a stained section are those of its stains by Beer and Lambert's law: the logarithm of the light that
comes through is linear in the amount of each stain. The unit is that of scikit-image: an amount of 1 lets one millionth
of the light through.

Source:
    Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, Anal. Quant. Cytol. Histol.
    23 (2001); numbers as in scikit-image's ``rgb_from_hed``.
"""

import math

import numpy as np
import torch
from torch import Tensor

# Rows: red, green and blue that haematoxylin, eosin and DAB absorb.
RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
HED_FROM_RGB = tuple(map(tuple, np.linalg.inv(RGB_FROM_HED).tolist()))
DARKEST = 1e-6
LOG_UNIT = -math.log(DARKEST)


def rgb_to_stains(images: Tensor) -> Tensor:
    """Amounts of haematoxylin, eosin and DAB: (B, 3, H, W) RGB in 0..1 to (B, 3, H, W), float32.

    As ``skimage.color.rgb2hed``, but colours that no amounts of the three stains make keep the negative ones (there
    they become 0), so that `stains_to_rgb` gives the image back.
    """
    amounts = -images.float().clamp(min=DARKEST).log() / LOG_UNIT
    return _mixed(amounts, HED_FROM_RGB)


def stains_to_rgb(stains: Tensor) -> Tensor:
    """Inverse of `rgb_to_stains`, cut to 0..1: ``skimage.color.hed2rgb`` of a batch."""
    return torch.exp(-LOG_UNIT * _mixed(stains.float(), RGB_FROM_HED)).clamp(0, 1)


def _mixed(channels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Every pixel times a (3, 3) matrix from the right, written out: products of the GPU may round float32 to TF32."""
    return torch.stack([sum(channels[:, i] * matrix[i][j] for i in range(3)) for j in range(3)], dim=1)
