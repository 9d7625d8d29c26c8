"""Masks and instance maps from nucleus outlines in Aperio ImageScope XML, as MoNuSeg publishes them."""

import json
import math
import os
import warnings
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..extras import import_extra
from ..reading import UnreadableError, check_regular_file
from ..writing import write_bytes, write_png
from .find import DataError, find_all_samples, list_images, shorten, stem_of
from .instances import HIGHEST_NUMBER, INSTANCES, LEAST_AGREEMENT, agreement, find_instances, write_instances
from .read import Doubts, decode_mask, read_image

XML_SUFFIX = ".xml"
MASKS, SUMMARY = "masks", "annotations.json"
MIN_VERTICES = 3
MAX_XML_BYTES = 1 << 29
XML_PARTS, LEAST_XML_PART = 16, 1 << 16  # the parser begins a tag that goes beyond a part again with each further one
MAX_XML_DEPTH = 100
LARGEST_COORDINATE = 1e7
MAX_TESTS = 2e10  # about a minute
HIDDEN = "{} outlines lie wholly under others and have no number in the instance map."


@dataclass(frozen=True)
class PreparedImage:
    """Result of the preparation of one image.

    Attributes:
        name: stem of its files.
        nuclei: nuclei in the instance map.
        skipped: regions with fewer than three vertices.
        hidden: nuclei that others cover wholly, so they have no pixel of their own.
        microns_per_pixel: resolution, or None if the annotation does not name it.
    """

    name: str
    nuclei: int
    skipped: int
    hidden: int
    microns_per_pixel: float | None


@dataclass(frozen=True)
class Annotation:
    """Outlines of the nuclei of one image.

    Attributes:
        polygons: one (vertices, 2) float64 array of (x, y) in pixels for each nucleus, in the order of the file; x = 0
            and y = 0 are the centre of the first pixel, and points may lie outside the image.
        skipped: number of regions with fewer than three vertices, which are left out.
        microns_per_pixel: resolution, or None if the file does not name it.
    """

    polygons: list[np.ndarray]
    skipped: int
    microns_per_pixel: float | None


def prepare_monuseg(
    annotations: str | os.PathLike, images: str | os.PathLike, output: str | os.PathLike, *, overwrite: bool = False
) -> list[PreparedImage]:
    """Write a mask and an instance map for each annotated image; for a dataset with masks see `prepare_instances`.

    ``output/masks/NAME.png`` is uint8 of 0 and 255. ``output/instances/NAME.png`` is uint16 with 0 for background and
    nuclei numbered from 1 without gaps; see :func:`uctrans.data.fill_polygons` for overlaps. Both have the size of the
    image. ``output/annotations.json`` has the fields of `PreparedImage` by name. If the images lie in
    ``output/images``, the result is a dataset folder. Images without an annotation are ignored. Everything is read and
    checked before the first file is written.

    Args:
        annotations: folder of XML files, or one of them.
        images: folder with an image of the same stem for each XML file; may be the same folder.
        output: folder to write to.
        overwrite: whether to replace existing files, masks included.

    Raises:
        DataError: a folder is missing, there is no XML file, an annotation has no image, a file cannot be read or would
            be replaced, or masks or instances would be written to the folder of the images.
        ImportError: defusedxml is not installed.
    """
    annotation_files = _list_annotations(Path(annotations))
    if not Path(images).is_dir():
        raise DataError(f"{images}: is not a folder; name the folder of the annotated images")
    image_files = list_images(Path(images), companions=frozenset({XML_SUFFIX}))
    _check_images(
        annotation_files,
        image_files,
        images,
        "; if the images lie in train, val and test folders beside masks, name their parent as output and leave out "
        "images",
    )
    output = Path(output)
    _check_folder(output / MASKS, {Path(images): "images"})
    _check_folder(output / INSTANCES, {Path(images): "images", output / MASKS: "masks"})
    names = [stem_of(file) for file in annotation_files]
    files = [output / folder / f"{name}.png" for folder in (MASKS, INSTANCES) for name in names]
    if not overwrite:
        _check_free(
            [*files, output / SUMMARY],
            "choose another output folder, set overwrite to replace them, or leave out images to keep the masks and "
            "add instance maps",
        )
    prepared, maps = _fill_outlines(annotation_files, image_files)
    for name, instances in maps.items():
        write_png(output / MASKS / f"{name}.png", np.where(instances > 0, np.uint8(255), np.uint8(0)))
        write_instances(output / INSTANCES / f"{name}.png", instances)
    _write_summary(output / SUMMARY, prepared)
    return prepared


