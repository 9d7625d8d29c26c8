"""How far the preparation of masks alone moves Dice: `python -m benchmarks.mask_conventions data`.

Nothing is predicted here. Each line holds the true mask, prepared in one way, against the true mask prepared in
another: what a segmentation would score that is right but for the convention.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from uctrans.data import find_samples, get_protocol, read_image, read_mask
from uctrans.inference import dice, mean_and_deviation
from uctrans.inference.predictor import enlarge

PUBLISHED = get_protocol("uctransnet-224")
Preparation = Callable[[np.ndarray], np.ndarray]


def nearest(mask: np.ndarray) -> np.ndarray:
    """(H, W) of 0 and 1 to the published size: the nearest pixel."""
    return interpolate(_batch(mask), PUBLISHED.image_size, mode="nearest-exact")[0, 0].numpy().astype(np.uint8)


def at_least_half(mask: np.ndarray) -> np.ndarray:
    """(H, W) of 0 and 1 to the published size: 1 where at least half of the area is."""
    share = interpolate(_batch(mask), PUBLISHED.image_size, mode="area")[0, 0].numpy()
    return (share >= 0.5).astype(np.uint8)


def published(mask: np.ndarray) -> np.ndarray:
    """(H, W) of 0 and 1 to the published size: bilinear, then everything above 0."""
    return PUBLISHED.resize_mask(mask, classes=1)


def there_and_back(resize: Preparation) -> Preparation:
    """Resize, and enlarge to the size of the file again, as `uctrans evaluate --size native` enlarges probabilities."""

    def prepare(mask: np.ndarray) -> np.ndarray:
        return (enlarge(_batch(resize(mask)), mask.shape)[0, 0].numpy() > 0.5).astype(np.uint8)

    return prepare


def as_it_is(mask: np.ndarray) -> np.ndarray:
    """The mask at the size of its file."""
    return mask


COMPARED: dict[str, tuple[Preparation, Preparation]] = {
    "at 224: nearest pixel, scored against the published mask": (nearest, published),
    "at 224: at least half of the area, scored against the published mask": (at_least_half, published),
    "at full size: the published mask enlarged, against the mask as it is": (there_and_back(published), as_it_is),
    "at full size: at least half of the area enlarged, likewise": (there_and_back(at_least_half), as_it_is),
}
FOREGROUND: dict[str, Preparation] = {
    "as it is": as_it_is,
    "at 224, nearest pixel": nearest,
    "at 224, published": published,
}


def table(masks: Sequence[np.ndarray]) -> str:
    """Foreground and Dice over masks, (H, W) of 0 and 1 each, as two Markdown tables."""
    lines = ["| mask | foreground, % of the pixels |", "| --- | ---: |"]
    for name, prepare in FOREGROUND.items():
        lines.append(f"| {name} | {_spread([100 * prepare(mask).mean() for mask in masks], 1)} |")
    lines += ["", "| the true mask, prepared otherwise | Dice |", "| --- | ---: |"]
    for name, (prediction, truth) in COMPARED.items():
        scores = [dice(prediction(mask), truth(mask), 1).item() for mask in masks]
        lines.append(f"| {name} | {_spread(scores, 4)} |")
    return "\n".join([*lines, "", f"Mean ± sample standard deviation over {len(masks)} images."])


def _spread(values: list[float], digits: int) -> str:
    mean, deviation, _ = mean_and_deviation(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _batch(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None].float()


def main(words: list[str] | None = None) -> None:
    """Print the tables of a data set with binary masks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_conventions", description=__doc__)
    parser.add_argument("data", type=Path, help="dataset: {train,val,test}/{images,masks}")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    arguments = parser.parse_args(words)
    samples = find_samples(arguments.data, arguments.split)
    print(table([read_mask(sample.mask, 1, shape=read_image(sample.image).shape[:2]) for sample in samples]))


if __name__ == "__main__":
    main()
