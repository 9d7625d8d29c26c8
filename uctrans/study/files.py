"""The files of a study beside its run folders, and how they are read again.

    OUTPUT/study.json                       which study this is, and of which images
    OUTPUT/folds.json                       the folds, where the study makes them
    OUTPUT/table.csv  table.md  chart.png   written at the end
    OUTPUT/comparison.png  comparison.json  test images with what the best run of each network makes of them
    OUTPUT/weights/VARIANT/                 the weights of that run, to be shared
    OUTPUT/runs/VARIANT/cost.json           parameters, operations, time and memory of a training step
    OUTPUT/runs/VARIANT/seed_N/             a run folder of uctrans train, beside it
                        failed.json         why training diverged, where it did
                        patience_P/best/    the best weights where this patience stopped the training
                        patience_P/test/    their evaluation on the test images
                        patience_P/validation/    and on those that training was validated on
                        patience_P/result.json    the mean scores; there once the run is finished
    OUTPUT/runs/VARIANT/seed_N/fold_K/      the same in cross-validation, beside them
    A variant that differs from another in scoring alone has its patience_P/ only: it takes the other's weights, is
    scored anew where these were trained anew, and fails where that training fails.
    OUTPUT/runs/VARIANT/seed_N/ensemble/patience_P/    test/ and result.json of the mean of the folds' probabilities

A damaged file is named with the remedy.
"""

import dataclasses
import filecmp
import json
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from uctrans.models.base import WEIGHTS_FILE
from uctrans.models.files import BEST_FOLDER
from uctrans.study.config import StudyError
from uctrans.study.cost import Cost
from uctrans.study.plan import PlannedRun
from uctrans.study.report import ALWAYS
from uctrans.writing import write_json

MARKER, RESULT, FAILURE, COST = "study.json", "result.json", "failed.json", "cost.json"
TABLE, MARKDOWN, CHART = "table.csv", "table.md", "chart.png"
COMPARISON, COMPARED, WEIGHTS = "comparison.png", "comparison.json", "weights"

Record = TypeVar("Record")


@dataclass(frozen=True)
class Marker:
    """What says that a folder holds a study.

    Attributes:
        study: its kind, models or skips.
        images: fingerprint of its images, see `uctrans.study.checks.fingerprint`; None of a study begun before it was
            kept.
        folds: how many the study made itself, None where it did not.
        names_in_folds: digest of their names; None without folds, and of a study begun before it was kept.
    """

    study: str
    images: str | None = None
    folds: int | None = None
    names_in_folds: str | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended, by one of its patiences.

    Attributes:
        variant: which network.
        seed: of the run.
        scores: mean over the test images by score; None where it is defined for none.
        images: number of test images.
        scored_at: the pixels that were counted, in words.
        scored: the settings of scoring.
        best_epoch: the epoch whose weights were scored.
        epochs: complete epochs.
        stopped_by: what ended the training.
        seconds: of training, since its beginning, and scoring.
        counts: test images over which each mean goes; empty of a run that was scored before they were kept.
        validation: mean over the images that training was validated on, scored in the same way; empty likewise.
    """

    variant: str
    seed: int
    scores: dict[str, float | None]
    images: int
    scored_at: str
    scored: dict[str, str]
    best_epoch: int
    epochs: int
    stopped_by: str
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    validation: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self):
        for name in ALWAYS:
            if self.scores.get(name) is None:
                raise ValueError(f"scores lack {name}")


@dataclass(frozen=True)
class EnsembleResult:
    """Scores of the mean of the probabilities of a seed's runs, one on each fold.

    Attributes:
        scores: mean over the test images by score; None where it is defined for none.
        scored: the settings of scoring.
        members: Dice of each run by its folder, which tells whether these are still its runs.
    """

    scores: dict[str, float | None]
    scored: dict[str, str]
    members: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """Why a run has no scores: its training diverged.

    Attributes:
        variant: which network.
        seed: of the run.
        reason: what training said.
    """

    variant: str
    seed: int
    reason: str

    @property
    def finding(self) -> str:
        """The reason without the advice after it, which is for a run on its own."""
        return self.reason.partition(";")[0]


@dataclass(frozen=True)
class MeasuredCost:
    """A cost, and the settings of the run that it was measured with."""

    cost: Cost
    settings: dict[str, Any]


def write_record(path: Path, record: Any) -> None:
    """Write one of the records above to ``path``, atomically."""
    write_json(path, asdict(record))


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a record from ``path``; fields that have a default may be missing.

    Raises:
        StudyError: it is damaged.
    """
    try:
        return _built(kind, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise StudyError(f"{path}: is damaged ({error}); delete it, and the same command makes it anew") from error


@dataclass(frozen=True)
class Outcome:
    """What there is of a run.

    Attributes:
        results: by patience, of those that the study asks for.
        failure: why the training diverged; results at smaller patiences may be there before.
        is_over: whether nothing more is to come.
    """

    results: dict[int, Result]
    failure: Failure | None
    is_over: bool


def outcome(run: PlannedRun) -> Outcome:
    """How far a run has got.

    Raises:
        StudyError: a file that says so is damaged.
    """
    if run.trained_by is not None:
        return _outcome_of_scoring(run, outcome(run.trained_by))
    paths = {patience: run.at(patience) / RESULT for patience in run.patiences}
    results = {patience: read_record(path, Result) for patience, path in paths.items() if path.exists()}
    if len(results) == len(paths):  # where the training diverged later, on the way to a patience not asked for
        return Outcome(results, None, is_over=True)
    path = run.folder / FAILURE
    failure = read_record(path, Failure) if path.exists() else None
    return Outcome(results, failure, is_over=failure is not None)


def _outcome_of_scoring(run: PlannedRun, trained: Outcome) -> Outcome:
    """That of a run which takes the weights of another: its results are those of these weights, and it fails alike."""
    results = {
        patience: read_record(run.at(patience) / RESULT, Result)
        for patience in trained.results
        if (run.at(patience) / RESULT).exists() and _has_weights_of(run.at(patience), run.trained_by.at(patience))
    }
    is_over = trained.is_over and len(results) == len(trained.results)
    failure = dataclasses.replace(trained.failure, variant=run.variant.name) if is_over and trained.failure else None
    return Outcome(results, failure, is_over)


def _has_weights_of(folder: Path, source: Path) -> bool:
    """Tell whether weights are those that lie in ``source`` now, where another training may have replaced them.

    Links and copies are known by their size and time, others by their bytes. Weights that are gone can only be
    believed.
    """
    own, now = (place / BEST_FOLDER / WEIGHTS_FILE for place in (folder, source))
    return not now.exists() or (own.exists() and filecmp.cmp(own, now))


def _built(kind: type[Record], content: Any) -> Record:
    """A dataclass of what its file holds; ValueError says what does not fit."""
    if not isinstance(content, dict):
        raise ValueError("it holds no names with values")
    values = {}
    for item, hint in zip(dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True):
        if item.name not in content:
            if item.default is MISSING and item.default_factory is MISSING:
                raise ValueError(f"it lacks {item.name}")
        elif dataclasses.is_dataclass(hint):
            values[item.name] = _built(hint, content[item.name])
        elif _fits(content[item.name], hint):
            values[item.name] = content[item.name]
        else:
            raise ValueError(f"{item.name} is {content[item.name]!r}")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value out of a JSON file has the type of an annotation."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, typing.get_args(hint)[1]) for item in value.values())
    if hint is float:
        hint = int | float
    return isinstance(value, hint) and not isinstance(value, bool)
