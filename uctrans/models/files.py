"""Load a model from any file or folder that holds one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..system import escaped, is_utf8
from .base import SegmentationModel, is_same_network
from .external import find_model_class
from .foreign import describe_checkpoint
from .metadata import check_metadata
from .published import from_published, is_upstream
from .registry import model_class
from .uctransnet import UCTransNet
from .weights import CONFIG_FILE, ModelFileError, build, check_finite, read_checkpoint, read_config

Network = str | type[nn.Module]

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "uctrans-checkpoint", 1
BEST_FOLDER = "best"
LAST_CHECKPOINT = "last.pt"
BUILT_IN_MODELS = Path(__file__).parent / "pretrained"
MODEL_PARTS = {"name": str, "config": dict, "metadata": dict, "state": dict}


def load_model(
    path: str | Path, device: str = "cpu", *, network: Network | Sequence[Network] | None = None
) -> SegmentationModel:
    """Load a model in evaluation mode.

    Args:
        path: a folder that ``save_pretrained`` wrote, the folder of a training run (its best weights), a checkpoint of
            a run (``last.pt``, ``best.pt``; the averaged weights if the run kept any), or a published UCTransNet
            checkpoint (``.pth.tar``; see :func:`uctrans.load_upstream` for more options). Or the name of a model that
            comes with the package, ``"nuclei"``; a file of that name, or a folder that holds a model, comes first.
        device: where the weights go.
        network: the network that the file holds, or several of which it holds one: names of
            :func:`uctrans.list_models`, and ``package.module:Class`` or the class itself for a network of another
            package. None allows the former alone: no file has code imported that the caller does not name.

    Raises:
        ModelFileError: the file is missing, damaged, or of another kind, or a weight is not finite.
        ValueError: there is no such ``network``.
    """
    if not is_utf8(path):
        raise ModelFileError(f"{escaped(path)}: is not UTF-8; rename the file or folder")
    path = _find(path)
    model = _load_folder(path, network) if path.is_dir() else _load_file(path, network)
    check_finite(model, path)
    return model.to(device).eval()


def built_in_models() -> list[str]:
    """Return the names of the models that come with the package, sorted."""
    return sorted(file.parent.name for file in BUILT_IN_MODELS.glob(f"*/{CONFIG_FILE}"))


def _find(path_or_name: str | Path) -> Path:
    path, names = Path(path_or_name), built_in_models()
    contents = (CONFIG_FILE, BEST_FOLDER, LAST_CHECKPOINT)
    if str(path_or_name) in names and not path.is_file() and not any((path / name).exists() for name in contents):
        return BUILT_IN_MODELS / path
    if not path.exists():
        raise ModelFileError(
            f"{path} does not exist: give a run folder, a saved model, a checkpoint file, or the name of a model that "
            f"comes with the package ({', '.join(names)})"
        )
    return path


def _load_folder(folder: Path, network: Network | Sequence[Network] | None) -> SegmentationModel:
    if not (folder / CONFIG_FILE).exists() and (folder / BEST_FOLDER).is_dir():
        folder = folder / BEST_FOLDER
    elif not (folder / CONFIG_FILE).exists() and (folder / LAST_CHECKPOINT).exists():
        raise ModelFileError(
            f"{folder} is a run without best weights yet: use {folder / LAST_CHECKPOINT}, or continue the run"
        )
    elif not (folder / CONFIG_FILE).exists() and (inside := _folders_with_a_model(folder)):
        raise ModelFileError(f"{folder} has no {CONFIG_FILE}; did you mean {' or '.join(map(str, inside))}?")
    return _class_of(read_config(folder)["name"], network, folder / CONFIG_FILE).from_pretrained(folder)


def _folders_with_a_model(folder: Path) -> list[Path]:
    contents = (CONFIG_FILE, f"{BEST_FOLDER}/{CONFIG_FILE}")
    return [inside for inside in sorted(folder.iterdir()) if any((inside / file).exists() for file in contents)]


def _class_of(name: str, network: Network | Sequence[Network] | None, source: Path) -> type[SegmentationModel]:
    """Return the class for the name in a file; nothing is imported but what the caller names as ``network``."""
    if network is None:
        if ":" in name:
            raise ModelFileError(
                f"{source} holds a network of the class {name}, and no name in a file has code imported; if you "
                f'trust this class, name it yourself: network="{name}" (--network {name})'
            )
        try:
            return model_class(name)
        except ValueError as error:
            raise ModelFileError(
                f"{source}: {error}; or name the class that registers it: network (--network package.module:Class)"
            ) from None
    classes = [find_model_class(each) for each in (network if isinstance(network, list | tuple) else [network])]
    for candidate in classes:
        if is_same_network(name, candidate.name):
            return candidate
    named = " or ".join(dict.fromkeys(candidate.name for candidate in classes))
    raise ModelFileError(f"{source} holds a {name}, not a {named}; take another file, or name its network")


def _load_file(path: Path, network: Network | Sequence[Network] | None) -> SegmentationModel:
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path} holds weights alone: give its folder, which must also hold a {CONFIG_FILE}")
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, dict) and checkpoint.get("format") == CHECKPOINT_FORMAT:
        return _from_checkpoint(checkpoint, path, network)
    if is_upstream(checkpoint):
        _class_of(UCTransNet.name, network, path)
        return from_published(checkpoint, path)
    raise ModelFileError(
        f"{path} is neither a checkpoint of a training run nor a published UCTransNet checkpoint, but "
        f"{describe_checkpoint(checkpoint)}"
    )


def _from_checkpoint(
    checkpoint: dict[str, Any], path: Path, network: Network | Sequence[Network] | None
) -> SegmentationModel:
    if checkpoint.get("version", CHECKPOINT_VERSION) != CHECKPOINT_VERSION:
        raise ModelFileError(
            f"{path} has format version {checkpoint['version']}, this uctrans reads {CHECKPOINT_VERSION}: use the "
            "uctrans that wrote it"
        )
    saved, averaged = checkpoint.get("model"), checkpoint.get("ema")
    check_saved_model(saved, path)
    kind = _class_of(saved["name"], network, path)
    model = build(kind, saved["config"], saved["state"] if averaged is None else averaged, path)
    model.metadata = dict(saved["metadata"])
    return model


def check_saved_model(saved: Any, source: object) -> None:
    """Raise :class:`ModelFileError` unless the entry "model" of a checkpoint has its parts, and metadata are valid."""
    if not isinstance(saved, dict):
        raise ModelFileError(f"{source} has no model: it is not a whole checkpoint of a training run")
    for key, kind in MODEL_PARTS.items():
        if not isinstance(saved.get(key), kind):
            raise ModelFileError(
                f"{source} lacks the entry {key!r}, or it is damaged: it is not a whole checkpoint of a training run"
            )
    check_metadata(saved["metadata"], source)
