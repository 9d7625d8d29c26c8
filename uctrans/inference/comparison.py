"""Predictions beside the truth at the size that `evaluate` scores, and what the masks of all images hold."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Protocol, get_protocol, list_protocols, load_tensors
from ..data.fingerprints import fingerprint
from ..data.instances import check_truth, read_instances
from ..data.pairs import Samples
from ..data.read import IGNORED, Doubts
from .instances import SEED_DISTANCE, SMALLEST_OBJECT, instances_of, mask_classes, mask_probabilities
from .metrics import METRICS, dice, hd95, iou, mean_and_deviation, mean_over_classes
from .predictor import PredictionSettings, predictor_of, to_labels


@dataclass
class EvaluateConfig(PredictionSettings):
    """Settings of `evaluate`.

    Args:
        data: Folder of the data set, in any layout that uctrans.data.find_samples knows. Empty if evaluate is given
            images and masks in Python.
        output: Folder for metrics.csv, summary.json, figure.png and, with instance maps, instances.png.
        split: train, val or test; or all, every image of the folder.
        folds: Cross-validation folds, a shipped name or a JSON file; train and val are then those of the fold.
        fold: Number of the fold, counted from 0.
        size: Where scores are taken. protocol: at the protocol's size, image and mask resized its way (the published
            convention). native: at the mask's own size, against the mask as it is, with the probabilities enlarged;
            models of the protocol native are always scored so. The name of a protocol that resizes, uctransnet-224:
            models of any other protocol are scored as its own, truth and prediction resized alike from the mask's size.
        resolution: What the network sees if size is native. protocol: the image as the model's protocol prepares it.
            native: tiles of its pixels.
        smallest_object: Predicted nuclei of fewer pixels are left out of AJI and PQ, which are scored if size is native
            and a folder "instances" lies beside the masks.
        seed_distance: Pixels between the seeds of nuclei that touch, for AJI and PQ: about a third of a diameter.
        overwrite: Replace an evaluation that the output folder already holds.
    """

    data: str = ""
    output: str = ""
    split: str = "test"
    folds: str | None = None
    fold: int | None = None
    size: str = "protocol"
    resolution: str = "protocol"
    smallest_object: int = SMALLEST_OBJECT
    seed_distance: int = SEED_DISTANCE
    overwrite: bool = False


def score_sizes() -> list[str]:
    """Return the values that ``size`` may have: protocol, native, and the protocols that resize."""
    resizing = [name for name in list_protocols() if not get_protocol(name).keeps_resolution]
    return ["protocol", "native", *resizing]


@dataclass(frozen=True)
class Compared:
    """One image with truth and prediction at the size that is scored; instance maps if there is a true one."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    fingerprint: str  # of the image at its own size
    true_instances: np.ndarray | None = None
    predicted_instances: np.ndarray | None = None


