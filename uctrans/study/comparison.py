"""A picture of a study: test images, their truth, and what the best run of each network makes of them.

The images are those on which the networks together are best, median and worst, by the mean of their Dice. Image and
truth are at the size at which the first network is scored. What the picture shows lies beside it as JSON, by which a
study that is called again knows that there is nothing new to draw.
"""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from uctrans.data import find_samples
from uctrans.inference.evaluate import Comparison
from uctrans.inference.figures import ModelsRow, choose_rows, models_figure
from uctrans.models import ModelFileError
from uctrans.study.best import BestRun
from uctrans.study.config import StudyConfig, StudyError
from uctrans.study.files import COMPARED, COMPARISON
from uctrans.study.schedule import Budget
from uctrans.study.single import SCORED, evaluation
from uctrans.writing import write_json


def draw_comparison(config: StudyConfig, best: dict[str, BestRun], budget: Budget) -> None:
    """Draw the picture, unless it is there already; print a line where it cannot be drawn, or not in this time.

    Args:
        config: of the study.
        best: the best run of each variant by its name.
        budget: nothing is predicted any more once it is over.
    """
    folder = Path(config.output)
    obstacles = [chosen.obstacle for chosen in best.values() if chosen.obstacle]
    try:
        shown = {} if obstacles or not best else _shown(best)
    except StudyError as error:
        shown, obstacles = {}, [str(error)]
    if shown and (folder / COMPARISON).exists() and _read(folder / COMPARED) == shown:
        return
    if shown and budget.is_over:
        obstacles = ["the time is up; the same command draws it"]
    if shown and not obstacles:
        try:
            _draw(folder / COMPARISON, config, best, shown)
        except ModelFileError as error:
            obstacles = [str(error)]
        else:
            write_json(folder / COMPARED, shown)
    if obstacles:
        print(f"{folder / COMPARISON} is not drawn: {obstacles[0]}", flush=True)


def _shown(best: dict[str, BestRun]) -> dict[str, Any]:
    """What the picture is to show, as JSON holds it: images with their ranks, and the runs with their Dice."""
    dice = {name: _dice_of_images(chosen) for name, chosen in best.items()}
    images = list(next(iter(dice.values())))
    for name, chosen in best.items():
        if list(dice[name]) != images:
            raise StudyError(f"{chosen.folder} has scores of other test images; {_scored_anew(chosen)}")
    means = [float(np.mean([scores[image] for scores in dice.values()])) for image in images]
    rows = [(images[position], rank) for position, rank in choose_rows(means)]
    return {
        "images": [{"name": image, "rank": rank} for image, rank in rows],
        "runs": [
            {
                "variant": name,
                "run": chosen.run.label,
                "patience": chosen.patience,
                "validation_dice": chosen.validation_dice,
                "scored": chosen.run.scored,
                "dice": [dice[name][image] for image, _ in rows],
            }
            for name, chosen in best.items()
        ],
    }


def _dice_of_images(chosen: BestRun) -> dict[str, float]:
    path = chosen.folder / SCORED["test"] / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["name"]: float(row["dice"]) for row in csv.DictReader(file)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(f"{path} cannot be read ({error!r}); {_scored_anew(chosen)}") from error


def _scored_anew(chosen: BestRun) -> str:
    words = ["uctrans", "evaluate", "-i", chosen.run.config.data, "-o", str(chosen.folder / SCORED["test"])]
    words += ["--model", str(chosen.folder), "--overwrite"]
    for name, value in chosen.run.scored.items():
        words += [f"--{name.removeprefix('score_')}", value]
    return f"{shlex.join(words)} writes it anew"


def _draw(path: Path, config: StudyConfig, best: dict[str, BestRun], shown: dict[str, Any]) -> None:
    samples = {sample.name: sample for sample in find_samples(config.data, "test")}
    chosen_samples = [samples[image["name"]] for image in shown["images"]]
    predictions = []
    for number, chosen in enumerate(best.values()):
        comparison = Comparison(evaluation(str(chosen.folder), chosen.run, config, chosen.folder))
        compared = list(comparison.images(chosen_samples))
        predictions.append([each.prediction for each in compared])
        if number == 0:
            pictures, colours, legend = compared, comparison.colours, comparison.legend
    rows = [
        ModelsRow(
            picture.name,
            picture.image,
            picture.truth,
            [of_model[position] for of_model in predictions],
            [run["dice"][position] for run in shown["runs"]],
            shown["images"][position]["rank"],
        )
        for position, picture in enumerate(pictures)
    ]
    models_figure(path, list(best), rows, colours, legend)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