def prepare_instances(
    annotations: str | os.PathLike, data: str | os.PathLike, *, overwrite: bool = False
) -> list[PreparedImage]:
    """Write an instance map beside the mask of each annotated image of a dataset; masks stay as they are.

    Each map is ``instances/NAME.png`` beside the folder of the mask, as `prepare_monuseg` writes it;
    ``data/annotations.json`` has the fields of `PreparedImage` by name. The annotations may belong to several splits.
    Images without an annotation are ignored. Everything is read and checked before the first file is written.

    Args:
        annotations: folder of XML files, or one of them.
        data: dataset with masks in any layout of :func:`uctrans.data.find_samples`.
        overwrite: whether to replace existing instance maps.

    Raises:
        DataError: the folder is no dataset, there is no XML file, an annotation has no image in any split, a file
            cannot be read or would be replaced, or outlines do not fit the mask of their image.
        ImportError: defusedxml is not installed.
    """
    annotation_files, data = _list_annotations(Path(annotations)), Path(data)
    if (data / "images").is_dir() and not (data / MASKS).is_dir():
        raise DataError(f"{data}: has images and no masks; give images as well, to make masks of the outlines")
    samples = {sample.name: sample for sample in find_all_samples(data)}
    image_files = {name: sample.image for name, sample in samples.items()}
    _check_images(annotation_files, image_files, data)
    annotated = [samples[stem_of(file)] for file in annotation_files]
    files = {sample.name: sample.mask.parent.parent / INSTANCES / f"{sample.name}.png" for sample in annotated}
    for image_folder, mask_folder in {(sample.image.parent, sample.mask.parent) for sample in annotated}:
        _check_folder(mask_folder.parent / INSTANCES, {image_folder: "images", mask_folder: "masks"})
    if not overwrite:
        _check_free([*files.values(), data / SUMMARY], "set overwrite to replace them; masks stay as they are")
    if others := sorted(set(find_instances(annotated).values()) - set(files.values())):
        raise DataError(f"{data}: has instance maps that are not PNG files ({shorten(others)}); remove them")
    prepared, maps = _fill_outlines(annotation_files, image_files)
    for file in annotation_files:
        mask_file = samples[stem_of(file)].mask
        mask = decode_mask(mask_file, 1, None, maps[stem_of(file)].shape, Doubts())
        if (dice := agreement(maps[stem_of(file)], mask)) < LEAST_AGREEMENT:
            raise DataError(
                f"{file}: its outlines do not fit the mask {mask_file} (Dice {dice:.2f}, below {LEAST_AGREEMENT}), so "
                "they belong to another image; take the file out of the annotations folder"
            )
    for name, instances in maps.items():
        write_instances(files[name], instances)
    _write_summary(data / SUMMARY, prepared)
    return prepared


def read_annotation(path: str | os.PathLike) -> Annotation:
    """Read one Aperio XML file: ``Annotations/Annotation/Regions/Region/Vertices/Vertex`` with X and Y.

    Regions with fewer than three vertices are skipped, with one warning that names the file and their number.

    Raises:
        DataError: the file is no regular file, too large, not XML, nested too deeply, declares entities, is no Aperio
            annotation, or has a vertex without coordinates of a pixel.
        ImportError: defusedxml is not installed.
    """
    path = Path(path)
    reader = _parse_xml(path)
    outlines = [np.array(outline, dtype=np.float64).reshape(-1, 2) for outline in reader.outlines]
    polygons = [outline for outline in outlines if len(outline) >= MIN_VERTICES]
    skipped = len(outlines) - len(polygons)
    if skipped:
        warnings.warn(f"{path}: {skipped} regions with fewer than {MIN_VERTICES} vertices were skipped.", stacklevel=2)
    return Annotation(polygons, skipped, reader.microns_per_pixel)


