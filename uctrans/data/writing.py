"""Write files so that a reader never meets half of one."""

from pathlib import Path

import numpy as np

from uctrans.writing import written_atomically


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it and a rename; its folder is made where it is missing."""
    with written_atomically(path) as temporary:
        temporary.write_bytes(content)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8, or (H, W) uint16, as a PNG file."""
    import imageio.v3

    write_bytes(path, imageio.v3.imwrite("<bytes>", pixels, extension=".png"))
