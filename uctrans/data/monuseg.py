"""Masks and instance maps of images from nucleus outlines, as MoNuSeg publishes them."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from uctrans.data.aperio import describe_hidden, paint_polygons, read_annotation
from uctrans.data.errors import DataError, shorten
from uctrans.data.files import find_all_samples, list_images
from uctrans.data.images import decode_mask, read_image
from uctrans.data.instances import INSTANCES, LEAST_AGREEMENT, agreement, find_instances, write_instances
from uctrans.writing import write_bytes, write_png

XML_SUFFIX = ".xml"
MASKS, SUMMARY = "masks", "annotations.json"


@dataclass(frozen=True)
class PreparedImage:
    """What was made of the outlines of one image.

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
    """Write a mask and an instance map for each annotated image; for a dataset with masks see `prepare_instances`.

    ``output/masks/NAME.png`` is 0/255 uint8, ``output/instances/NAME.png`` is uint16 with 0 for background and nuclei
    from 1 on without gaps, both of the image's size; ``output/annotations.json`` has the fields of `PreparedImage` by
    name. Where outlines overlap the smaller nucleus has the pixels, see :func:`uctrans.data.fill_polygons`; a nucleus
    that is left without any is counted as hidden, with a warning that names the file. With ``output`` the parent of an
    images folder named ``images``, the result is a dataset folder. Everything is read and checked before the first file
    is written; images without an annotation are passed over.

    Args:
        annotations: folder of XML files, or one of them.
        images: folder with an image of the same stem for each XML file (may be the same folder).
        output: folder to write to.
        overwrite: replace files that are there already, masks included; False refuses to.

    Raises:
        DataError: a missing folder, no XML file, an annotation without an image, a file that cannot be read, a file
            that would be replaced, or ``images`` being a folder that masks or instances would go to.
        ImportError: defusedxml is not installed.
    """
    annotation_files = _list_annotations(Path(annotations))
    if not Path(images).is_dir():
        raise DataError(f"{images} is not a folder: give the folder of the annotated images.")
    image_files = list_images(Path(images), companions=frozenset({XML_SUFFIX}))
    _refuse_without_image(
        annotation_files,
        image_files,
        images,
        "; for images that lie in train, val and test folders beside their masks, name the folder of these as output "
        "and leave images out",
    )
    output = Path(output)
    names = [file.stem for file in annotation_files]
    for folder in (output / MASKS, output / INSTANCES):
        if folder.is_dir() and folder.samefile(images):
            raise DataError(
                f"{folder} is the folder of the images, which the results would replace: choose another output folder."
            )
    files = [output / folder / f"{name}.png" for folder in (MASKS, INSTANCES) for name in names]
    if not overwrite:
        _refuse_existing(
            [*files, output / SUMMARY],
            "Choose another output folder, set overwrite to replace them, or leave images out to keep the masks and "
            "add instance maps",
        )
    prepared, maps = _fill_outlines(annotation_files, image_files)
    for name, instances in maps.items():
        write_png(output / MASKS / f"{name}.png", np.where(instances > 0, np.uint8(255), np.uint8(0)))
        write_instances(output / INSTANCES / f"{name}.png", instances)
    write_bytes(output / SUMMARY, _summary(prepared))
    return prepared


def prepare_instances(
    annotations: str | os.PathLike, data: str | os.PathLike, *, overwrite: bool = False
) -> list[PreparedImage]:
    """Write an instance map beside the mask of each annotated image of a dataset, whose masks stay as they are.

    The annotations may be of images of several splits. ``instances`` beside the folder of an image's mask takes
    ``NAME.png`` (see `prepare_monuseg` for its content), and ``data/annotations.json`` the fields of `PreparedImage` by
    name. Everything is read and checked before the first file is written; images without an annotation are passed over.

    Args:
        annotations: folder of XML files, or one of them.
        data: dataset with masks in any layout that :func:`uctrans.data.find_samples` knows.
        overwrite: replace instance maps that are there already; False refuses to.

    Raises:
        DataError: a folder that is no dataset, no XML file, an annotation without an image in any split, a file that
            cannot be read or would be replaced, or outlines that do not fit the mask of their image.
        ImportError: defusedxml is not installed.
    """
    annotation_files, data = _list_annotations(Path(annotations)), Path(data)
    if (data / "images").is_dir() and not (data / MASKS).is_dir():
        raise DataError(f"{data} has images and no masks: to have masks made of the outlines, give images as well.")
    samples = {sample.name: sample for sample in find_all_samples(data)}
    image_files = {name: sample.image for name, sample in samples.items()}
    _refuse_without_image(annotation_files, image_files, data)
    annotated = [samples[file.stem] for file in annotation_files]
    files = {sample.name: sample.mask.parent.parent / INSTANCES / f"{sample.name}.png" for sample in annotated}
    if not overwrite:
        _refuse_existing([*files.values(), data / SUMMARY], "Set overwrite to replace them; masks stay as they are")
    if others := [file for file in find_instances(annotated).values() if file not in files.values()]:
        raise DataError(f"Instance maps that are no PNG files are there already: {shorten(others)}. Remove them first.")
    prepared, maps = _fill_outlines(annotation_files, image_files)
    for file in annotation_files:
        mask, _ = decode_mask(samples[file.stem].mask, 1, None, maps[file.stem].shape)
        if (dice := agreement(maps[file.stem], mask)) < LEAST_AGREEMENT:
            raise DataError(
                f"The outlines in {file} do not fit the mask {samples[file.stem].mask} (Dice {dice:.2f}, below "
                f"{LEAST_AGREEMENT}), so they are of another image: take the file out of the annotations folder."
            )
    for name, instances in maps.items():
        write_instances(files[name], instances)
    write_bytes(data / SUMMARY, _summary(prepared))
    return prepared


def _fill_outlines(
    annotation_files: list[Path], image_files: Mapping[str, Path]
) -> tuple[list[PreparedImage], dict[str, np.ndarray]]:
    """What the summary says of each image, and the instance maps by name."""
    prepared, maps = [], {}
    for file in annotation_files:
        annotation = read_annotation(file)
        instances, hidden = paint_polygons(annotation.polygons, read_image(image_files[file.stem]).shape[:2])
        nuclei = int(instances.max())
        if hidden:
            warnings.warn(f"{file}: {describe_hidden(hidden)}.", stacklevel=3)
        if nuclei == 0:
            warnings.warn(f"{file} outlines no nucleus inside its image; what is made of it is empty.", stacklevel=3)
        maps[file.stem] = instances
        prepared.append(PreparedImage(file.stem, nuclei, annotation.skipped, hidden, annotation.microns_per_pixel))
    return prepared, maps


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


def _refuse_without_image(
    annotation_files: list[Path], image_files: Mapping[str, Path], folder: str | os.PathLike, further_remedy: str = ""
) -> None:
    without_image = [file.name for file in annotation_files if file.stem not in image_files]
    if without_image:
        raise DataError(
            f"No image of the same stem in {folder} for the annotations {shorten(without_image)}: add the images, or "
            f"take these files out of the annotations folder{further_remedy}."
        )


def _refuse_existing(files: list[Path], remedy: str) -> None:
    existing = [file for file in files if file.exists()]
    if existing:
        raise DataError(f"{len(existing)} of the files to write exist already: {shorten(existing, limit=3)}. {remedy}.")


def _summary(prepared: list[PreparedImage]) -> bytes:
    by_name = {item.name: {key: value for key, value in asdict(item).items() if key != "name"} for item in prepared}
    return (json.dumps(by_name, indent=2) + "\n").encode()
