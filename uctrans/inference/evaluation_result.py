"""What an evaluation found, and its scores as a table of plain text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uctrans.inference.metrics import METRICS

TABLE_ROWS = 40
TITLES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (px)", "aji": "AJI", "pq": "PQ", "sq": "SQ", "rq": "RQ = F1"}


@dataclass(frozen=True)
class EvaluationResult:
    """What `uctrans.inference.evaluate` found.

    Attributes:
        rows: One mapping per image: ``name``, then ``dice``, ``iou`` (0..1) and ``hd95`` (pixels; nan where undefined),
            each the mean over the foreground classes; where instance maps were scored ``aji``, ``pq``, ``sq``, ``rq``
            and ``f1`` (0..1; nan for an image without a map); then with several classes ``dice_CLASS`` and so on.
        mean: Mean over the images by score, undefined scores left out.
        deviation: Sample standard deviation over the images by score.
        count: Number of images with a defined score, by score.
        scored_at: The pixels that were counted, in words.
        output: The folder that holds metrics.csv, summary.json, figure.png and, where instance maps were scored,
            instances.png.
        unscored_instance_maps: Number of instance maps that lie beside the masks and belong to another size than that
            which was scored.
        remarks: What else is to be known of the scores, in sentences.
    """

    rows: list[dict[str, Any]]
    mean: dict[str, float]
    deviation: dict[str, float]
    count: dict[str, int]
    scored_at: str
    output: Path
    unscored_instance_maps: int = 0
    remarks: tuple[str, ...] = ()

    def table(self) -> str:
        """The scores as plain text: a line an image (the first where there are many), then mean and deviation."""
        names = [row["name"] for row in self.rows[:TABLE_ROWS]]
        width = min(max(map(len, [*names, "standard deviation"])), 48)
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
        per_class = [key.removeprefix("dice_") for key in self.mean if key.startswith("dice_")]
        for name in per_class:
            lines.append(_line(f"mean, {name}", {key: self.mean[f"{key}_{name}"] for key in METRICS}, METRICS, width))
        return "\n".join([*lines, f"{len(self.rows)} images, scored at {self.scored_at}", *self._remarks()])

    def _remarks(self) -> list[str]:
        remarks = [*self.remarks]
        undefined = len(self.rows) - self.count["hd95"]
        if undefined:
            remarks.append(
                f"HD95 is undefined for {undefined} of {len(self.rows)} images: truth or prediction is empty"
            )
        with_map = self.count.get("aji", 0)
        if 0 < with_map < len(self.rows):
            remarks.append(f"AJI, PQ, SQ and RQ are of the {with_map} of {len(self.rows)} images with an instance map")
        unmatched = with_map - self.count.get("sq", 0)
        if unmatched:
            remarks.append(f"SQ is undefined for {unmatched} of {with_map} images: no nucleus was matched")
        if self.unscored_instance_maps:
            remarks.append(
                f"{self.unscored_instance_maps} instance maps lie beside the masks: set size to native for AJI and PQ"
            )
        return remarks


def _line(name: str, scores: dict[str, Any], columns: list[str] | tuple[str, ...], width: int) -> str:
    shown = name if len(name) <= width else f"{name[: width - 1]}…"
    return f"{shown:<{width}}" + "".join(
        f"{scores[key]:>11.2f}" if key == "hd95" else f"{scores[key]:>11.4f}" for key in columns
    )
