"""The runs of a study: train and score what is not finished yet, then write the table and the chart.

    OUTPUT/study.json                       which study this is
    OUTPUT/table.csv  table.md  chart.png   written at the end
    OUTPUT/runs/VARIANT/cost.json           parameters, operations, time and memory of a training step
    OUTPUT/runs/VARIANT/seed_N/             a run folder of uctrans train, beside it
                        test/               the evaluation of its best weights on the test images
                        result.json         the mean scores; there once the run is finished

A study goes on where it was stopped. What is finished is kept if it was made with the same settings, and refused if
not.
"""

import dataclasses
import inspect
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uctrans.data import find_samples, get_protocol, load_folds
from uctrans.extras import import_extra
from uctrans.inference import EvaluateConfig, evaluate
from uctrans.inference.files import write_json
from uctrans.models.registry import model_class
from uctrans.study.config import ModelStudyConfig, SkipStudyConfig, StudyConfig, StudyError, Variant, variant_folder
from uctrans.study.cost import Cost, measure
from uctrans.study.report import Row, Table
from uctrans.training import TrainConfig, load_checkpoint, train
from uctrans.training.logs import read_metrics

MARKER, RESULT, COST = "study.json", "result.json", "cost.json"
TABLE, MARKDOWN, CHART = "table.csv", "table.md", "chart.png"
FREE = ("output", "resume", "progress", "save_minutes")  # settings that change nothing in the table
SIGNALS = ("SIGINT", "SIGTERM")


@dataclass(frozen=True)
class StudyResult:
    """How a study ended; ``str()`` of it is what to print.

    Attributes:
        output: its folder.
        table: what it found, None when a signal stopped it.
        stopped_by: "", "SIGINT" or "SIGTERM".
        finished: runs that are finished.
        total: runs of the study.
    """

    output: Path
    table: Table | None
    stopped_by: str
    finished: int
    total: int

    def __str__(self) -> str:
        """The table, or how to go on."""
        if self.table is None:
            done = f"{self.finished} of {self.total} runs finished"
            return f"Stopped by {self.stopped_by}, {done}; the same command goes on."
        return f"\n{self.table.markdown()}\n\nTable and chart are in {self.output}: {TABLE}, {MARKDOWN}, {CHART}"


@dataclass(frozen=True)
class _PlannedRun:
    variant: Variant
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def study_skips(config: SkipStudyConfig) -> StudyResult:
    """Train the U-Net with none of its skips, all, each alone and all but one, over the seeds; see `study_models`."""
    return _study(config, "skips")


def study_models(config: ModelStudyConfig) -> StudyResult:
    """Train several networks with the same settings over the seeds and compare their scores on the test images.

    Called again it goes on where it was stopped; more seeds or models may be asked for then.

    Raises:
        StudyError: the output folder holds something else, or results of other settings.
        ConfigError, DataError, CheckpointError, TrainingError: as for ``uctrans.training.train``.
        ImportError: a package of the extra "training" is missing.
    """
    return _study(config, "models")


def _study(config: StudyConfig, kind: str) -> StudyResult:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise StudyError("a study runs in one process: start it without torchrun")
    for package in ("matplotlib", "monai"):  # a missing one is told before the work, not after it
        import_extra(package, "training")
    folder, variants = Path(config.output), config.variants()
    _check_folder(folder, kind)
    find_samples(config.data, "test")
    _check_folds(config)
    # Seed by seed: where a study is stopped, its networks have had about the same number of runs.
    plan = [_PlannedRun(variant, seed, config.run(variant, seed)) for seed in config.seed_list for variant in variants]
    for run in plan:
        _check_run(run, config)
    for run in plan[: len(variants)]:
        _check_cost(run, config)
    write_json(folder / MARKER, {"study": kind})

    costs = {run.variant.name: _cost(run, config) for run in plan[: len(variants)]}
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for run in plan:
        was_finished = (run.folder / RESULT).exists()
        if not was_finished and (signal := _train_and_score(run, config)):
            return StudyResult(folder, None, signal, len(results), len(plan))
        results[run.variant.name, run.seed] = _read_json(run.folder / RESULT, "scores", "scored", "seconds")
        print(_progress(run, plan, results, costs, was_finished), flush=True)
    table = _table(config, variants, results, costs)
    table.write_csv(folder / TABLE)
    table.write_markdown(folder / MARKDOWN)
    table.draw(folder / CHART)
    return StudyResult(folder, table, "", len(plan), len(plan))


def _check_folder(folder: Path, kind: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"output: {folder} is a file; name a folder")
    if (folder / MARKER).exists():
        found = _read_json(folder / MARKER, "study")["study"]
        if found != kind:
            raise StudyError(f"output: {folder} holds another study, of {found}; name another folder")
    elif folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise StudyError(f"output: {folder} holds files that no study wrote; name a new or empty folder")


def _check_folds(config: StudyConfig) -> None:
    if config.cross_validation is None:
        return
    count, highest = len(load_folds(config.cross_validation, config.data)), max(config.seed_list)
    if highest >= count:
        raise StudyError(
            f"seeds: {config.cross_validation} has {count} folds and none for seed {highest}; "
            f"give seeds of 0 to {count - 1}"
        )


