"""The table of a study, as CSV and Markdown, and its bar chart."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uctrans.extras import import_extra
from uctrans.inference import mean_and_deviation
from uctrans.study.cost import TIMED_STEPS, Cost
from uctrans.writing import written_atomically

TITLES = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ"}
ALWAYS = ("dice", "iou")
SINGLE_RUN = "single run"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        variant: its name.
        model: registry name of the network.
        seeds: of its runs.
        scores: for each score the mean over the test images, one number a run.
        cost: of the network.
    """

    variant: str
    model: str
    seeds: list[int]
    scores: dict[str, list[float]]
    cost: Cost


@dataclass(frozen=True)
class Table:
    """The rows, and in words what the scores are of and how a step was timed."""

    rows: list[Row]
    scored_on: str
    step: str
    image_size: tuple[int, int]

    @property
    def scores(self) -> list[str]:
        """Dice and IoU, and the scores of instances where every run has them."""
        everywhere = set.intersection(*(set(row.scores) for row in self.rows))
        return [name for name in TITLES if name in ALWAYS or name in everywhere]

    def records(self) -> list[dict[str, Any]]:
        """One mapping a row, numbers in full: scores 0..1, deviations of samples (None for a single run), bytes."""
        return [self._record(row) for row in self.rows]

    def _record(self, row: Row) -> dict[str, Any]:
        record = {"variant": row.variant, "model": row.model, "runs": len(row.seeds)}
        record["seeds"] = " ".join(map(str, row.seeds))
        for name in self.scores:
            mean, deviation, _ = mean_and_deviation(row.scores[name])
            record |= {f"{name}_mean": mean, f"{name}_deviation": None if len(row.seeds) == 1 else deviation}
        return record | {
            "parameters": row.cost.parameters,
            "gflop": row.cost.flop / 1e9,
            "seconds_a_step": row.cost.seconds_a_step,
            "peak_memory_bytes": row.cost.peak_memory,
            "device": row.cost.device,
        }

    def markdown(self) -> str:
        """The table in Markdown, with a note on what its columns are."""
        titles = [TITLES[name] for name in self.scores]
        lines = [["variant", "runs", *titles, "parameters (M)", "GFLOP", "s/step", "peak memory (GiB)"]]
        lines += [self._cells(record) for record in self.records()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        table = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines]
        for number, line in enumerate(lines):  # names on the left, numbers on the right
            table[number] = table[number].replace(line[0].rjust(widths[0]), line[0].ljust(widths[0]), 1)
        return "\n".join([*table, "", *self._notes()])

    def _cells(self, record: dict[str, Any]) -> list[str]:
        is_single, memory = record["runs"] == 1, record["peak_memory_bytes"]
        return [
            record["variant"],
            SINGLE_RUN if is_single else str(record["runs"]),
            *(
                f"{record[f'{name}_mean']:.4f}" + ("" if is_single else f" ± {record[f'{name}_deviation']:.4f}")
                for name in self.scores
            ),
            f"{record['parameters'] / 1e6:.3f}",
            f"{record['gflop']:.3g}" if record["gflop"] < 10 else f"{record['gflop']:.1f}",
            f"{record['seconds_a_step']:.3g}",
            "n/a" if memory is None else f"{memory / 2**30:.2f}",
        ]

    def _notes(self) -> list[str]:
        devices = "; ".join(dict.fromkeys(row.cost.device for row in self.rows))
        height, width = self.image_size
        spread = (
            "a single run each, which has no deviation"
            if all(len(row.seeds) == 1 for row in self.rows)
            else "mean ± sample standard deviation over the seeds"
        )
        notes = [
            f"Scores: {spread}; each run's is the mean over {self.scored_on}.",
            f"GFLOP: forward pass of one image of {height} x {width} pixels, by PyTorch's FlopCounterMode.",
            f"s/step: median of {TIMED_STEPS} training steps, {self.step}, on {devices}.",
        ]
        if any(row.cost.peak_memory is None for row in self.rows):
            notes.append("Peak memory: n/a on a CPU, where PyTorch keeps no count.")
        else:
            notes.append("Peak memory: the most PyTorch held on the GPU in these steps, data set included.")
        return notes

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
            axis.bar(positions, [record[f"{name}_mean"] for record in records], color="tab:blue", alpha=0.6)
            spread = [at for at in positions if records[at][f"{name}_deviation"] is not None]
            axis.errorbar(
                spread,
                [records[at][f"{name}_mean"] for at in spread],
                [records[at][f"{name}_deviation"] for at in spread],
                fmt="none",
                ecolor="black",
                capsize=4,
            )
            points = [(at, value) for at in positions for value in self.rows[at].scores[name]]
            axis.plot(*zip(*points, strict=True), ".", color="tab:orange", markersize=5)
            axis.set_xticks(list(positions), [record["variant"] for record in records], rotation=45, ha="right")
            axis.set(ylabel=TITLES[name], ylim=(0, None))
            axis.grid(axis="y", alpha=0.3)
        runs = records[0]["runs"]
        figure.suptitle(
            f"A {SINGLE_RUN} each" if runs == 1 else f"Mean and standard deviation over {runs} runs (points)"
        )
        with written_atomically(path) as temporary:
            figure.savefig(temporary, dpi=150)
