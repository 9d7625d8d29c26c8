"""The logs of a run: log.txt, metrics.csv, TensorBoard, a picture of the curves, and a progress bar."""

import contextlib
import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..extras import import_extra
from ..reading import check_regular_file
from ..system import CAUSES
from ..writing import open_to_append, write_bytes
from .config import TrainConfig

COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "train_dice",
    "val_loss",
    "val_dice",
    "best_epoch",
    "best_dice",
    "seconds",
    "images_per_second",
)
LOG_FILES = ("log.txt", "metrics.csv", "progress.png", "tensorboard")
CURVES = ("learning_rate", "train_loss", "train_dice", "val_loss", "val_dice")
SECONDS_BETWEEN_PICTURES = 30


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what to do. Checkpoints already written stay as they are."""


@contextlib.contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Turn an OSError of this block into a TrainingError that names ``path``."""
    try:
        yield
    except OSError as error:
        cause, remedy = CAUSES.get(error.errno, (None, "free space or make it writable"))
        reason = str(error) if cause is None else f"{error}: {cause}"
        raise TrainingError(f"{path}: cannot be written ({reason}); {remedy}, and continue with resume") from error


class SilentLog:
    """The log of a process that writes no files."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def line(self, text: str) -> None:
        """Ignore a line of text."""

    def step(self) -> None:
        """Ignore a step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Ignore the metrics of an epoch."""


class RunLog:
    """The log of a run in its folder, a context manager.

    Args:
        config: Settings of the run: its folder, and whether to show progress.
        epoch: Complete epochs; later rows of metrics.csv are removed, as they will be written again.
        step: Steps already done in the next epoch.
        steps_per_epoch: Steps of an epoch.

    Raises:
        ImportError: A package of the extra "training" is missing.
        TrainingError: A file cannot be written.
    """

    def __init__(self, config: TrainConfig, epoch: int, step: int, steps_per_epoch: int):
        self.folder = Path(config.output)
        self.show = config.progress
        self.next_picture = 0.0
        import_extra("matplotlib", "training")
        with failures_named(self.folder):
            self.rows = _trimmed_rows(self.folder / "metrics.csv", epoch)
            self.board = import_extra("torch.utils.tensorboard", "training").SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=epoch + 1
            )
        self.bar = import_extra("tqdm", "training").tqdm(
            total=config.epochs * steps_per_epoch,
            initial=epoch * steps_per_epoch + step,
            unit="step",
            disable=None if self.show else True,  # None hides the bar if the output is not a terminal
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self.bar.close()
        with failures_named(self.folder / "tensorboard"):
            self.board.close()
        if self.rows and error is None:
            draw_progress(self.rows, self.folder / "progress.png")

    def line(self, text: str) -> None:
        """Write a line to log.txt, and show it if progress is shown."""
        with failures_named(self.folder / "log.txt"), open_to_append(self.folder / "log.txt") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.show:
            self.bar.write(text)

    def step(self) -> None:
        """Advance the progress bar by a step."""
        self.bar.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Write the metrics of an epoch, one value (or None) for each of ``COLUMNS``."""
        with failures_named(self.folder / "metrics.csv"), open_to_append(self.folder / "metrics.csv") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: row[name] for name in COLUMNS})
        with failures_named(self.folder / "tensorboard"):
            for name in CURVES:
                if row[name] is not None:
                    self.board.add_scalar(name.replace("_", "/", 1), row[name], row["epoch"])
            self.board.flush()
        if time.monotonic() >= self.next_picture:
            draw_progress(self.rows, self.folder / "progress.png")
            self.next_picture = time.monotonic() + SECONDS_BETWEEN_PICTURES
        self.line(_summary(row))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.csv, with numbers as int or float and empty cells as None.

    An incomplete last line is left out. A missing file has no rows.

    Raises:
        TrainingError: the file is damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        check_regular_file(path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if set(row) == set(COLUMNS) and None not in row.values()]
        return [{name: _number(name, row[name]) for name in COLUMNS} for row in rows]
    except (csv.Error, ValueError) as error:
        raise TrainingError(f"{path}: is damaged ({error}); restore it, or delete it to go on without it") from error


def draw_progress(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and Dice of training and validation over the epochs into a PNG file, atomically."""
    figure_type = import_extra("matplotlib.figure", "training").Figure
    figure = figure_type(figsize=(10, 4))
    axes = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.98, "bottom": 0.13, "top": 0.92})
    for axis, quantity in zip(axes, ("loss", "dice"), strict=True):
        for part, colour in (("train", "tab:blue"), ("val", "tab:orange")):
            points = [
                (row["epoch"], row[f"{part}_{quantity}"]) for row in rows if row[f"{part}_{quantity}"] is not None
            ]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), color=colour, label=part, linewidth=1)
        axis.set(xlabel="epoch", ylabel="Dice" if quantity == "dice" else quantity)
        axis.grid(alpha=0.3)
    last = rows[-1]
    if last["best_epoch"]:
        axes[1].plot(last["best_epoch"], last["best_dice"], "o", color="tab:red")
        axes[1].set_title(f"best {last['best_dice']:.4f} at epoch {last['best_epoch']}")
    axes[1].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    with failures_named(path):
        write_bytes(path, picture.getvalue())


def _trimmed_rows(path: Path, epoch: int) -> list[dict[str, Any]]:
    """Remove the rows after ``epoch`` from the file and return the others."""
    if not path.exists():
        return []
    rows = [row for row in read_metrics(path) if row["epoch"] <= epoch]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
    return rows


def _number(name: str, text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if name in ("epoch", "best_epoch") else float(text)


def _summary(row: dict[str, Any]) -> str:
    parts = [f"epoch {row['epoch']}", f"loss {row['train_loss']:.4f}", f"Dice {row['train_dice']:.4f}"]
    if row["val_dice"] is not None:
        parts.append(f"validation loss {row['val_loss']:.4f} Dice {row['val_dice']:.4f}")
    if row["best_epoch"]:
        parts.append(f"best {row['best_dice']:.4f} at {row['best_epoch']}")
    return ", ".join([*parts, f"{row['images_per_second']:.1f} images/s"])
