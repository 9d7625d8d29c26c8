"""The table of a study and the differences between its networks, as CSV and Markdown, and its bar chart."""

import csv
import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import get_protocol
from ..data.find import shorten
from ..extras import import_extra
from ..inference import mean_and_deviation
from ..training import TrainConfig
from ..training.build import build_model, check_external, trial_device
from ..training.log import read_metrics
from ..writing import written_atomically
from .folder import read_ensemble, read_failure, read_scores
from .plan import PlannedRun, StudyConfig, StudyError

SCORES = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ"}
ENSEMBLES = {"ensemble_dice": "ensemble Dice", "ensemble_iou": "ensemble IoU"}
TITLES = SCORES | ENSEMBLES | {"validation_dice": "val Dice"}
IN_DETAIL = ("dice", "iou")


@dataclass(frozen=True)
class Row:
    """A line of the table: a network at a patience."""

    record: dict[str, Any]  # what table.csv holds of it, numbers in full
    values: dict[str, dict[str, float]]  # by score, then by seed and fold of the run, or seed of the ensemble, in words
    failed: dict[str, str]  # by seed and fold in words, why the training of a run diverged


@dataclass(frozen=True)
class Difference:
    """The mean over pairs of runs, with the same seed and fold, of the test Dice of one network minus another's."""

    variant: str
    other: str
    patience: int
    pairs: int
    mean: float
    standard_error: float


