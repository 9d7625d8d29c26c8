"""Small arrays and image files for the tests of datasets."""

import struct
import zlib

import imageio.v3
import numpy as np
import torch

from uctrans.data import NativeAugmentation, NativeImages

NO_CHANGES = dict.fromkeys(NativeAugmentation.__dataclass_fields__, 0)


def random_pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def put(path, pixels):
    """Write an image file in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v3.imwrite(path, pixels)
    return path


def write_png(path, rows, size, bits, colour_type):
    """Write the bytes of rows, each after its filter byte, as a PNG file by the format's specification."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", size[1], size[0], bits, colour_type, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks.items():
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)
    return path


def put_pairs(root, *names, images="images", masks="masks"):
    """Write a black image and a black mask for each name."""
    for name in names:
        put(root / images / f"{name}.png", np.zeros((6, 5, 3), dtype=np.uint8))
        put(root / masks / f"{name}.png", np.zeros((6, 5), dtype=np.uint8))
    return root


def names_of(samples):
    return [sample.name for sample in samples]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def native_images(*labels):
    """Return `NativeImages` whose three channels equal their labels, uint8 (H, W)."""
    counts = torch.tensor([label.size for label in labels])
    flat = torch.cat([torch.from_numpy(label).flatten() for label in labels])
    return NativeImages(
        names=[str(number) for number in range(len(labels))],
        pixels=flat.expand(3, -1).contiguous(),
        labels=flat,
        starts=counts.cumsum(0) - counts,
        sizes=torch.tensor([label.shape for label in labels]).T.contiguous(),
    )
