"""Figures, one row an image: masks and their differences, masks of several models, and outlines of single nuclei."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uctrans.extras import import_extra
from uctrans.inference.overlays import DIFFERENCES, PANEL_GAP, colour_labels, differences, instance_comparison
from uctrans.writing import written_atomically

COLUMNS = ("Image", "Truth", "Prediction", "Differences")
PANEL_INCHES, SMALLEST_PANEL_INCHES = 2.1, 1.3
FIGURE_INCHES = 16  # beyond this width panels get smaller
INSTANCE_COLUMNS = ("Image", "True nuclei", "Predicted nuclei")
INSTANCE_PANEL_INCHES = 3.5  # outlines are thin
DPI = 150
LABEL_INCHES, TITLE_INCHES, CAPTION_INCHES, LEGEND_INCHES = 0.5, 0.45, 0.2, 0.25
LEGEND_COLUMNS = 4
TITLE_LENGTH = 28
TITLE_POINTS, LABEL_POINTS, SMALLEST_POINTS = 11, 8, 6
CHARACTER_WIDTH = 0.6  # of the size of its font, about


class ComparisonRow(NamedTuple):
    """One row of the figure: uint8 image ``(H, W, 3)``, label maps uint8 ``(H, W)``, Dice in 0..1."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    dice: float
    rank: str = ""


class ModelsRow(NamedTuple):
    """One row of the figure of several models: uint8 image ``(H, W, 3)``, label maps uint8 ``(H, W)``, Dice in 0..1.

    ``predictions`` and ``dice`` have one entry for each model.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    predictions: list[np.ndarray]
    dice: list[float]
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
    panels = [
        [
            row.image,
            colour_labels(row.truth, colours),
            colour_labels(row.prediction, colours),
            differences(row.prediction, row.truth),
        ]
        for row in rows
    ]
    labels = [_label(row.name, f"Dice {row.dice:.3f}", row.rank) for row in rows]
    kinds = [item for item in DIFFERENCES.items() if class_names or item[0] != "wrong class"]
    _write_grid(path, COLUMNS, labels, panels, legend=[*_class_legend(colours, class_names), kinds])


def models_figure(
    path: Path,
    models: list[str],
    rows: list[ModelsRow],
    colours: np.ndarray,
    class_names: list[str] | None = None,
) -> None:
    """Write image, truth and the prediction of each of several models as a PNG, atomically; Dice is below these.

    Args:
        path: Of the PNG.
        models: What to call the models, one column each.
        rows: At least one, top to bottom.
        colours: Colours of the labels, see `uctrans.inference.overlays.class_colours`.
        class_names: Of the foreground classes, for the legend of multi-class figures; None for binary masks.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: No row was given, or one without a prediction of every model.
    """
    if not rows:
        raise ValueError("A figure of models needs at least one row.")
    if any(not len(models) == len(row.predictions) == len(row.dice) for row in rows):
        raise ValueError(f"Every row needs a prediction and a Dice of each of the {len(models)} models.")
    panels = [
        [row.image, *(colour_labels(labels, colours) for labels in (row.truth, *row.predictions))] for row in rows
    ]
    labels = [_label(row.name, f"mean Dice {np.mean(row.dice):.3f}", row.rank) for row in rows]
    captions = [["", "", *(f"Dice {dice:.3f}" for dice in row.dice)] for row in rows]
    _write_grid(
        path, (*COLUMNS[:2], *models), labels, panels, captions=captions, legend=_class_legend(colours, class_names)
    )


def _class_legend(colours: np.ndarray, class_names: list[str] | None) -> list[list[tuple[str, np.ndarray]]]:
    """Names and colours of the foreground classes, in lines of the legend."""
    entries = [(name, colours[label]) for label, name in enumerate(class_names or (), start=1)]
    return [entries[start : start + LEGEND_COLUMNS] for start in range(0, len(entries), LEGEND_COLUMNS)]


def _write_grid(
    path: Path,
    titles: Sequence[str],
    labels: list[str],
    panels: list[list[np.ndarray]],
    legend: list[list[tuple[str, Sequence[int]]]],
    captions: list[list[str]] | None = None,
) -> None:
    """Write pictures in rows and columns as a PNG, atomically.

    Args:
        path: Of the PNG.
        titles: Of the columns.
        labels: Of the rows, on the left.
        panels: The pictures of each row, uint8 ``(H, W, 3)``.
        legend: Lines of names and colours below the pictures.
        captions: What stands below each picture.
    """
    figure_class = import_extra("matplotlib.figure", "training").Figure
    panel_inches = max(SMALLEST_PANEL_INCHES, min(PANEL_INCHES, FIGURE_INCHES / len(titles)))
    aspect = float(np.median([row[0].shape[0] / row[0].shape[1] for row in panels]))
    panel_height = panel_inches * min(max(aspect, 0.3), 3.0)
    figure = figure_class(layout="constrained")
    figure.set_size_inches(
        panel_inches * len(titles) + LABEL_INCHES,
        (panel_height + (CAPTION_INCHES if captions else 0)) * len(panels) + TITLE_INCHES + LEGEND_INCHES * len(legend),
    )
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    for row, (row_axes, label, pictures) in enumerate(zip(axes, labels, panels, strict=True)):
        for column, (axis, picture) in enumerate(zip(row_axes, pictures, strict=True)):
            axis.imshow(picture, interpolation="antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("0.6")
            if captions:
                axis.set_xlabel(captions[row][column], fontsize=LABEL_POINTS)
        row_axes[0].set_ylabel(label, fontsize=_points(label, panel_height, LABEL_POINTS))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=_points(title, panel_inches, TITLE_POINTS))
    _add_legend(figure, legend)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def _points(text: str, inches: float, most: float) -> float:
    """The size of letters in which the longest line of a text takes ``inches``, within bounds."""
    fitting = 72 * inches / (CHARACTER_WIDTH * max(map(len, text.split("\n"))))
    return max(SMALLEST_POINTS, min(most, fitting))


def _add_legend(figure: Any, lines: list[list[tuple[str, Sequence[int]]]]) -> None:
    if not lines:
        return
    patch = import_extra("matplotlib.patches", "training").Patch
    columns = max(map(len, lines))
    handles = [  # a legend is filled column by column
        patch(facecolor=np.asarray(line[column][1]) / 255, edgecolor="0.4", label=line[column][0])
        if column < len(line)
        else patch(visible=False, label=" ")
        for column in range(columns)
        for line in lines
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


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
