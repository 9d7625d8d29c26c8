"""The plan for a GPU: the order of its steps, their limits, how a second call continues, and that commands exist."""

import importlib
import sys
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import gpu, harness, network, test_channel_attention, time_to_dice
from benchmarks.gpu import SECONDS, Step, left, main, plan, run_all, run_stage
from benchmarks.records import append_line, read_lines

ROOT = Path(__file__).parents[2]
FOLDER = Path("folder")
STEPS = [step for stage in chain(*plan(FOLDER).values()) for step in stage]


def python(source, name="step", limit=30):
    return Step(name, (sys.executable, "-c", source), limit)


def outcomes(folder):
    return [(line["step"], line["outcome"]) for line in read_lines(folder / "steps.jsonl")]


def names_of(stages):
    return [[step.name for step in stage] for stage in stages]


def words_after(step, module):
    return list(step.command[step.command.index(module) + 1 :])


def test_the_plan_fits_into_fifteen_minutes_and_begins_with_the_operators():
    """Two starts of a machine take about three of them; the second call has time for what the first one left."""
    first, second = ([max(step.limit for step in stage) for stage in stages] for stages in plan(FOLDER).values())
    assert sum(SECONDS.values()) <= 12 * 60
    assert sum(first) <= SECONDS[1]
    assert sum(second[:4]) <= SECONDS[2] - 30
    assert STEPS[0].name == "operators"
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_every_step_of_pytest_selects_tests():
    """A test or file that is renamed would otherwise leave a step with nothing to do."""
    for step in (step for step in STEPS if step.name in ("operators", "tests")):
        paths = [ROOT / word for word in step.command if word.startswith("tests/")]
        assert paths and all(path.exists() for path in paths)
        files = chain(*(path.rglob("test_*.py") if path.is_dir() else [path] for path in paths))
        text = "".join(f"{file.name} {file.read_text()}" for file in files)
        terms = gpu.CHOSEN if step.name == "tests" else gpu.SMALLEST
        assert all(term in text for term in terms)
    names = [comparison.id for comparison in harness.comparisons(test_channel_attention.CASES)]
    for batch in (4, 32):
        step = next(step for step in STEPS if step.name == f"attention-{batch}")
        terms = words_after(step, "-k")[0].removesuffix(" and (sdpa or compiled)").split(" and ")
        selected = [name for name in names if all(term in name for term in terms)]
        assert len([name for name in selected if "sdpa" in name or "compiled" in name]) == 8


def test_commands_of_networks_and_of_the_training_are_understood():
    for step in STEPS:
        if "benchmarks.network" in step.command:
            assert network.parsed(words_after(step, "benchmarks.network")).record == Path("folder/record.jsonl")
        if "benchmarks.time_to_dice" in step.command:
            given = time_to_dice.parsed(words_after(step, "benchmarks.time_to_dice"))
            assert (given.candidates, given.dice) == (["ours"], 0.7999)
            assert given.seconds < step.limit
        assert importlib.util.find_spec(step.command[step.command.index("-m") + 1])


def test_a_step_that_fails_or_is_slow_does_not_end_the_plan(tmp_path, capsys):
    stages = [
        (python("print('fine')", "first"),),
        (python("import time; print('begun', flush=True); time.sleep(60)", "slow", limit=1),),
        (python("raise SystemExit('broken')", "third"), python("print('beside')", "fourth")),
    ]
    assert not run_all(stages, tmp_path, seconds=100)
    assert sorted(outcomes(tmp_path)) == [
        ("first", "passed"),
        ("fourth", "passed"),
        ("slow", "cut short"),
        ("third", "failed"),
    ]
    assert "begun" in (tmp_path / "slow.log").read_text()
    printed = capsys.readouterr().out
    assert "third: failed after 0 s; broken" in printed
    assert "fourth: passed" in printed


def test_the_steps_of_a_stage_run_at_the_same_time(tmp_path):
    """Each waits for the file of the other."""
    source = (
        "import pathlib, time\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    )
    files = [str(tmp_path / name) for name in ("one", "other")]
    stage = (python(source.format(*files), "one"), python(source.format(*files[::-1]), "other"))
    assert [line["outcome"] for line in run_stage(stage, tmp_path, seconds=30)] == ["passed", "passed"]


def test_no_stage_begins_without_time(tmp_path, capsys):
    assert not run_all([(python("print('never')"),)], tmp_path, seconds=8)
    assert outcomes(tmp_path) == []
    assert "step: not begun" in capsys.readouterr().out


def test_what_a_step_started_ends_with_it(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    (line,) = run_stage((python(f"{child} time.sleep(60)"),), tmp_path, seconds=1)
    assert line["outcome"] == "cut short"
    assert line["seconds"] < 10


def test_the_second_call_begins_with_what_the_first_one_left(tmp_path):
    first, second = plan(tmp_path).values()
    assert left(1, tmp_path) == first
    assert left(2, tmp_path) == first + second
    for stage in first:
        for step in stage:
            outcome = {"tests": "failed", "training-4": "cut short"}.get(step.name, "passed")
            append_line(tmp_path / "steps.jsonl", {"step": step.name, "outcome": outcome})
    assert names_of(left(2, tmp_path))[:2] == [["tests"], ["training-4"]]
    assert left(2, tmp_path)[2:] == second
    assert names_of(left(1, tmp_path, again=["compile-4"])) == [["tests", "compile-4"], ["training-4"]]


def test_the_command_lists_refuses_and_needs_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--list", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("operators (40 s): ")
    assert main(["-o", str(tmp_path)]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--again", "operator"])
    assert "'operator' is unknown; choose of operators" in capsys.readouterr().err