@dataclass(frozen=True)
class Table:
    """The rows of a study, and sentences on how they came about."""

    rows: list[Row]
    remarks: list[str]

    @property
    def scores(self) -> list[str]:
        """The scores of the columns: those of any row."""
        return [name for name in TITLES if any(name in row.values for row in self.rows)]

    @property
    def differences(self) -> list[Difference]:
        """The differences in Dice of all networks from those above them, where two pairs of runs or more exist."""
        found = []
        for other, row in itertools.combinations(self.rows, 2):
            patience = row.record["patience"]
            dice, others = (each.values.get("dice", {}) for each in (row, other))
            paired = [dice[label] - others[label] for label in dice if label in others]
            if patience == other.record["patience"] and len(paired) > 1:
                mean, deviation, pairs = mean_and_deviation(paired)
                names = row.record["variant"], other.record["variant"]
                found.append(Difference(*names, patience, pairs, mean, deviation / math.sqrt(pairs)))
        return found

    def markdown(self) -> str:
        """Return the table in Markdown, notes on its columns, and a table of the differences for each patience."""
        titles = ["variant", "patience", "runs"]
        for name in self.scores:
            titles += [TITLES[name]] + ["s.e.", f"best {TITLES[name]}"] * (name in IN_DETAIL)
        lines = [[*titles, "parameters (M)", "GFLOP", "s/epoch"], *map(self._cells, self.rows)]
        return "\n".join([*_markdown_lines(lines), "", *self._notes(), *self._differences()])

    def _differences(self) -> list[str]:
        """Return the lines of a table for each patience: networks against those above them."""
        cells = {
            (each.patience, each.variant, each.other): f"{each.mean:+.4f} ± {each.standard_error:.4f} ({each.pairs})"
            for each in self.differences
        }
        lines = []
        for patience in dict.fromkeys(patience for patience, _, _ in cells):
            others = list(dict.fromkeys(other for each, _, other in cells if each == patience))
            variants = dict.fromkeys(variant for each, variant, _ in cells if each == patience)
            table = [[name, *(cells.get((patience, name, other), "") for other in others)] for name in variants]
            lines += ["", *_markdown_lines([[f"Dice minus that of, patience {patience}", *others], *table])]
        if lines:
            lines += ["", "Differences: mean ± standard error over pairs of runs of the same seed and fold (number)."]
        return lines

    def _cells(self, row: Row) -> list[str]:
        record = row.record
        others = len(row.failed) + record["missing"]
        runs = "single run" if record["runs"] == 1 else str(record["runs"])
        cells = [
            record["variant"],
            str(record["patience"]),
            runs + (f" of {record['runs'] + others}" if others else ""),
        ]
        for name in self.scores:
            mean, deviation = record.get(f"{name}_mean"), record.get(f"{name}_deviation")
            cells.append(_number(mean, ".4f") + ("" if deviation is None else f" ± {deviation:.4f}"))
            if name in IN_DETAIL:
                cells += [_number(record.get(f"{name}_{which}"), ".4f") for which in ("standard_error", "best")]
        gflop = _number(record["gflop"], ".3g" if record["gflop"] < 10 else ".1f")
        return [*cells, f"{record['parameters'] / 1e6:.3f}", gflop, _number(record["seconds_an_epoch"], ".3g")]

    def _notes(self) -> list[str]:
        records = [row.record for row in self.rows]
        spread = (
            f"mean ± sample standard deviation over the seeds{' and folds' * any(each['folds'] for each in records)}"
        )
        if all(record["runs"] < 2 for record in records):
            spread = "a single run each, without a deviation"
        notes = [f"Scores: {spread}.", *self.remarks]
        if any(record["missing"] for record in records):
            notes.append("Not complete: some runs are not over yet, and are in none of the scores.")
        failed = [
            f"{row.record['variant']}, {run}: {reason}" for row in self.rows for run, reason in row.failed.items()
        ]
        if failed:
            notes.append(f"Failed, in none of the scores: {'; '.join(dict.fromkeys(failed))}.")
        if set(ENSEMBLES) & set(self.scores):
            notes.append("Ensemble: mean of the folds' probabilities, for each seed with all its folds.")
        return [
            *notes,
            "s.e.: standard error of the mean, as if the runs were independent; folds share most of their images.",
            "Best: the highest test score of a run; nothing is chosen by it.",
            "val Dice: the best Dice on the validation images during training; choose by it.",
            "GFLOP: forward pass of one image, by PyTorch's FlopCounterMode.",
            "s/epoch: median of an epoch of training and validation, on the machine of each run.",
        ]

    def write(self, folder: Path) -> None:
        """Write table.csv, differences.csv, table.md and chart.png into a folder, each atomically."""
        _write_records(folder / "table.csv", [row.record for row in self.rows])
        _write_records(folder / "differences.csv", [dataclasses.asdict(each) for each in self.differences])
        with written_atomically(folder / "table.md") as path:
            path.write_text(f"{self.markdown()}\n", encoding="utf-8")
        with written_atomically(folder / "chart.png") as path:
            self._draw(path)

    def _draw(self, path: Path) -> None:
        """Draw a bar for each row and score, with the standard deviation and a point for each run."""
        records = [row.record for row in self.rows]
        names = [name for name in self.scores if name in SCORES]
        labels = [f"{record['variant']}, {record['patience']}" for record in records]
        figure = import_extra("matplotlib.figure", "training").Figure(layout="constrained")
        figure.set_size_inches(max(4.0, 1.5 + 0.6 * len(records)) * len(names), 4.5)
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            means = [record.get(f"{name}_mean", 0.0) for record in records]  # no bar where every run failed
            deviations = [record.get(f"{name}_deviation") or 0.0 for record in records]
            axis.bar(range(len(records)), means, color="tab:blue", alpha=0.6)
            axis.errorbar(range(len(records)), means, deviations, fmt="none", ecolor="black", capsize=4)
            for position, row in enumerate(self.rows):
                values = [*row.values.get(name, {}).values()]
                axis.plot([position] * len(values), values, ".", color="tab:orange", markersize=5)
            axis.set_xticks(range(len(records)), labels, rotation=45, ha="right")
            axis.set(ylabel=TITLES[name], ylim=(0, None))
            axis.grid(axis="y", alpha=0.3)
        figure.suptitle("Mean and standard deviation over the runs (points)")
        figure.savefig(path, dpi=150)


