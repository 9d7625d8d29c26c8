"""Figures of an evaluation, one row an image: masks and their differences, and outlines of single nuclei."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from uctrans.extras import import_extra
from uctrans.inference.overlays import DIFFERENCES, PANEL_GAP, colour_labels, differences, instance_comparison
from uctrans.writing import written_atomically

COLUMNS = ("Image", "Truth", "Prediction", "Differences")
PANEL_INCHES = 2.1
INSTANCE_COLUMNS = ("Image", "True nuclei", "Predicted nuclei")
INSTANCE_PANEL_INCHES = 3.5  # outlines are thin
DPI = 150
LABEL_INCHES, TITLE_INCHES, LEGEND_INCHES = 0.5, 0.45, 0.25
LEGEND_COLUMNS = 4
TITLE_LENGTH = 28


class ComparisonRow(NamedTuple):
    """One row of the figure: uint8 image ``(H, W, 3)``, label maps uint8 ``(H, W)``, Dice in 0..1."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    dice: float
    rank: str = ""


class InstanceRow(NamedTuple):
    """One row of the figure of nuclei: uint8 image ``(H, W, 3)``, instance maps int ``(H, W)``, AJI in 0..1."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    aji: float
    rank: str = ""


def choose_rows(scores: list[float], count: int = 6) -> list[tuple[int, str]]:
    """Which images to show: up to ``count / 3`` each of the best, the median and the worst, best first.

    Returns:
        Pairs of position in ``scores`` and ``"best"``, ``"median"`` or ``"worst"``; with no more than ``count`` images
        all of them, ranked ``""`` where they are neither first, middle nor last.
    """
    order = sorted(range(len(scores)), key=lambda position: -scores[position])
    if len(order) <= count:
        ranks = {len(order) // 2: "median", len(order) - 1: "worst", 0: "best"} if len(order) > 2 else {}
        return [(position, ranks.get(place, "")) for place, position in enumerate(order)]
    share = count // 3
    middle = (len(order) - share) // 2
    return [
        *((position, "best") for position in order[:share]),
        *((position, "median") for position in order[middle : middle + share]),
        *((position, "worst") for position in order[len(order) - share :]),
    ]


def _shortened(name: str) -> str:
    return name if len(name) <= TITLE_LENGTH else f"{name[: TITLE_LENGTH - 1]}…"


def _label(name: str, score: str, rank: str) -> str:
    return f"{_shortened(name)}\n{score}" + (f" ({rank})" if rank else "")


def comparison_figure(
    path: Path, rows: list[ComparisonRow], colours: np.ndarray, class_names: list[str] | None = None
) -> None:
    """Write the comparison of truth and prediction as a PNG, atomically.

    Args:
        path: Of the PNG.
        rows: At least one, top to bottom.
        colours: Colours of the labels, see `uctrans.inference.overlays.class_colours`.
        class_names: Of the foreground classes, for the legend of multi-class figures; None for binary masks.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No row was given.
    """
    if not rows:
        raise ValueError("A comparison figure needs at least one row.")
    figure_class = import_extra("matplotlib.figure", "training").Figure
    patch = import_extra("matplotlib.patches", "training").Patch
    aspect = float(np.median([row.image.shape[0] / row.image.shape[1] for row in rows]))
    row_inches = PANEL_INCHES * min(max(aspect, 0.3), 3.0)
    figure = figure_class(layout="constrained")
    figure.set_figwidth(PANEL_INCHES * len(COLUMNS) + LABEL_INCHES)
    axes = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for row_axes, row in zip(axes, rows, strict=True):
        truth, prediction = colour_labels(row.truth, colours), colour_labels(row.prediction, colours)
        panels = (row.image, truth, prediction, differences(row.prediction, row.truth))
        for axis, panel in zip(row_axes, panels, strict=True):
            axis.imshow(panel, interpolation="antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("0.6")
        row_axes[0].set_ylabel(_label(row.name, f"Dice {row.dice:.3f}", row.rank), fontsize=8)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=11)
    entries = [(name, colours[label]) for label, name in enumerate(class_names or (), start=1)]
    lines = [entries[start : start + LEGEND_COLUMNS] for start in range(0, len(entries), LEGEND_COLUMNS)]
    lines.append([item for item in DIFFERENCES.items() if class_names or item[0] != "wrong class"])
    columns = max(map(len, lines))
    handles = [  # a legend is filled column by column
        patch(facecolor=np.asarray(line[column][1]) / 255, edgecolor="0.4", label=line[column][0])
        if column < len(line)
        else patch(visible=False, label=" ")
        for column in range(columns)
        for line in lines
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.set_figheight(row_inches * len(rows) + TITLE_INCHES + LEGEND_INCHES * len(lines))
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def instance_figure(path: Path, rows: list[InstanceRow]) -> None:
    """Write images beside the outlines of their true and predicted nuclei as a PNG, atomically.

    Args:
        path: Of the PNG.
        rows: At least one, top to bottom.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No row was given, or an image and a map of it differ in size.
    """
    if not rows:
        raise ValueError("A figure of nuclei needs at least one row.")
    pictures = [instance_comparison(row.image, row.prediction, row.truth) for row in rows]
    figure_inches = INSTANCE_PANEL_INCHES * len(INSTANCE_COLUMNS)
    heights = [figure_inches * picture.shape[0] / picture.shape[1] for picture in pictures]
    figure = import_extra("matplotlib.figure", "training").Figure(layout="constrained")
    figure.set_size_inches(figure_inches + LABEL_INCHES, sum(heights) + TITLE_INCHES)
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, row, picture in zip(axes, rows, pictures, strict=True):
        axis.imshow(picture, interpolation="antialiased")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("none")
        axis.set_ylabel(_label(row.name, f"AJI {row.aji:.3f}", row.rank), fontsize=9)
    width = rows[0].image.shape[1]
    centres = [column * (width + PANEL_GAP) + width / 2 for column in range(len(INSTANCE_COLUMNS))]
    axes[0].set_xticks(centres, INSTANCE_COLUMNS, fontsize=11)
    axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=DPI, bbox_inches="tight")  # the layout alone cuts labels off
