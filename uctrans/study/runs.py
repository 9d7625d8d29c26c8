"""The runs of a study: train and score what is not finished yet, then write the table and the chart.

A study goes on where it was stopped. What is finished is kept if it was made with the same settings, and refused if
not. A run whose training diverges fails alone: the study keeps the reason, goes on, and leaves it out of the table.
"""

import dataclasses
import inspect
import os
import time
from dataclasses import dataclass
from pathlib import Path

from uctrans.data import get_protocol
from uctrans.extras import import_extra
from uctrans.inference import EvaluateConfig, evaluate
from uctrans.models import ModelFileError
from uctrans.models.registry import model_class
from uctrans.study.checks import anew, check_study, scoring
from uctrans.study.config import ModelStudyConfig, PlannedRun, SkipStudyConfig, StudyConfig, StudyError, variant_folder
from uctrans.study.cost import Cost, measure
from uctrans.study.files import (
    CHART,
    COST,
    FAILURE,
    MARKDOWN,
    MARKER,
    RESULT,
    TABLE,
    Failure,
    MeasuredCost,
    Result,
    outcome,
    read_record,
    write_record,
)
from uctrans.study.report import TITLES, Row, Table, between
from uctrans.training import RunResult, TrainConfig, TrainingError, load_checkpoint, train
from uctrans.training.checkpoint import save_checkpoint
from uctrans.training.logs import read_metrics

SIGNALS = ("SIGINT", "SIGTERM")
PLACED_BY_THE_STUDY = ("data", "compile")  # free in a study, though train keeps them when it resumes


@dataclass(frozen=True)
class _EndedRun:
    run: PlannedRun
    outcome: Result | Failure


