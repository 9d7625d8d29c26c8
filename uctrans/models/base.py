"""The base class of the networks: name, configuration, and files."""

import hashlib
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from ..extras import import_extra
from ..kernels.checks import check_dtypes_and_devices
from ..writing import remove_unfinished, write_bytes, written_together
from .metadata import check_metadata
from .weights import CONFIG_FILE, DIGEST, WEIGHTS_FILE, ModelFileError, build, read_model

CARD_FILE = "README.md"
REPOSITORY = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)  # on the Hugging Face hub


class SegmentationModel(nn.Module):
    """Base class of all networks.

    Subclasses are decorated with :func:`uctrans.models.registry.register_model`, which sets ``name`` and records the
    constructor's arguments as ``config``.

    Attributes:
        name: registry name.
        config: every constructor argument with its value, as JSON holds it.
        metadata: notes that JSON can hold, saved and restored with the weights (protocol, scores, palette, the images
            it was trained on, ...).
        in_channels: channels of the image.
        classes: channels of the logits.
        can_start_from_unet: whether the model has a method ``load_unet`` that takes the weights of a U-Net.
    """

    name: str
    config: dict[str, Any]
    in_channels: int
    classes: int
    can_start_from_unet = False

    def __init__(self) -> None:
        super().__init__()
        self.metadata: dict[str, Any] = {}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``; each file is replaced as a whole.

        With huggingface_hub installed, also write a model card (``README.md``) if there is none.

        Args:
            folder: where the files go.
            dtype: floating-point type of the parameters in the file, such as ``torch.float16`` for half the size; None
                keeps theirs. Buffers, such as the running statistics of batch norm, keep theirs in any case. A model
                that is loaded has float32 again.

        Raises:
            ValueError: ``dtype`` is not a floating-point type, or a parameter is not finite in it.
        """
        folder, saved = Path(folder), self._saved()
        if dtype is not None:
            saved["state"] |= _parameters_as(self, dtype)
        write_model(folder, saved)
        if importlib.util.find_spec("huggingface_hub") is not None:
            write_card(folder, saved)
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, device: str = "cpu") -> Self:
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            source: a local folder; or text ``owner/name`` for the Hugging Face hub (needs ``uctrans[hub]``), which is
                asked only if nothing local is called ``owner``.
            revision: branch, tag or commit on the hub.
            device: where the weights go.

        Raises:
            ModelFileError: the folder or a file is missing, corrupt, or of another model.
        """
        folder = Path(source)
        if not folder.is_dir() and isinstance(source, str) and is_on_hub(source):
            hub = import_extra("huggingface_hub", "hub")
            files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
            folder = Path(hub.snapshot_download(source, revision=revision, allow_patterns=files))
        elif not folder.is_dir():
            raise ModelFileError(
                f"{source} is no folder here: give a folder that save_pretrained wrote, or owner/name on the hub"
            )
        config, state = read_model(folder)
        name, metadata = config.pop("name"), config.pop("metadata", {})
        if not is_same_network(name, cls.name):
            raise ModelFileError(
                f"{folder / CONFIG_FILE} describes a {name!r}, not a {cls.name!r}: use uctrans.load_model"
            )
        check_metadata(metadata, folder / CONFIG_FILE)
        model = build(cls, config, state, folder / CONFIG_FILE)
        model.metadata = metadata
        return model.to(device)

    def start_from(self, source: "SegmentationModel") -> list[str]:
        """Take the weights of a trained network of the same kind, to train it further.

        If ``source`` has another number of classes or channels, the last or the first convolution stays as it is. A
        UCTransNet also takes the weights of a U-Net, and interpolates position embeddings of another image size.

        Returns:
            The names of the weights that stay.

        Raises:
            ModelFileError: ``source`` is of another kind, or differs in another option; the message names it.
        """
        if source.name != self.name:
            raise ModelFileError(f"a {source.name} cannot start a {self.name}; take the weights of a {self.name}")
        own, given = self.state_dict(), source.state_dict()
        kept = weights_of_other_counts(self, source)
        shapes, given_shapes = ({name: weight.shape for name, weight in state.items()} for state in (own, given))
        if any(shapes.get(name) != given_shapes.get(name) for name in (own.keys() | given.keys()) - set(kept)):
            differences = [
                f"{name} {source.config.get(name)!r} and not {value!r}"
                for name, value in self.config.items()
                if source.config.get(name) != value and name not in ("classes", "in_channels")
            ]
            raise ModelFileError(
                f"the trained {self.name} has {', '.join(differences) or 'other weights'}; build this one with the "
                "options of that one, of which only classes, in_channels and image_size may differ"
            )
        self.load_state_dict({name: own[name] if name in kept else weight for name, weight in given.items()})
        return kept

    def push_to_hub(self, repository: str, *, private: bool = False, message: str = "Upload model") -> str:
        """Upload weights, configuration and model card to ``owner/name`` on the Hugging Face hub.

        A card that the repository already has is kept. The names of the images that the model was trained on, which may
        identify patients, stay here; their fingerprints tell an evaluation elsewhere which images the model knows.

        Returns:
            The address of the commit.

        Raises:
            ImportError: ``huggingface_hub`` is not installed (``pip install "uctrans[hub]"``).
        """
        hub = import_extra("huggingface_hub", "hub")
        hub.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            saved = self._saved() | {"metadata": without_image_names(self.metadata)}
            write_model(Path(folder), saved)
            if not hub.file_exists(repository, CARD_FILE):
                write_card(Path(folder), saved)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))

    def _saved(self) -> dict[str, Any]:
        return {"name": self.name, "config": self.config, "metadata": self.metadata, "state": self.state_dict()}


