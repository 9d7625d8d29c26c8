"""Segment image files: a mask and an overlay of its outlines for each, optionally single nuclei and probabilities."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uctrans.data import DataError, Sample, find_images, labels_to_colours, read_image
from uctrans.data.instances import write_instances
from uctrans.inference.files import (
    InferenceError,
    output_folder,
    progress_bar,
    refuse_bad_instance_settings,
    refuse_existing,
)
from uctrans.inference.instances import (
    SEED_DISTANCE,
    SMALLEST_OBJECT,
    instances_of,
    mask_classes,
    mask_probabilities,
)
from uctrans.inference.overlays import class_colours, instance_overlay, overlay
from uctrans.inference.predictor import Predictor, predictor_of, to_labels
from uctrans.writing import write_png, written_atomically

PROBABILITY_FORMATS = ("none", "png", "npy")


@dataclass
class PredictConfig:
    """Settings of `predict`.

    Args:
        model: Run folder, folder of save_pretrained, checkpoint (.pt), or a published .pth.tar; several as a,b, whose
            probabilities are averaged.
        input: Folder of images, or one image, of any size.
        output: Folder for NAME.png (mask) and NAME_overlay.png (outlines over the image).
        resolution: What the network sees: protocol, the image as the model's protocol resizes it, the probabilities are
            then enlarged to the image; native, the pixels of the image, in tiles where it is larger than one. Models of
            the protocol native see those in either case.
        tile: Side of the tiles in pixels; none takes the model's image size.
        overlap: Share of a tile that overlaps with the next.
        tta: Test-time transforms whose probabilities are averaged: none, flips (4) or d4 (8 flips and rotations).
        threshold: Probability above which a pixel is foreground, of binary models.
        instances: Also write single nuclei: NAME_instances.png, 16 bit, one number a nucleus, and
            NAME_instances_overlay.png, their outlines over the image.
        smallest_object: Nuclei of fewer pixels are no instances.
        seed_distance: Pixels between the seeds of nuclei that touch: about a third of a diameter; of no meaning for
            models of the target boundary.
        probability: Also write the probabilities: none; png, 8 bit, the foreground's; npy, float32 (classes, H, W),
            of models of the target boundary background, interior and border.
        batch_size: Tiles in one forward pass.
        channel_order: Order in which the network sees the colour channels: rgb or bgr; none takes the model's.
        backend: Implementation of the network's operators: auto, triton, composed or reference.
        device: auto, cpu, cuda, cuda:1.
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
    overlap: float = 0.25
    tta: str = "none"
    threshold: float = 0.5
    instances: bool = False
    smallest_object: int = SMALLEST_OBJECT
    seed_distance: int = SEED_DISTANCE
    probability: str = "none"
    batch_size: int = 4
    channel_order: str | None = None
    backend: str = "auto"
    device: str = "auto"
    amp: str = "no"
    graph: bool = True
    overwrite: bool = False
    progress: bool = True


class PredictionError(InferenceError):
    """Some images could not be segmented; the others were.

    Attributes:
        failures: What went wrong, by image file.
        written: The files of the images that went well.
    """

    def __init__(self, failures: dict[Path, str], written: list[Path]):
        self.failures, self.written = failures, written
        listed = "\n".join(f"  {reason}" for reason in failures.values())
        super().__init__(
            f"{len(failures)} images were not segmented, {len(written)} files of the others are written:\n{listed}"
        )


def _output_files(folder: Path, name: str, config: PredictConfig) -> dict[str, Path]:
    files = {"mask": folder / f"{name}.png", "overlay": folder / f"{name}_overlay.png"}
    if config.instances:
        files["instances"] = folder / f"{name}_instances.png"
        files["instances overlay"] = folder / f"{name}_instances_overlay.png"
    if config.probability != "none":
        files["probability"] = folder / f"{name}_probability.{config.probability}"
    return files


