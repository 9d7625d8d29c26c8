"""The commands of ``uctrans``: what each runs, on which settings, and how it is explained."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand: what it runs and how it is explained."""

    summary: str
    module: str
    settings: str  # name of the dataclass in the module
    function: str  # name of the function that takes one
    report: Callable[[Any], str]  # what to print of its result
    paths: dict[str, tuple[str, str]]  # field: (its flag --input or --output, help)
    examples: tuple[str, ...]
    hidden: tuple[str, ...] = ()  # fields that are no flags

    @property
    def settings_class(self) -> type:
        """The dataclass of its settings; imports its module."""
        return getattr(importlib.import_module(self.module), self.settings)

    def run(self, settings: Any) -> Any:
        """What its function returns."""
        return getattr(importlib.import_module(self.module), self.function)(settings)


def _report_files(files: Sequence[Any]) -> str:
    return f"Wrote {len(files)} files into {files[0].parent}" if files else "Nothing to write."


def _report_run(run: Any) -> str:
    best = (
        f"Best validation Dice {run.best_score:.4f} in epoch {run.best_epoch} of {run.epochs}"
        if run.best_epoch
        else f"No best weights yet after {run.epochs} epochs"
    )
    resume = f" Continue with: uctrans train -o {run.run_folder} --resume" if run.stopped_by.startswith("SIG") else ""
    return f"{best} (stopped by: {run.stopped_by}). Everything is in {run.run_folder}.{resume}"


_STUDY_PATHS = {
    "data": ("input", "dataset: {train,val,test}/{images,masks}, or images and masks side by side"),
    "output": ("output", "folder of the study; the same command goes on with what is in it"),
}
_SET_BY_A_STUDY = ("model", "seed", "init_from", "resume")

COMMANDS = {
    "demo": Command(
        summary="train, evaluate and predict on a small embedded dataset, in minutes on a CPU",
        module="uctrans.demo",
        settings="DemoConfig",
        function="run_demo",
        report=str,
        paths={"output": ("output", "folder for everything the demo writes")},
        examples=("uctrans demo -o demo",),
    ),
    "prepare monuseg": Command(
        summary="turn MoNuSeg annotations into masks and instance maps",
        module="uctrans.commands",
        settings="PrepareMonusegConfig",
        function="_prepare_monuseg",
        report=lambda images: f"Wrote the maps of {len(images)} images, {sum(image.nuclei for image in images)} nuclei",
        paths={
            "annotations": ("input", "folder of XML annotations, or one of them"),
            "output": ("output", "dataset with masks, which gets instance maps; or, with --images, folder for both"),
        },
        examples=(
            "uctrans prepare monuseg -i data/annotations -o data",
            "uctrans prepare monuseg -i monuseg/annotations --images monuseg/images -o monuseg",
        ),
    ),
    "train": Command(
        summary="train a model on a folder of images and masks",
        module="uctrans.training",
        settings="TrainConfig",
        function="train",
        report=_report_run,
        paths={
            "data": ("input", "dataset: {train,val,test}/{images,masks}, or images and masks side by side"),
            "output": ("output", "run folder: checkpoints, curves, the resolved config"),
        },
        examples=(
            "uctrans train -i data -o runs/first",
            "uctrans train -i data -o runs/unet --model unet --epochs 100",
            "uctrans train --config runs/first/config.yaml -o runs/second --seed 1",
            "uctrans train -o runs/first --resume",
        ),
    ),
    "evaluate": Command(
        summary="score a model on images with masks",
        module="uctrans.inference",
        settings="EvaluateConfig",
        function="evaluate",
        report=lambda result: f"{result.table()}\nEverything is in {result.output}",
        paths={
            "data": ("input", "dataset: {train,val,test}/{images,masks}, or images and masks side by side"),
            "output": ("output", "folder for metrics.csv, summary.json and pictures"),
        },
        examples=("uctrans evaluate -i data -o scores --model runs/first",),
    ),
    "predict": Command(
        summary="segment a folder of images, or one image",
        module="uctrans.inference",
        settings="PredictConfig",
        function="predict",
        report=_report_files,
        paths={
            "input": ("input", "folder of images, or one image"),
            "output": ("output", "folder for the masks and overlays"),
        },
        examples=("uctrans predict -i images -o masks --model runs/first",),
    ),
    "export": Command(
        summary="write a model for use without uctrans",
        module="uctrans.inference",
        settings="ExportConfig",
        function="export",
        report=_report_files,
        paths={
            "model": ("input", "run folder, saved model or checkpoint"),
            "output": ("output", "folder to write"),
        },
        examples=("uctrans export -i runs/first -o exported",),
    ),
    "share": Command(
        summary="put a model's weights into a folder to share, with a model card",
        module="uctrans.sharing",
        settings="ShareConfig",
        function="share",
        report=str,
        paths={
            "model": ("input", "run folder, or a folder of save_pretrained"),
            "output": ("output", "folder to write"),
        },
        examples=("uctrans share -i runs/first -o shared/first --evaluation scores",),
    ),
    "study skips": Command(
        summary="train U-Nets with none, all and some of their skips over seeds, and compare them",
        module="uctrans.study",
        settings="SkipStudyConfig",
        function="study_skips",
        report=str,
        paths=_STUDY_PATHS,
        examples=("uctrans study skips -i data -o studies/skips --seeds 5",),
        hidden=_SET_BY_A_STUDY,
    ),
    "study models": Command(
        summary="train several models with the same settings over seeds, and compare them",
        module="uctrans.study",
        settings="ModelStudyConfig",
        function="study_models",
        report=str,
        paths=_STUDY_PATHS,
        examples=("uctrans study models -i data -o studies/models --models unet,uctransnet --seeds 0,1,2",),
        hidden=_SET_BY_A_STUDY,
    ),
    "study recipes": Command(
        summary="train one model in several ways over seeds, and compare them run by run",
        module="uctrans.study",
        settings="RecipeStudyConfig",
        function="study_recipes",
        report=str,
        paths=_STUDY_PATHS,
        examples=("uctrans study recipes -i data -o studies/recipes --cross-validation 5 --epochs 300 --patience 300",),
        hidden=tuple(field for field in _SET_BY_A_STUDY if field != "model"),
    ),
}


@dataclass
class PrepareMonusegConfig:
    """Settings of ``uctrans prepare monuseg``.

    Attributes:
        annotations: Folder of XML annotations, or one of them.
        output: A dataset with masks, split into train, val and test or not: every annotated image gets an instance map
            (one number a nucleus) in instances/ beside masks/, and the masks stay as they are. Where images are given:
            the folder for masks/ (0 and 255) and instances/, both made of the outlines.
        images: Folder of the images that the annotations belong to, to have masks made as well.
        overwrite: Replace what would be written and is there already.
    """

    annotations: str
    output: str
    images: str | None = None
    overwrite: bool = False


def _prepare_monuseg(config: PrepareMonusegConfig) -> Any:
    from uctrans.data import prepare_instances, prepare_monuseg

    if config.images is None:
        return prepare_instances(config.annotations, config.output, overwrite=config.overwrite)
    prepared = prepare_monuseg(config.annotations, config.images, config.output, overwrite=config.overwrite)
    if Path(config.images).resolve() != (Path(config.output) / "images").resolve():
        print(f"For training, put the images of {config.images} into {Path(config.output) / 'images'}.")
    return prepared
