"""Pictures of masks and nuclei: colours, outlines over the image, differences, and figures with one row an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import labels_to_colours
from ..data.fingerprints import eight_bit
from ..data.instances import BORDER, boundary_target
from ..extras import import_extra
from ..writing import written_atomically

BACKGROUND = (0, 0, 0)
# A green that stands out on stained tissue and on gray images (binary masks), then the colours of Okabe and Ito.
CLASS_COLOURS = (
    (40, 230, 40),
    (86, 180, 233),
    (230, 159, 0),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
DIFFERENCES = {
    "true positive": (235, 235, 235),
    "false positive": (230, 120, 0),
    "false negative": (60, 150, 255),
    "wrong class": (220, 60, 180),
}
IGNORED_COLOUR = (120, 120, 120)
# Bright colours that stand out on stained tissue and from each other, for nuclei that touch.
INSTANCE_COLOURS = np.array(
    [(40, 230, 40), (255, 220, 0), (0, 200, 255), (255, 120, 0), (255, 80, 220), (255, 255, 255)], dtype=np.uint8
)
PIXELS_PER_LINE_WIDTH = 400  # an outline is one pixel wide for each of these along the shorter side, at least one

COLUMNS = ("Image", "Truth", "Prediction", "Differences")
INSTANCE_COLUMNS = ("Image", "True nuclei", "Predicted nuclei")
PANEL_INCHES = 2.1
INSTANCE_PANEL_INCHES = 3.5  # outlines are thin
DPI = 150
LABEL_INCHES, TITLE_INCHES, LEGEND_INCHES = 0.5, 0.45, 0.25
LEGEND_COLUMNS = 4
NAME_LENGTH = 28
TITLE_POINTS, LABEL_POINTS, SMALLEST_POINTS = 11, 8, 6
CHARACTER_WIDTH = 0.6  # mean width of a character as a share of its font size

Legend = list[list[tuple[str, Sequence[int]]]]  # lines of names and colours


def class_colours(classes: int, palette: Sequence | str | None = None) -> np.ndarray:
    """Return one RGB colour for each label, background first.

    Args:
        classes: 1 for binary masks, otherwise the number of labels.
        palette: Colours of the labels, as `uctrans.data.parse_palette` takes them; None takes the built-in ones,
            which repeat after seven classes.

    Returns:
        uint8 ``(max(classes, 2), 3)``.
    """
    labels = max(classes, 2)
    if palette is not None:
        return labels_to_colours(np.arange(labels), palette)
    repeats = -(-labels // len(CLASS_COLOURS))
    return np.array([BACKGROUND, *CLASS_COLOURS * repeats][:labels], dtype=np.uint8)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image ``(H, W, C)`` as uint8 ``(H, W, 3)`` to look at: gray, red and green, or three channels."""
    image, channels = eight_bit(image), image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    return np.dstack([image, np.zeros_like(image[..., :1])]) if channels == 2 else image[..., :3]


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return the image with the outlines of its objects in the colour of their class.

    Args:
        image: uint8 ``(H, W, 3)``.
        labels: uint8 ``(H, W)``.
        colours: uint8 ``(labels, 3)``, see `class_colours`.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    lines = outlines(labels)
    return np.where(lines[..., None] > 0, colours[lines], image)


def outlines(labels: np.ndarray) -> np.ndarray:
    """Return the label at the rim of every object, 0 elsewhere: uint8 ``(H, W)``. Lines widen with the image."""
    from skimage.morphology import dilation, disk
    from skimage.segmentation import find_boundaries

    rim = labels * find_boundaries(labels, mode="inner")
    radius = round(min(labels.shape) / PIXELS_PER_LINE_WIDTH) // 2
    return dilation(rim, disk(radius)) if radius else rim


