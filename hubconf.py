"""torch.hub entry points: ``torch.hub.load(REPOSITORY, "uctransnet", classes=2)``."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent


class _Kernels:
    """Find uctrans.kernels if unpacking an archive turned the link uctrans/kernels into a text file."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name != "uctrans.kernels":
            return None
        return importlib.util.spec_from_file_location(name, ROOT / "kernels/__init__.py")


if not (ROOT / "uctrans/kernels").is_dir():
    sys.meta_path.append(_Kernels)

from uctrans import SegmentationModel, create_model, load_model  # noqa: E402 - the finder must be there first

dependencies = ["torch", "numpy", "einops", "safetensors"]


def uctransnet(pretrained: str | Path | None = None, **options: Any) -> SegmentationModel:
    """Build or load a UCTransNet; ``uctrans.UCTransNet`` lists the options.

    Args:
        pretrained: a local file or folder that ``uctrans.load_model`` reads; None gives random weights.
        options: arguments of the model; not allowed with ``pretrained``, which has its own.

    Raises:
        ValueError: ``pretrained`` is given together with options, or holds another model.
    """
    return _model("uctransnet", pretrained, options)


def dual_branch_uctransnet(pretrained: str | Path | None = None, **options: Any) -> SegmentationModel:
    """Build or load the dual-branch network; ``uctrans.DualBranchUCTransNet`` lists the options, see `uctransnet`."""
    return _model("dual_branch_uctransnet", pretrained, options)


def unet(pretrained: str | Path | None = None, **options: Any) -> SegmentationModel:
    """Build or load a U-Net; ``uctrans.UNet`` lists the options, see `uctransnet`."""
    return _model("unet", pretrained, options)


def _model(name: str, pretrained: str | Path | None, options: dict[str, Any]) -> SegmentationModel:
    if pretrained is None:
        return create_model(name, **options)
    if options:
        raise ValueError(f"{pretrained} says how the model is built: leave out {', '.join(options)}")
    model = load_model(pretrained)
    if model.name != name:
        raise ValueError(f"{pretrained} holds a {model.name!r}, not a {name!r}")
    return model