def _check_run(run: _PlannedRun, config: StudyConfig) -> None:
    """Raise StudyError where a finished or interrupted run was made with other settings."""
    file, checkpoint = run.folder / "config.yaml", run.folder / "last.pt"
    if file.exists():
        _refuse_other_settings(run.folder, TrainConfig.load_yaml(file).to_dict(), run.config.to_dict())
    elif checkpoint.exists():
        _refuse_other_settings(run.folder, load_checkpoint(checkpoint)["train_config"], run.config.to_dict())
    if (run.folder / RESULT).exists():
        _refuse_other_settings(
            run.folder, _read_json(run.folder / RESULT, "scores", "scored", "seconds")["scored"], _scoring(config)
        )


def _check_cost(run: _PlannedRun, config: StudyConfig) -> None:
    path = variant_folder(config.output, run.variant) / COST
    if path.exists():
        before = _read_json(path, "settings", "cost")["settings"]
        _refuse_other_settings(path, before, run.config.to_dict() | {"seed": before["seed"], "fold": before["fold"]})


def _refuse_other_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = [name for name in {**before, **now} if name not in FREE and before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names)
        raise StudyError(
            f"{path}: was made with other settings: {changes}. Give the former ones, or name another output folder"
        )


def _scoring(config: StudyConfig) -> dict[str, str]:
    return {"score_size": config.score_size, "score_resolution": config.score_resolution}


def _cost(run: _PlannedRun, config: StudyConfig) -> Cost:
    path = variant_folder(config.output, run.variant) / COST
    if not path.exists():
        print(f"measuring a training step of {run.variant.name}", flush=True)
        write_json(path, {"cost": asdict(measure(run.config)), "settings": run.config.to_dict()})
    return Cost(**_read_json(path, "settings", "cost")["cost"])


def _train_and_score(run: _PlannedRun, config: StudyConfig) -> str:
    """Write the result of a run; return "", or the name of the signal that stopped the training."""
    # A training that ended before its scores were written goes on too, and ends at once.
    trained = train(dataclasses.replace(run.config, resume=(run.folder / "last.pt").exists()))
    if trained.stopped_by in SIGNALS:
        return trained.stopped_by
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
    seconds = sum(row["seconds"] for row in read_metrics(run.folder / "metrics.csv")) + time.perf_counter() - started
    result = {
        "variant": run.variant.name,
        "seed": run.seed,
        "scores": scores.mean,
        "images": len(scores.rows),
        "scored_at": scores.scored_at,
        "scored": _scoring(config),
        "best_epoch": trained.best_epoch,
        "epochs": trained.epochs,
        "stopped_by": trained.stopped_by,
        "seconds": seconds,
    }
    write_json(run.folder / RESULT, result)
    return ""


def _progress(
    run: _PlannedRun,
    plan: list[_PlannedRun],
    results: dict[tuple[str, int], dict[str, Any]],
    costs: dict[str, Cost],
    was_finished: bool,
) -> str:
    """The line about a run just finished; what remains is estimated from the finished runs and the time of a step."""
    result = results[run.variant.name, run.seed]
    line = (
        f"run {len(results)} of {len(plan)}: {run.variant.name}, seed {run.seed}: Dice {result['scores']['dice']:.4f}"
    )
    line += f", {_duration(result['seconds'])}" + (" (finished before)" if was_finished else "")
    spent = sum(finished["seconds"] for finished in results.values())
    steps_spent = sum(costs[name].seconds_a_step for name, _ in results)
    open_runs = [
        other
        for other in plan
        if (other.variant.name, other.seed) not in results and not (other.folder / RESULT).exists()
    ]
    if open_runs:
        remaining = spent / steps_spent * sum(costs[other.variant.name].seconds_a_step for other in open_runs)
        line += f"; about {_duration(remaining)} to go"
    return line


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"


def _table(
    config: StudyConfig,
    variants: list[Variant],
    results: dict[tuple[str, int], dict[str, Any]],
    costs: dict[str, Cost],
) -> Table:
    rows = []
    for variant in variants:
        scores = [results[variant.name, seed]["scores"] for seed in config.seed_list]
        common = [name for name in scores[0] if all(each.get(name) is not None for each in scores)]
        columns = {name: [each[name] for each in scores] for name in common}
        rows.append(Row(variant.name, variant.model, config.seed_list, columns, costs[variant.name]))
    first = next(iter(results.values()))
    return Table(
        rows,
        scored_on=f"the {first['images']} test images, scored at {first['scored_at']}",
        step=f"batch {config.batch_size}, {'float32' if config.amp == 'no' else config.amp}",
        image_size=get_protocol(config.protocol, config.image_size).image_size,
    )


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The content of one of the study's files; StudyError where it is damaged."""
    remedy = "delete it, and the same command makes it anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path}: is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise StudyError(f"{path}: lacks {', '.join(keys)}, so no study wrote it; {remedy}")
    return content
