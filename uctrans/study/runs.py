"""The runs of a study: train and score what is not finished yet, then write table, chart, picture and best weights.

A study goes on where it was stopped. What is finished is kept if it was made with the same settings, and refused if
not. A run whose training diverges fails alone: the study keeps the reason, goes on, and leaves it out of the table.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from uctrans.extras import import_extra
from uctrans.sharing import upload_command
from uctrans.study.best import best_runs
from uctrans.study.checks import check_study, folds_of
from uctrans.study.comparison import draw_comparison
from uctrans.study.config import FOLDS, ModelStudyConfig, SkipStudyConfig, StudyConfig, StudyError
from uctrans.study.cost import Cost, measure
from uctrans.study.files import (
    CHART,
    COMPARISON,
    COST,
    MARKDOWN,
    MARKER,
    TABLE,
    WEIGHTS,
    Marker,
    MeasuredCost,
    read_record,
    write_record,
)
from uctrans.study.lock import only_call
from uctrans.study.plan import PlannedRun, variant_folder
from uctrans.study.processes import run_here, run_in_processes
from uctrans.study.recipe import RecipeStudyConfig
from uctrans.study.report import Table, between
from uctrans.study.schedule import Budget, Schedule
from uctrans.study.sharing import share_best
from uctrans.study.summary import make_ensembles, make_table
from uctrans.training.signals import TIME_IS_UP
from uctrans.writing import written_atomically

SIGNALS = ("SIGINT", "SIGTERM")


@dataclass(frozen=True)
class StudyResult:
    """How a study ended; ``str()`` of it is what to print.

    Attributes:
        output: its folder.
        table: what it found so far, None when a signal stopped it, or the time was up before the first run was over.
        stopped_by: "", "SIGINT", "SIGTERM", or "time" where its minutes were over.
        finished: runs that are finished.
        failed: runs whose training diverged.
        total: runs of the study.
    """

    output: Path
    table: Table | None
    stopped_by: str
    finished: int
    failed: int
    total: int

    def __str__(self) -> str:
        """The table, and how to go on where there are runs left."""
        parts = [] if self.table is None else ["", self.table.markdown(), "", *self._files()]
        if self.stopped_by:
            done = f"{self.finished} of {self.total} runs finished"
            done += f", {self.failed} failed" if self.failed else ""
            cause = "The time is up" if self.stopped_by == TIME_IS_UP else f"Stopped by {self.stopped_by}"
            parts.append(f"{cause}, {done}; the same command goes on.")
        return "\n".join(parts)

    def _files(self) -> list[str]:
        names = [TABLE, MARKDOWN, CHART, *([COMPARISON] if (self.output / COMPARISON).exists() else [])]
        lines = [f"Table and pictures are in {self.output}: {', '.join(names)}"]
        if (weights := self.output / WEIGHTS).is_dir():
            lines += [
                f"The weights of the best run of each network, by validation Dice, are in {weights}, with a card each;",
                f"--license names their licence. To share one: {upload_command(weights / 'NAME', 'NAME')}",
            ]
        return lines


def study_skips(config: SkipStudyConfig) -> StudyResult:
    """Train the U-Net with none of its skips, all, each alone and all but one, over the seeds; see `study_models`."""
    return _study(config, "skips")


def study_models(config: ModelStudyConfig) -> StudyResult:
    """Train several networks with the same settings over the seeds and compare their scores on the test images.

    Called again it goes on where it was stopped; more seeds, models or larger patiences may be asked for then, and
    settings may change that change no result, such as the device or where the data lie. Parameters, time and memory of
    a training step are measured once for each network and stay those of the device they were measured on.

    Raises:
        StudyError: the output folder holds something else, results of other settings or images, or a damaged file,
            every run failed, or a process of a run died.
        ConfigError, DataError, CheckpointError: as for ``uctrans.training.train``.
        TrainingError: a log cannot be written, or a step cannot be recorded as a CUDA graph.
        ImportError: a package of the extra "training" is missing.
    """
    return _study(config, "models")


def study_recipes(config: RecipeStudyConfig) -> StudyResult:
    """Train one network in several ways over the seeds and compare their scores, run by run; see `study_models`."""
    return _study(config, "recipes")


def _study(config: StudyConfig, kind: str) -> StudyResult:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise StudyError("a study is started without torchrun; with processes it has several runs at a time")
    for package in ("matplotlib", "monai"):  # a missing one is told before the work, not after it
        import_extra(package, "training")
    if config.threads is not None:  # for what is only scored here; a training sets them itself
        torch.set_num_threads(config.threads)
    budget = Budget(None if config.minutes is None else 60 * config.minutes)
    folder, plan = Path(config.output), config.plan()
    marker = check_study(config, kind, plan)
    _tell_cosines_without_an_end(config, plan)
    folder.mkdir(parents=True, exist_ok=True)
    with only_call(folder):
        write_record(folder / MARKER, marker)
        if isinstance(config.cross_validation, int):
            _keep_folds(config)
        return _train_and_tell(config, plan, marker, budget)


def _train_and_tell(config: StudyConfig, plan: list[PlannedRun], marker: Marker, budget: Budget) -> StudyResult:
    """Do the runs that are not over, then write what there is."""
    folder = Path(config.output)
    costs = {run.variant.name: _cost(run, config) for run in plan[: len(config.variants())]}
    schedule = Schedule(plan, costs, budget, config.processes)
    stopped_by = (run_here if config.processes == 1 else run_in_processes)(schedule, config)
    if stopped_by in SIGNALS:
        return _study_result(folder, None, stopped_by, schedule)
    is_complete = make_ensembles(config, schedule) and len(schedule.ended) == len(plan)
    table = make_table(config, schedule)
    if table is not None:
        table.write_csv(folder / TABLE)
        table.write_markdown(folder / MARKDOWN)
        table.draw(folder / CHART)
        best = best_runs(config, schedule)
        share_best(config, best, marker.images)
        draw_comparison(config, best, budget)
    if schedule.died:
        raise StudyError(
            f"{len(schedule.died)} runs are not over, their processes are gone: {'; '.join(schedule.died.values())}. "
            f"The others are in the table in {folder}; the same command tries these again, with fewer processes where "
            "memory was short"
        )
    return _study_result(folder, table, "" if is_complete else TIME_IS_UP, schedule)


def _tell_cosines_without_an_end(config: StudyConfig, plan: list[PlannedRun]) -> None:
    """Print a line where early stopping may end trainings long before their learning rate has fallen."""
    runs = plan[: len(config.variants())]
    early = [run for run in runs if run.config.restart_period is None and config.patiences[0] < run.config.epochs]
    if early:
        print(
            f"{', '.join(run.variant.name for run in early)}: the learning rate falls once, over all of "
            f"{between([run.config.epochs for run in early])} epochs, and a patience of {config.patiences[0]} may stop "
            "a run long before; for the whole fall give epochs, and as much patience",
            flush=True,
        )


def _study_result(folder: Path, table: Table | None, stopped_by: str, schedule: Schedule) -> StudyResult:
    finished = len(schedule.ended) - schedule.failed
    return StudyResult(folder, table, stopped_by, finished, schedule.failed, len(schedule.plan))


def _keep_folds(config: StudyConfig) -> None:
    with written_atomically(Path(config.output) / FOLDS) as temporary:
        temporary.write_text(json.dumps({"folds": folds_of(config)}, indent=2) + "\n", encoding="utf-8")


def _cost(run: PlannedRun, config: StudyConfig) -> Cost:
    """The cost of a variant, as it was measured first: its time is not of the device where the study goes on."""
    path = variant_folder(config.output, run.variant) / COST
    if not path.exists():
        print(f"measuring a training step of {run.variant.name}", flush=True)
        fresh = dataclasses.replace(run.config, init_from=None)  # the U-Net is not trained yet
        write_record(path, MeasuredCost(measure(fresh), fresh.to_dict()))
    return read_record(path, MeasuredCost).cost
