"""Segment image files: a mask and an overlay of its outlines for each, optionally single nuclei and probabilities."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data import find_images
from ..data.image_files import ImageSize, read_size
from ..data.read import Doubts
from ..data.rows import open_rows
from ..devices import explaining_short_memory
from ..pipeline import in_thread
from ..writing import locked
from .instances import SEED_DISTANCE, SMALLEST_OBJECT, mask_probabilities
from .journal import Journal, weights_digest
from .outputs import Planned, divide_by_names, entry_of, find_missing, plan_files
from .predictor import PredictionSettings, Predictor, predictor_of, to_labels
from .settings import (
    InferenceError,
    check_choice,
    check_mask_settings,
    output_folder,
    progress_bar,
    refuse_inputs,
    refuse_truth,
)
from .writer import MEMORY_REMEDY, PER_IMAGE, Done, Failed, Segmented, Strip, Writer

PROBABILITY_FORMATS = ("none", "png", "npy")
# Settings that change no result beyond rounding, or say where it lies.
WITHOUT_EFFECT = ("model", "input", "output", "batch_size", "backend", "device", "graph", "engine", "overwrite")
WITHOUT_EFFECT += ("progress", "strips_above")


@dataclass
class PredictConfig(PredictionSettings):
    """Settings of `predict`.

    Args:
        input: Folder of images, or one image, of any size.
        output: Folder for NAME.png (mask) and NAME_overlay.png (outlines over the image).
        resolution: What the network sees. protocol: the image as the model's protocol resizes it, and the probabilities
            are enlarged to the image. native: the pixels of the image, in tiles if it is larger than one. Models of the
            protocol native always see the pixels.
        instances: Also write single nuclei: NAME_instances.png, 16 bit, one number a nucleus, and
            NAME_instances_overlay.png, their outlines over the image.
        smallest_object: Nuclei of fewer pixels are left out.
        seed_distance: Pixels between the seeds of nuclei that touch, about a third of a diameter; models of the target
            boundary do not use it.
        probability: Also write the probabilities: none; png, 8 bit, of the foreground; npy, float32 (classes, H, W),
            which for models of the target boundary are background, interior and border.
        overwrite: Replace files that exist, and predict images that are done again.
        strips_above: Number of pixels above which an image is read, segmented and written in strips of rows, so that it
            needs little memory. Its mask and its 8-bit probabilities are TIFF files, its overlay is reduced to 4096
            pixels; it must be seen at native resolution, and single nuclei are not numbered.
    """

    input: str
    output: str
    resolution: str = "protocol"
    instances: bool = False
    smallest_object: int = SMALLEST_OBJECT
    seed_distance: int = SEED_DISTANCE
    probability: str = "none"
    overwrite: bool = False
    strips_above: int = 64_000_000


class WrittenFiles(list[Path]):
    """The files that a call of `predict` wrote, image by image, and how fast.

    Attributes:
        folder: Folder of the files.
        images: Number of images that the call segmented.
        pixels: Number of their pixels.
        seconds: Time from the first image that was read to the last file that was written.
        done_before: Number of images that an earlier call had done.
    """

    def __init__(self, folder: Path, done_before: int) -> None:
        super().__init__()
        self.folder, self.done_before = folder, done_before
        self.images = self.pixels = 0
        self.seconds = 0.0

    def add(self, done: Done) -> None:
        """Count an image whose files are written."""
        self += done.files
        self.images += 1
        self.pixels += done.pixels

    def __str__(self) -> str:
        before = f" {self.done_before} images were done before." if self.done_before else ""
        if not self.images:
            return f"Nothing to write into {self.folder}.{before}"
        images, pixels = self.images / self.seconds, self.pixels / self.seconds / 1e6
        return (
            f"Wrote {len(self)} files into {self.folder}: {self.images} images in {self.seconds:.1f} s, {images:.2f} "
            f"images and {pixels:.2f} million pixels a second.{before}"
        )


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
            f"repair or remove, then repeat the command:\n{listed}"
        )


def predict(config: PredictConfig) -> WrittenFiles:
    """Segment a folder of images, or one image.

    Writes for each image NAME.EXT, at its own size: ``NAME.png``, the mask (0 and 255 for binary models, otherwise the
    label index, or the colours of the palette that the model was trained with), ``NAME_overlay.png``, its outlines over
    the image, and on request ``NAME_instances.png`` with its overlay and ``NAME_probability.png`` or ``.npy``. Of an
    image with more than ``strips_above`` pixels, `uctrans.inference.writer` writes the files. All checks that need no
    prediction come before the first file. An image that cannot be read does not stop the others.

    The next image is read and the last one written while the network runs. A call that was stopped leaves whole files;
    another call with the same model and settings continues with the images that are missing, which it knows from the
    file ``.uctrans-predict.jsonl`` in the output folder.

    Returns:
        The files written, image by image.

    Raises:
        PredictionError: Some images could not be read, hold more nuclei than 16 bit can number, need more memory than
            there is, or have names too long for their files; the others are done.
        InferenceError: A setting is out of its range, files exist that another model, other settings or another image
            made and ``overwrite`` is not set, two images would write the same file, or the output folder holds the
            images or the masks of a data set.
        DataError: There is no image at ``config.input``.
        FolderError: Another process writes into the output folder, or it cannot be made or written to.
        ModelFileError: There is no model at ``config.model``.
        OSError: A file could not be written; nothing after it was.
        ValueError: The backend or device is unknown, or a backend is named and the model has none.
        NotImplementedError: The backend cannot run on the device.
        ImportError: MONAI (for tiles) or tqdm (for the progress bar) is not installed.
    """
    check_choice("probability", config.probability, PROBABILITY_FORMATS)
    check_mask_settings(config.threshold, config.smallest_object, config.seed_distance)
    if config.strips_above < 1:
        raise InferenceError(f"strips_above: {config.strips_above} is too small; give 1 pixel or more")
    folder = output_folder(config.output)
    samples = find_images(config.input)
    plan = plan_files(samples, folder, config)
    with locked(folder):
        journal = Journal(folder)
        if not journal.entries:
            refuse_truth(folder)
        plan, failures = divide_by_names(plan)
        refuse_inputs(
            (path for planned in plan for path in planned.possible_files), (sample.image for sample in samples)
        )
        missing = plan if config.overwrite else find_missing(plan, journal)
        predictor = predictor_of(config)
        settings = _settings(config, predictor)
        if not config.overwrite:
            journal.check(settings)
        written = WrittenFiles(folder, len(plan) - len(missing))
        try:
            with journal.written(settings, {planned.sample.name: entry_of(planned, journal) for planned in missing}):
                _segment(missing, predictor, config, journal, written, failures)
        except BaseException as stop:
            again = "the same command without --overwrite" if config.overwrite else "the same command"
            done = journal.count_done(planned.sample.name for planned in plan)
            stop.add_note(f"{done} of {len(samples)} images are done; {again} continues")
            raise
    if failures:
        raise PredictionError(failures, written)
    return written


def _settings(config: PredictConfig, predictor: Predictor) -> dict[str, Any]:
    """Return what the files depend on besides their images, as JSON gives it back."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in WITHOUT_EFFECT}
    return json.loads(json.dumps({"weights": weights_digest(predictor.model), **settings}))


