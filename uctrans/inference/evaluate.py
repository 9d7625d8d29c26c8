"""Score a model on a split of a data set: scores of every image, their mean and deviation, and a comparison figure."""

import csv
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uctrans.data import find_split
from uctrans.data.find import drawn_from
from uctrans.data.instances import find_instances
from uctrans.extras import import_extra
from uctrans.inference.comparing import Compared, Comparison, score_sizes
from uctrans.inference.evaluation_result import EvaluationResult
from uctrans.inference.figures import ComparisonRow, InstanceRow, choose_rows, comparison_figure, instance_figure
from uctrans.inference.files import (
    InferenceError,
    output_folder,
    progress_bar,
    refuse_bad_instance_settings,
    refuse_existing,
    write_json,
)
from uctrans.inference.instance_metrics import INSTANCE_METRICS, score_instances
from uctrans.inference.instances import SEED_DISTANCE, SMALLEST_OBJECT
from uctrans.inference.metrics import METRICS, dice, hd95, iou, mean_and_deviation, mean_over_classes
from uctrans.inference.predictor import transforms_in_words
from uctrans.writing import written_atomically

INSTANCE_PICTURE, INSTANCE_ROWS = "instances.png", 3
PROTOCOL_SETTINGS = ("name", "image_size", "channel_order")  # those that a score depends on


@dataclass
class EvaluateConfig:
    """Settings of `evaluate`.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), or a published .pth.tar; several as a,b, whose
            probabilities are averaged.
        data: Folder of the data set, in any layout that uctrans.data.find_samples knows.
        output: Folder for metrics.csv, summary.json, figure.png and, with instance maps, instances.png.
        split: train, val or test; or all, every image of the folder.
        folds: Cross-validation folds: a shipped name or a JSON file; train and val are those of the fold then.
        fold: Which of the folds, counted from 0.
        size: protocol scores at the protocol's size, image and mask resized its way (the published convention); native
            enlarges the probabilities to the mask's own size and scores there, against the mask as it is. For models
            of the protocol native the two are the same. The name of a protocol that resizes, uctransnet-224, scores
            models of any other as it scores its own: truth and prediction are resized from the mask's own size alike.
        resolution: What the network sees when size is native: protocol, the image as the model's protocol prepares it;
            native, tiles of its pixels.
        threshold: Probability above which a pixel is foreground, of binary models.
        smallest_object: Predicted nuclei of fewer pixels are left out of AJI and PQ, which are scored where size is
            native and a folder "instances" lies beside the masks.
        seed_distance: Pixels between the seeds of nuclei that touch, for AJI and PQ: about a third of a diameter.
        tta: Test-time transforms whose probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        tile: Side of the tiles in pixels; none takes the model's image size.
        overlap: Share of a tile that overlaps with the next.
        batch_size: Images, or tiles, in one forward pass.
        channel_order: Order in which the network sees the colour channels: rgb or bgr; none takes the protocol's.
        backend: Implementation of the network's operators: auto, triton, composed or reference.
        device: auto, cpu, cuda, cuda:1.
        amp: bf16 runs the network under bfloat16 autocast, no leaves it in float32.
        graph: Replay the network as a CUDA graph, on CUDA.
        overwrite: Replace an evaluation that the output folder already holds.
        progress: Show a progress bar.
    """

    model: str
    data: str
    output: str
    split: str = "test"
    folds: str | None = None
    fold: int | None = None
    size: str = "protocol"
    resolution: str = "protocol"
    threshold: float = 0.5
    smallest_object: int = SMALLEST_OBJECT
    seed_distance: int = SEED_DISTANCE
    tta: str = "none"
    tile: int | None = None
    overlap: float = 0.25
    batch_size: int = 4
    channel_order: str | None = None
    backend: str = "auto"
    device: str = "auto"
    amp: str = "no"
    graph: bool = True
    overwrite: bool = False
    progress: bool = True


def _row(compared: Compared, classes: int, class_names: list[str], with_instances: bool) -> dict[str, Any]:
    scores = {
        key: score(compared.prediction, compared.truth, classes)
        for key, score in zip(METRICS, (dice, iou, hd95), strict=True)
    }
    row = {"name": compared.name} | {key: mean_over_classes(scores[key]).item() for key in METRICS}
    if compared.true_instances is not None:
        row |= score_instances(compared.predicted_instances, compared.true_instances)._asdict()
    elif with_instances:
        row |= dict.fromkeys(INSTANCE_METRICS, math.nan)
    if len(class_names) > 1:
        row |= {f"{key}_{name}": scores[key][i].item() for key in METRICS for i, name in enumerate(class_names)}
    return row


