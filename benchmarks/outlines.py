"""Draw what several models find in one image as outlines, without a pixel of the image.

    python -m benchmarks.outlines -i DATA -o outlines.png --name IMAGE --models runs/a runs/b,runs/c

A panel for each model shows the outlines of its prediction over those of the mask, at the size of the mask; a,b is the
mean of the probabilities of two models.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from uctrans.data import find_samples, read_image, read_mask
from uctrans.inference.metrics import dice
from uctrans.inference.predictor import load_predictor, to_labels

PANEL = 4  # inches
TRUTH, FOUND = "0.65", "tab:red"


def predicted(model: str, image: np.ndarray) -> np.ndarray:
    """Return the labels that a model, or the mean of several, gives an image: (H, W, 3) uint8 to (H, W) uint8."""
    probabilities = load_predictor(model, device="cpu").probabilities_of_image(image)
    return to_labels(probabilities[None])[0].numpy()


def draw(path: Path, truth: np.ndarray, found: dict[str, np.ndarray], part: tuple[slice, slice]) -> None:
    """Write the figure: a panel for each title of ``found``, limited to a part of the image."""
    figure = Figure(figsize=(PANEL * len(found), PANEL * 1.08), layout="constrained")
    for axis, (title, labels) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        axis.contourf(truth[part], levels=[0.5, 1.5], colors=["0.9"])
        axis.contour(truth[part], levels=[0.5], colors=TRUTH, linewidths=1)
        axis.contour(labels[part], levels=[0.5], colors=FOUND, linewidths=1)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.invert_yaxis()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="benchmarks.outlines", description=__doc__.partition("\n")[0])
    parser.add_argument("-i", "--data", required=True, help="data set with test/images and test/masks")
    parser.add_argument("-o", "--output", required=True, type=Path, help="picture to write")
    parser.add_argument("--name", required=True, help="name of the test image, without its ending")
    parser.add_argument("--models", nargs="+", required=True, help="models, or a,b for the mean of two")
    parser.add_argument("--titles", nargs="+", help="titles of the panels; the models without it")
    parser.add_argument("--part", nargs=3, type=int, metavar=("TOP", "LEFT", "SIDE"), help="square to show, in pixels")
    options = parser.parse_args(arguments)
    titles = options.titles or options.models
    if len(titles) != len(options.models):
        parser.error(f"--titles: {len(titles)} for {len(options.models)} models; give one for each")
    samples = {sample.name: sample for sample in find_samples(options.data, "test")}
    if options.name not in samples:
        parser.error(f"--name: there is no {options.name} in test; choose one of {', '.join(samples)}")
    image, truth = read_image(samples[options.name].image), read_mask(samples[options.name].mask)
    top, left, side = options.part or (0, 0, max(truth.shape))
    found = {}
    for title, model in zip(titles, options.models, strict=True):
        labels = predicted(model, image)
        found[f"{title}: Dice {dice(labels, truth, 1).item():.3f}"] = labels
    draw(options.output, truth, found, np.s_[top : top + side, left : left + side])


if __name__ == "__main__":
    main()
