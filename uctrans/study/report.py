"""The table of a study, as CSV and Markdown, and its bar chart."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uctrans.extras import import_extra
from uctrans.inference import mean_and_deviation
from uctrans.study.cost import TIMED_STEPS, Cost
from uctrans.writing import written_atomically

TITLES = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ"}
ALWAYS = ("dice", "iou")
SINGLE_RUN = "single run"
BEST_NOTE = "Best: the highest test score of a run. Nothing is chosen by it."
VALIDATION_NOTE = (
    "val Dice: of the images that training was validated on, scored likewise; choose by it, not by test scores. Each "
    "run's epoch was chosen on these images too, which makes it optimistic."
)
EFFECT_NOTE = (
    "Effect: difference in val Dice from {} with the same seed and fold, mean ± sample standard deviation over the "
    "pairs{}. Pairs that share images are not independent of each other."
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        variant: its name.
        model: registry name of the network.
        patience: of the training.
        seeds: of the runs that count.
        scores: for each score the mean over the test images, one number for each run that counts.
        cost: of the network.
        folds: of the runs that count; empty without cross-validation.
        failed: by seed and fold in words, why the training of other runs diverged; these have no scores.
        missing: number of runs that are not over yet.
        ensembles: Dice and IoU of the mean of the folds' probabilities, one number for each seed.
        validation: Dice on the validation images, one number for each run that counts; empty where it was not kept.
        effects: its differences from the validation Dice of the study's baseline with the same seed and fold.
    """

    variant: str
    model: str
    patience: int
    seeds: list[int]
    scores: dict[str, list[float]]
    cost: Cost
    folds: list[int] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: int = 0
    ensembles: dict[str, list[float]] = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """The rows, at least one of them with scores, and in words what these are of and how a step was timed."""

    rows: list[Row]
    scored_on: str
    step: str
    image_size: str
    remarks: list[str] = field(default_factory=list)
    baseline: str | None = None

    @property
    def scores(self) -> list[str]:
        """Dice and IoU, and the scores of instances where every run has them."""
        everywhere = set.intersection(*(set(row.scores) for row in self.rows if row.seeds))
        return [name for name in TITLES if name in ALWAYS or name in everywhere]

    def records(self) -> list[dict[str, Any]]:
        """One mapping a row, numbers in full: scores 0..1, deviations of samples, bytes; None where there is none.

        There is no mean without a run, and no deviation with less than two. Standard errors are those of independent
        runs, which runs on folds of the same images are not quite.
        """
        return [self._record(row) for row in self.rows]

    @property
    def has_ensembles(self) -> bool:
        """Whether any row has scores of an ensemble of folds."""
        return any(row.ensembles for row in self.rows)

    @property
    def has_validation(self) -> bool:
        """Whether every run has a score on validation images."""
        return all(len(row.validation) == len(row.seeds) for row in self.rows)

    def _record(self, row: Row) -> dict[str, Any]:
        runs = len(row.seeds)
        record = {"variant": row.variant, "model": row.model, "patience": row.patience, "runs": runs}
        record |= {"seeds": " ".join(map(str, row.seeds)), "folds": " ".join(map(str, row.folds))}
        record |= {"failed": "; ".join(row.failed), "missing": row.missing}
        if self.has_validation:
            record |= _mean_and_deviation("validation_dice", row.validation)
        if self.baseline is not None:
            record |= _mean_and_deviation("effect", row.effects) | {"effect_pairs": len(row.effects)}
        for name in self.scores:
            scores = row.scores.get(name, [])
            record |= _mean_and_deviation(name, scores)
            record[f"{name}_best"] = max(scores, default=None)
        if self.has_ensembles:
            record["ensembles"] = len(row.ensembles.get("dice", []))
            for name in ALWAYS:
                record |= _mean_and_deviation(f"ensemble_{name}", row.ensembles.get(name, []))
        return record | {
            "parameters": row.cost.parameters,
            "gflop": row.cost.flop / 1e9,
            "seconds_a_step": row.cost.seconds_a_step,
            "peak_memory_bytes": row.cost.peak_memory,
            "device": row.cost.device,
        }

    def markdown(self) -> str:
        """The table in Markdown, with a note on what its columns are."""
        titles = ["val Dice"] * self.has_validation + ["effect"] * (self.baseline is not None)
        titles += [title for name in self.scores for title in self._titles(name)]
        titles += [f"ensemble {TITLES[name]}" for name in ALWAYS] if self.has_ensembles else []
        lines = [["variant", "patience", "runs", *titles, "parameters (M)", "GFLOP", "s/step", "peak memory (GiB)"]]
        lines += [self._cells(row, record) for row, record in zip(self.rows, self.records(), strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        table = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines]
        for number, line in enumerate(lines):  # names on the left, numbers on the right
            table[number] = table[number].replace(line[0].rjust(widths[0]), line[0].ljust(widths[0]), 1)
        return "\n".join([*table, "", *self._notes()])

    @staticmethod
    def _titles(name: str) -> list[str]:
        return [TITLES[name], f"best {TITLES[name]}"] if name in ALWAYS else [TITLES[name]]

    def _cells(self, row: Row, record: dict[str, Any]) -> list[str]:
        runs, memory, others = record["runs"], record["peak_memory_bytes"], len(row.failed) + row.missing
        scores = []
        if self.has_validation:
            scores.append(_score_cell(record["validation_dice_mean"], record["validation_dice_deviation"]))
        if self.baseline is not None:
            is_baseline = row.variant == self.baseline
            scores.append("" if is_baseline else _score_cell(record["effect_mean"], record["effect_deviation"], "+"))
        for name in self.scores:
            scores.append(_score_cell(record[f"{name}_mean"], record[f"{name}_deviation"]))
            scores += [_score_cell(record[f"{name}_best"], None)] if name in ALWAYS else []
        if self.has_ensembles:
            names = [f"ensemble_{name}" for name in ALWAYS]
            scores += [_score_cell(record[f"{name}_mean"], record[f"{name}_deviation"]) for name in names]
        return [
            record["variant"],
            str(row.patience),
            (SINGLE_RUN if runs == 1 else str(runs)) + (f" of {runs + others}" if others else ""),
            *scores,
            f"{record['parameters'] / 1e6:.3f}",
            f"{record['gflop']:.3g}" if record["gflop"] < 10 else f"{record['gflop']:.1f}",
            f"{record['seconds_a_step']:.3g}",
            "n/a" if memory is None else f"{memory / 2**30:.2f}",
        ]

    def _notes(self) -> list[str]:
        over = "seeds and folds" if any(row.folds for row in self.rows) else "seeds"
        spread = (
            f"mean ± sample standard deviation over the {over}"
            if any(len(row.seeds) > 1 for row in self.rows)
            else "a single run each, which has no deviation"
        )
        failed = [f"{row.variant}, {run}: {reason}" for row in self.rows for run, reason in row.failed.items()]
        open_runs = any(row.missing for row in self.rows)
        return [
            *(["Not complete: runs of a row that are not over yet are in none of its scores."] if open_runs else []),
            f"Scores: {spread}; each run's is the mean over {self.scored_on}.",
            BEST_NOTE,
            *self.remarks,
            *([VALIDATION_NOTE] * self.has_validation),
            *([] if self.baseline is None else [EFFECT_NOTE.format(self.baseline, self._fewer_pairs())]),
            *(["Ensemble: mean of the folds' probabilities, for each seed with all its folds."] * self.has_ensembles),
            *([f"Failed, in no score: {'; '.join(dict.fromkeys(failed))}."] if failed else []),
            f"GFLOP: forward pass of one image of {self.image_size} pixels, by PyTorch's FlopCounterMode.",
            f"s/step: median of {TIMED_STEPS} training steps, {self.step}, {self._measured_on()}.",
            *self._notes_on_memory(),
        ]

    def _fewer_pairs(self) -> str:
        """Of which rows there are fewer pairs than runs, as a run of the baseline is missing or scored otherwise."""
        rows = [row for row in self.rows if row.variant != self.baseline and len(row.effects) < len(row.seeds)]
        return "".join(f", {len(row.effects)} of {row.variant}" for row in rows)

    def _names(self) -> list[str]:
        """What the chart calls the rows."""
        is_one = len({row.patience for row in self.rows}) == 1
        return [row.variant if is_one else f"{row.variant}, {row.patience}" for row in self.rows]

    def _measured_on(self) -> str:
        devices = {row.cost.device for row in self.rows}
        if len(devices) == 1:
            return f"on {devices.pop()}"
        each = "; ".join(dict.fromkeys(f"{row.variant} on {row.cost.device}" for row in self.rows))
        return f"measured on different devices, so they do not compare: {each}"

    def _notes_on_memory(self) -> list[str]:
        has_memory = {row.cost.peak_memory is not None for row in self.rows}
        notes = {
            False: "Peak memory: n/a on a CPU, where PyTorch keeps no count.",
            True: "Peak memory: the most PyTorch held on the GPU in these steps, data set included.",
        }
        return [note for kind, note in notes.items() if kind in has_memory]

    def write_csv(self, path: Path) -> None:
        """Write the records, atomically; what does not exist is left empty."""
        records = self.records()
        with written_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)

    def write_markdown(self, path: Path) -> None:
        """Write the table in Markdown, atomically."""
        with written_atomically(path) as temporary:
            temporary.write_text(f"{self.markdown()}\n", encoding="utf-8")

    def draw(self, path: Path) -> None:
        """Draw a bar for each variant and score, with the standard deviation and a point for each run, into a PNG."""
        records, scores = self.records(), self.scores
        positions = range(len(records))
        figure = import_extra("matplotlib.figure", "training").Figure(layout="constrained")
        figure.set_size_inches(max(4.0, 1.5 + 0.6 * len(records)) * len(scores), 4.5)
        for axis, name in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
            means = [record[f"{name}_mean"] or 0.0 for record in records]  # no bar where every run failed
            axis.bar(positions, means, color="tab:blue", alpha=0.6)
            spread = [at for at in positions if records[at][f"{name}_deviation"] is not None]
            axis.errorbar(
                spread,
                [means[at] for at in spread],
                [records[at][f"{name}_deviation"] for at in spread],
                fmt="none",
                ecolor="black",
                capsize=4,
            )
            points = [(at, value) for at in positions for value in self.rows[at].scores.get(name, [])]
            axis.plot(*zip(*points, strict=True), ".", color="tab:orange", markersize=5)
            axis.set_xticks(list(positions), self._names(), rotation=45, ha="right")
            axis.set(ylabel=TITLES[name], ylim=(0, None))
            axis.grid(axis="y", alpha=0.3)
        runs = [record["runs"] for record in records]
        figure.suptitle(
            f"A {SINGLE_RUN} each"
            if max(runs) == 1
            else f"Mean and standard deviation over {between(runs)} runs (points)"
        )
        with written_atomically(path) as temporary:
            figure.savefig(temporary, dpi=150)


def _mean_and_deviation(name: str, scores: list[float]) -> dict[str, float | None]:
    mean, deviation, number = mean_and_deviation(scores)
    several = number > 1
    return {
        f"{name}_mean": mean if number else None,
        f"{name}_deviation": deviation if several else None,
        f"{name}_standard_error": deviation / math.sqrt(number) if several else None,
    }


def between(numbers: list[int]) -> str:
    """The smallest and the largest of some numbers in words, or the one number that all are."""
    lowest, highest = min(numbers), max(numbers)
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _score_cell(mean: float | None, deviation: float | None, sign: str = "-") -> str:
    """Mean and deviation; with the sign "+" both directions are marked, of a difference."""
    if mean is None:
        return "n/a"
    return f"{mean:{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
