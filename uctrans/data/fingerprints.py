"""Know images again by their pixels, whatever the names of their files: which did a model learn from?

A record of the images of a model is {"train": {fingerprint: name}, "val": {fingerprint: name}}: those that its weights
were trained on, and those that chose the best of them.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

ROWS = 256
WORD_BYTES = 8
DIGITS = 16
Record = dict[str, dict[str, str]]


def eight_bit(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as uint8: those in 0..1 times 255 and rounded, uint8 as they are."""
    return pixels if pixels.dtype == np.uint8 else np.rint(pixels * 255).astype(np.uint8)


def fingerprint(pixels: np.ndarray) -> str:
    """Return 16 hexadecimal digits that identify an image, (H, W, ...), by its size and pixels of 8 bits.

    At most 256 rows at equal distances count byte by byte, and all pixels by their sum as 64-bit words, so that the
    digits of a large image take little of the time to read it.
    """
    pixels = eight_bit(pixels)
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels[:: -(-len(pixels) // ROWS)]))
    flat = np.ascontiguousarray(pixels).reshape(-1)
    whole = len(flat) // WORD_BYTES * WORD_BYTES
    digest.update(np.add.reduce(flat[:whole].view(np.uint64), dtype=np.uint64).tobytes())
    digest.update(flat[whole:])
    return digest.hexdigest()[:DIGITS]


def join_records(records: Iterable[Record]) -> Record:
    """Return the record of weights that all the images of several records have formed."""
    records = list(records)
    return {part: {key: name for record in records for key, name in record[part].items()} for part in ("train", "val")}


def find_known(record: Record, names: Iterable[str], fingerprints: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find images that formed the weights.

    Args:
        record: images of the model.
        names: names of the images to look for.
        fingerprints: their fingerprints.

    Returns:
        The names of those images by part, "train" or else "val", each with its name in the record.
    """
    known: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    for name, key in zip(names, fingerprints, strict=True):
        part = next((part for part in known if key in record[part]), None)
        if part is not None:
            known[part][name] = record[part][key]
    return known
