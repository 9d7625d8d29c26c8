"""Label and instance maps as pictures: colours, outlines over the image, and where prediction and truth differ."""

from collections.abc import Sequence

import numpy as np

from uctrans.data.instances import BORDER, boundary_target

BACKGROUND = (0, 0, 0)
# A green that stands out on stained tissue as on gray images (binary masks), then Okabe and Ito's colours.
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
# Bright colours that stand out on stained tissue and from each other, for nuclei that touch.
INSTANCE_COLOURS = np.array(
    [(40, 230, 40), (255, 220, 0), (0, 200, 255), (255, 120, 0), (255, 80, 220), (255, 255, 255)], dtype=np.uint8
)
ADJACENT = ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:]))  # a pixel and the next beside and below it
PANEL_GAP = 8  # white pixels between two pictures side by side
PIXELS_PER_LINE_WIDTH = 400  # an outline is one pixel wide for each of these along the shorter side, at least one


def class_colours(classes: int, palette: Sequence | str | None = None) -> np.ndarray:
    """One RGB colour for each label, background first.

    Args:
        classes: 1 for binary masks, otherwise the number of labels.
        palette: Colours of the labels, as `uctrans.data.parse_palette` takes them, or None for the built-in ones.

    Returns:
        uint8 ``(max(classes, 2), 3)``. Built-in colours repeat after seven classes.
    """
    labels = max(classes, 2)
    if palette is not None:
        from uctrans.data import labels_to_colours

        return labels_to_colours(np.arange(labels), palette)
    repeats = -(-labels // len(CLASS_COLOURS))
    return np.array([BACKGROUND, *CLASS_COLOURS * repeats][:labels], dtype=np.uint8)


def colour_labels(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A label map uint8 ``(H, W)`` as a picture uint8 ``(H, W, 3)``."""
    return colours[labels]


def outlines(labels: np.ndarray) -> np.ndarray:
    """The label at the rim of every object, 0 elsewhere: uint8 ``(H, W)``, as wide as suits the size of the image."""
    from skimage.morphology import dilation, disk
    from skimage.segmentation import find_boundaries

    rim = labels * find_boundaries(labels, mode="inner")
    radius = round(min(labels.shape) / PIXELS_PER_LINE_WIDTH) // 2
    return dilation(rim, disk(radius)) if radius else rim


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The image with the outlines of its objects in their class's colour.

    Args:
        image: uint8 ``(H, W, 3)``.
        labels: uint8 ``(H, W)``.
        colours: uint8 ``(labels, 3)``, see `class_colours`.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    lines = outlines(labels)
    return np.where(lines[..., None] > 0, colours[lines], image)


def differences(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Where two label maps uint8 ``(H, W)`` agree and differ, in the colours of `DIFFERENCES`, uint8 ``(H, W, 3)``."""
    picture = np.zeros((*truth.shape, 3), dtype=np.uint8)
    predicted, true = prediction > 0, truth > 0
    picture[predicted & true] = DIFFERENCES["true positive"]
    picture[predicted & ~true] = DIFFERENCES["false positive"]
    picture[~predicted & true] = DIFFERENCES["false negative"]
    picture[predicted & true & (prediction != truth)] = DIFFERENCES["wrong class"]
    return picture


def instance_overlay(image: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """The image with the outlines of its nuclei, each inside its own pixels, those that touch in different colours.

    A nucleus too thin for the line keeps its innermost pixels without it, so one of a single pixel has no outline.

    Args:
        image: uint8 ``(H, W, 3)``.
        instances: Integer ``(H, W)``, 0 background.

    Returns:
        uint8 ``(H, W, 3)``.

    Raises:
        ValueError: Image and map differ in size, or the map is no instance map.
    """
    if image.shape[:2] != instances.shape:
        raise ValueError(f"Image and instance map differ in size: {image.shape[:2]} and {instances.shape}.")
    line_width = max(round(min(instances.shape) / PIXELS_PER_LINE_WIDTH), 1)
    lines = boundary_target(instances, line_width) == BORDER
    return np.where(lines[..., None], INSTANCE_COLOURS[_alternating(instances)], image)


def instance_comparison(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The image, and beside it the `instance_overlay` of the truth and that of the prediction.

    Args:
        image: uint8 ``(H, W, 3)``.
        prediction: Integer instance map ``(H, W)``.
        truth: Integer instance map ``(H, W)``.

    Returns:
        uint8 ``(H, 3 W + 2 PANEL_GAP, 3)``.

    Raises:
        ValueError: as `instance_overlay`.
    """
    gap = np.full((len(image), PANEL_GAP, 3), 255, dtype=np.uint8)
    panels = [image, gap, instance_overlay(image, truth), gap, instance_overlay(image, prediction)]
    return np.concatenate(panels, axis=1)


def _alternating(instances: np.ndarray) -> np.ndarray:
    """For every pixel the position in `INSTANCE_COLOURS` of its nucleus, other than those of nuclei it touches.

    Only a nucleus that touches as many as there are colours may share one.
    """
    numbers, labels = np.unique(instances, return_inverse=True)
    labels = labels.reshape(instances.shape)
    neighbours: list[set[int]] = [set() for _ in numbers]
    for first, second in ADJACENT:
        one, other = labels[first], labels[second]
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
