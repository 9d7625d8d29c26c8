"""From a candidate's variants to the one that races: it computes channel attention, and is the fastest that does."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import gate, timing
from .candidates import OPERATOR, Attend, Problem, sdpa_choice, sdpa_on, variants
from .errors import in_short
from .timing import Call, Sample

TRIALS = 5
COMPILED = ", compiled"


@dataclass(frozen=True)
class Entrant:
    """What races: a function, its calls, what times them cold, and notes for the record."""

    function: Callable[..., Tensor]
    calls: Sequence[Call]
    sample: Sample
    notes: dict[str, Any] = field(default_factory=dict)


# Functions of the problem at hand, by candidate and variant: its tests follow each other, and share what is compiled.
_built: dict[tuple[Problem, str], dict[str, Attend]] = {}


def fastest(candidate: str, problem: Problem, passes: str, calls: Sequence[Call]) -> Entrant:
    """The fastest variant of ``candidate`` whose results are right; those that fail are noted with the reason.

    SDPA is tried on each of its backends, and then compiled on the fastest of them.

    Raises:
        RuntimeError: no variant is right; the message says why for each.
    """
    offered = _variants(candidate, problem)
    best: Entrant | None = None
    medians: dict[str, float] = {}
    refused: dict[str, str] = {}

    def enter(name: str) -> None:
        nonlocal best
        try:
            entrant = _entrant(offered[name], problem, passes, calls)
        except Exception as error:  # whatever it is, the others race on and the record says what it was
            refused[name] = in_short(error)
            return
        medians[name] = statistics.median(entrant.sample() for _ in range(TRIALS))
        if min(medians, key=medians.get) == name:
            best = entrant

    for name in list(offered):
        enter(name)
    if candidate == "sdpa" and medians:
        backend = min(medians, key=medians.get).removesuffix(COMPILED)
        if backend + COMPILED not in offered:
            offered[backend + COMPILED] = sdpa_on(backend, problem, compile_it=True)
            enter(backend + COMPILED)
    if best is None:
        raise RuntimeError(f"{candidate} cannot run {problem}: {refused}")
    notes = {
        "variant": min(medians, key=medians.get),
        "variants_seconds": medians,
        "variants_refused": refused,
    }
    if candidate == "sdpa":
        notes["torch_chooses"] = sdpa_choice(problem)
    return Entrant(best.function, best.calls, best.sample, best.notes | notes)


def operator_or_reason(problem: Problem, passes: str, calls: Sequence[Call]) -> Entrant | str:
    """The operator as an opponent, or why it cannot run: the others are then timed alone."""
    try:
        return fastest(OPERATOR, problem, passes, calls)
    except RuntimeError as error:
        return str(error)


def any_right(candidate: str, problem: Problem, call: Call) -> tuple[Attend, str]:
    """A variant whose output and gradients are right, and its name: of several the last, which is compiled if any is.

    Raises:
        RuntimeError: no variant is right; the message says why for each.
    """
    refused = {}
    for name, function in reversed(_variants(candidate, problem).items()):
        try:
            _check(function, problem, "both", call, timing.run_pass(function, "both", call))
        except Exception as error:
            refused[name] = in_short(error)
        else:
            return function, name
    raise RuntimeError(f"{candidate} cannot run {problem}: {refused}")


def _variants(candidate: str, problem: Problem) -> dict[str, Attend]:
    if any(built_for != problem for built_for, _ in _built):
        _built.clear()
        # Left to itself, torch runs a function uncompiled, with no more than a warning, after a few shapes.
        torch._dynamo.reset()
        gc.collect()
        if problem.device == "cuda":
            torch.cuda.empty_cache()
    if (problem, candidate) not in _built:
        _built[problem, candidate] = variants(candidate, problem)
    return _built[problem, candidate]


def _entrant(function: Attend, problem: Problem, passes: str, calls: Sequence[Call]) -> Entrant:
    sample = timing.sampler(function, passes, calls)
    sample()
    return Entrant(function, calls, sample, _check(function, problem, passes, calls[0], sample.results))


def _check(function: Attend, problem: Problem, passes: str, call: Call, results: Sequence[Tensor]) -> dict:
    if not all(bool(result.isfinite().all()) for result in results):
        raise AssertionError(f"{passes} has results that are not finite")
    if problem.dropout_p == 0:
        return {"relative_error": gate.assert_exact(problem, passes, call, results)}
    gate.assert_drops(problem, function, passes, call)
    return {}