class Comparison:
    """A model and the size at which its predictions are compared with the truth.

    Attributes:
        predictor: The predictor of the model.
        model: The model.
        classes: Number of classes of the masks.
        palette: Colours of colour-coded masks; None if masks hold labels.
        ignore_label: Label of the pixels to ignore in truth that was read, or None.
        scored_as: Protocol at whose size scores are taken.
        is_native: Whether scores are taken at the size of the masks.
        doubts: Doubts about the images and masks that were read.

    Raises:
        ModelFileError, InferenceError, ValueError, NotImplementedError: See
            `uctrans.inference.predictor.load_predictor`.
    """

    def __init__(self, config: EvaluateConfig):
        self._config = config
        self.predictor = predictor_of(config)
        self.model = self.predictor.model
        self.classes, self.palette = mask_classes(self.model), self.model.metadata.get("palette")
        self.ignore_label = None if self.predictor.protocol.ignore_label is None else IGNORED
        self.scored_as = _protocol_of_scores(self.predictor.protocol, config.size)
        self.is_native = self.scored_as.keeps_resolution
        self.doubts = Doubts()
        self._is_at_network_size = not self.is_native and self.scored_as is self.predictor.protocol

    @property
    def scored_at(self) -> str:
        """The pixels that are counted, in words."""
        height, width = self.scored_as.image_size
        resized = f"{height} x {width} pixels, as {self.scored_as.resizes_as} resizes them"
        return "the size of their masks" if self.is_native else resized

    @property
    def class_names(self) -> list[str]:
        """Names of the foreground classes; those in the metadata may include the background."""
        foreground = max(self.classes - 1, 1)
        names = [str(name) for name in self.model.metadata.get("class_names") or ()]
        if len(names) == foreground + 1:
            names = names[1:]
        return names if len(set(names)) == foreground else [str(label) for label in range(1, foreground + 1)]

    def scores(self, compared: "Compared") -> dict[str, torch.Tensor]:
        """Return the scores of each foreground class of an image, float64 (foreground,) by score."""
        maps = compared.prediction, compared.truth, self.classes, self.ignore_label
        return {key: score(*maps) for key, score in zip(METRICS, (dice, iou, hd95), strict=True)}

    def classes_of(self, truth: np.ndarray) -> torch.Tensor:
        """Return whether a mask has each foreground class, bool (foreground,)."""
        labels = np.arange(1, max(self.classes, 2))
        return torch.from_numpy(np.isin(labels, truth))

    def check(self, samples: Samples, instance_maps: Mapping[str, Path]) -> None:
        """Raise DataError if a mask or map cannot be used.

        Masks at the size of the network are not read here, because `images` reads a batch before it predicts.
        """
        if not self._is_at_network_size:
            maps = instance_maps if self.is_native else {}
            check_truth(samples, maps, self.classes, self.palette, self.predictor.protocol)

    def images(self, samples: Samples, instance_maps: Mapping[str, Path]) -> Iterator[Compared]:
        """Predict the images in their order, and read their truth and the instance maps that are given."""
        if self._is_at_network_size:
            return self._at_network_size(samples)
        return self._at_native_size(samples, instance_maps) if self.is_native else self._resized(samples)

    def _at_network_size(self, samples: Samples) -> Iterator[Compared]:
        protocol = self.predictor.protocol
        for start in range(0, len(samples), self._config.batch_size):
            batch = samples[start : start + self._config.batch_size]
            tensors = load_tensors(batch, protocol, self.classes, self.palette, doubts=self.doubts)
            probabilities = mask_probabilities(self.model, self.predictor.probabilities(tensors.images))
            labels = to_labels(probabilities, self._config.threshold).cpu().numpy()
            images = tensors.images.permute(0, 2, 3, 1).numpy()
            yield from map(Compared, tensors.names, images, tensors.masks.numpy(), labels, tensors.fingerprints)

    def _at_native_size(self, samples: Samples, instance_maps: Mapping[str, Path]) -> Iterator[Compared]:
        for sample in samples:
            protocol = self.predictor.protocol
            image, truth = sample.read(protocol, self.classes, self.palette, self.doubts)
            ignored = protocol.ignored(truth)
            maps = instance_maps.get(sample.name)
            true = None if maps is None else read_instances(maps, truth, ignored)
            probabilities = self.predictor.probabilities_of_image(image)[None]
            foreground = mask_probabilities(self.model, probabilities)
            labels = to_labels(foreground, self._config.threshold)[0].cpu().numpy()
            predicted = None if true is None else instances_of(self.model, probabilities[0], labels, self._config)
            if true is not None and ignored is not None:  # what is left of objects is compared
                true, predicted = np.where(ignored, 0, true), np.where(ignored, 0, predicted)
            yield Compared(sample.name, image, truth, labels, fingerprint(image), true, predicted)

    def _resized(self, samples: Samples) -> Iterator[Compared]:
        """Yield truth and prediction at native size, both resized as the protocol of the scores resizes masks."""
        for whole in self._at_native_size(samples, {}):
            resize = dataclasses.replace(self.scored_as, ignore_label=self.predictor.protocol.ignore_label).resize_mask
            truth, prediction = (resize(mask, self.classes) for mask in (whole.truth, whole.prediction))
            image = self.scored_as.resize_image(whole.image)
            yield Compared(whole.name, image, truth, prediction, whole.fingerprint)


def _protocol_of_scores(trained_under: Protocol, size: str) -> Protocol:
    """Return the protocol at whose size scores are taken; the model's own object if both prepare images alike."""
    if size == "native":
        return get_protocol("native")
    if size == "protocol":
        return trained_under
    named = get_protocol(size)
    is_alike = not trained_under.keeps_resolution and trained_under.image_size == named.image_size
    return trained_under if is_alike else named


@dataclass(frozen=True)
class Truth:
    """The scores of all images, and which classes their masks have.

    Attributes:
        has_class: bool (images, foreground classes).
        is_scored: Whether an image has a pixel that is not ignored, bool (images,).
        scores: float64 (images, foreground classes) by score, undefined where nothing is scored.
    """

    has_class: torch.Tensor
    is_scored: torch.Tensor
    scores: dict[str, torch.Tensor]

    def __post_init__(self):
        for scores in self.scores.values():  # 1 or 0 would be a score of nothing
            scores[:, ~self.has_class.any(0)] = math.nan

    def means(self) -> Iterator[dict[str, float]]:
        """Yield the means over the classes that some mask has, for each image."""
        for image in range(len(self.has_class)):
            yield {key: mean_over_classes(scores[image]).item() for key, scores in self.scores.items()}

    def by_class(self, names: Sequence[str]) -> Iterator[dict[str, float]]:
        """Yield the scores of each class for each image; nothing for a single class."""
        columns = [(key, place, name) for key in METRICS for place, name in enumerate(names) if len(names) > 1]
        for image in range(len(self.has_class)):
            yield {f"{key}_{name}": self.scores[key][image, place].item() for key, place, name in columns}

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """Return ``present``, ``mean_where_present``, ``empty`` and ``ignored`` of `EvaluationResult`."""
        names = names if len(names) > 1 else ["foreground"]
        return {
            "present": dict(zip(names, self.has_class.sum(0).tolist(), strict=True)),
            "mean_where_present": {
                name: {
                    key: mean_and_deviation(scores[self.has_class[:, place], place])[0]
                    for key, scores in self.scores.items()
                }
                for place, name in enumerate(names)
            },
            "empty": int((self.is_scored & ~self.has_class.any(1)).sum()),
            "ignored": int((~self.is_scored).sum()),
        }
