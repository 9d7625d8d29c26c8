"""Put a run into the package as the model "nuclei", score that model by kind of image, and time it.

    python -m benchmarks.nuclei --run runs/nuclei     (the best weights of the run, in 16 bits)
    python -m benchmarks.nuclei -i DATA               (scores of DATA/test, which has images, masks and instances)

Both may be given at once. The kinds are those of the Data Science Bowl 2018: fluorescence, stained tissue, and gray
images of a bright field.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from skimage.data import immunohistochemistry

import uctrans
from uctrans.data import find_samples, read_image
from uctrans.inference import EvaluateConfig, Predictor, evaluate
from uctrans.inference.instances import to_instances
from uctrans.inference.metrics import mean_and_deviation
from uctrans.models.base import without_image_names
from uctrans.models.files import BUILT_IN_MODELS

NAME = "nuclei"
SCORES = {"dice": "Dice", "ap": "AP at IoU 0.5", "aji": "AJI", "pq": "PQ"}
MIDDLE_GRAY = 128
REPEATS = 5


def install(run: str) -> Path:
    """Write the best weights of a run into the package, parameters in 16 bits; return their folder.

    The names of the images that the model was trained on stay behind; it knows them by their fingerprints.
    """
    model = uctrans.load_model(run)
    model.metadata = without_image_names(model.metadata)
    return model.save_pretrained(BUILT_IN_MODELS / NAME, dtype=torch.float16)


def kind_of(image: np.ndarray) -> str:
    """Return "stained", "fluorescence" or "bright field" of an image, uint8 (H, W, 3).

    An image with any colour is stained; of the gray ones, those with a dark background are fluorescence.
    """
    if (image != image[..., :1]).any():
        return "stained"
    return "fluorescence" if np.median(image) < MIDDLE_GRAY else "bright field"


def scores_by_kind(data: str, model: str = NAME) -> dict[str, tuple[int, dict[str, float]]]:
    """Return the number of test images and the means of their scores, over all images and by kind."""
    kinds = {sample.name: kind_of(read_image(sample.image)) for sample in find_samples(data, "test")}
    with tempfile.TemporaryDirectory() as folder:
        rows = evaluate(EvaluateConfig(model, data, folder, size="native")).rows
    groups = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        groups[kinds[row["name"]]].append(row)
    return {
        kind: (len(rows), {score: mean_and_deviation([row[score] for row in rows])[0] for score in SCORES})
        for kind, rows in groups.items()
    }


def seconds_per_image(model: str = NAME) -> float:
    """Return the median of the seconds from a picture of 512 x 512 pixels to its nuclei, on the CPU."""
    predictor = Predictor(uctrans.load_model(model), device="cpu")
    image, seconds = immunohistochemistry(), []
    for _ in range(REPEATS + 1):  # the first warms up
        start = time.perf_counter()
        to_instances(predictor.probabilities_of_image(image))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def table(scores: dict[str, tuple[int, dict[str, float]]]) -> str:
    """Return the scores as a Markdown table."""
    lines = [f"| images | number | {' | '.join(SCORES.values())} |", "| --- " * (len(SCORES) + 2) + "|"]
    for kind, (number, means) in scores.items():
        lines.append(f"| {kind} | {number} | {' | '.join(f'{means[score]:.3f}' for score in SCORES)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="benchmarks.nuclei", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", help="folder of a training run whose best weights the package takes")
    parser.add_argument("-i", "--data", help="data set with test/images, test/masks and test/instances")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    options = parser.parse_args(arguments)
    if options.run is None and options.data is None:
        parser.error("nothing to do: give --run, -i or both")
    torch.set_num_threads(options.threads)
    if options.run is not None:
        print(f"Wrote {install(options.run)}")
    if options.data is not None:
        print(table(scores_by_kind(options.data)))
        print(f"{seconds_per_image():.2f} s for an image of 512 x 512 pixels, threads: {options.threads}")


if __name__ == "__main__":
    main()
