"""Several models as one: the mean of their probabilities, as the authors of UCTransNet average their fold models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import uctrans
from uctrans.data import protocol_of
from uctrans.inference.files import InferenceError
from uctrans.models.base import probabilities

SHARED_METADATA = ("target", "palette", "class_names")
SMALLEST_PROBABILITY = 1e-7  # its logit and that of 1 - 1e-7 are finite in float32


class Ensemble(nn.Module):
    """Models whose probabilities are averaged; its logits are those of the mean, so it stands where one model does.

    Attributes:
        models: the members.
        name: "ensemble".
        in_channels, classes: those of every member.
        config: the configurations of the members, under "members".
        metadata: what the members have in common, and "members", their files or folders.

    Args:
        models: Two or more models in evaluation mode, of one protocol, image size, channel order, target and classes.
        names: What to call each in ``metadata`` and in error messages.

    Raises:
        InferenceError: Fewer than two models, or two of them that differ in what their probabilities mean.
    """

    name = "ensemble"

    def __init__(self, models: Sequence[nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        if len(models) < 2:
            raise InferenceError(f"An ensemble needs two models or more, got {len(models)}: name them as a,b.")
        first, *others = [_meaning(model) for model in models]
        for meaning, name in zip(others, names[1:], strict=True):
            if differences := [key for key in first if first[key] != meaning[key]]:
                listed = "; ".join(f"{key}: {first[key]!r} and {meaning[key]!r}" for key in differences)
                raise InferenceError(
                    f"{names[0]} and {name} cannot be averaged, they differ in {listed}. Name models that were trained "
                    "with the same classes and under the same protocol."
                )
        self.models = nn.ModuleList(models)
        self.in_channels, self.classes = first["in_channels"], first["classes"]
        self.config: dict[str, Any] = {
            "members": [{"name": model.name, **model.config} for model in models],
            "image_size": first["image_size"],
        }
        self.metadata: dict[str, Any] = {
            "protocol": first["protocol"],
            "image_size": first["image_size"],
            "channel_order": first["channel_order"],
            **{key: first[key] for key in SHARED_METADATA if first[key] is not None},
            "members": list(names),
        }

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the mean probability, float32: ``(B, in_channels, H, W)`` to ``(B, classes, H, W)``.

        Softmax (sigmoid where there is one class) gives the mean back, which is clamped to 1e-7..1 - 1e-7.
        """
        total = sum(probabilities(model(image).float()) for model in self.models)
        mean = (total / len(self.models)).clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
        return mean.logit() if self.classes == 1 else mean.log()


def load_model_or_ensemble(path: str | Path) -> nn.Module:
    """The model at ``path``, or the ensemble of several paths with commas between them.

    Raises:
        ModelFileError: There is no model.
        InferenceError: See `Ensemble`.
    """
    names = [part.strip() for part in str(path).split(",")]
    if len(names) == 1 or Path(path).exists():
        return uctrans.load_model(path)
    if "" in names:
        raise InferenceError(f'A name is empty in "{path}": write the models of an ensemble as runs/a,runs/b.')
    return Ensemble([uctrans.load_model(name) for name in names], names)


def _meaning(model: nn.Module) -> dict[str, Any]:
    """What decides how a model takes images and what its probabilities are of."""
    protocol = protocol_of(model)
    return {
        "in_channels": model.in_channels,
        "classes": model.classes,
        "protocol": protocol.name,
        "image_size": list(protocol.image_size),
        "channel_order": protocol.channel_order,
        **{key: model.metadata.get(key) for key in SHARED_METADATA},
    }