def differences(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return where two label maps uint8 ``(H, W)`` agree and differ, in the colours of `DIFFERENCES`: ``(H, W, 3)``."""
    picture = np.zeros((*truth.shape, 3), dtype=np.uint8)
    predicted, true = prediction > 0, truth > 0
    picture[predicted & true] = DIFFERENCES["true positive"]
    picture[predicted & ~true] = DIFFERENCES["false positive"]
    picture[~predicted & true] = DIFFERENCES["false negative"]
    picture[predicted & true & (prediction != truth)] = DIFFERENCES["wrong class"]
    return picture


def instance_overlay(image: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Return the image with the outline of each nucleus inside its own pixels, in other colours where nuclei touch.

    A nucleus too thin for the line keeps its innermost pixels without it, so a nucleus of one pixel has no outline.

    Args:
        image: uint8 ``(H, W, 3)``.
        instances: Integer ``(H, W)``, 0 background.

    Returns:
        uint8 ``(H, W, 3)``.

    Raises:
        ValueError: Image and map differ in size, or the map is no instance map.
    """
    if image.shape[:2] != instances.shape:
        raise ValueError(
            f"instances: they differ in size from the image, {instances.shape} and {image.shape[:2]}; "
            "give the map of this image"
        )
    line_width = max(round(min(instances.shape) / PIXELS_PER_LINE_WIDTH), 1)
    lines = boundary_target(instances, line_width) == BORDER
    return np.where(lines[..., None], INSTANCE_COLOURS[_alternating(instances)], image)


def _alternating(instances: np.ndarray) -> np.ndarray:
    """Return for every pixel a position in `INSTANCE_COLOURS` that differs between nuclei that touch.

    Only a nucleus that touches as many others as there are colours may share one.
    """
    numbers, labels = np.unique(instances, return_inverse=True)
    labels = labels.reshape(instances.shape)
    neighbours: list[set[int]] = [set() for _ in numbers]
    for one, other in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        touching = (one != other) & (numbers[one] > 0) & (numbers[other] > 0)
        for pair in np.unique(np.stack([one[touching], other[touching]]), axis=1).T.tolist():
            neighbours[pair[0]].add(pair[1])
            neighbours[pair[1]].add(pair[0])
    count = len(INSTANCE_COLOURS)
    colours = np.arange(len(numbers)) % count
    for label in range(len(numbers)):
        taken = {int(colours[other]) for other in neighbours[label] if other < label}
        choices = [(label + shift) % count for shift in range(count)]
        colours[label] = next((colour for colour in choices if colour not in taken), label % count)
    return colours[labels]


class ComparisonRow(NamedTuple):
    """One row of `comparison_figure`: uint8 image ``(H, W, 3)``, label maps uint8 ``(H, W)``, Dice in 0..1."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    dice: float
    rank: str = ""


class InstanceRow(NamedTuple):
    """One row of `instance_figure`: uint8 image ``(H, W, 3)``, integer instance maps ``(H, W)``, AJI in 0..1."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    aji: float
    rank: str = ""


def choose_rows(scores: list[float], count: int = 6) -> list[tuple[int, str]]:
    """Choose the images to show: up to ``count / 3`` each of the best, the median and the worst, best first.

    Returns:
        Pairs of position in ``scores`` and ``"best"``, ``"median"`` or ``"worst"``. If there are no more than
        ``count`` images, all of them, with the rank ``""`` for those that are neither first, middle nor last.
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


def comparison_figure(
    path: Path,
    rows: list[ComparisonRow],
    colours: np.ndarray,
    class_names: list[str] | None = None,
    ignore_label: int | None = None,
) -> None:
    """Write image, truth, prediction and differences as a PNG, atomically.

    Args:
        path: File to write.
        rows: At least one, top to bottom.
        colours: Colours of the labels, see `class_colours`.
        class_names: Names of the foreground classes, for the legend; None for binary masks.
        ignore_label: Pixels with this label in the truth are gray, and no differences.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: There is no row.
    """
    panels = []
    for row in rows:
        ignored = np.zeros(row.truth.shape, dtype=bool) if ignore_label is None else row.truth == ignore_label
        truth, prediction = np.where(ignored, 0, row.truth), np.where(ignored, 0, row.prediction)
        pictures = [colours[truth], colours[row.prediction], differences(prediction, truth)]
        for picture in (pictures[0], pictures[2]):
            picture[ignored] = IGNORED_COLOUR
        panels.append([row.image, *pictures])
    labels = [_label(row.name, "Dice n/a" if np.isnan(row.dice) else f"Dice {row.dice:.3f}", row.rank) for row in rows]
    kinds = [item for item in DIFFERENCES.items() if class_names or item[0] != "wrong class"]
    kinds += [("ignored", IGNORED_COLOUR)] * (ignore_label is not None)
    _write_grid(path, COLUMNS, labels, panels, legend=[*_class_legend(colours, class_names), kinds])


def instance_figure(path: Path, rows: list[InstanceRow]) -> None:
    """Write images and the outlines of their true and predicted nuclei as a PNG, atomically.

    Args:
        path: File to write.
        rows: At least one, top to bottom.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: There is no row, or an image and a map of it differ in size.
    """
    panels = [
        [row.image, instance_overlay(row.image, row.truth), instance_overlay(row.image, row.prediction)] for row in rows
    ]
    labels = [_label(row.name, f"AJI {row.aji:.3f}", row.rank) for row in rows]
    _write_grid(path, INSTANCE_COLUMNS, labels, panels, panel_inches=INSTANCE_PANEL_INCHES)


def _label(name: str, score: str, rank: str) -> str:
    shown = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
    return f"{shown}\n{score}" + (f" ({rank})" if rank else "")


def _class_legend(colours: np.ndarray, class_names: list[str] | None) -> Legend:
    entries = [(name, colours[label]) for label, name in enumerate(class_names or (), start=1)]
    return [entries[start : start + LEGEND_COLUMNS] for start in range(0, len(entries), LEGEND_COLUMNS)]


def _write_grid(
    path: Path,
    titles: Sequence[str],
    labels: list[str],
    panels: list[list[np.ndarray]],
    legend: Legend = (),
    panel_inches: float = PANEL_INCHES,
) -> None:
    """Write pictures in rows and columns as a PNG, atomically.

    Args:
        path: File to write.
        titles: Titles of the columns.
        labels: Labels of the rows, on the left.
        panels: Pictures of each row, uint8 ``(H, W, 3)``.
        legend: Lines of names and colours below the pictures.
        panel_inches: Width of a picture.

    Raises:
        ValueError: There is no row.
    """
    if not panels:
        raise ValueError("rows: there are none; give at least one row")
    figure_class = import_extra("matplotlib.figure", "training").Figure
    aspect = float(np.median([row[0].shape[0] / row[0].shape[1] for row in panels]))
    panel_height = panel_inches * min(max(aspect, 0.3), 3.0)
    figure = figure_class(layout="constrained")
    figure.set_size_inches(
        panel_inches * len(titles) + LABEL_INCHES,
        panel_height * len(panels) + TITLE_INCHES + LEGEND_INCHES * len(legend),
    )
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    for row_axes, label, pictures in zip(axes, labels, panels, strict=True):
        for axis, picture in zip(row_axes, pictures, strict=True):
            axis.imshow(picture, interpolation="antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("0.6")
        fitting = 72 * panel_height / (CHARACTER_WIDTH * max(map(len, label.split("\n"))))
        row_axes[0].set_ylabel(label, fontsize=max(SMALLEST_POINTS, min(LABEL_POINTS, fitting)))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=TITLE_POINTS)
    if legend:
        _add_legend(figure, legend)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def _add_legend(figure: Any, lines: Legend) -> None:
    patch = import_extra("matplotlib.patches", "training").Patch
    columns = max(map(len, lines))
    handles = [  # Matplotlib fills a legend column by column
        patch(facecolor=np.asarray(line[column][1]) / 255, edgecolor="0.4", label=line[column][0])
        if column < len(line)
        else patch(visible=False, label=" ")
        for column in range(columns)
        for line in lines
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