def _segment(
    missing: list[Planned],
    predictor: Predictor,
    config: PredictConfig,
    journal: Journal,
    written: WrittenFiles,
    failures: dict[Path, str],
) -> None:
    """Segment the images; add their files to ``written``, and why some cannot be segmented to ``failures``."""
    doubts = Doubts()
    writer = Writer(predictor.model, config, journal)

    def read(planned: Planned) -> tuple[Planned, np.ndarray | ImageSize] | Failed:
        try:
            with explaining_short_memory(MEMORY_REMEDY):
                size = read_size(planned.sample.image)
                is_large = size.height * size.width > config.strips_above
                return planned, size if is_large else predictor.protocol.read_image(planned.sample.image, doubts)
        except PER_IMAGE as error:
            return Failed.of(planned, error)

    start = time.perf_counter()
    with (
        contextlib.closing(in_thread(read, missing)) as images,
        contextlib.closing(_run_network(images, predictor, config, doubts)) as segmented,
        writer,
        contextlib.closing(in_thread(writer.write, segmented)) as results,
    ):
        ends = (result for result in results if result is not None)
        for result in progress_bar(ends, len(missing), "predict", config.progress):
            if isinstance(result, Failed):
                failures[result.image] = result.reason
            else:
                written.add(result)
    written.seconds = time.perf_counter() - start
    doubts.warn()


def _run_network(
    images: Iterable[tuple[Planned, np.ndarray | ImageSize] | Failed],
    predictor: Predictor,
    config: PredictConfig,
    doubts: Doubts,
) -> Iterator[Segmented | Strip | Failed]:
    """Yield the images with their probabilities and labels: large ones in strips."""
    for item in images:
        if isinstance(item, Failed):
            yield item
            continue
        planned, image = item
        del item
        try:
            with explaining_short_memory(MEMORY_REMEDY):
                if isinstance(image, ImageSize):
                    yield from _strips(planned, image, predictor, config, doubts)
                else:
                    probabilities = predictor.probabilities_of_image(image)
                    yield Segmented(planned, image, *_on_cpu(probabilities, predictor, config))
        except PER_IMAGE as error:
            yield Failed.of(planned, error)
        del image  # before the next one is waited for


def _strips(
    planned: Planned, size: ImageSize, predictor: Predictor, config: PredictConfig, doubts: Doubts
) -> Iterator[Strip]:
    protocol, top = predictor.protocol, 0
    try:
        if config.instances:
            raise InferenceError("instances: nuclei are numbered in an image as a whole; cut it into parts")
        with open_rows(planned.sample.image, protocol.channels, protocol.intensity_range, doubts) as rows:
            for probabilities in predictor.probabilities_by_rows(rows.read, rows.size):
                image = rows.read(top, top + probabilities.shape[1])
                yield Strip(planned, top, rows.size, image, *_on_cpu(probabilities, predictor, config))
                top += probabilities.shape[1]
    except InferenceError as error:
        raise InferenceError(
            f"{error}, or raise strips_above, which is {config.strips_above}, above {size.height} x {size.width} pixels"
        ) from error


def _on_cpu(probabilities: Tensor, predictor: Predictor, config: PredictConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities ``(P, H, W)`` and the labels that they give, for the threads without PyTorch."""
    labels = to_labels(mask_probabilities(predictor.model, probabilities[None]), config.threshold)[0]
    return probabilities.cpu().numpy(), labels.cpu().numpy()
