"""What every model shares: its name and configuration, and saving and loading them with the weights."""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.checks import check_dtypes_and_devices
from ..writing import written_atomically

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class ModelFileError(ValueError):
    """A model file cannot be used; the message names the file and the remedy."""


class SegmentationModel(nn.Module):
    """Base of the networks.

    Subclasses are decorated with :func:`uctrans.models.registry.register_model`, which sets ``name``, and take only
    arguments that JSON can hold; those become ``config``.

    Attributes:
        name: registry name.
        config: every constructor argument with its value.
        metadata: free-form JSON-able notes, saved and restored with the weights (protocol, scores, palette, ...).
        in_channels: channels of the image.
        classes: channels of the logits.
    """

    name: str
    in_channels: int
    classes: int

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        original = cls.__init__
        signature = inspect.signature(original)

        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {key: _plain(value) for key, value in bound.arguments.items() if key != "self"}
            for key, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(key)
            original(self, **arguments)
            self.config = arguments
            self.metadata = getattr(self, "metadata", {})

        __init__.__signature__ = signature
        __init__.__doc__ = original.__doc__
        cls.__init__ = __init__

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``; each file is replaced as a whole."""
        saved = {"name": self.name, "config": self.config, "metadata": self.metadata, "state": self.state_dict()}
        return write_model(Path(folder), saved)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, device: str = "cpu") -> Self:
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            source: a local folder, or ``owner/name`` on the Hugging Face hub (needs ``uctrans[hub]``).
            revision: branch, tag or commit on the hub.
            device: where the weights go.

        Raises:
            ModelFileError: a file is missing, corrupt, or of another model.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(_hub().snapshot_download(str(source), revision=revision))
        config = read_config(folder)
        name, metadata = config.pop("name"), config.pop("metadata", {})
        if name != cls.name:
            raise ModelFileError(
                f"{folder / CONFIG_FILE} describes a {name!r}, not a {cls.name!r}: use uctrans.load_model"
            )
        try:
            model = cls(**config)
        except (TypeError, ValueError) as error:
            raise ModelFileError(f"{folder / CONFIG_FILE} does not configure a {cls.name!r}: {error}") from None
        load_weights(model, folder / WEIGHTS_FILE)
        model.metadata = metadata
        return model.to(device)

    def push_to_hub(self, repository: str, *, private: bool = False, message: str = "Upload model") -> str:
        """Upload weights and configuration to ``owner/name`` on the Hugging Face hub; returns the commit's address.

        Raises:
            ImportError: ``huggingface_hub`` is not installed (``pip install "uctrans[hub]"``).
        """
        hub = _hub()
        hub.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))


def write_model(folder: Path, saved: dict[str, Any]) -> Path:
    """Write the files of :meth:`SegmentationModel.save_pretrained` for a model's name, config, metadata and state."""
    state = {key: value.detach().contiguous() for key, value in saved["state"].items()}
    with written_atomically(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(safetensors.torch.save(state))
    text = json.dumps({"name": saved["name"], **saved["config"], "metadata": saved["metadata"]}, indent=2)
    with written_atomically(folder / CONFIG_FILE) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a saved model; raise :class:`ModelFileError` where there is none to read."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{folder} holds no {CONFIG_FILE}: give a folder that save_pretrained wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFileError(f"{path} is not JSON ({error}): save the model again or restore the file") from None
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise ModelFileError(f"{path} names no model: it needs the key 'name' that save_pretrained writes")
    return config


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``; :class:`ModelFileError` where it is missing, corrupt or another's."""
    try:
        state = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: copy the weights beside {CONFIG_FILE}") from None
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}): copy or save it again") from None
    load_state(model, state, path)


def load_state(model: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """``model.load_state_dict`` with an error that says what differs and where ``state`` came from."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or unexpected or reshaped:
        differences = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unknown", unexpected), ("of another shape", reshaped))
            if keys
        ]
        raise ModelFileError(
            f"{source} does not fit this model: entries {', '.join(differences)}. It is of another model or size; "
            f"create the model with the configuration it was saved with"
        )
    model.load_state_dict(state)


def probabilities(logits: Tensor) -> Tensor:
    """Return class probabilities of logits (B, classes, H, W): sigmoid of a single channel, softmax over several."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W'): repeat the last row and column up to multiples of ``multiple``."""
    # With //, not %: torch.compile makes sizes symbols when they change, and cannot trace a modulus of a negated one.
    missing_rows, missing_columns = ((side + multiple - 1) // multiple * multiple - side for side in image.shape[-2:])
    if missing_rows == 0 and missing_columns == 0:
        return image
    return F.pad(image, (0, missing_columns, 0, missing_rows), mode="replicate")


def check_image(image: Tensor, in_channels: int, weight: Tensor) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``image`` is a (B, in_channels, H, W) that meets ``weight``.

    That is, on its device and, outside autocast, of its dtype.
    """
    if image.ndim != 4 or image.shape[1] != in_channels or 0 in image.shape[2:]:
        raise ValueError(f"the image must be (B, {in_channels}, height, width); got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"the image must be floating point in [0, 1]; got {image.dtype}: divide by 255 first")
    check_dtypes_and_devices(image=image, weights=weight)


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it: sequences and arrays as new lists, numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError('the Hugging Face hub needs huggingface_hub: pip install "uctrans[hub]"') from None
    return huggingface_hub
