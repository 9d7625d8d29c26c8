"""The plan for a GPU: the order of its steps, their limits, how a second call continues, and that commands exist."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, harness, network
from benchmarks.gpu import Step, main, pending, plan, run, run_all, run_smallest_steps
from benchmarks.records import read_lines

ROOT = Path(__file__).parents[2]


def python(source, name="step", limit=30):
    return Step(name, (sys.executable, "-c", source), limit)


def outcomes(folder):
    return [(line["step"], line["outcome"]) for line in read_lines(folder / "steps.jsonl")]


def test_the_plan_fits_into_fifteen_minutes_and_begins_with_correctness():
    steps = plan(Path("folder"))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[0] == "correctness"
    assert sum(step.limit for step in steps) <= 14 * 60
    assert max(step.limit for step in steps) <= 10 * 60


def test_every_step_of_pytest_selects_tests():
    """A test or file that is renamed would otherwise leave a step with nothing to do."""
    modules = [importlib.import_module(f"benchmarks.test_{name}") for name in gpu.OPERATORS]
    comparisons = [
        comparison.id
        for module in modules
        for comparison in harness.comparisons(module.CASES)
        if comparison.id.startswith("cuda")
    ]
    for step in plan(Path("folder")):
        words = step.command[step.command.index("pytest") :] if "pytest" in step.command else ()
        for path in (ROOT / word for word in words if word.startswith(("tests/", "benchmarks/"))):
            files = path.rglob("test_*.py") if path.is_dir() else [path]
            assert path.name.startswith("test_") or any("mark.gpu" in file.read_text() for file in files)
            assert path.exists()
        if "-k" in words:
            terms = words[words.index("-k") + 1].split(" and ")
            selected = [comparison for comparison in comparisons if all(_matches(term, comparison) for term in terms)]
            assert len(selected) > 10, step.name


def _matches(term, name):
    return term.removeprefix("not ") not in name if term.startswith("not ") else term in name


def test_commands_of_networks_are_understood():
    for step in plan(Path("folder")):
        if "benchmarks.network" in step.command:
            words = list(step.command[step.command.index("benchmarks.network") + 1 :])
            assert network.parsed(words).record == Path("folder/record.jsonl")


def test_steps_run_in_order_and_only_those_left_run_again(tmp_path, capsys):
    steps = [
        python("print('fine')", "first"),
        python("import time; print('begun', flush=True); time.sleep(60)", "slow", limit=1),
        python("raise SystemExit('broken')", "third"),
    ]
    assert not run_all(steps, tmp_path, seconds=100)
    assert outcomes(tmp_path) == [("first", "passed"), ("slow", "cut short"), ("third", "failed")]
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert "broken" in capsys.readouterr().out
    steps.append(python("", "new"))
    assert [step.name for step in pending(steps, tmp_path)] == ["new", "slow"]
    assert [step.name for step in pending(steps, tmp_path, again=["third"])] == ["third", "new", "slow"]


def test_no_step_begins_without_time(tmp_path, capsys):
    assert run_all([python("print('never')")], tmp_path, seconds=8)
    assert outcomes(tmp_path) == []
    assert "not begun" in capsys.readouterr().out


def test_what_a_step_started_ends_with_it(tmp_path):
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    step = python(f"{child} time.sleep(60)", limit=1)
    assert run(step, tmp_path, seconds=1) == "cut short"
    assert read_lines(tmp_path / "steps.jsonl")[0]["seconds"] < 30


def test_a_missing_program_is_an_outcome(tmp_path):
    assert run(Step("memcheck", ("no-such-program",), 10), tmp_path, seconds=10) == "not installed"
    assert [step.name for step in pending([Step("memcheck", ("no-such-program",), 10)], tmp_path)] == ["memcheck"]


def test_the_smallest_steps_run(capsys):
    run_smallest_steps()
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_the_command_lists_refuses_and_needs_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--list", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("correctness (90 s): ")
    assert main(["-o", str(tmp_path)]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--again", "corectness"])
    assert "'corectness' is unknown; choose of correctness" in capsys.readouterr().err
