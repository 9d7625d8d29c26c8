"""Nucleus outlines in Aperio ImageScope XML, as MoNuSeg publishes them, and instance maps of them."""

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uctrans.data.errors import DataError
from uctrans.data.instances import HIGHEST_NUMBER

MIN_VERTICES = 3


@dataclass(frozen=True)
class Annotation:
    """Outlines of one image.

    Attributes:
        polygons: one (vertices, 2) float64 array of (x, y) in pixels for each nucleus, in the order of the file; x = 0
            and y = 0 are the centre of the first pixel, and points may lie outside the image.
        skipped: number of regions with fewer than three vertices, left out.
        microns_per_pixel: resolution, None where the file does not say.
    """

    polygons: list[np.ndarray]
    skipped: int
    microns_per_pixel: float | None


def read_annotation(path: str | os.PathLike) -> Annotation:
    """Read one Aperio XML file: ``Annotations/Annotation/Regions/Region/Vertices/Vertex`` with X and Y.

    Regions with fewer than three vertices are skipped, with one warning that names the file and their number.

    Raises:
        DataError: a file that is not XML, tries to expand entities, is no Aperio annotation, or has a vertex without
            finite coordinates.
        ImportError: defusedxml is not installed.
    """
    path = Path(path)
    root = _parse_xml(path)
    if root.tag != "Annotations":
        raise DataError(
            f"{path} is not an Aperio annotation (its root is <{root.tag}>, not <Annotations>): export it anew."
        )
    outlines = [_read_vertices(region, path) for region in root.iter("Region")]
    polygons = [outline for outline in outlines if len(outline) >= MIN_VERTICES]
    skipped = len(outlines) - len(polygons)
    if skipped:
        warnings.warn(f"{path}: {skipped} regions with fewer than {MIN_VERTICES} vertices were skipped.", stacklevel=2)
    return Annotation(polygons, skipped, _read_resolution(root.get("MicronsPerPixel")))


def fill_polygons(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Fill outlines into an instance map, (H, W) uint16: 0 background, nuclei 1.. without gaps, in the order given.

    A pixel belongs to a polygon whose outline holds its centre. What lies outside the image is cut off. Where polygons
    overlap the smaller one, of equal ones the earlier, lies on top, so that a large outline never swallows a nucleus
    that was drawn inside it. A polygon that smaller ones cover wholly, or a second one of the same pixels, gets no
    number and is told of in a warning; one without a pixel in the image gets no number.

    Args:
        polygons: (vertices, 2) arrays of (x, y) in pixels.
        shape: (H, W).

    Raises:
        DataError: more nuclei than 16 bit can number.
    """
    instances, hidden = paint_polygons(polygons, shape)
    if hidden:
        warnings.warn(f"{describe_hidden(hidden)}.", stacklevel=2)
    return instances


def paint_polygons(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """The instance map, and how many polygons have pixels in the image but none that others leave them."""
    from skimage.draw import polygon as polygon_pixels

    pixels = [polygon_pixels(vertices[:, 1], vertices[:, 0], shape) for vertices in polygons]
    if len(pixels) > HIGHEST_NUMBER:
        raise DataError(
            f"{len(pixels)} nuclei in one image are more than a 16-bit map can number: annotate tiles of it."
        )
    areas = [len(rows) for rows, _ in pixels]
    painted = np.zeros(shape, dtype=np.uint16)
    for index in sorted(range(len(pixels)), key=lambda index: (-areas[index], -index)):
        painted[pixels[index]] = index + 1
    visible = np.unique(painted)
    visible = visible[visible > 0]
    numbers = np.zeros(len(pixels) + 1, dtype=np.uint16)
    numbers[visible] = np.arange(1, len(visible) + 1)
    return numbers[painted], int(np.count_nonzero(areas)) - len(visible)


def describe_hidden(count: int) -> str:
    """What a warning says of outlines that have no pixel left."""
    return f"{count} outlines lie wholly under others and have no number in the instance map"


def _parse_xml(path: Path):
    try:
        from defusedxml import DefusedXmlException
        from defusedxml.ElementTree import ParseError, parse
    except ImportError as error:
        raise ImportError('Reading annotations needs defusedxml: pip install "uctrans[training]"') from error
    try:
        return parse(path).getroot()
    except ParseError as error:
        raise DataError(f"{path} is not well-formed XML ({error}): download or export it anew.") from error
    except DefusedXmlException as error:
        raise DataError(
            f"{path} declares entities, which an annotation has no use for and which can exhaust memory: it was not "
            "read. Take the declarations out or get the file from its source anew."
        ) from error
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{path} declares a text encoding that cannot be read ({error}): save it as UTF-8 and declare that."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.") from error


def _read_vertices(region, path: Path) -> np.ndarray:
    vertices = []
    for vertex in region.iter("Vertex"):
        try:
            x, y = float(vertex.get("X", "")), float(vertex.get("Y", ""))
        except ValueError:
            x = y = math.nan
        if not (math.isfinite(x) and math.isfinite(y)):
            raise DataError(
                f"{path}, region {region.get('Id')}: a vertex has X={vertex.get('X')!r} Y={vertex.get('Y')!r}, not two "
                "numbers: correct the file or export it anew."
            )
        vertices.append((x, y))
    return np.array(vertices, dtype=np.float64).reshape(-1, 2)


def _read_resolution(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
