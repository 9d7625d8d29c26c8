"""``uctrans demo``: nuclei by the built-in model, then training, on data that needs no download, in minutes on a CPU.

The picture is the immunohistochemistry photograph inside scikit-image. The labels for the training are made by colour
deconvolution and thresholding, so a score here shows that everything works, and nothing about accuracy on annotated
data.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from .data import haematoxylin_image, write_demo_dataset
from .inference import EvaluateConfig, PredictConfig, evaluate, predict
from .training import TrainConfig, train
from .writing import locked, write_png

MARKER = ".uctrans-demo"
PARTS = ("picture", "nuclei", "data", "run", "evaluation", "prediction")
IMAGE_SIZE = 128  # pixels, the side of the embedded tiles, so nothing is resized


class DemoError(ValueError):
    """The demo cannot write to its output folder; the message says what to do."""


@dataclass
class DemoConfig:
    """Settings of `run_demo`.

    Args:
        output: Folder for everything; an earlier demo in it is replaced, any other folder must be empty or new.
        epochs: Epochs of training.
        base_channels: Channels of the network's finest scale (the published network has 64).
        device: auto, cpu, cuda, cuda:1.
        progress: Show a progress bar.
    """

    output: str = "demo"
    epochs: int = 60
    base_channels: int = 16
    device: str = "auto"
    progress: bool = True


@dataclass(frozen=True)
class DemoResult:
    """Output folder of the demo and the mean test Dice, which is None if a signal stopped the training."""

    output: Path
    test_dice: float | None
    stopped_by: str

    def __str__(self) -> str:
        """Return a list of the files to look at."""
        if self.test_dice is None:
            return f"Training was stopped ({self.stopped_by}); its checkpoints are in {self.output / 'run'}"
        return "\n".join(
            (
                f"Mean test Dice {self.test_dice:.3f}, against labels made by colour thresholding. Look at",
                f"  {self.output}/nuclei/                   what the built-in model finds, without this training",
                f"  {self.output}/run/progress.png          the training curves",
                f"  {self.output}/evaluation/metrics.csv    the scores of every test image",
                f"  {self.output}/evaluation/figure.png     image, label and prediction side by side",
                f"  {self.output}/prediction/               masks, and outlines over the images (*_overlay.png)",
            )
        )


def run_demo(config: DemoConfig) -> DemoResult:
    """Find nuclei by the built-in model; write the embedded dataset, train a small UCTransNet on it, evaluate, predict.

    Raises:
        DemoError: the output folder holds files that are not from an earlier demo.
        FolderError: another demo runs in the output folder, or it cannot be made or written to.
        ImportError: a package of the training extra is missing.
    """
    from skimage.data import immunohistochemistry

    output = Path(config.output)
    with locked(output):
        _clear(output)
        picture, nuclei, data, run, evaluation, prediction = (output / part for part in PARTS)
        settings = {"device": config.device, "progress": config.progress}
        write_png(picture / "haematoxylin.png", haematoxylin_image(immunohistochemistry()))
        predict(PredictConfig("nuclei", str(picture), str(nuclei), instances=True, **settings))
        print(f"The built-in model found nuclei: see {nuclei / 'haematoxylin_instances_overlay.png'}")
        write_demo_dataset(data)
        print(f"Training on {data} ({data / 'README.txt'} describes the labels).")
        trained = train(
            TrainConfig(
                data=str(data),
                output=str(run),
                model="uctransnet",
                base_channels=config.base_channels,
                image_size=IMAGE_SIZE,
                epochs=config.epochs,
                patience=config.epochs,
                **settings,
            )
        )
        if trained.stopped_by in ("SIGINT", "SIGTERM"):
            return DemoResult(output, None, trained.stopped_by)
        scores = evaluate(EvaluateConfig(str(run), str(data), str(evaluation), **settings))
        predict(PredictConfig(str(run), str(data / "test" / "images"), str(prediction), **settings))
        print(scores.table())
        return DemoResult(output, scores.mean["dice"], trained.stopped_by)


def _clear(folder: Path) -> None:
    """Mark the folder as a demo's, and remove what an earlier demo left there.

    Raises:
        DemoError: the folder holds files and no mark of an earlier demo.
    """
    if any(path.name[0] != "." for path in folder.iterdir()) and not (folder / MARKER).is_file():
        raise DemoError(f"{folder}: holds files that no demo wrote; name a new or empty folder with -o/--output")
    (folder / MARKER).write_text("Made by `uctrans demo`, which replaces the folders here when it runs again.\n")
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
