"""Score a model on a split of a data set: scores of every image, their mean and deviation, and figures."""

import csv
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import find_split
from ..data.find import describe_draw, shorten
from ..data.fingerprints import Record, find_known
from ..data.instances import find_instances
from ..data.pairs import Samples, pairs_of
from ..extras import import_extra
from ..models.base import without_images
from ..models.files import LAST_CHECKPOINT
from ..writing import locked, write_json, written_together
from .comparison import Compared, Comparison, EvaluateConfig, Truth, score_sizes
from .figures import ComparisonRow, InstanceRow, as_rgb, choose_rows, class_colours, comparison_figure, instance_figure
from .metrics import (
    INSTANCE_METRICS,
    METRICS,
    mean_and_deviation,
    score_instances,
)
from .settings import (
    InferenceError,
    check_choice,
    check_mask_settings,
    output_folder,
    progress_bar,
    refuse_existing,
    refuse_truth,
)
from .transforms import TRANSFORMS

SCORES, SUMMARY, PICTURE, INSTANCE_PICTURE = "metrics.csv", "summary.json", "figure.png", "instances.png"
INSTANCE_ROWS = 3
# Those that a score depends on.
PROTOCOL_SETTINGS = ("name", "image_size", "channel_order", "channels", "intensity_range", "ignore_label")
TABLE_ROWS, NAME_WIDTH = 40, 48
TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95 (px)",
    "aji": "AJI",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ = F1",
    "ap": "AP at 0.5",
}
WHITE_ON_BLACK = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of `evaluate`.

    Attributes:
        rows: One mapping for each image: ``name``, then ``dice``, ``iou`` (0..1) and ``hd95`` (pixels; nan where
            undefined), each the mean over the foreground classes; if instance maps were scored, ``aji``, ``pq``,
            ``sq``, ``rq``, ``f1`` and ``ap`` (0..1; nan for an image without a map); with several classes
            ``dice_CLASS`` and so on. The scores of a class that no mask has are nan and in no mean.
        mean: Mean over the images by score, without undefined scores.
        deviation: Sample standard deviation over the images by score.
        count: Number of images with a defined score, by score.
        scored_at: The pixels that were counted, in words.
        output: Folder of metrics.csv, summary.json, figure.png and, if instance maps were scored, instances.png.
        unscored_instance_maps: Number of instance maps that were not scored, because scores were not taken at the size
            of the masks.
        known: Images that the model was trained on ("train"), or else that chose its best weights ("val"): their names
            in the record of the model by their names here. None if the model has no such record.
        present: Number of masks that have a class, by its name ("foreground" if the masks are binary). An image whose
            mask lacks a class scores 1 if the prediction lacks it, too, and 0 otherwise.
        mean_where_present: Mean of ``dice``, ``iou`` and ``hd95`` of each class over the masks that have it.
        empty: Number of masks without any class, but not ignored as a whole.
        ignored: Number of masks that are ignored as a whole, so that their images have no score.
        mean_of_others: Means over the other images.
        remarks: Sentences that a reader of the scores should know.
    """

    rows: list[dict[str, Any]]
    mean: dict[str, float]
    deviation: dict[str, float]
    count: dict[str, int]
    scored_at: str
    output: Path
    unscored_instance_maps: int = 0
    known: dict[str, dict[str, str]] | None = None
    present: dict[str, int] = field(default_factory=dict)
    mean_where_present: dict[str, dict[str, float]] = field(default_factory=dict)
    empty: int = 0
    ignored: int = 0
    mean_of_others: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def table(self) -> str:
        """Return the scores as plain text: one line for each of the first images, then mean and deviation."""
        names = [row["name"] for row in self.rows[:TABLE_ROWS]]
        width = min(max(map(len, [*names, "standard deviation"])), NAME_WIDTH)
        columns = [key for key in TITLES if key in self.mean]
        header = " " * width + "".join(f"{TITLES[key]:>11}" for key in columns)
        lines = [header]
        lines += [_line(name, row, columns, width) for name, row in zip(names, self.rows, strict=False)]
        if len(self.rows) > len(names):
            lines.append(f"... {len(self.rows) - len(names)} more in {self.output / 'metrics.csv'}")
        lines += [
            "-" * len(header),
            _line("mean", self.mean, columns, width),
            _line("standard deviation", self.deviation, columns, width),
        ]
        for name in (key.removeprefix("dice_") for key in self.mean if key.startswith("dice_")):
            lines.append(_line(f"mean, {name}", {key: self.mean[f"{key}_{name}"] for key in METRICS}, METRICS, width))
        lines.append(f"{len(self.rows)} images, scored at {self.scored_at}")
        return "\n".join([*lines, *self.remarks, *self._remarks_on_counts()])

    def _remarks_on_counts(self) -> Iterator[str]:
        images = len(self.rows)
        if absent := [name for name, count in self.present.items() if count == 0]:
            yield f"n/a: no mask has {shorten(absent)}, so there is nothing to score"
        if 0 < self.empty < images:
            yield (
                f"{self.empty} of {images} masks are empty, where an empty prediction scores Dice 1 and any other 0; "
                f"mean of the others: {_listed(self.mean_of_others)}"
            )
        if self.ignored:
            yield f"{self.ignored} of {images} masks are ignored as a whole; their images have no score"
        for name, count in self.present.items():
            if len(self.present) > 1 and 0 < count < images:
                scores = _listed(self.mean_where_present[name])
                yield f"{count} of {images} masks have {name}; its mean over these: {scores}"
        if any(self.present.values()) and (undefined := images - self.ignored - self.count["hd95"]):
            yield f"HD95 is undefined for {undefined} of {images} images: truth or prediction is empty"
        with_map = self.count.get("aji", 0)
        if 0 < with_map < images:
            yield f"AJI, PQ, SQ, RQ and AP are those of the {with_map} of {images} images with an instance map"
        if unmatched := with_map - self.count.get("sq", 0):
            yield f"SQ is undefined for {unmatched} of {with_map} images: no nucleus was matched"
        if self.unscored_instance_maps:
            yield (
                f"{self.unscored_instance_maps} instance maps beside the masks were not scored: set size to native for "
                "AJI and PQ"
            )


def _line(name: str, scores: dict[str, Any], columns: Sequence[str], width: int) -> str:
    shown = name if len(name) <= width else f"{name[: width - 1]}…"
    return f"{shown:<{width}}" + "".join(f"{_number(key, scores[key]):>11}" for key in columns)


def _number(key: str, score: float) -> str:
    return "n/a" if math.isnan(score) else f"{score:.2f}" if key == "hd95" else f"{score:.4f}"


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{TITLES[key]} {_number(key, score)}" for key, score in scores.items())


def evaluate(config: EvaluateConfig, *, data: Any = None) -> EvaluationResult:
    """Score a model on a split of a data set, or on images and masks in memory.

    Writes into ``config.output``: ``metrics.csv`` (one line for each image), ``summary.json`` (mean, sample standard
    deviation and count of every score, the settings, the model's metadata) and ``figure.png`` (image, truth, prediction
    and differences of the best, median and worst images). `uctrans.inference.metrics` defines the scores. At native
    size, instance maps beside the masks (see `uctrans.data.instances.find_instances`) add AJI, PQ, SQ, RQ, F1 and AP
    for the images that have one, and ``instances.png``: the outlines of true and predicted nuclei of the images with
    the best, median and worst AJI. All masks and maps are then read and checked before the first prediction. New files
    replace those of an earlier evaluation together, at the end, ``summary.json`` last.

    Args:
        config: Settings of the evaluation.
        data: Images and masks in place of a split of ``config.data``: two tensors, (n, C, H, W) and (n, H, W), or a
            ``torch.utils.data.Dataset`` of pairs, see :func:`uctrans.data.pairs.pairs_of`. An item may be read several
            times.

    Raises:
        DataError: The split, the folds, a mask or ``data`` cannot be used, or an instance map belongs to another image.
        InferenceError: A setting is out of its range, or the output folder holds a run, the images or masks of a data
            set, or an evaluation and ``overwrite`` is not set.
        FolderError: Another process evaluates into the output folder, or it cannot be made or written to.
        ModelFileError: There is no model at ``config.model``.
        ValueError: The backend or device is unknown, or a backend is named and the model has none.
        NotImplementedError: The backend cannot run on the device.
        ImportError: MONAI or Matplotlib is not installed.
    """
    check_choice("size", config.size, score_sizes())
    if config.size != "native" and config.resolution == "native":
        raise InferenceError("resolution: native pixels can only be scored at native size; set size to native")
    check_mask_settings(config.threshold, config.smallest_object, config.seed_distance)
    for package in ("matplotlib", "monai"):  # report a missing package before the work
        import_extra(package, "training")
    folder = output_folder(config.output)
    if (folder / LAST_CHECKPOINT).exists():
        raise InferenceError(
            f"output: {folder} is the folder of a run, which has a metrics.csv too; name another folder"
        )
    refuse_truth(folder)
    with locked(folder):
        if not config.overwrite:
            refuse_existing([folder / name for name in (SCORES, SUMMARY, PICTURE, INSTANCE_PICTURE)], "an evaluation")
        return _evaluate(config, folder, _samples(config, data))


def _samples(config: EvaluateConfig, data: Any) -> Samples:
    if data is None:
        if not config.data:
            raise InferenceError("data: is empty; name a folder, or give evaluate images and masks as data in Python")
        return find_split(config.data, config.split, config.folds, config.fold)
    if given := [name for name in ("data", "folds", "fold") if getattr(config, name) not in ("", None)]:
        raise InferenceError(f"{given[0]}: is of a folder, and evaluate is given data; leave one of them out")
    return pairs_of(data, "data")


def _evaluate(config: EvaluateConfig, folder: Path, samples: Samples) -> EvaluationResult:
    instance_maps = find_instances(samples) if config.data else {}
    comparison = Comparison(config)
    with_instances = bool(instance_maps) and comparison.is_native
    comparison.check(samples, instance_maps)
    compared = progress_bar(comparison.images(samples, instance_maps), len(samples), "evaluate", config.progress)
    names, fingerprints, scores, has_class, is_scored, of_instances = [], [], [], [], [], []
    for item in compared:
        names.append(item.name)
        fingerprints.append(item.fingerprint)
        scores.append(comparison.scores(item))
        has_class.append(comparison.classes_of(item.truth))
        is_scored.append(comparison.ignore_label is None or bool((item.truth != comparison.ignore_label).any()))
        of_instances.append(_instance_scores(item, with_instances))
    stacked = {key: torch.stack([each[key] for each in scores]) for key in METRICS}
    truth = Truth(torch.stack(has_class), torch.tensor(is_scored), stacked)
    if not truth.has_class.any():
        of_instances = [dict.fromkeys(each, math.nan) for each in of_instances]
    parts = zip(names, truth.means(), of_instances, truth.by_class(comparison.class_names), strict=True)
    rows = [{"name": name} | means | instances | by_class for name, means, instances, by_class in parts]
    record = comparison.model.metadata.get("images")
    known = None if record is None else find_known(record, names, fingerprints)

    comparison.doubts.warn()  # before the images of the figures are read again
    statistics = {key: mean_and_deviation([row[key] for row in rows]) for key in rows[0] if key != "name"}
    mean, deviation, count = ({key: values[i] for key, values in statistics.items()} for i in range(3))
    others = [row for row, has in zip(rows, truth.has_class, strict=True) if has.any()]
    found = truth.summary(comparison.class_names) | {
        "mean_of_others": {key: mean_and_deviation([row[key] for row in others])[0] for key in TITLES if key in mean}
    }
    model = comparison.model
    summary = {
        "images": len(rows),
        "mean": mean,
        "standard_deviation": deviation,
        "count": count,
        "hd95_undefined": sum(math.isnan(row["hd95"]) for row in rows),
        **found,
        "settings": dataclasses.asdict(config),
        "protocol": {name: getattr(comparison.predictor.protocol, name) for name in PROTOCOL_SETTINGS},
        "scored_at": comparison.scored_at,
        "model": {"name": model.name, "config": model.config, "metadata": without_images(model.metadata)},
        "known_images": known,
        "torch_version": torch.__version__,
    }
    has_instances = any(not math.isnan(row.get("aji", math.nan)) for row in rows)
    names = [SCORES, PICTURE, *[INSTANCE_PICTURE] * has_instances, SUMMARY]
    former = [folder / SUMMARY, folder / INSTANCE_PICTURE]  # so that no killed process leaves a summary of other scores
    with written_together([folder / name for name in names], removed=former) as temporaries:
        files = dict(zip(names, temporaries, strict=True))
        _draw_figures(files, rows, comparison, samples, instance_maps)
        _write_csv(files[SCORES], rows)
        write_json(files[SUMMARY], summary)
    unscored = 0 if with_instances else len(instance_maps)
    remarks = _remarks(config, rows, record, known)
    return EvaluationResult(
        rows,
        mean,
        deviation,
        count,
        comparison.scored_at,
        folder,
        unscored_instance_maps=unscored,
        known=known,
        **found,
        remarks=remarks,
    )


def _instance_scores(compared: Compared, with_instances: bool) -> dict[str, float]:
    if compared.true_instances is not None:
        return score_instances(compared.predicted_instances, compared.true_instances)._asdict()
    return dict.fromkeys(INSTANCE_METRICS, math.nan) if with_instances else {}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in row.items()})


def _draw_figures(
    files: dict[str, Path],
    rows: list[dict[str, Any]],
    comparison: Comparison,
    samples: Samples,
    instance_maps: Mapping[str, Path],
) -> None:
    """Predict the images to show once more, which saves the memory of keeping all predictions, and draw them."""
    by_dice = choose_rows([-1 if math.isnan(row["dice"]) else row["dice"] for row in rows])
    with_aji = [position for position, row in enumerate(rows) if not math.isnan(row.get("aji", math.nan))]
    chosen = choose_rows([rows[position]["aji"] for position in with_aji], INSTANCE_ROWS)
    by_aji = [(with_aji[place], rank) for place, rank in chosen]
    positions = sorted({position for position, _ in (*by_dice, *by_aji)})
    maps = {name: instance_maps[name] for name in (rows[position]["name"] for position, _ in by_aji)}
    again = comparison.images([samples[position] for position in positions], maps)
    pictures = dict(zip(positions, again, strict=True))
    mask_rows, instance_rows = [], []
    for position, rank in by_dice:
        shown, score = pictures[position], rows[position]["dice"]
        mask_rows.append(ComparisonRow(shown.name, as_rgb(shown.image), shown.truth, shown.prediction, score, rank))
    for position, rank in by_aji:
        shown, score = pictures[position], rows[position]["aji"]
        nuclei = shown.true_instances, shown.predicted_instances
        instance_rows.append(InstanceRow(shown.name, as_rgb(shown.image), *nuclei, score, rank))
    classes, palette = comparison.classes, comparison.palette
    colours = WHITE_ON_BLACK if classes == 1 and palette is None else class_colours(classes, palette)
    names = comparison.class_names if classes > 1 else None
    comparison_figure(files[PICTURE], mask_rows, colours, names, comparison.ignore_label)
    if instance_rows:
        instance_figure(files[INSTANCE_PICTURE], instance_rows)


def _remarks(
    config: EvaluateConfig, rows: list[dict[str, Any]], record: Record | None, known: dict[str, dict[str, str]] | None
) -> tuple[str, ...]:
    remarks = []
    if config.tta != "none":
        kinds = "flips" if config.tta == "flips" else "flips and rotations"
        remarks.append(f"Each probability is the mean over {len(TRANSFORMS[config.tta])} {kinds}")
    if known is not None and config.intensity_range is not None:
        remarks.append("Images that the model was trained on are recognised only in the intensity range of training")
    if known is not None and any(known.values()):
        remarks.append(_remark_on_known_images(rows, known))
        if config.split != "test" and known["train"] and config.folds is None:
            remarks.append("Of a model that was trained on a fold, score val with its folds and fold")
    is_folds_own = config.folds is not None and config.split != "test"
    is_whole = config.split == "all" or not config.data
    drawn = None if is_whole or is_folds_own else describe_draw(config.data, config.split, len(rows))
    if drawn is not None:
        if record is None:
            drawn += ", and the model does not record whether it was trained on them"
        elif not any(known.values()):
            before = {name for part in record.values() for name in part.values()}
            changed = [row["name"] for row in rows if row["name"] in before]
            if changed:
                drawn += (
                    f", and the model may have seen {shorten(changed)} in training, with other pixels or read in "
                    "another intensity range"
                )
            else:
                drawn += ", and the model has seen none of them in training"
        remarks.append(f"{drawn}; --split all scores every one")
    return tuple(remarks)


def _remark_on_known_images(rows: list[dict[str, Any]], known: dict[str, dict[str, str]]) -> str:
    """Return a sentence about the images that the model was trained on or chosen by, with the mean of the others."""
    parts = []
    for part, what in (("train", "the model was trained on"), ("val", "the best weights were chosen by")):
        named = [name if before in ("", name) else f"{name} (as {before})" for name, before in known[part].items()]
        if named:
            parts.append(f"{what} {len(named)} of these {len(rows)} images: {shorten(named)}")
    new = [row["dice"] for row in rows if row["name"] not in known["train"] | known["val"]]
    mean = (
        f"the mean Dice of the other {len(new)} is {mean_and_deviation(new)[0]:.4f}"
        if new
        else "no image is new to the model"
    )
    text = "; ".join([*parts, mean])
    return f"Not a test: {text}"
