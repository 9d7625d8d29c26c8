"""Records as pictures: how many times as fast, how near to the roofline, and how time grows with the images.

Each function draws into an SVG, the same bytes for the same record, and needs matplotlib.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uctrans.extras import import_extra
from uctrans.writing import written_atomically

BAR_INCHES = 0.3
MARGIN_INCHES = 1.2
WIDTH_INCHES = 8.0
SETTINGS = {"svg.hashsalt": "uctrans", "svg.fonttype": "none", "font.size": 9}


@dataclass(frozen=True)
class Speedup:
    """How many times as fast one is as the other: median of pairs, and its quartiles."""

    workload: str
    over: str
    ratio: float
    quartiles: tuple[float, float]


def draw_speedups(speedups: Sequence[Speedup], title: str, path: Path) -> None:
    """A bar for each race, by workload; the whisker is from the first to the third quartile of the pairs."""
    opponents = list(dict.fromkeys(speedup.over for speedup in speedups))
    height = MARGIN_INCHES + BAR_INCHES * len(speedups)
    with _figure(path, (WIDTH_INCHES, height)) as figure:
        axis = figure.subplots()
        axis.axvline(1.0, color="0.3", linewidth=1)
        for place, opponent in enumerate(opponents):
            rows = [row for row, speedup in enumerate(speedups) if speedup.over == opponent]
            chosen = [speedups[row] for row in rows]
            ratios = [speedup.ratio for speedup in chosen]
            below = [max(speedup.ratio - speedup.quartiles[0], 0.0) for speedup in chosen]
            above = [max(speedup.quartiles[1] - speedup.ratio, 0.0) for speedup in chosen]
            axis.barh(rows, ratios, xerr=[below, above], capsize=2, color=f"C{place}", alpha=0.7, label=opponent)
            for row, speedup in zip(rows, chosen, strict=True):
                label = f" {speedup.ratio:.2f}"
                axis.annotate(
                    label, (speedup.quartiles[1], row), va="center", textcoords="offset points", xytext=(3, 0)
                )
        axis.set_yticks(range(len(speedups)), [speedup.workload for speedup in speedups])
        axis.invert_yaxis()
        axis.set(xlabel="times as fast (median of pairs, quartiles)", title=title)
        axis.set_xlim(0, 1.15 * max(speedup.quartiles[1] for speedup in speedups))
        axis.grid(axis="x", alpha=0.3)
        axis.legend(title="against", loc="lower right")


def draw_roofline(infos: Sequence[dict[str, Any]], ceilings: dict[str, Any], title: str, path: Path) -> None:
    """Operations a second over operations a byte of the ideal work, under the ceilings: one point a measured test.

    ``infos`` have ``gflop``, ``gigabytes``, ``tflop_per_second``, ``dtype`` and ``passes``; ``ceilings`` are those that
    :meth:`benchmarks.roofline.Ceilings.as_json` writes.
    """
    with _figure(path, (WIDTH_INCHES, 5.0)) as figure:
        axis = figure.subplots()
        intensities = [info["gflop"] / info["gigabytes"] for info in infos]
        span = (min(intensities) / 2, max(intensities) * 2)
        for place, dtype in enumerate(dict.fromkeys(info["dtype"] for info in infos)):
            if dtype in ceilings["flop_rates"]:
                _draw_roof(axis, span, ceilings["bandwidth"], ceilings["flop_rates"][dtype], f"C{place}", dtype)
            points = [(at, info) for at, info in zip(intensities, infos, strict=True) if info["dtype"] == dtype]
            for passes, marker in (("forward", "o"), ("backward", "s"), ("both", "^")):
                chosen = [(at, info["tflop_per_second"]) for at, info in points if info["passes"] == passes]
                if chosen:
                    label = f"{dtype}, {passes}"
                    axis.plot(*zip(*chosen, strict=True), marker, color=f"C{place}", alpha=0.6, label=label)
        axis.set(xscale="log", yscale="log", xlim=span, title=title)
        axis.set(xlabel="FLOP a byte of ideal work", ylabel="TFLOP/s")
        axis.grid(which="both", alpha=0.2)
        axis.legend()


def draw_scaling(infos: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Median milliseconds over the side of the images and over their number, a line for each candidate.

    ``infos`` have ``candidate``, ``pixels``, ``batch`` and ``median_seconds``. Over the side at the batch that was
    measured at most sizes, over the batch at the size that was measured at most batches.
    """
    with _figure(path, (WIDTH_INCHES, 4.0)) as figure:
        for axis, name, other in zip(figure.subplots(1, 2), ("pixels", "batch"), ("batch", "pixels"), strict=True):
            fixed = _most_varied(infos, name, other)
            chosen = [info for info in infos if info[other] == fixed]
            for candidate in dict.fromkeys(info["candidate"] for info in infos):
                points = {info[name]: info["median_seconds"] * 1e3 for info in chosen if info["candidate"] == candidate}
                axis.plot(*zip(*sorted(points.items()), strict=True) if points else ([], []), "o-", label=candidate)
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms", title=f"{other} {fixed}")
            axis.set_xticks(ticks := sorted({info[name] for info in chosen}), [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axis.legend()
        figure.suptitle(title)


def scales(infos: Iterable[dict[str, Any]]) -> bool:
    """Whether there is more than one size and more than one batch to draw a line through."""
    infos = list(infos)
    return all(len({info[name] for info in infos}) > 1 for name in ("pixels", "batch"))


def _draw_roof(axis: Any, span: tuple[float, float], bandwidth: float, rate: float, colour: str, dtype: str) -> None:
    ridge = rate / bandwidth
    corners = [at for at in (span[0], ridge, span[1]) if span[0] <= at <= span[1]]
    heights = [min(at * bandwidth, rate) / 1e12 for at in corners]
    axis.plot(corners, heights, color=colour, linewidth=1, label=f"{dtype}: {rate / 1e12:.0f} TFLOP/s")


def _most_varied(infos: Sequence[dict[str, Any]], name: str, other: str) -> int:
    """The value of ``other`` at which the most values of ``name`` were measured; the smallest of several."""
    values: dict[int, set[int]] = {}
    for info in infos:
        values.setdefault(info[other], set()).add(info[name])
    return max(sorted(values), key=lambda value: len(values[value]))


@contextmanager
def _figure(path: Path, inches: tuple[float, float]) -> Iterator[Any]:
    """A figure that is saved when the block ends without an error."""
    with import_extra("matplotlib", "training").rc_context(SETTINGS):
        figure = import_extra("matplotlib.figure", "training").Figure(inches, layout="constrained")
        yield figure
        with written_atomically(path) as temporary:
            figure.savefig(temporary, metadata={"Date": None})
