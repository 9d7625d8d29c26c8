"""Segment image files: a mask and an overlay of its outlines for each, optionally single nuclei and probabilities."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import DataError, Sample, find_images, labels_to_colours
from ..data.instances import write_instances
from ..data.read import Doubts
from ..devices import explaining_short_memory
from ..tiling import OVERLAP
from ..writing import remove_unfinished, write_png, written_atomically
from .figures import as_rgb, class_colours, instance_overlay, overlay
from .instances import SEED_DISTANCE, SMALLEST_OBJECT, instances_of, mask_classes, mask_probabilities
from .predictor import Predictor, predictor_of, to_labels
from .settings import (
    InferenceError,
    check_choice,
    check_mask_settings,
    output_folder,
    progress_bar,
    refuse_existing,
)

PROBABILITY_FORMATS = ("none", "png", "npy")


@dataclass
class PredictConfig:
    """Settings of `predict`.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), a published .pth.tar, or the name of a model
            that comes with the package: nuclei. Several as a,b, whose probabilities are averaged.
        input: Folder of images, or one image, of any size.
        output: Folder for NAME.png (mask) and NAME_overlay.png (outlines over the image).
        resolution: What the network sees. protocol: the image as the model's protocol resizes it, and the probabilities
            are enlarged to the image. native: the pixels of the image, in tiles if it is larger than one. Models of the
            protocol native always see the pixels.
        tile: Side of the tiles in pixels; none takes the model's image size.
        overlap: Share of a tile that overlaps with the next.
        tta: Test-time transforms over which probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        threshold: Probability above which a pixel is foreground, for binary models.
        instances: Also write single nuclei: NAME_instances.png, 16 bit, one number a nucleus, and
            NAME_instances_overlay.png, their outlines over the image.
        smallest_object: Nuclei of fewer pixels are left out.
        seed_distance: Pixels between the seeds of nuclei that touch, about a third of a diameter; models of the target
            boundary do not use it.
        probability: Also write the probabilities: none; png, 8 bit, of the foreground; npy, float32 (classes, H, W),
            which for models of the target boundary are background, interior and border.
        batch_size: Tiles in one forward pass.
        channel_order: Order in which the network sees the colour channels: rgb or bgr; none takes the model's.
        intensity_range: Lowest and highest value of the image files: 0,4095; none takes the model's.
        scale: Factor by which images are enlarged before the network sees their pixels, 0.1 to 10; masks and scores
            stay at the size of the images. Raise it if small nuclei are merged or missed, lower it if large ones are
            split.
        backend: Implementation of the network's operators: auto, triton, composed or reference.
        device: auto, cpu, cuda, cuda:1 or mps.
        amp: bf16 runs the network under bfloat16 autocast, no leaves it in float32.
        graph: Replay the network as a CUDA graph, on CUDA.
        overwrite: Replace files that exist.
        progress: Show a progress bar.
    """

    model: str
    input: str
    output: str
    resolution: str = "protocol"
    tile: int | None = None
    overlap: float = OVERLAP
    tta: str = "none"
    threshold: float = 0.5
    instances: bool = False
    smallest_object: int = SMALLEST_OBJECT
    seed_distance: int = SEED_DISTANCE
    probability: str = "none"
    batch_size: int = 4
    channel_order: str | None = None
    intensity_range: tuple[int, int] | None = None
    scale: float = 1.0
    backend: str = "auto"
    device: str = "auto"
    amp: str = "no"
    graph: bool = True
    overwrite: bool = False
    progress: bool = True


class PredictionError(InferenceError):
    """Some images could not be segmented; the others were.

    Attributes:
        failures: Reasons by image file.
        written: The files of the images that were segmented.
    """

    def __init__(self, failures: dict[Path, str], written: list[Path]):
        self.failures, self.written = failures, written
        listed = "\n".join(f"  {reason}" for reason in failures.values())
        super().__init__(
            f"input: {len(failures)} images were not segmented, {len(written)} files of the others are written; "
            f"repair or remove:\n{listed}"
        )


def predict(config: PredictConfig) -> list[Path]:
    """Segment a folder of images, or one image.

    Writes for each image NAME.EXT, at its own size: ``NAME.png``, the mask (0 and 255 for binary models, otherwise the
    label index, or the colours of the palette that the model was trained with), ``NAME_overlay.png``, its outlines over
    the image, and on request ``NAME_instances.png`` with its overlay and ``NAME_probability.png`` or ``.npy``. All
    checks that need no prediction come before the first file. An image that cannot be read does not stop the others.

    Returns:
        The files written, image by image.

    Raises:
        PredictionError: Some images could not be read, hold more nuclei than 16 bit can number, or need more memory
            than there is; the others are done.
        InferenceError: A setting is out of its range, files exist and ``overwrite`` is not set, two images would write
            the same file, or the output folder holds the images.
        DataError: There is no image at ``config.input``.
        ModelFileError: There is no model at ``config.model``.
        ValueError: The backend or device is unknown, or a backend is named and the model has none.
        NotImplementedError: The backend cannot run on the device.
        ImportError: MONAI (for tiles) or tqdm (for the progress bar) is not installed.
    """
    check_choice("probability", config.probability, PROBABILITY_FORMATS)
    check_mask_settings(config.threshold, config.smallest_object, config.seed_distance)
    folder = output_folder(config.output)
    samples = find_images(config.input)
    plan = _plan(samples, folder, config)
    if not config.overwrite:
        refuse_existing([path for files in plan for path in files.values()], "this prediction")
    predictor = predictor_of(config)
    remove_unfinished(folder)
    written: list[Path] = []
    failures: dict[Path, str] = {}
    doubts = Doubts()
    pairs = zip(samples, plan, strict=True)
    for sample, files in progress_bar(pairs, len(samples), "predict", config.progress):
        try:
            with explaining_short_memory("use a device with more memory, or smaller images"):
                image = predictor.protocol.read_image(sample.image, doubts)
                _write_outputs(predictor, image, files, config)
        except DataError as error:
            failures[sample.image] = str(error)
            continue
        except torch.OutOfMemoryError as error:
            failures[sample.image] = f"{sample.image}: {error}"
            continue
        written += files.values()
    doubts.warn()
    if failures:
        raise PredictionError(failures, written)
    return written


def _plan(samples: list[Sample], folder: Path, config: PredictConfig) -> list[dict[str, Path]]:
    """Return the files to write for each sample; raise InferenceError if they would replace an input or each other."""
    if folder.resolve() in {sample.image.parent.resolve() for sample in samples}:
        raise InferenceError(f"output: {folder} holds the images themselves; choose another folder")
    plan = [_output_files(folder, sample.name, config) for sample in samples]
    owners: dict[Path, Path] = {}
    for sample, files in zip(samples, plan, strict=True):
        for path in files.values():
            if path in owners:
                raise InferenceError(
                    f"input: {owners[path]} and {sample.image} would both write {path.name}; rename one of them, or "
                    "predict them into different folders"
                )
            owners[path] = sample.image
    return plan


def _output_files(folder: Path, name: str, config: PredictConfig) -> dict[str, Path]:
    files = {"mask": folder / f"{name}.png", "overlay": folder / f"{name}_overlay.png"}
    if config.instances:
        files["instances"] = folder / f"{name}_instances.png"
        files["instances overlay"] = folder / f"{name}_instances_overlay.png"
    if config.probability != "none":
        files["probability"] = folder / f"{name}_probability.{config.probability}"
    return files


def _write_outputs(predictor: Predictor, image: np.ndarray, files: dict[str, Path], config: PredictConfig) -> None:
    """Write all files of one image; raise DataError before the first if 16 bit cannot number its nuclei."""
    model = predictor.model
    probabilities = predictor.probabilities_of_image(image)
    image = as_rgb(image)
    foreground = mask_probabilities(model, probabilities[None])
    labels = to_labels(foreground, config.threshold)[0].cpu().numpy()
    classes, palette = mask_classes(model), model.metadata.get("palette")
    if config.instances:
        instances = instances_of(model, probabilities, labels, config)
        write_instances(files["instances"], instances)
        write_png(files["instances overlay"], instance_overlay(image, instances))
    if config.probability == "npy":
        with written_atomically(files["probability"]) as temporary:
            np.save(temporary, probabilities.cpu().numpy())
    elif config.probability == "png":
        first = foreground[0, 0].cpu().numpy()  # the foreground of binary models, the background of others
        shown = first if classes == 1 else 1 - first
        write_png(files["probability"], (shown * 255).round().astype(np.uint8))
    if palette is not None:
        mask = labels_to_colours(labels, palette)
    else:
        mask = labels * np.uint8(255) if classes == 1 else labels
    write_png(files["overlay"], overlay(image, labels, class_colours(classes, palette)))
    write_png(files["mask"], mask)
