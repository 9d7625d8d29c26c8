"""A model in an ONNX file that `uctrans.inference.export` wrote, run by ONNX Runtime."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import import_extra, require_extra
from ..layers import pad_to_multiple
from ..models import ModelFileError
from ..models.metadata import check_metadata
from ..system import first_line
from .settings import InferenceError

SUFFIX = ".onnx"
RECORD = "uctrans"  # key of the file's own metadata
FIELDS = {
    "name": str,
    "config": dict,
    "metadata": dict,
    "in_channels": int,
    "classes": int,
    "batch_size": int | None,
    "size": list | None,
    "size_multiple": int,
    "digest": str,
}
CUDA_PROVIDER = "CUDAExecutionProvider"


class OnnxModel(nn.Module):
    """A model whose forward pass is a session of ONNX Runtime, with as many threads as PyTorch has.

    Attributes:
        name, config, metadata: Those of the exported model, without the record of its images. ``metadata`` has the
            channel order of the export and, unless the size is open, its image size.
        in_channels: Channels of the image.
        classes: Channels of the logits.
        digest: Tells the program from others; also a buffer, so that it counts as a weight.

    Args:
        path: File of `uctrans.inference.export`.
        device: ``cpu``, or the CUDA device that runs the session.

    Raises:
        ModelFileError: The file is missing, damaged, or not written by `uctrans.inference.export`.
        InferenceError: ONNX Runtime does not run on the device.
        ImportError: onnxruntime, or its build for CUDA, is not installed.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelFileError(f"{path} does not exist or is no file: give the model.onnx of uctrans export")
        self._session = _open_session(self.path, torch.device(device))
        record = _read_record(self.path, self._session)
        self.name, self.config, self.metadata = record["name"], record["config"], record["metadata"]
        self.in_channels, self.classes = record["in_channels"], record["classes"]
        self.digest = record["digest"]
        self.register_buffer("digest_bytes", torch.tensor(list(self.digest.encode()), dtype=torch.uint8))
        self._batch_size, self._size, self._multiple = record["batch_size"], record["size"], record["size_multiple"]

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of an image (B, in_channels, H, W).

        Raises:
            InferenceError: The program takes images of another size.
        """
        height, width = image.shape[-2:]
        if self._size is None:
            image = pad_to_multiple(image, self._multiple)
            if min(image.shape[-2:]) < 2 * self._multiple:
                raise InferenceError(
                    f"{self.path}: takes images from {2 * self._multiple} pixels a side on, got {height}x{width}; "
                    "give the model itself instead of its export"
                )
        elif [height, width] != self._size:
            raise InferenceError(
                f"{self.path}: takes images of {self._size[0]}x{self._size[1]} pixels only, got {height}x{width}; "
                "leave tile unset, or export the model with dynamic size"
            )
        if self._batch_size is None:
            logits = self._run(image)
        else:
            logits = torch.cat([self._run(part)[: len(part)] for part in image.split(self._batch_size)])
        return logits[..., :height, :width].to(image.device)

    def _run(self, image: Tensor) -> Tensor:
        if self._batch_size and len(image) < self._batch_size:
            image = torch.cat([image, image[:1].expand(self._batch_size - len(image), -1, -1, -1)])
        # NumPy copies and checks on this thread: PyTorch's threads would spin and keep ONNX Runtime's from the cores.
        pixels = np.ascontiguousarray(image.float().cpu().numpy())
        logits = self._session.run(["logits"], {"image": pixels})[0]
        if not np.isfinite(logits).all():
            raise ModelFileError(
                f"{self.path}: gives logits that are not finite: it is damaged; export the model again"
            )
        return torch.from_numpy(logits)


def require_onnxruntime(device: torch.device) -> None:
    """Raise unless ONNX Runtime is installed and runs on a device.

    Raises:
        InferenceError: It runs on other devices only.
        ImportError: It, or its build for CUDA, is not installed; the message names the command.
    """
    if device.type not in ("cpu", "cuda"):
        raise InferenceError(f"device: ONNX Runtime is used on cpu and cuda, not on {device.type}; set engine to torch")
    require_extra("onnxruntime", "export")
    if device.type == "cuda" and CUDA_PROVIDER not in import_extra("onnxruntime", "export").get_available_providers():
        raise ImportError(
            "the installed onnxruntime has no CUDA: pip uninstall onnxruntime && pip install onnxruntime-gpu; or set "
            "device to cpu, or engine to torch"
        )


def _open_session(path: Path, device: torch.device) -> Any:
    require_onnxruntime(device)
    runtime = import_extra("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, (CUDA_PROVIDER, {"device_id": device.index or 0}))
    try:
        return runtime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        raise ModelFileError(f"{path} is damaged or not ONNX ({first_line(error)}): copy or export it again") from error


def _read_record(path: Path, session: Any) -> dict[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(RECORD, "null")
    record = None
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(text)
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name, ...), kind) for name, kind in FIELDS.items()
    ):
        raise ModelFileError(
            f"{path} was not written by uctrans export, or by another version of it, and does not say how to prepare "
            "an image: export the model again"
        )
    check_metadata(record["metadata"], path)
    return record
