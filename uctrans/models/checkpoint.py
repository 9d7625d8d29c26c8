"""Read checkpoint files without executing anything in them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import ModelFileError


def read_checkpoint(path: str | Path) -> Any:
    """``torch.load`` with ``weights_only``; tensors stay on the CPU.

    Raises:
        ModelFileError: the file is missing, truncated, no checkpoint, or holds pickled objects.
    """
    # The authors' training code stores its scores as numpy scalars; these are plain numbers.
    number_types = [type(np.dtype(name)) for name in ("float32", "float64", "int64")]
    rebuild_scalar = np.float64(0).__reduce__()[0]
    try:
        with torch.serialization.safe_globals([rebuild_scalar, np.dtype, *number_types]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: check the path") from None
    except pickle.UnpicklingError:
        # The unpickler's own advice, to load without weights_only, would execute what the file holds.
        raise ModelFileError(
            f"{path} is no checkpoint, or holds more than tensors and plain values, which is never executed here: "
            f"save its state dict alone with torch.save, or download it again"
        ) from None
    except Exception as error:  # reading arbitrary bytes as a checkpoint fails in any way the bytes lead to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{path} is truncated or no checkpoint ({reason}): copy or download it again") from None
