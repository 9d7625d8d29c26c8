"""Score a model on a split of a data set: scores of every image, their mean and deviation, and a comparison figure."""

import csv
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uctrans.data import Sample, find_samples, load_tensors, read_image, read_mask
from uctrans.extras import import_extra
from uctrans.inference.figures import ComparisonRow, choose_rows, comparison_figure
from uctrans.inference.files import (
    InferenceError,
    output_folder,
    progress_bar,
    refuse_existing,
    write_json,
)
from uctrans.inference.metrics import METRICS, dice, hd95, iou, mean_and_deviation, mean_over_classes
from uctrans.inference.overlays import class_colours
from uctrans.inference.predictor import Predictor, load_predictor, to_labels
from uctrans.writing import written_atomically

SIZES = ("protocol", "native")
TABLE_ROWS = 40
WHITE_ON_BLACK = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)
TITLES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (px)"}


@dataclass
class EvaluateConfig:
    """Settings of `evaluate`.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), or a published .pth.tar.
        data: Folder of the data set, in any layout that uctrans.data.find_samples knows.
        output: Folder for metrics.csv, summary.json and figure.png.
        split: train, val or test.
        size: protocol scores at the protocol's size, image and mask resized its way (the published convention); native
            enlarges the probabilities to the mask's own size and scores there, against the mask as it is.
        resolution: What the network sees when size is native: protocol, the resized image; native, tiles of its pixels.
        threshold: Probability above which a pixel is foreground, of binary models.
        tta: Test-time transforms whose probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        tile: Side of the tiles in pixels; none takes the model's image size.
        overlap: Share of a tile that overlaps with the next.
        batch_size: Images, or tiles, in one forward pass.
        channel_order: Order in which the network sees the colour channels: rgb or bgr; none takes the protocol's.
        backend: Implementation of the network's operators: auto, triton, composed or reference.
        device: auto, cpu, cuda, cuda:1.
        amp: bf16 runs the network under bfloat16 autocast, no leaves it in float32.
        overwrite: Replace an evaluation that the output folder already holds.
        progress: Show a progress bar.
    """

    model: str
    data: str
    output: str
    split: str = "test"
    size: str = "protocol"
    resolution: str = "protocol"
    threshold: float = 0.5
    tta: str = "none"
    tile: int | None = None
    overlap: float = 0.25
    batch_size: int = 4
    channel_order: str | None = None
    backend: str = "auto"
    device: str = "auto"
    amp: str = "no"
    overwrite: bool = False
    progress: bool = True


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found.

    Attributes:
        rows: One mapping per image: ``name``, then ``dice``, ``iou`` (0..1) and ``hd95`` (pixels; nan where undefined),
            each the mean over the foreground classes, then with several of those ``dice_CLASS`` and so on.
        mean: Mean over the images by score, undefined scores left out.
        deviation: Sample standard deviation over the images by score.
        count: Number of images with a defined score, by score.
        scored_at: The pixels that were counted, in words.
        output: The folder that holds metrics.csv, summary.json and figure.png.
    """

    rows: list[dict[str, Any]]
    mean: dict[str, float]
    deviation: dict[str, float]
    count: dict[str, int]
    scored_at: str
    output: Path

    def table(self) -> str:
        """The scores as plain text: a line an image (the first where there are many), then mean and deviation."""
        names = [row["name"] for row in self.rows[:TABLE_ROWS]]
        width = min(max(map(len, [*names, "standard deviation"])), 48)
        header = " " * width + "".join(f"{title:>11}" for title in TITLES.values())
        lines = [header]
        lines += [_line(name, row, width) for name, row in zip(names, self.rows, strict=False)]
        if len(self.rows) > len(names):
            lines.append(f"... {len(self.rows) - len(names)} more in {self.output / 'metrics.csv'}")
        lines += [
            "-" * len(header),
            _line("mean", self.mean, width),
            _line("standard deviation", self.deviation, width),
        ]
        per_class = [key.removeprefix("dice_") for key in self.mean if key.startswith("dice_")]
        for name in per_class:
            lines.append(_line(f"mean, {name}", {key: self.mean[f"{key}_{name}"] for key in METRICS}, width))
        lines.append(f"{len(self.rows)} images, scored at {self.scored_at}")
        undefined = len(self.rows) - self.count["hd95"]
        if undefined:
            lines.append(f"HD95 is undefined for {undefined} of {len(self.rows)} images: truth or prediction is empty")
        return "\n".join(lines)


def _line(name: str, scores: dict[str, Any], width: int) -> str:
    shown = name if len(name) <= width else f"{name[: width - 1]}…"
    return f"{shown:<{width}}" + "".join(
        f"{scores[key]:>11.2f}" if key == "hd95" else f"{scores[key]:>11.4f}" for key in METRICS
    )


@dataclass(frozen=True)
class _Compared:
    """One image beside its truth and prediction, at the size that is scored."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def _compare_at_protocol_size(
    predictor: Predictor, samples: list[Sample], config: EvaluateConfig
) -> Iterator[_Compared]:
    classes, palette = predictor.model.classes, predictor.model.metadata.get("palette")
    for start in range(0, len(samples), config.batch_size):
        tensors = load_tensors(samples[start : start + config.batch_size], predictor.protocol, classes, palette)
        labels = to_labels(predictor.probabilities(tensors.images), config.threshold).cpu().numpy()
        images = tensors.images.permute(0, 2, 3, 1).numpy()
        for name, image, truth, prediction in zip(tensors.names, images, tensors.masks.numpy(), labels, strict=True):
            yield _Compared(name, image, truth, prediction)