def fill_polygons(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Fill outlines into an instance map, (H, W) uint16: 0 background, nuclei from 1 without gaps, in the given order.

    A pixel belongs to a polygon whose outline holds its centre. Parts outside the image are cut off. Where polygons
    overlap, the smaller one lies on top (the earlier one of two with equal size), so a large outline never swallows a
    nucleus inside it. A polygon that others cover wholly gets no number, and a warning counts such polygons. A polygon
    without a pixel in the image gets no number.

    Args:
        polygons: (vertices, 2) arrays of (x, y) in pixels.
        shape: (H, W).

    Raises:
        DataError: there are more nuclei than 16 bits can number, or so many vertices around so many pixels that filling
            them would take hours.
    """
    instances, hidden = _paint_polygons(polygons, shape)
    if hidden:
        warnings.warn(HIDDEN.format(hidden), stacklevel=2)
    return instances


def _paint_polygons(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Return the instance map, and the number of polygons in the image whose pixels all belong to others."""
    from skimage.draw import polygon as polygon_pixels

    polygons = list(polygons)
    if len(polygons) > HIGHEST_NUMBER:
        raise DataError(
            f"polygons: {len(polygons)} nuclei in one image are more than a 16-bit map can number; annotate tiles of it"
        )
    if (tests := sum(_count_tests(vertices, shape) for vertices in polygons)) > MAX_TESTS:
        raise DataError(
            f"polygons: their vertices and the pixels in them would take {tests:.0e} tests; draw nuclei with fewer "
            "vertices, and take outlines of whole regions out"
        )
    painted = np.zeros(shape, dtype=np.uint16)
    area_on_top = np.full(shape, painted.size + 1, dtype=np.uint32)
    in_image = 0
    for number, vertices in enumerate(polygons, start=1):
        rows, columns = polygon_pixels(vertices[:, 1], vertices[:, 0], shape)
        in_image += len(rows) > 0
        is_on_top = len(rows) < area_on_top[rows, columns]
        rows, columns = rows[is_on_top], columns[is_on_top]
        painted[rows, columns], area_on_top[rows, columns] = number, len(is_on_top)
    visible = np.unique(painted)
    visible = visible[visible > 0]
    numbers = np.zeros(len(polygons) + 1, dtype=np.uint16)
    numbers[visible] = np.arange(1, len(visible) + 1)
    return numbers[painted], in_image - len(visible)


def _count_tests(vertices: np.ndarray, shape: tuple[int, int]) -> float:
    """Return how often filling an outline compares a pixel of its bounding box in the image with a vertex."""
    low, high = vertices.min(0).clip(0), vertices.max(0).clip(max=shape[::-1])
    return len(vertices) * float(np.prod((high - low + 1).clip(0)))


def _fill_outlines(
    annotation_files: list[Path], image_files: Mapping[str, Path]
) -> tuple[list[PreparedImage], dict[str, np.ndarray]]:
    """Return the summaries of the images, and their instance maps by name."""
    prepared, maps = [], {}
    for file in annotation_files:
        annotation = read_annotation(file)
        shape = read_image(image_files[stem_of(file)]).shape[:2]
        try:
            instances, hidden = _paint_polygons(annotation.polygons, shape)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        nuclei = int(instances.max())
        if hidden:
            warnings.warn(f"{file}: {HIDDEN.format(hidden)}", stacklevel=3)
        if nuclei == 0:
            warnings.warn(f"{file}: outlines no nucleus inside its image, so its instance map is empty.", stacklevel=3)
        maps[stem_of(file)] = instances
        prepared.append(PreparedImage(stem_of(file), nuclei, annotation.skipped, hidden, annotation.microns_per_pixel))
    return prepared, maps


def _list_annotations(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: does not exist; name an XML file or a folder of them")
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.iterdir() if file.suffix.lower() == XML_SUFFIX and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"{path}: holds no {XML_SUFFIX} file; name the folder of the annotations")
    return files


def _check_images(
    annotation_files: list[Path], image_files: Mapping[str, Path], folder: str | os.PathLike, further_remedy: str = ""
) -> None:
    without_image = [file.name for file in annotation_files if stem_of(file) not in image_files]
    if without_image:
        raise DataError(
            f"{folder}: has no image of the same stem for the annotations {shorten(without_image)}; add the images, or "
            f"take these files out of the annotations folder{further_remedy}"
        )


def _check_folder(folder: Path, taken: Mapping[Path, str]) -> None:
    """Raise DataError if a folder to write to is one of those that are taken, by a link or not."""
    for other, content in taken.items():
        if folder.resolve() == other.resolve():
            raise DataError(
                f"{folder}: is the folder of the {content}, which the results would replace; choose another output "
                "folder, or remove the link"
            )


def _check_free(files: list[Path], remedy: str) -> None:
    existing = [file for file in files if file.exists()]
    if existing:
        raise DataError(f"{shorten(existing, limit=3)}: {len(existing)} of the files to write exist already; {remedy}")


def _write_summary(path: Path, prepared: list[PreparedImage]) -> None:
    by_name = {item.name: {key: value for key, value in asdict(item).items() if key != "name"} for item in prepared}
    write_bytes(path, (json.dumps(by_name, indent=2) + "\n").encode())


class _OutlineReader:
    """Target of a parser of XML that keeps the vertices of regions, and nothing of the other elements."""

    def __init__(self, path: Path):
        self.path, self.depth, self.region = path, 0, None
        self.outlines: list[array[float]] = []  # x and y of each vertex, one after the other
        self.microns_per_pixel: float | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Take in the beginning of an element."""
        self.depth += 1
        if self.depth > MAX_XML_DEPTH:
            raise DataError(f"{self.path}: is nested in more than {MAX_XML_DEPTH} levels; export it again")
        if self.depth == 1 and tag != "Annotations":
            raise DataError(
                f"{self.path}: is not an Aperio annotation (its root is <{tag[:100]}>, not <Annotations>); export it "
                "again"
            )
        if self.depth == 1:
            self.microns_per_pixel = _read_resolution(attributes.get("MicronsPerPixel"))
        elif tag == "Region":
            self.region = attributes.get("Id", "without Id")
            self.outlines.append(array("d"))
        elif tag == "Vertex" and self.region is not None:
            self.outlines[-1].extend(self._read_vertex(attributes))

    def end(self, tag: str) -> None:
        """Take in the end of an element."""
        self.depth -= 1
        if tag == "Region":
            self.region = None

    def close(self) -> "_OutlineReader":
        """Return this object, at the end of the file."""
        return self

    def _read_vertex(self, attributes: dict[str, str]) -> tuple[float, float]:
        try:
            x, y = float(attributes.get("X", "")), float(attributes.get("Y", ""))
        except ValueError:
            x = y = math.nan
        if not (abs(x) <= LARGEST_COORDINATE and abs(y) <= LARGEST_COORDINATE):
            shown = " ".join(f"{name}={str(attributes.get(name))[:50]!r}" for name in "XY")
            raise DataError(
                f"{self.path}: region {self.region[:50]} has a vertex with {shown}, not two numbers of pixels; correct "
                "the file or export it again"
            )
        return x, y


def _parse_xml(path: Path) -> _OutlineReader:
    defusedxml = import_extra("defusedxml", "training")
    element_tree = import_extra("defusedxml.ElementTree", "training")
    reader = _OutlineReader(path)
    try:
        check_regular_file(path)
        size = path.stat().st_size
        if size > MAX_XML_BYTES:
            raise DataError(f"{path}: is larger than {MAX_XML_BYTES} bytes; annotate tiles of the image")
        parser = element_tree.DefusedXMLParser(target=reader)
        with path.open("rb") as file:
            while part := file.read(max(LEAST_XML_PART, size // XML_PARTS)):
                parser.feed(part)
        parser.close()
    except UnreadableError as error:
        raise DataError(f"{error}; name an XML file") from error
    except DataError:
        raise
    except element_tree.ParseError as error:
        raise DataError(f"{path}: is not well-formed XML ({error}); download or export it again") from error
    except defusedxml.DefusedXmlException as error:
        raise DataError(
            f"{path}: declares entities, which an annotation does not need and which can exhaust memory, so it was not "
            "read; remove the declarations, or get the file from its source again"
        ) from error
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{path}: declares a text encoding that cannot be read ({error}); save it as UTF-8 and declare that"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    return reader


def _read_resolution(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