def _plan(samples: list[Sample], folder: Path, config: PredictConfig) -> list[dict[str, Path]]:
    """The files to write for each sample.

    Raises:
        InferenceError: Two images would write the same file, or the output folder is that of the images.
    """
    sources = {sample.image.parent.resolve() for sample in samples}
    if folder.resolve() in sources:
        raise InferenceError(f"The output folder {folder} holds the images themselves: choose another one.")
    plan = [_output_files(folder, sample.name, config) for sample in samples]
    owners: dict[Path, Path] = {}
    for sample, files in zip(samples, plan, strict=True):
        for path in files.values():
            if path in owners:
                raise InferenceError(
                    f"{owners[path]} and {sample.image} would both write {path.name}: rename one of them, or predict "
                    "them into different folders."
                )
            owners[path] = sample.image
    return plan


def _write_outputs(predictor: Predictor, image: np.ndarray, files: dict[str, Path], config: PredictConfig) -> None:
    """Write everything of one image; DataError, before the first file, where there are more nuclei than 16 bit hold."""
    model = predictor.model
    probabilities = predictor.probabilities_of_image(image)
    of_masks = mask_probabilities(model, probabilities[None])
    labels = to_labels(of_masks, config.threshold)[0].cpu().numpy()
    classes, palette = mask_classes(model), model.metadata.get("palette")
    if "instances" in files:
        instances = instances_of(model, probabilities, labels, config)
        write_instances(files["instances"], instances)
        write_png(files["instances overlay"], instance_overlay(image, instances))
    if palette is not None:
        mask = labels_to_colours(labels, palette)
    else:
        mask = labels * np.uint8(255) if classes == 1 else labels
    if "probability" in files:
        path = files["probability"]
        if path.suffix == ".npy":
            with written_atomically(path) as temporary:
                np.save(temporary, probabilities.cpu().numpy())
        else:
            background_or_foreground = of_masks[0, 0].cpu().numpy()
            foreground = background_or_foreground if classes == 1 else 1 - background_or_foreground
            write_png(path, (foreground * 255).round().astype(np.uint8))
    write_png(files["overlay"], overlay(image, labels, class_colours(classes, palette)))
    write_png(files["mask"], mask)


def predict(config: PredictConfig) -> list[Path]:
    """Segment a folder of images, or one image.

    Writes for each image NAME.EXT, at its own size: ``NAME.png``, the mask (0 and 255 for binary models, otherwise the
    label index, or the colours of the palette the model was trained with), ``NAME_overlay.png``, its outlines over the
    image, and on request ``NAME_instances.png`` with its overlay and ``NAME_probability.png`` or ``.npy``. What can be
    checked is checked before the first file is written; an image that cannot be read does not stop the others.

    Returns:
        The files written, those of one image together.

    Raises:
        PredictionError: Some images could not be read, or hold more nuclei than 16 bit; the others are done.
        InferenceError: A setting out of its range, files that exist while ``overwrite`` is not set, two images that
            would write the same file, an output folder that holds the images.
        DataError: There is no image at ``config.input``.
        ModelFileError: ``config.model`` is no model file.
        ValueError: There is no such backend, or one is named and the model has none.
        NotImplementedError: The backend cannot run on the device.
        ImportError: MONAI (for tiles) or tqdm (for the progress bar) is not installed.
    """
    if config.probability not in PROBABILITY_FORMATS:
        raise InferenceError(f'probability must be "none", "png" or "npy", got "{config.probability}".')
    if not 0 < config.threshold < 1:
        raise InferenceError(f"threshold must lie between 0 and 1, got {config.threshold}.")
    refuse_bad_instance_settings(config.smallest_object, config.seed_distance)
    folder = output_folder(config.output)
    samples = find_images(config.input)
    plan = _plan(samples, folder, config)
    if not config.overwrite:
        refuse_existing([path for files in plan for path in files.values()], "this prediction")
    predictor = predictor_of(config)
    written: list[Path] = []
    failures: dict[Path, str] = {}
    pairs = zip(samples, plan, strict=True)
    for sample, files in progress_bar(pairs, len(samples), "predict", config.progress):
        try:
            image = read_image(sample.image)
            _write_outputs(predictor, image, files, config)
        except DataError as error:
            failures[sample.image] = str(error)
            continue
        written += files.values()
    if failures:
        raise PredictionError(failures, written)
    return written
