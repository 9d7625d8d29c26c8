"""Load a model from any file or folder that holds one."""

from pathlib import Path
from typing import Any

from .base import CONFIG_FILE, ModelFileError, SegmentationModel, load_state, read_checkpoint, read_config
from .published import from_published, is_upstream
from .registry import model_class

CHECKPOINT_FORMAT = "uctrans-checkpoint"
BEST_FOLDER = "best"
LAST_CHECKPOINT = "last.pt"


def load_model(path: str | Path, device: str = "cpu") -> SegmentationModel:
    """Load a model in evaluation mode.

    Args:
        path: a folder that ``save_pretrained`` wrote, the folder of a training run (its best weights), a checkpoint of
            a run (``last.pt``, ``best.pt``; the averaged weights if the run kept any), or a published UCTransNet
            checkpoint (``.pth.tar``; see :func:`uctrans.load_upstream` for more options).
        device: where the weights go.

    Raises:
        ModelFileError: the file is missing, corrupt, or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise ModelFileError(f"{path} does not exist: give a run folder, a saved model or a checkpoint file")
    model = _load_folder(path) if path.is_dir() else _load_file(path)
    return model.to(device).eval()


def _load_folder(folder: Path) -> SegmentationModel:
    if not (folder / CONFIG_FILE).exists() and (folder / BEST_FOLDER).is_dir():
        folder = folder / BEST_FOLDER
    elif not (folder / CONFIG_FILE).exists() and (folder / LAST_CHECKPOINT).exists():
        raise ModelFileError(
            f"{folder} is a run without best weights yet: use {folder / LAST_CHECKPOINT}, or continue the run"
        )
    elif not (folder / CONFIG_FILE).exists() and (inside := _folders_with_a_model(folder)):
        raise ModelFileError(f"{folder} has no {CONFIG_FILE}; did you mean {' or '.join(map(str, inside))}?")
    return model_class_of(folder).from_pretrained(folder)


def _folders_with_a_model(folder: Path) -> list[Path]:
    contents = (CONFIG_FILE, f"{BEST_FOLDER}/{CONFIG_FILE}")
    return [inside for inside in sorted(folder.iterdir()) if any((inside / file).exists() for file in contents)]


def model_class_of(folder: Path) -> type[SegmentationModel]:
    """Return the class that ``config.json`` in ``folder`` names."""
    try:
        return model_class(read_config(folder)["name"])
    except ValueError as error:
        raise ModelFileError(f"{folder / CONFIG_FILE}: {error}") from None


def _load_file(path: Path) -> SegmentationModel:
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, dict) and checkpoint.get("format") == CHECKPOINT_FORMAT:
        return _from_checkpoint(checkpoint, path)
    if is_upstream(checkpoint):
        return from_published(checkpoint, path)
    raise ModelFileError(f"{path} is neither a checkpoint of a training run nor a published UCTransNet checkpoint")


def _from_checkpoint(checkpoint: dict[str, Any], path: Path) -> SegmentationModel:
    try:
        saved = checkpoint["model"]
        state, metadata = checkpoint.get("ema") or saved["state"], dict(saved["metadata"])
        model = model_class(saved["name"])(**saved["config"])
    except KeyError as error:
        raise ModelFileError(
            f"{path} lacks the entry {error}: it is not a whole checkpoint of a training run"
        ) from None
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from None
    load_state(model, state, path)
    model.metadata = metadata
    return model