def _parameters_as(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype} is not a floating-point type; give torch.float16, for example")
    parameters = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    if infinite := [name for name, parameter in parameters.items() if not parameter.isfinite().all()]:
        raise ValueError(f"dtype: {infinite[0]} is not finite in {dtype}; save it in torch.float32")
    return parameters


def write_model(folder: Path, saved: dict[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` of a model, given as its name, config, metadata and state.

    The configuration holds the digest of the weights, so that the two files are only read together.
    """
    remove_unfinished(folder)
    state = {key: value.detach().contiguous() for key, value in saved["state"].items()}
    weights = safetensors.torch.save(state)
    description = {"name": saved["name"], **saved["config"], "metadata": saved["metadata"]}
    text = json.dumps(description | {DIGEST: hashlib.sha256(weights).hexdigest()}, indent=2)
    with written_together([folder / CONFIG_FILE, folder / WEIGHTS_FILE]) as (config_file, weights_file):
        config_file.write_bytes(f"{text}\n".encode())
        weights_file.write_bytes(weights)


def is_on_hub(source: str) -> bool:
    """Return whether ``source`` reads like ``owner/name`` on the Hugging Face hub and no local path begins with it."""
    return REPOSITORY.fullmatch(source) is not None and not Path(source).parent.exists()


def write_card(folder: Path, saved: dict[str, Any]) -> None:
    """Write the model card of a saved model (``README.md``), unless there is one; needs huggingface_hub."""
    path = folder / CARD_FILE
    if path.exists():
        return
    from huggingface_hub import ModelCard, ModelCardData

    name, config = saved["name"], saved["config"]
    tags = ["uctrans", name.rpartition(":")[2].replace("_", "-"), "medical-imaging", "semantic-segmentation"]
    arguments, flags = (f', network="{name}"', f" --network {name}") if ":" in name else ("", "")
    data = ModelCardData(library_name="uctrans", pipeline_tag="image-segmentation", tags=tags)
    text = f"""---
{data.to_yaml()}
---

# {name}

A `{name}` of uctrans for image segmentation. FOLDER is the folder that holds this file.

```python
import uctrans

model = uctrans.load_model("FOLDER"{arguments})
logits = model(image)  # image: float (B, {config.get("in_channels", "channels")}, height, width), 0 to 1
```

`uctrans predict -i images -o masks --model FOLDER{flags}` prepares images as in training.

## Architecture

{_list_of(config)}

## Training and scores

{_list_of(without_images(saved["metadata"]))}

## Limits

For research only; this is no medical device. Scores hold for images like those they were taken on: another scanner,
stain or magnification may give much lower ones. Name a licence in the header before you publish the weights.
"""
    write_bytes(path, str(ModelCard(text)).encode())


def without_images(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a model without the record of its images, which has a line for each."""
    return {key: value for key, value in metadata.items() if key != "images"}


def without_image_names(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a model with the fingerprints of its images, by which it knows them, and no names."""
    if "images" not in metadata:
        return metadata
    return metadata | {"images": {part: dict.fromkeys(known, "") for part, known in metadata["images"].items()}}


def _list_of(values: dict[str, Any]) -> str:
    known = [f"- {key.replace('_', ' ')}: `{value}`" for key, value in values.items() if value is not None]
    return "\n".join(known) or "Nothing was recorded."


def is_same_network(one: str, other: str) -> bool:
    """Compare two names of networks; of ``package.module:Class``, the class counts and the module may have moved."""
    return (":" in one) == (":" in other) and one.rpartition(":")[2] == other.rpartition(":")[2]


def weights_of_other_counts(model: SegmentationModel, source: SegmentationModel) -> list[str]:
    """Return the names of weights that have another shape in ``source`` only for its number of classes or channels."""
    given, names = source.state_dict(), []
    for name, weight in model.state_dict().items():
        now, before = list(weight.shape), list(given[name].shape) if name in given else []
        for axis, own, other in ((0, model.classes, source.classes), (1, model.in_channels, source.in_channels)):
            is_other = own != other and before[axis : axis + 1] == [other]
            if is_other and now == [*before[:axis], own, *before[axis + 1 :]]:
                names.append(name)
    return names


def probabilities(logits: Tensor) -> Tensor:
    """Return class probabilities of logits (B, classes, H, W): sigmoid of a single channel, softmax over several."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def check_image(image: Tensor, in_channels: int, weight: Tensor) -> None:
    """Raise unless ``image`` is a (B, in_channels, H, W) on the device of ``weight`` and, outside autocast, its dtype.

    Raises:
        ValueError: shape or device do not fit.
        TypeError: the dtype does not fit.
    """
    if image.ndim != 4 or image.shape[1] != in_channels or 0 in image.shape[2:]:
        raise ValueError(f"the image must be (B, {in_channels}, height, width); got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"the image must be floating point in [0, 1]; got {image.dtype}: divide by 255 first")
    check_dtypes_and_devices(image=image, weights=weight)
