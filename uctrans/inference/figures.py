"""The comparison figure: one row an image; columns image, truth, prediction and differences."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from uctrans.extras import import_extra
from uctrans.inference.overlays import DIFFERENCES, colour_labels, differences
from uctrans.writing import written_atomically

COLUMNS = ("Image", "Truth", "Prediction", "Differences")
PANEL_INCHES = 2.1
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


def choose_rows(dice: list[float], count: int = 6) -> list[tuple[int, str]]:
    """Which images to show: up to two each of the best, the median and the worst, best first.

    Returns:
        Pairs of position in ``dice`` and ``"best"``, ``"median"`` or ``"worst"``; with no more than ``count`` images
        all of them, ranked ``""`` where they are neither first, middle nor last.
    """
    order = sorted(range(len(dice)), key=lambda position: -dice[position])
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
        label = [_shortened(row.name), f"Dice {row.dice:.3f}" + (f" ({row.rank})" if row.rank else "")]
        row_axes[0].set_ylabel("\n".join(label), fontsize=8)
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
        figure.savefig(temporary, dpi=150)
