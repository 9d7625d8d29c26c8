"""Small arrays and image files for the tests of datasets."""

import imageio.v3
import numpy as np


def random_pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def put(path, pixels):
    """Write an image file in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v3.imwrite(path, pixels)
    return path


def put_pairs(root, *names, images="images", masks="masks"):
    """Write a black image and a black mask for each name."""
    for name in names:
        put(root / images / f"{name}.png", np.zeros((6, 5, 3), dtype=np.uint8))
        put(root / masks / f"{name}.png", np.zeros((6, 5), dtype=np.uint8))
    return root


def names_of(samples):
    return [sample.name for sample in samples]