def _choose_by_aji(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Positions of the rows whose nuclei are shown, and their ranks; none where no instance map was scored."""
    scored = [position for position, row in enumerate(rows) if not math.isnan(row.get("aji", math.nan))]
    chosen = choose_rows([rows[position]["aji"] for position in scored], INSTANCE_ROWS)
    return [(scored[place], rank) for place, rank in chosen]


def _comparison_row(compared: Compared, scores: dict[str, Any], rank: str) -> ComparisonRow:
    return ComparisonRow(compared.name, compared.image, compared.truth, compared.prediction, scores["dice"], rank)


def _instance_row(compared: Compared, scores: dict[str, Any], rank: str) -> InstanceRow:
    return InstanceRow(
        compared.name, compared.image, compared.true_instances, compared.predicted_instances, scores["aji"], rank
    )


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in row.items()})


def _remarks(config: EvaluateConfig, images: int) -> tuple[str, ...]:
    """What is to be known of scores beside the pixels that were counted."""
    remarks = []
    if words := transforms_in_words(config.tta):
        remarks.append(f"Each probability is {words}")
    total = None if config.split == "all" else drawn_from(config.data)
    if total is not None:
        remarks.append(
            f"{config.data} comes unsplit: {images} of its {total} images are drawn for {config.split}, the same for "
            "training and scores; --split all scores every one"
        )
    return tuple(remarks)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Score a model on a split of a data set.

    Writes into ``config.output``: ``metrics.csv`` (one line an image), ``summary.json`` (mean, sample standard
    deviation and count of every score, the settings, the model's metadata) and ``figure.png`` (image, truth, prediction
    and differences of the best, median and worst images). The scores are defined in `uctrans.inference.metrics`. At
    size native, instance maps beside the masks (see `uctrans.data.instances.find_instances`) bring those of
    `uctrans.inference.instance_metrics`, for the images that have one, and ``instances.png``: the image and the
    outlines of true and predicted nuclei where AJI is best, median and worst. Masks and maps are all read and checked
    before the first image is predicted then.

    Raises:
        InferenceError: A setting out of its range, or an evaluation in the output folder and ``overwrite`` not set.
        DataError: The data set cannot be read, has no masks, holds labels the model has no class for, or an instance
            map that is none or not that of its image.
        ModelFileError: ``config.model`` is no model file.
        ValueError: There is no such backend, or one is named and the model has none.
        NotImplementedError: The backend cannot run on the device.
        ImportError: MONAI or Matplotlib is not installed.
    """
    if config.size not in score_sizes():
        raise InferenceError(f'size must be one of {", ".join(score_sizes())}, got "{config.size}".')
    if config.size != "native" and config.resolution == "native":
        raise InferenceError("The network can only see native pixels where scores are native too: set size to native.")
    if not 0 < config.threshold < 1:
        raise InferenceError(f"threshold must lie between 0 and 1, got {config.threshold}.")
    refuse_bad_instance_settings(config.smallest_object, config.seed_distance)
    for package in ("matplotlib", "monai"):  # a missing one is told before the work, not after it
        import_extra(package, "training")
    folder = output_folder(config.output)
    files = {name: folder / name for name in ("metrics.csv", "summary.json", "figure.png", INSTANCE_PICTURE)}
    if not config.overwrite:
        refuse_existing(list(files.values()), "an evaluation")
    samples = find_split(config.data, config.split, config.folds, config.fold)
    instance_maps = find_instances(samples)
    comparison = Comparison(config)
    model, is_native, scored_as = comparison.model, comparison.is_native, comparison.scored_as
    with_instances = bool(instance_maps) and is_native
    comparison.check(samples, instance_maps)
    compared = progress_bar(comparison.images(samples, instance_maps), len(samples), "evaluate", config.progress)
    rows = [_row(item, comparison.classes, comparison.class_names, with_instances) for item in compared]

    statistics = {key: mean_and_deviation([row[key] for row in rows]) for key in rows[0] if key != "name"}
    mean, deviation, count = ({key: values[i] for key, values in statistics.items()} for i in range(3))
    by_dice = choose_rows([row["dice"] for row in rows])
    by_aji = _choose_by_aji(rows)
    shown = sorted({position for position, _ in (*by_dice, *by_aji)})
    shown_maps = {rows[position]["name"]: instance_maps[rows[position]["name"]] for position, _ in by_aji}
    again = comparison.images([samples[position] for position in shown], shown_maps)
    pictures = dict(zip(shown, again, strict=True))
    figure_rows = [_comparison_row(pictures[position], rows[position], rank) for position, rank in by_dice]
    instance_rows = [_instance_row(pictures[position], rows[position], rank) for position, rank in by_aji]
    height, width = scored_as.image_size
    scored_at = (
        "the size of their masks" if is_native else f"{height} x {width} pixels, as {scored_as.resizes_as} resizes them"
    )
    _write_csv(files["metrics.csv"], rows)
    comparison_figure(files["figure.png"], figure_rows, comparison.colours, comparison.legend)
    if instance_rows:
        instance_figure(files[INSTANCE_PICTURE], instance_rows)
    else:  # one of the evaluation that is replaced would not be of these scores
        files[INSTANCE_PICTURE].unlink(missing_ok=True)
    write_json(
        files["summary.json"],
        {
            "images": len(rows),
            "mean": mean,
            "standard_deviation": deviation,
            "count": count,
            "hd95_undefined": sum(math.isnan(row["hd95"]) for row in rows),
            "settings": dataclasses.asdict(config),
            "protocol": {name: getattr(comparison.predictor.protocol, name) for name in PROTOCOL_SETTINGS},
            "scored_at": scored_at,
            "model": {"name": model.name, "config": model.config, "metadata": model.metadata},
            "torch_version": torch.__version__,
        },
    )
    unscored = 0 if with_instances else len(instance_maps)
    return EvaluationResult(rows, mean, deviation, count, scored_at, folder, unscored, _remarks(config, len(rows)))
