"""Label maps as pictures: colours, outlines over the image, and where prediction and truth differ."""

from collections.abc import Sequence

import numpy as np

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
