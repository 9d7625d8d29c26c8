"""The journal of a folder of predictions: which images are done, by which model, under which settings.

A second call with the same model and settings continues with the images that are missing. The file holds a JSON object
on each line: the settings, then every planned image, and once more each image that is done. Lines that are no such
objects are ignored: a killed process may have left half of the last one.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.base import without_images
from ..writing import write_bytes
from .settings import InferenceError

JOURNAL = ".uctrans-predict.jsonl"
DIGITS = 16


class Entry(NamedTuple):
    """The record of an image in the journal.

    Attributes:
        image: Absolute path of the image file.
        bytes: Its size.
        changed: Time of its last change, in nanoseconds.
        files: Names of its files in the folder.
        done: Whether all of them are there; otherwise the image is planned, and any of them may be.
    """

    image: str
    bytes: int
    changed: int
    files: tuple[str, ...] = ()
    done: bool = False


def planned_entry(image: Path, files: Iterable[str] = ()) -> Entry:
    """Return the entry of an image file, as it is now, that is to be predicted."""
    status = image.stat()
    return Entry(str(image.absolute()), status.st_size, status.st_mtime_ns, tuple(files))


class Journal:
    """The journal of a folder, read from its file; no file, or a foreign one, is an empty journal.

    Attributes:
        settings: What the files depend on besides their images, by name.
        entries: The images by name.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self.settings: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        if not self._path.is_file():
            return
        for line in self._path.read_bytes().splitlines():
            # A foreign or an unfinished line.
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
                content = json.loads(line)
                self.settings = content.get("settings", self.settings)
                if "name" in content:
                    entry = Entry(**content["entry"])
                    self.entries[content["name"]] = entry._replace(files=tuple(Path(name).name for name in entry.files))

    def find(self, name: str, image: Path) -> Entry | None:
        """Return the entry of an image if it was made for this file as it is now, or None."""
        entry = self.entries.get(name)
        return (
            entry
            if entry is not None and entry == planned_entry(image, entry.files)._replace(done=entry.done)
            else None
        )

    def count_done(self, names: Iterable[str]) -> int:
        """Return how many of the images are done."""
        return sum(name in self.entries and self.entries[name].done for name in names)

    def check(self, settings: dict[str, Any]) -> None:
        """Raise InferenceError if the folder holds files that were made under other settings."""
        folder = self._path.parent
        names = (name for entry in self.entries.values() for name in entry.files)
        differences = [key for key in {**self.settings, **settings} if self.settings.get(key) != settings.get(key)]
        if differences and any((folder / name).exists() for name in names):
            listed = ", ".join(f"{key}: {self.settings.get(key)} there, {settings.get(key)} now" for key in differences)
            raise InferenceError(
                f"output: {folder} holds a prediction of another model or of other settings ({listed}); choose another "
                "folder, or set overwrite to replace its files"
            )

    @contextlib.contextmanager
    def written(self, settings: dict[str, Any], planned: dict[str, Entry]) -> Iterator[None]:
        """Note the settings and the images to come; within the block, `note_done` notes each that is done.

        Entries of other images are kept if the settings are the same.
        """
        kept = self.entries if self.settings == settings else {}
        self.settings, self.entries = settings, kept | planned
        self._write()
        with self._path.open("ab") as self._file:
            yield
        self._write()  # in the same order, whether or not the prediction was interrupted

    def note_done(self, name: str, files: Iterable[Path]) -> None:
        """Note that all files of an image are in the folder, and remove those of an earlier prediction that are not."""
        names = tuple(path.name for path in files)
        for former in set(self.entries[name].files) - set(names):
            (self._path.parent / former).unlink(missing_ok=True)
        self.entries[name] = self.entries[name]._replace(files=names, done=True)
        self._file.write(_line(name, self.entries[name]))
        self._file.flush()

    def _write(self) -> None:
        lines = [_line(name, self.entries[name]) for name in sorted(self.entries)]
        write_bytes(self._path, b"".join([_encoded({"settings": self.settings}), *lines]))


def weights_digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify a model by its weights, configuration and metadata."""
    meaning = [getattr(model, "name", ""), model.config, without_images(model.metadata)]
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]


def _line(name: str, entry: Entry) -> bytes:
    return _encoded({"name": name, "entry": entry._asdict()})


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