def _compare_at_native_size(predictor: Predictor, samples: list[Sample], config: EvaluateConfig) -> Iterator[_Compared]:
    classes, palette = predictor.model.classes, predictor.model.metadata.get("palette")
    for sample in samples:
        image = read_image(sample.image)
        truth = read_mask(sample.mask, classes, palette, shape=image.shape[:2])
        probabilities = predictor.probabilities_of_image(image)
        yield _Compared(sample.name, image, truth, to_labels(probabilities[None], config.threshold)[0].cpu().numpy())


def _row(compared: _Compared, classes: int, class_names: list[str]) -> dict[str, Any]:
    scores = {
        key: score(compared.prediction, compared.truth, classes)
        for key, score in zip(METRICS, (dice, iou, hd95), strict=True)
    }
    row = {"name": compared.name} | {key: mean_over_classes(scores[key]).item() for key in METRICS}
    if len(class_names) > 1:
        row |= {f"{key}_{name}": scores[key][i].item() for key in METRICS for i, name in enumerate(class_names)}
    return row


def _foreground_names(metadata: dict[str, Any], classes: int) -> list[str]:
    """Names of the foreground classes; those of the metadata may include the background or not."""
    foreground = max(classes - 1, 1)
    names = [str(name) for name in metadata.get("class_names") or ()]
    if len(names) == foreground + 1:
        names = names[1:]
    return names if len(set(names)) == foreground else [str(label) for label in range(1, foreground + 1)]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in row.items()})


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Score a model on a split of a data set.

    Writes into ``config.output``: ``metrics.csv`` (one line an image), ``summary.json`` (mean, sample standard
    deviation and count of every score, the settings, the model's metadata) and ``figure.png`` (image, truth, prediction
    and differences of the best, median and worst images). The scores are defined in `uctrans.inference.metrics`.

    Raises:
        InferenceError: A setting out of its range, or an evaluation in the output folder and ``overwrite`` not set.
        DataError: The data set cannot be read, has no masks, or holds labels the model has no class for.
        ModelFileError: ``config.model`` is no model file.
        ValueError: There is no such backend, or one is named and the model has none.
        NotImplementedError: The backend cannot run on the device.
        ImportError: MONAI or Matplotlib is not installed.
    """
    if config.size not in SIZES:
        raise InferenceError(f'size must be "protocol" or "native", got "{config.size}".')
    if config.size == "protocol" and config.resolution == "native":
        raise InferenceError("The network can only see native pixels where scores are native too: set size to native.")
    if not 0 < config.threshold < 1:
        raise InferenceError(f"threshold must lie between 0 and 1, got {config.threshold}.")
    for package in ("matplotlib", "monai"):  # a missing one is told before the work, not after it
        import_extra(package, "training")
    folder = output_folder(config.output)
    files = {name: folder / name for name in ("metrics.csv", "summary.json", "figure.png")}
    if not config.overwrite:
        refuse_existing(list(files.values()), "an evaluation")
    samples = find_samples(config.data, config.split)
    predictor = load_predictor(
        config.model,
        config.backend,
        device=config.device,
        resolution=config.resolution,
        tile=config.tile,
        overlap=config.overlap,
        tta=config.tta,
        amp=config.amp,
        batch_size=config.batch_size,
        channel_order=config.channel_order,
    )
    model = predictor.model
    compare = _compare_at_protocol_size if config.size == "protocol" else _compare_at_native_size
    class_names = _foreground_names(model.metadata, model.classes)
    compared = progress_bar(compare(predictor, samples, config), len(samples), "evaluate", config.progress)
    rows = [_row(item, model.classes, class_names) for item in compared]

    statistics = {key: mean_and_deviation([row[key] for row in rows]) for key in rows[0] if key != "name"}
    mean, deviation, count = ({key: values[i] for key, values in statistics.items()} for i in range(3))
    chosen = choose_rows([row["dice"] for row in rows])
    pictures = compare(predictor, [samples[position] for position, _ in chosen], config)
    figure_rows = [
        ComparisonRow(item.name, item.image, item.truth, item.prediction, rows[position]["dice"], rank)
        for item, (position, rank) in zip(pictures, chosen, strict=True)
    ]
    palette = model.metadata.get("palette")
    colours = WHITE_ON_BLACK if model.classes == 1 and palette is None else class_colours(model.classes, palette)
    _write_csv(files["metrics.csv"], rows)
    comparison_figure(files["figure.png"], figure_rows, colours, class_names if model.classes > 1 else None)
    write_json(
        files["summary.json"],
        {
            "images": len(rows),
            "mean": mean,
            "standard_deviation": deviation,
            "count": count,
            "hd95_undefined": sum(math.isnan(row["hd95"]) for row in rows),
            "settings": dataclasses.asdict(config),
            "protocol": dataclasses.asdict(predictor.protocol),
            "model": {"name": model.name, "config": model.config, "metadata": model.metadata},
            "torch_version": torch.__version__,
        },
    )
    height, width = predictor.protocol.image_size
    scored_at = (
        f"{height} x {width} pixels, as {predictor.protocol.name} resizes them"
        if config.size == "protocol"
        else "the size of their masks"
    )
    return EvaluationResult(rows, mean, deviation, count, scored_at, folder)
