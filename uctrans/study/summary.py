"""What the runs of a study come to: a row for each network and patience, with the ensembles of folds."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from uctrans.data import get_protocol
from uctrans.inference.predictor import transforms_in_words
from uctrans.study.checks import SCORING_DEFAULTS
from uctrans.study.config import StudyConfig, StudyError
from uctrans.study.cost import Cost
from uctrans.study.files import RESULT, EnsembleResult, Outcome, Result, read_record, write_record
from uctrans.study.plan import PlannedRun, Variant, seed_folder
from uctrans.study.report import ALWAYS, TITLES, Row, Table, between
from uctrans.study.schedule import Schedule
from uctrans.study.single import score

ENSEMBLE_FOLDER = "ensemble"


def make_ensembles(config: StudyConfig, schedule: Schedule) -> bool:
    """Score the mean of the folds' probabilities, as the authors of UCTransNet do, for each seed with all its folds.

    What there is of the same runs is kept. Once the time of the call is over nothing more is scored, and False comes
    back where there would have been.
    """
    for variant, patience, seed in _groups(config):
        members = _members(schedule, variant, patience, seed)
        if members and _read_ensemble(config, members, patience) is None:
            if schedule.budget.is_over:
                return False
            _score_ensemble(config, members, patience)
    return True


def make_table(config: StudyConfig, schedule: Schedule) -> Table | None:
    """The table of what there is so far, None where no run is over yet.

    Raises:
        StudyError: every run failed.
    """
    outcomes = [(run, schedule.of(run)) for run in schedule.plan]
    results = [result for _, found in outcomes for result in found.results.values()]
    if not results:
        failed = [(run, found.failure) for run, found in outcomes if found.failure is not None]
        if len(failed) < len(outcomes):
            return None
        run, failure = failed[0]
        raise StudyError(
            f"all runs failed, the first, {run.name}: {failure.finding}. "
            "Name another output folder and give other settings, such as a lower learning_rate"
        )
    return Table(
        [
            _row(config, schedule, variant, patience, [each for each in outcomes if each[0].variant == variant])
            for variant in config.variants()
            for patience in config.patiences
        ],
        scored_on=f"the {between([result.images for result in results])} test images, scored at {_scored_at(results)}",
        step=_alternatives(
            f"batch {run.config.batch_size}, {'float32' if run.config.amp == 'no' else run.config.amp}"
            for run in schedule.plan
        ),
        image_size=_alternatives(_pixels(run) for run in schedule.plan),
        remarks=[
            *_remark_on_transforms(outcomes),
            *_remark_on_instance_maps(results),
            *_remark_on_starts(config),
            *_remark_on_cosines(outcomes),
        ],
        baseline=config.baseline,
    )


def _row(
    config: StudyConfig,
    schedule: Schedule,
    variant: Variant,
    patience: int,
    outcomes: list[tuple[PlannedRun, Outcome]],
) -> Row:
    scored = [(run, found.results[patience]) for run, found in outcomes if patience in found.results]
    unscored = [(run, found.failure) for run, found in outcomes if patience not in found.results]
    failed = {run.label: failure.finding for run, failure in unscored if failure is not None}
    validation = [result.validation["dice"] for _, result in scored if result.validation.get("dice") is not None]
    columns = {
        name: [result.scores[name] for _, result in scored]
        for name in TITLES
        if scored and all(result.scores.get(name) is not None for _, result in scored)
    }
    found = [
        _read_ensemble(config, members, patience)
        for seed in config.seed_list
        if (members := _members(schedule, variant, patience, seed))
    ]
    ensembles = [ensemble.scores for ensemble in found if ensemble is not None]
    cost: Cost = schedule.costs[variant.name]
    return Row(
        variant.name,
        variant.model,
        patience,
        [run.seed for run, _ in scored],
        columns,
        cost,
        folds=[run.fold for run, _ in scored if run.fold is not None],
        failed=failed,
        missing=len(unscored) - len(failed),
        ensembles={name: [scores[name] for scores in ensembles] for name in ALWAYS} if ensembles else {},
        validation=validation,
        effects=_effects(schedule, scored, config.baseline, patience),
    )


def _effects(
    schedule: Schedule, scored: list[tuple[PlannedRun, Result]], baseline: str | None, patience: int
) -> list[float]:
    """Differences in validation Dice from the baseline with the same seed and fold, where both are scored alike."""
    others = {(run.seed, run.fold): run for run in schedule.plan if run.variant.name == baseline}
    effects = []
    for run, result in scored:
        if run.variant.name == baseline or not others:
            continue
        other = schedule.of(others[run.seed, run.fold]).results.get(patience)
        if other is None or _size_of(result) != _size_of(other):
            continue
        pair = [each.validation.get("dice") for each in (result, other)]
        if None not in pair:
            effects.append(pair[0] - pair[1])
    return effects


def _scored_at(results: list[Result]) -> str:
    """The pixels that were counted; by variant where they are not the same for all."""
    sizes = {result.variant: _size_of(result) for result in results}
    if len(set(sizes.values())) == 1:
        return sizes[results[0].variant]
    return "different sizes, so they do not compare: " + "; ".join(f"{name} at {size}" for name, size in sizes.items())


def _size_of(result: Result) -> str:
    # Former results call the protocols by two names, though they resize alike.
    return result.scored_at.replace("augmented-224", "uctransnet-224")


def _pixels(run: PlannedRun) -> str:
    height, width = get_protocol(run.config.protocol, run.config.image_size).image_size
    return f"{height} x {width}"


def _alternatives(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def _groups(config: StudyConfig) -> list[tuple[Variant, int, int]]:
    """What an ensemble may be of: network, patience and seed."""
    return [
        (variant, patience, seed)
        for seed in config.seed_list
        for variant in config.variants()
        for patience in config.patiences
    ]


def _members(schedule: Schedule, variant: Variant, patience: int, seed: int) -> list[tuple[PlannedRun, Result]]:
    """The runs of all folds with their results; none where one of them has no result, or there is one fold only."""
    runs = [run for run in schedule.plan if (run.variant, run.seed) == (variant, seed) and run.fold is not None]
    results = [schedule.of(run).results.get(patience) for run in runs]
    return list(zip(runs, results, strict=True)) if len(runs) > 1 and None not in results else []


def _dice_of(members: list[tuple[PlannedRun, Result]]) -> dict[str, float]:
    return {run.folder.name: result.scores["dice"] for run, result in members}


def _read_ensemble(
    config: StudyConfig, members: list[tuple[PlannedRun, Result]], patience: int
) -> EnsembleResult | None:
    """What there is of an ensemble; None where there is nothing, or it is of runs that were trained anew since."""
    path = _ensemble_folder(config, members, patience) / RESULT
    ensemble = read_record(path, EnsembleResult) if path.exists() else None
    if ensemble is None or ensemble.members != _dice_of(members):
        return None
    return ensemble if SCORING_DEFAULTS | ensemble.scored == members[0][0].scored else None


def _score_ensemble(config: StudyConfig, members: list[tuple[PlannedRun, Result]], patience: int) -> None:
    folder, first = _ensemble_folder(config, members, patience), members[0][0]
    scores = score(",".join(str(run.at(patience)) for run, _ in members), first, config, folder / "test")
    print(
        f"ensemble of {len(members)} folds: {first.variant.name}, seed {first.seed}, patience {patience}: "
        f"Dice {scores.mean['dice']:.4f}",
        flush=True,
    )
    write_record(folder / RESULT, EnsembleResult(scores.mean, first.scored, _dice_of(members)))


def _ensemble_folder(config: StudyConfig, members: list[tuple[PlannedRun, Result]], patience: int) -> Path:
    run = members[0][0]
    return seed_folder(config.output, run.variant, run.seed) / ENSEMBLE_FOLDER / f"patience_{patience}"


def _remark_on_transforms(outcomes: list[tuple[PlannedRun, Outcome]]) -> list[str]:
    """Of which rows each probability is a mean over flips; nothing where none is."""
    words = {run.variant.name: transforms_in_words(run.scored["score_tta"]) for run, _ in outcomes}
    if not any(words.values()):
        return []
    if len(set(words.values())) == 1:
        return [f"Each probability is {next(iter(words.values()))}."]
    averaged = [f"{name}, {text}" for name, text in words.items() if text]
    return [f"Each probability is one prediction, but of {'; '.join(averaged)}."]


def _remark_on_instance_maps(results: list[Result]) -> list[str]:
    """Over which test images AJI and PQ go; nothing where it is all, as with Dice, or there are no such scores."""
    scored = [result for result in results if result.scores.get("aji") is not None]
    counts = [result.counts.get("aji") for result in scored]
    if not scored or counts == [result.images for result in scored]:
        return []
    number = "their number was not kept" if None in counts else f"{between(counts)} of {scored[0].images}"
    return [f"AJI and PQ: each run's is the mean over the test images with an instance map, {number}."]


def _remark_on_starts(config: StudyConfig) -> list[str]:
    """Where the rows of smaller patiences are not what a study with these alone would give."""
    names = [variant.name for variant in config.variants() if variant.from_unet]
    if not names or len(config.patiences) == 1:
        return []
    return [f"{', '.join(names)}: starts at every patience from the U-Net of patience {config.patiences[-1]}."]


def _remark_on_cosines(outcomes: list[tuple[PlannedRun, Outcome]]) -> list[str]:
    """How many runs early stopping ended in the midst of the one fall of their learning rate."""
    ends = [
        (run.variant.name, result.stopped_by)
        for run, found in outcomes
        if run.config.restart_period is None
        for result in found.results.values()
    ]
    stopped = Counter(name for name, stopped_by in ends if stopped_by == "early stopping")
    all_ends = Counter(name for name, _ in ends)
    counts = ", ".join(f"{number} of {all_ends[name]} of {name}" for name, number in stopped.items())
    return [f"Stopped early, before their learning rate had fallen to its end: {counts}."] if counts else []
