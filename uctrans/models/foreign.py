"""Describe the content of files that no model can be loaded from, with the remedy, for messages."""

import contextlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
PROGRAMS = {  # by a record that only they have
    "models/model.json": "a program of torch.export",
    "constants.pkl": "a TorchScript program",
}
SHOWN, LONGEST = 4, 60  # names, and characters of each
ASK_FOR_ANOTHER = "give a folder that save_pretrained wrote, or a checkpoint of a run"


def describe_file(path: Path) -> str | None:
    """Return in words what a file is, and the remedy; None if it may be a checkpoint, perhaps a damaged one."""
    if path.suffix == ".onnx":
        return "an ONNX network: run it with uctrans predict or evaluate, or give the model that it was exported from"
    with contextlib.suppress(Exception):  # arbitrary bytes may fail in any way
        return _describe_archive(path) if zipfile.is_zipfile(path) else _describe_start(path)
    return None


def _describe_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    for record, kind in PROGRAMS.items():
        if record in inner:
            return f"{kind}, which has no configuration: give the model that it was exported from"
    return None if "data.pkl" in inner else f"a zip archive of {_listed(names)}: {ASK_FOR_ANOTHER}"


def _describe_start(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(LONGEST)
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            return f"{kind}: {ASK_FOR_ANOTHER}"
    text = start.decode("ascii").partition("\n")[0].rstrip()
    return f'text that begins "{text}": download or copy the file again' if text and text.isprintable() else None


def describe_pickle(path: Path) -> str:
    """Return in words what a file holds that ``torch.load`` refuses to unpickle, and the remedy."""
    classes = []
    with contextlib.suppress(Exception):  # arbitrary bytes may fail in any way
        classes = sorted(get_unsafe_globals_in_checkpoint(path))
    pickled = "not a checkpoint, or a pickle of more than tensors and plain values"
    if classes:
        pickled = f"a pickle of objects of {_listed(classes)}"
    return (
        f"{pickled}, whose code is never executed here: save the state dict of its network alone with "
        "torch.save, or download it again"
    )


def describe_checkpoint(checkpoint: Any) -> str:
    """Return in words what a checkpoint of plain values holds, and the remedy."""
    if not isinstance(checkpoint, dict):
        return f"a {type(checkpoint).__name__}; save the state dict of a network"
    if not checkpoint:
        return "an empty dict; save the state dict of a network"
    places = {"": checkpoint} | {f" under {key!r}": value for key, value in checkpoint.items()}
    for place, state in places.items():
        if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
            return (
                f"a state dict of {len(state)} tensors{place} ({_listed(state)}): build its network and call "
                "load_state_dict; to train that network here, name it: uctrans train --model package.module:Class"
            )
    return f"a dict with the keys {_listed(checkpoint)}; save the state dict of a network"


def _listed(names: Iterable[Any]) -> str:
    """Join the first names, without what would write to a terminal."""
    names = [repr(str(name)[:LONGEST])[1:-1] for name in names]
    text = ", ".join(names[:SHOWN])
    return text if len(names) <= SHOWN else f"{text} and {len(names) - SHOWN} more"