@dataclass(frozen=True)
class StudyResult:
    """How a study ended; ``str()`` of it is what to print.

    Attributes:
        output: its folder.
        table: what it found, None when a signal stopped it.
        stopped_by: "", "SIGINT" or "SIGTERM".
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
        """The table, or how to go on."""
        if self.table is None:
            done = f"{self.finished} of {self.total} runs finished"
            done += f", {self.failed} failed" if self.failed else ""
            return f"Stopped by {self.stopped_by}, {done}; the same command goes on."
        return f"\n{self.table.markdown()}\n\nTable and chart are in {self.output}: {TABLE}, {MARKDOWN}, {CHART}"


def study_skips(config: SkipStudyConfig) -> StudyResult:
    """Train the U-Net with none of its skips, all, each alone and all but one, over the seeds; see `study_models`."""
    return _study(config, "skips")


def study_models(config: ModelStudyConfig) -> StudyResult:
    """Train several networks with the same settings over the seeds and compare their scores on the test images.

    Called again it goes on where it was stopped; more seeds or models may be asked for then, and settings may change
    that change no result, such as the device or where the data lie. Parameters, time and memory of a training step are
    measured once for each network and stay those of the device they were measured on.

    Raises:
        StudyError: the output folder holds something else, results of other settings or images, or a damaged file, or
            every run failed.
        ConfigError, DataError, CheckpointError: as for ``uctrans.training.train``.
        TrainingError: a log cannot be written, or a step cannot be recorded as a CUDA graph.
        ImportError: a package of the extra "training" is missing.
    """
    return _study(config, "models")


def _study(config: StudyConfig, kind: str) -> StudyResult:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise StudyError("a study runs in one process: start it without torchrun")
    for package in ("matplotlib", "monai"):  # a missing one is told before the work, not after it
        import_extra(package, "training")
    folder, plan = Path(config.output), config.plan()
    write_record(folder / MARKER, check_study(config, kind, plan))

    costs = {run.variant.name: _cost(run, config) for run in plan[: len(config.variants())]}
    ended: list[_EndedRun] = []
    for run in plan:
        was_over = outcome(run.folder) is not None
        if not was_over and (signal := _train_and_score(run, config)):
            return _study_result(folder, None, signal, ended, plan)
        ended.append(_EndedRun(run, outcome(run.folder)))
        print(_progress(ended, plan, costs, was_over), flush=True)
    table = _table(config, ended, costs)
    table.write_csv(folder / TABLE)
    table.write_markdown(folder / MARKDOWN)
    table.draw(folder / CHART)
    return _study_result(folder, table, "", ended, plan)


def _study_result(
    folder: Path, table: Table | None, stopped_by: str, ended: list[_EndedRun], plan: list[PlannedRun]
) -> StudyResult:
    failed = sum(isinstance(each.outcome, Failure) for each in ended)
    return StudyResult(folder, table, stopped_by, len(ended) - failed, failed, len(plan))


def _cost(run: PlannedRun, config: StudyConfig) -> Cost:
    """The cost of a variant, as it was measured first: its time is not of the device where the study goes on."""
    path = variant_folder(config.output, run.variant) / COST
    if not path.exists():
        print(f"measuring a training step of {run.variant.name}", flush=True)
        write_record(path, MeasuredCost(measure(run.config), run.config.to_dict()))
    return read_record(path, MeasuredCost).cost


def _train_and_score(run: PlannedRun, config: StudyConfig) -> str:
    """Write the result or the failure of a run; return "", or the name of the signal that stopped the training."""
    try:
        trained = train(_begun_or_interrupted(run))
    except TrainingError as error:
        if error.__cause__ is not None:  # a file or the device, which would fail the other runs too
            raise
        write_record(run.folder / FAILURE, Failure(run.variant.name, run.seed, str(error)))
        return ""
    if trained.stopped_by in SIGNALS:
        return trained.stopped_by
    try:
        write_record(run.folder / RESULT, _score(run, config, trained))
    except ModelFileError as error:
        raise StudyError(f"{run.folder}: its best weights cannot be read; {anew(run.folder)} ({error})") from error
    return ""


def _begun_or_interrupted(run: PlannedRun) -> TrainConfig:
    """The configuration that begins a run or goes on with it, also where its data lie in another folder now."""
    path = run.folder / "last.pt"
    if not path.exists():
        return run.config
    checkpoint, now = load_checkpoint(path), run.config.to_dict()
    placed = {name: now[name] for name in PLACED_BY_THE_STUDY}
    if checkpoint["train_config"] | placed != checkpoint["train_config"]:
        checkpoint["train_config"] |= placed
        save_checkpoint(path, checkpoint)
    # A training that ended before its scores were written goes on too, and ends at once.
    return dataclasses.replace(run.config, resume=True)


def _score(run: PlannedRun, config: StudyConfig, trained: RunResult) -> Result:
    has_backends = "backend" in inspect.signature(model_class(run.variant.model)).parameters
    started = time.perf_counter()
    scores = evaluate(
        EvaluateConfig(
            model=str(run.folder),
            data=run.config.data,
            output=str(run.folder / "test"),
            size=config.score_size,
            resolution=config.score_resolution,
            batch_size=config.batch_size,
            backend=config.backend if has_backends else "auto",
            device=config.device,
            overwrite=True,
            progress=config.progress,
        )
    )
    training = sum(row["seconds"] for row in read_metrics(run.folder / "metrics.csv"))
    return Result(
        variant=run.variant.name,
        seed=run.seed,
        scores=scores.mean,
        counts=scores.count,
        images=len(scores.rows),
        scored_at=scores.scored_at,
        scored=scoring(config),
        best_epoch=trained.best_epoch,
        epochs=trained.epochs,
        stopped_by=trained.stopped_by,
        seconds=training + time.perf_counter() - started,
    )


def _progress(ended: list[_EndedRun], plan: list[PlannedRun], costs: dict[str, Cost], was_over: bool) -> str:
    """The line about the last run that ended; what remains is estimated from finished runs and the time of a step."""
    run, last = ended[-1].run, ended[-1].outcome
    line = f"run {len(ended)} of {len(plan)}: {run.variant.name}, seed {run.seed}: "
    if isinstance(last, Failure):
        line += f"failed{' before' if was_over else ''}, {last.finding}; to try it again, delete {run.folder}"
    else:
        line += f"Dice {last.scores['dice']:.4f}, {_duration(last.seconds)}"
        line += " (finished before)" if was_over else ""
    finished = [each for each in ended if isinstance(each.outcome, Result)]
    open_runs = [other for other in plan[len(ended) :] if outcome(other.folder) is None]
    if finished and open_runs:
        spent = sum(each.outcome.seconds for each in finished)
        steps_spent = sum(costs[each.run.variant.name].seconds_a_step for each in finished)
        remaining = spent / steps_spent * sum(costs[other.variant.name].seconds_a_step for other in open_runs)
        line += f"; about {_duration(remaining)} to go"
    return line


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"


def _table(config: StudyConfig, ended: list[_EndedRun], costs: dict[str, Cost]) -> Table:
    results = [each.outcome for each in ended if isinstance(each.outcome, Result)]
    if not results:
        first = ended[0]
        raise StudyError(
            f"all runs failed, the first, {first.run.variant.name}, seed {first.run.seed}: {first.outcome.finding}. "
            "Name another output folder and give other settings, such as a lower learning_rate"
        )
    rows = []
    for variant in config.variants():
        own = [each for each in ended if each.run.variant == variant]
        failed = {each.run.seed: each.outcome.finding for each in own if isinstance(each.outcome, Failure)}
        scored = {each.run.seed: each.outcome.scores for each in own if isinstance(each.outcome, Result)}
        columns = {
            name: [scores[name] for scores in scored.values()]
            for name in TITLES
            if scored and all(scores.get(name) is not None for scores in scored.values())
        }
        rows.append(Row(variant.name, variant.model, list(scored), columns, costs[variant.name], failed))
    return Table(
        rows,
        scored_on=f"the {between([result.images for result in results])} test images, scored at {results[0].scored_at}",
        step=f"batch {config.batch_size}, {'float32' if config.amp == 'no' else config.amp}",
        image_size=get_protocol(config.protocol, config.image_size).image_size,
        remark=_remark_on_instance_maps(results),
    )


def _remark_on_instance_maps(results: list[Result]) -> str:
    """Over which test images AJI and PQ go; "" where it is all, as with Dice, or where there are no such scores."""
    scored = [result for result in results if result.scores.get("aji") is not None]
    counts = [result.counts.get("aji") for result in scored]
    if not scored or counts == [result.images for result in scored]:
        return ""
    number = "their number was not kept" if None in counts else f"{between(counts)} of {scored[0].images}"
    return f"AJI and PQ: each run's is the mean over the test images with an instance map, {number}."