def count_cost(config: TrainConfig) -> dict[str, float]:
    """Count the parameters of a network, and the GFLOP of the forward pass of one image by FlopCounterMode.

    Both are those of the published sequence of operations (backend ``reference``). Only networks of other packages
    compute anything.

    Raises:
        ConfigError: The network cannot be built, or is of another package and cannot be trained.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    height, width = get_protocol(config.protocol, config.image_size).image_size
    check_external(config, (height, width), torch.device("cpu"))
    with trial_device(config):
        model = build_model(dataclasses.replace(config, backend="reference"), (height, width)).eval()
        image = torch.empty(1, model.in_channels, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "gflop": counter.get_total_flops() / 1e9}


def make_table(config: StudyConfig, plan: list[PlannedRun], costs: dict[str, dict[str, float]]) -> Table | None:
    """Return the table of what a study has found so far, or None if no run is over yet.

    Args:
        config: Settings of the study.
        plan: Its runs.
        costs: What ``count_cost`` returns for each network, by the name of the variant.

    Raises:
        StudyError: Every run failed.
    """
    scores = [score for run in plan for score in read_scores(run).values()]
    if not scores:
        reasons = {run.name: read_failure(run) for run in plan}
        if None in reasons.values():
            return None
        name, reason = next(iter(reasons.items()))
        raise StudyError(
            f"output: all runs failed, the first, {name}: {reason}; "
            "name another output folder and give other settings, such as a lower learning_rate"
        )
    count, images, scored_at = (scores[0][name] for name in ("count", "images", "scored_at"))
    averaged = "" if config.score_tta == "none" else f", with test-time transforms {config.score_tta}"
    remarks = [f"Each run's score is the mean over {images} test images, scored at {scored_at}{averaged}."]
    known = sorted({name for score in scores for part in score["known_images"].values() for name in part})
    if known:
        remarks.append(
            f"Not a test: networks were trained on, or chosen by, {len(known)} of these images: {shorten(known)}."
        )
    if count.get("aji", images) < images:
        remarks.append(f"AJI and PQ: mean over the {count['aji']} test images with an instance map.")
    started = [variant.name for variant in config.variants() if variant.from_unet]
    if started and len(config.patience) > 1:
        remarks.append(f"{', '.join(started)}: starts from the U-Net of patience {config.patience[-1]} in every row.")
    rows = []
    for name, cost in costs.items():
        runs = [run for run in plan if run.variant.name == name]
        ensembles = [each for each in config.ensembles() if each.needs[0].variant.name == name]
        for patience in config.patience:
            found = {f"seed {each.needs[0].seed}": read_ensemble(each, patience) for each in ensembles}
            scored = {seed: summary["mean"] for seed, summary in found.items() if summary is not None}
            rows.append(_row(runs, patience, scored, cost))
    return Table(rows, remarks)


def _row(runs: list[PlannedRun], patience: int, ensembles: dict[str, dict[str, float]], cost: dict[str, float]) -> Row:
    scores = [(run, read_scores(run).get(patience)) for run in runs]
    scored = [(run, score) for run, score in scores if score is not None]
    reasons = {run.label: read_failure(run) for run, score in scores if score is None}
    failed = {label: reason for label, reason in reasons.items() if reason is not None}
    values = {name: {run.label: score["mean"].get(name) for run, score in scored} for name in SCORES}
    for name in ENSEMBLES:
        values[name] = {seed: mean[name.removeprefix("ensemble_")] for seed, mean in ensembles.items()}
    values["validation_dice"] = {run.label: score["model"]["metadata"].get("best_dice") for run, score in scored}
    values = {name: numbers for name, numbers in values.items() if numbers and None not in numbers.values()}
    record = {
        "variant": runs[0].variant.name,
        "model": runs[0].variant.model,
        "patience": patience,
        "runs": len(scored),
        "seeds": " ".join(str(run.seed) for run, _ in scored),
        "folds": " ".join(str(run.fold) for run, _ in scored if run.fold is not None),
        "failed": "; ".join(failed),
        "missing": len(reasons) - len(failed),
    }
    for name, numbers in values.items():
        mean, deviation, number = mean_and_deviation([*numbers.values()])
        record |= {f"{name}_mean": mean, f"{name}_deviation": deviation if number > 1 else None}
        if name in IN_DETAIL:
            record[f"{name}_standard_error"] = deviation / math.sqrt(number) if number > 1 else None
            record[f"{name}_best"] = max(numbers.values())
    seconds = [row["seconds"] for run in runs for row in read_metrics(run.folder / "metrics.csv")]
    return Row(record | cost | {"seconds_an_epoch": statistics.median(seconds) if seconds else None}, values, failed)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else f"{value:{form}}"


def _markdown_lines(lines: list[list[str]]) -> list[str]:
    """Return a Markdown table of lines of cells, the first its titles; columns after the first align right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    titles, *rows = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [f"| {' | '.join(line)} |" for line in (titles, rule, *rows)]


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for record in records for name in record)))
        writer.writeheader()
        writer.writerows(records)
