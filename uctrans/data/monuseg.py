"""Turn nucleus outlines in Aperio ImageScope XML, as MoNuSeg publishes them, into masks and instance maps."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from uctrans.data.errors import DataError, shorten
from uctrans.data.files import list_images
from uctrans.data.images import read_image
from uctrans.data.instances import HIGHEST_NUMBER, INSTANCES, write_instances
from uctrans.data.writing import write_bytes, write_png

XML_SUFFIX = ".xml"
MIN_VERTICES = 3
MASKS, SUMMARY = "masks", "annotations.json"


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


@dataclass(frozen=True)
class PreparedImage:
    """What :func:`prepare_monuseg` made of one image.

    Attributes:
        name: stem of its files.
        nuclei: nuclei in the instance map.
        skipped: regions with fewer than three vertices.
        hidden: nuclei that others cover wholly, so that they have no pixel of their own.
        microns_per_pixel: resolution, None where the annotation does not say.
    """

    name: str
    nuclei: int
    skipped: int
    hidden: int
    microns_per_pixel: float | None


def prepare_monuseg(
    annotations: str | os.PathLike, images: str | os.PathLike, output: str | os.PathLike, *, overwrite: bool = False
) -> list[PreparedImage]:
    """Write a mask and an instance map for each annotated image.

    ``output/masks/NAME.png`` is 0/255 uint8, ``output/instances/NAME.png`` is uint16 with 0 for background and nuclei
    from 1 on without gaps, both of the image's size; ``output/annotations.json`` has the fields of `PreparedImage` by
    name. Where outlines overlap the smaller nucleus has the pixels, see :func:`fill_polygons`; a nucleus that is left
    without any is counted as hidden, with a warning that names the file. With ``output`` the parent of an images folder
    named ``images``, the result is a dataset folder. Everything is read and checked before the first file is written;
    images without an annotation are passed over.

    Args:
        annotations: folder of XML files, or one of them.
        images: folder with an image of the same stem for each XML file (may be the same folder).
        output: folder to write to.
        overwrite: replace files that are there already; False refuses to.

    Raises:
        DataError: a missing folder, no XML file, an annotation without an image, a file that cannot be read, a file
            that would be replaced, or ``images`` being a folder that masks or instances would go to.
        ImportError: defusedxml is not installed.
    """
    annotation_files = _list_annotations(Path(annotations))
    if not Path(images).is_dir():
        raise DataError(f"{images} is not a folder: give the folder of the annotated images.")
    image_files = list_images(Path(images), companions=frozenset({XML_SUFFIX}))
    without_image = [file.name for file in annotation_files if file.stem not in image_files]
    if without_image:
        raise DataError(
            f"No image of the same stem in {images} for the annotations {shorten(without_image)}: add the images, or "
            "take these files out of the annotations folder."
        )
    output = Path(output)
    _refuse_losses(Path(images), output, [file.stem for file in annotation_files], overwrite)
    prepared, maps = [], {}
    for file in annotation_files:
        annotation = read_annotation(file)
        instances, hidden = _fill(annotation.polygons, read_image(image_files[file.stem]).shape[:2])
        nuclei = int(instances.max())
        if hidden:
            warnings.warn(f"{file}: {_describe_hidden(hidden)}.", stacklevel=2)
        if nuclei == 0:
            warnings.warn(f"{file} outlines no nucleus inside its image; its mask is empty.", stacklevel=2)
        maps[file.stem] = instances
        prepared.append(PreparedImage(file.stem, nuclei, annotation.skipped, hidden, annotation.microns_per_pixel))
    for name, instances in maps.items():
        write_png(output / MASKS / f"{name}.png", np.where(instances > 0, np.uint8(255), np.uint8(0)))
        write_instances(output / INSTANCES / f"{name}.png", instances)
    write_bytes(output / SUMMARY, _summary(prepared))
    return prepared


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
    instances, hidden = _fill(polygons, shape)
    if hidden:
        warnings.warn(f"{_describe_hidden(hidden)}.", stacklevel=2)
    return instances


def _fill(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int]:
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


def _describe_hidden(count: int) -> str:
    return f"{count} outlines lie wholly under others and have no number in the instance map"


def _list_annotations(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give an XML file or a folder of them.")
    files = sorted(
        file for file in path.iterdir() if file.suffix.lower() == XML_SUFFIX and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"{path} holds no {XML_SUFFIX} file: give the folder of the annotations.")
    return files


def _refuse_losses(images: Path, output: Path, names: list[str], overwrite: bool) -> None:
    for folder in (output / MASKS, output / INSTANCES):
        if folder.is_dir() and folder.samefile(images):
            raise DataError(
                f"{folder} is the folder of the images, which the results would replace: choose another output folder."
            )
    files = [output / folder / f"{name}.png" for folder in (MASKS, INSTANCES) for name in names]
    existing = [file for file in (*files, output / SUMMARY) if file.exists()]
    if existing and not overwrite:
        raise DataError(
            f"{len(existing)} of the files to write exist already: {shorten(existing, limit=3)}. Choose another output "
            "folder, or set overwrite to replace them."
        )


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


def _summary(prepared: list[PreparedImage]) -> bytes:
    by_name = {item.name: {key: value for key, value in asdict(item).items() if key != "name"} for item in prepared}
    return (json.dumps(by_name, indent=2) + "\n").encode()
