"""Images beside their truth and what a model predicts, at the size that is scored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from uctrans.data import Protocol, Sample, get_protocol, list_protocols, load_tensors, read_image, read_mask
from uctrans.data.instances import check_truth, read_instances
from uctrans.inference.instances import instances_of, mask_classes, mask_probabilities
from uctrans.inference.overlays import class_colours
from uctrans.inference.predictor import predictor_of, to_labels

if TYPE_CHECKING:
    from uctrans.inference.evaluate import EvaluateConfig

WHITE_ON_BLACK = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)
NO_MAPS: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True)
class Compared:
    """One image beside truth and prediction, at the size that is scored; instance maps where there is a true one."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    true_instances: np.ndarray | None = None
    predicted_instances: np.ndarray | None = None


def score_sizes() -> list[str]:
    """What ``size`` may be: protocol, native, and the protocols that resize."""
    resizing = [name for name in list_protocols() if not get_protocol(name).keeps_resolution]
    return ["protocol", "native", *resizing]


class Comparison:
    """A model, and how the settings of an evaluation hold its predictions against the truth.

    Attributes:
        predictor: of the model.
        model: what is loaded.
        classes: of the masks.
        palette: of colour-coded masks, None where they hold labels.
        scored_as: the protocol at whose size scores are taken.

    Raises:
        ModelFileError, InferenceError, ValueError, NotImplementedError: as for
            `uctrans.inference.predictor.load_predictor`.
    """

    def __init__(self, config: "EvaluateConfig"):
        self._config = config
        self.predictor = predictor_of(config)
        self.model = self.predictor.model
        self.classes, self.palette = mask_classes(self.model), self.model.metadata.get("palette")
        self.scored_as = _protocol_of_scores(self.predictor.protocol, config.size)

    @property
    def is_native(self) -> bool:
        """Whether scores are taken at the size of the masks."""
        return self.scored_as.keeps_resolution

    @property
    def class_names(self) -> list[str]:
        """Of the foreground classes; those of the metadata may include the background or not."""
        foreground = max(self.classes - 1, 1)
        names = [str(name) for name in self.model.metadata.get("class_names") or ()]
        if len(names) == foreground + 1:
            names = names[1:]
        return names if len(set(names)) == foreground else [str(label) for label in range(1, foreground + 1)]

    @property
    def legend(self) -> list[str] | None:
        """The names of the classes in a figure; None of binary masks, which need none."""
        return self.class_names if self.classes > 1 else None

    @property
    def colours(self) -> np.ndarray:
        """Colours of the labels in figures of masks, uint8 ``(labels, 3)``."""
        is_plain = self.classes == 1 and self.palette is None
        return WHITE_ON_BLACK if is_plain else class_colours(self.classes, self.palette)

    def check(self, samples: Sequence[Sample], instance_maps: Mapping[str, Path]) -> None:
        """Raise DataError where a mask or map cannot be used, unless masks are read before any prediction anyway."""
        if not self._is_as_seen:
            check_truth(samples, instance_maps if self.is_native else {}, self.classes, self.palette)

    def images(self, samples: Sequence[Sample], instance_maps: Mapping[str, Path] = NO_MAPS) -> Iterator[Compared]:
        """The images in their order, with the truth of those instance maps that are given."""
        if self._is_as_seen:
            return self._as_seen(samples)
        return self._at_native_size(samples, instance_maps) if self.is_native else self._resized(samples)

    @property
    def _is_as_seen(self) -> bool:
        return not self.is_native and self.scored_as is self.predictor.protocol

    def _as_seen(self, samples: Sequence[Sample]) -> Iterator[Compared]:
        """At the size that the network sees."""
        for start in range(0, len(samples), self._config.batch_size):
            batch = samples[start : start + self._config.batch_size]
            tensors = load_tensors(batch, self.predictor.protocol, self.classes, self.palette)
            probabilities = mask_probabilities(self.model, self.predictor.probabilities(tensors.images))
            labels = to_labels(probabilities, self._config.threshold).cpu().numpy()
            images = tensors.images.permute(0, 2, 3, 1).numpy()
            yield from map(Compared, tensors.names, images, tensors.masks.numpy(), labels)

    def _at_native_size(self, samples: Sequence[Sample], instance_maps: Mapping[str, Path]) -> Iterator[Compared]:
        """At the size of the files."""
        for sample in samples:
            image = read_image(sample.image)
            truth = read_mask(sample.mask, self.classes, self.palette, shape=image.shape[:2])
            true = read_instances(instance_maps[sample.name], truth) if sample.name in instance_maps else None
            probabilities = self.predictor.probabilities_of_image(image)[None]
            foreground = mask_probabilities(self.model, probabilities)
            labels = to_labels(foreground, self._config.threshold)[0].cpu().numpy()
            predicted = None if true is None else instances_of(self.model, probabilities[0], labels, self._config)
            yield Compared(sample.name, image, truth, labels, true, predicted)

    def _resized(self, samples: Sequence[Sample]) -> Iterator[Compared]:
        """Truth and prediction at the size of the files, both resized as the protocol of the scores resizes masks."""
        for whole in self._at_native_size(samples, NO_MAPS):
            truth, prediction = (
                self.scored_as.resize_mask(mask, self.classes) for mask in (whole.truth, whole.prediction)
            )
            yield Compared(whole.name, self.scored_as.resize_image(whole.image), truth, prediction)


def _protocol_of_scores(trained_under: Protocol, size: str) -> Protocol:
    """The protocol at whose size scores are taken; the very one of the model where it prepares images alike."""
    if size == "native":
        return get_protocol("native")
    if size == "protocol":
        return trained_under
    named = get_protocol(size)
    is_alike = not trained_under.keeps_resolution and trained_under.image_size == named.image_size
    return trained_under if is_alike else named
