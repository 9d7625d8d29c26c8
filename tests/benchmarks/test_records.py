"""The record of a run: complete after every test, readable after a kill, and continued where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.records import Budget, Record, read_lines, sources
from benchmarks.tables import device_report

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMOKE = ROOT / "benchmarks" / "test_channel_attention.py"


def run_benchmarks(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark-only", *map(str, arguments)]
    # Without what a parallel test run leaves there: pytest-benchmark would take itself for one of its workers.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def test_each_line_is_there_at_once_and_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "deeper" / "record.jsonl"
    record = Record(path, CPU)
    record.measured_test("a", "forward", {"batch": 4}, [0.5, 0.25])
    record.unmeasured_test("b", "skipped", "no time")
    record.unmeasured_test("c", "failed", "no memory")
    with path.open("a") as file:
        file.write('{"test": "d", "outc')
    environment, measured, skipped, failed = read_lines(path)
    assert environment["environment"]["torch"] == torch.__version__
    assert measured == {
        "test": "a",
        "group": "forward",
        "outcome": "measured",
        "info": {"batch": 4},
        "seconds": [0.5, 0.25],
        "sources": sources(),
    }
    assert (skipped["reason"], failed["reason"]) == ("no time", "no memory")


def test_a_second_run_knows_what_is_finished_and_does_not_glue_its_first_line_to_half_a_line(tmp_path):
    path = tmp_path / "record.jsonl"
    first = Record(path, CPU)
    first.measured_test("a", "forward", {}, [1.0])
    first.unmeasured_test("b", "skipped", "no time")
    first.unmeasured_test("c", "failed", "no memory")
    with path.open("a") as file:
        file.write('{"test": "d", "outc')
    second = Record(path, CPU)
    assert second.finished == {"a", "c"}
    assert sum("environment" in line for line in read_lines(path)) == 2


def test_budget_takes_the_longest_so_far_and_a_guess_before_that():
    unlimited, hour, seconds = Budget(None), Budget(60), Budget(10 / 60)
    assert unlimited.obstacle("reference compiled") is None
    assert hour.obstacle("reference compiled") is None
    assert "needs about 60 s" in seconds.obstacle("reference compiled")
    assert "needs about 150 s" in seconds.obstacle("test_training_step compiled, own graphs")
    assert "needs about 15 s" in seconds.obstacle("operator")
    seconds.spent("operator", 2.0)
    seconds.spent("operator", 1.0)
    assert seconds.obstacle("operator") is None
    seconds.spent("operator", 11.0)
    assert "needs about 11 s" in seconds.obstacle("operator")


@pytest.mark.slow
def test_one_command_races_every_candidate_and_leaves_a_record(tmp_path):
    record, plugin_record = tmp_path / "record.jsonl", tmp_path / "plugin.json"
    chosen = "cpu and ((p0- and forward) or (p0.1 and both and operator))"
    run = run_benchmarks(SMOKE, "-k", chosen, "--record", record, f"--benchmark-json={plugin_record}")
    assert run.returncode == 0, run.stdout + run.stderr
    infos = {line["test"]: line for line in read_lines(record) if line.get("outcome") == "measured"}
    assert len(infos) == 6
    forward = {line["info"]["candidate"]: line["info"] for line in infos.values() if line["group"] == "forward"}
    assert set(forward) == {"operator", "reference compiled", "sdpa", "reference", "composed"}
    for info in forward.values():
        assert info["relative_error"] < 1e-5
        assert info["ratio"] > 0
    for bench in json.loads(plugin_record.read_text())["benchmarks"]:
        assert bench["stats"]["data"] == pytest.approx(infos[bench["name"]]["seconds"])
    assert "| 2 x 64², float32 |" in device_report(read_lines(record))

    again = run_benchmarks(SMOKE, "-k", chosen, "--record", record, "--missing")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "6 skipped" in again.stdout and "already in the record" in again.stdout
    assert len([line for line in read_lines(record) if "test" in line]) == 6


def test_without_time_nothing_runs_and_the_record_says_why(tmp_path):
    record = tmp_path / "record.jsonl"
    run = run_benchmarks(SMOKE, "-k", "cpu and forward", "--record", record, "--minutes", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    skipped = [line for line in read_lines(record) if line.get("outcome") == "skipped"]
    assert len(skipped) == 10
    assert all("of the budget are left" in line["reason"] for line in skipped)


def test_gpu_tests_come_in_the_order_of_what_is_claimed():
    listed = run_benchmarks("benchmarks", "--collect-only", "-m", "gpu").stdout.splitlines()
    names = [line.partition("::")[2] for line in listed if "::" in line]
    places = [
        names.index(name)
        for name in (
            "test_training_step[uctransnet-64ch-224px-B4-published]",
            "test_inference[throughput-uctransnet-64ch-224px-B32-published]",
            "test_training_step[uctransnet-64ch-224px-B4-compiled]",
            "test_inference[latency-uctransnet-64ch-224px-B1-compiled, own graphs]",
            "test_training_step[dual_branch_uctransnet-64ch-224px-B4-published]",
            "test_channel_attention[bfloat16-224px-B32-p0-forward-operator]",
            "test_channel_attention[bfloat16-224px-B32-p0-forward-reference compiled]",
            "test_channel_attention[bfloat16-224px-B32-p0-backward-operator]",
            "test_peak_memory[bfloat16-224px-B32-p0-operator]",
            "test_channel_attention[bfloat16-224px-B4-p0-forward-operator]",
            "test_attention_block_in_graphs[bfloat16-1024px-B4-p0-forward-operator]",
            "test_channel_attention[bfloat16-224px-B32-p0.1-forward-operator]",
            "test_channel_attention[float32-1024px-B1-p0.1-both-composed]",
        )
    ]
    assert places == sorted(places)
    sizes = {name for name in names if name.startswith("test_channel_attention[")}
    assert len(sizes) == 3 * 4 * 2 * 2 * 3 * 5  # batches, pixels, dtypes, dropout, passes, candidates
