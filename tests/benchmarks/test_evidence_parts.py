"""What parts of the evidence are made of: runs of pytest that outlive crashes, the sanitizer's report, the machine."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import uctrans.kernels
from benchmarks.evidence import machine, sanitizer_part, smallest
from benchmarks.evidence.children import Children, Ended, environment
from benchmarks.evidence.machine import cool_down, gpu_state, in_words
from benchmarks.evidence.outcomes import finished_tests
from benchmarks.evidence.parts import DONE, FAILED, NOT_THERE, OUT_OF_TIME, Context
from benchmarks.evidence.pytest_part import outcomes_of, result_of, run_pytest
from benchmarks.evidence.sanitizer_part import result_of as sanitizer_result
from benchmarks.evidence.sanitizer_part import run_sanitizer
from benchmarks.kernel_shares import profile_table, shares
from benchmarks.records import OUT_OF_BUDGET, append_line, read_lines, sources

TESTS = """
import os, signal, time
import pytest

def test_passes(): pass
def test_fails(): assert 1 + 1 == 3
def test_crashes():
    print("about to crash")
    os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.skip(reason="no second GPU")
def test_skipped(): pass
def test_hangs(): time.sleep(600)
@pytest.mark.parametrize("number", range(3))
def test_after(number): pass
"""


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, Children(tmp_path / "log.txt"), time.monotonic() + 200)


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "tests" / "test_suite.py"
    path.parent.mkdir()
    path.write_text(TESTS)
    (path.parent / "test_broken.py").write_text("import a_package_that_is_not_there\n")
    return path.parent


def test_crashes_hangs_and_files_that_cannot_be_imported_do_not_stop_the_other_tests(context, suite):
    result = run_pytest(context, "part", [suite], shards=2, stall=4.0)
    assert (result.outcome, result.is_complete) == (FAILED, True)
    assert result.counts == {"passed": 4, "failed": 2, "crashed": 2, "skipped": 1}
    assert result.reason == "4 failed or crashed"
    outcomes = {line["test"].rpartition("/")[2]: line for line in outcomes_of(context.folder, "part")}
    assert "assert (1 + 1) == 3" in outcomes["test_suite.py::test_fails"]["reason"]
    assert "a_package_that_is_not_there" in outcomes["test_broken.py"]["reason"]
    assert outcomes["test_suite.py::test_crashes"]["reason"].startswith("killed by SIGSEGV")
    assert "in test_hangs" in outcomes["test_suite.py::test_hangs"]["reason"]
    assert "no second GPU" in outcomes["test_suite.py::test_skipped"]["reason"]
    assert "test_suite.py" in (context.folder / "log.txt").read_text()


CRASHES = """
import os, signal, time

def test_crashes_once_compiled():
    time.sleep(3)
    if not os.path.exists(NOTE):
        open(NOTE, "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
def test_passes(): pass
"""


def test_what_a_process_died_in_is_tried_again_in_a_later_session(context, tmp_path):
    path = tmp_path / "tests" / "test_crashes.py"
    path.parent.mkdir()
    path.write_text(CRASHES.replace("NOTE", repr(str(tmp_path / "note"))))
    arguments = [path, "--compiled-stall", 60]  # longer than the stall of others, which the first test takes
    first, second = (run_pytest(context, "part", arguments, shards=1, stall=2.0, tries=2) for _ in range(2))
    assert (first.outcome, first.is_complete, first.counts) == (FAILED, False, {"passed": 1, "crashed": 1})
    assert first.reason == "1 failed or crashed; 1 to be tried once more"
    assert (second.outcome, second.is_complete, second.counts) == (DONE, True, {"passed": 2})
    started = [line["test"].rpartition("::")[2] for line in read_lines(tmp_path / "outcomes.jsonl") if "test" in line]
    assert (started.count("test_crashes_once_compiled"), started.count("test_passes")) == (4, 2)
    assert all(len(line["sources"]) == len(sources()) for line in outcomes_of(tmp_path, "part"))


def test_a_crash_is_final_in_its_session_and_after_all_tries():
    crash = {"test": "a", "outcome": "crashed", "time": 100.0, "try": 1}
    assert finished_tests([crash], tries=2, session=50.0) == {"a"}
    assert finished_tests([crash], tries=2, session=150.0) == set()
    assert finished_tests([crash, crash | {"try": 2}], tries=2, session=150.0) == {"a"}
    assert finished_tests([crash], tries=1, session=150.0) == {"a"}
    assert finished_tests([{"test": "a", "outcome": "failed"}], 2, 150.0) == {"a"}
    assert finished_tests([{"test": "a", "outcome": "skipped"}, {"ended": True}], 2, 150.0) == set()


def test_a_test_that_took_all_of_a_session_comes_last_in_the_next(context, suite):
    (suite / "test_broken.py").unlink()
    for name in ("test_passes", "test_fails", "test_crashes", "test_hangs"):
        line = {"part": "part", "shard": "0/1", "test": f"test_suite.py::{name}", "outcome": "passed", "seconds": 1.0}
        append_line(context.folder / "outcomes.jsonl", line)
    line = {"part": "part", "shard": "0/1", "test": "test_suite.py::test_after[0]", "outcome": "started"}
    append_line(context.folder / "outcomes.jsonl", line)
    before = len(read_lines(context.folder / "outcomes.jsonl"))
    run_pytest(context, "part", [suite], shards=1, stall=4.0)
    lines = read_lines(context.folder / "outcomes.jsonl")[before:]
    started = [line["test"].rpartition("::")[2] for line in lines if line.get("outcome") == "started"]
    assert started == ["test_skipped", "test_after[1]", "test_after[2]", "test_after[0]"]


def test_a_run_goes_on_after_a_half_written_line_and_runs_nothing_twice(context, suite):
    path = context.folder / "outcomes.jsonl"
    for name in ("test_passes", "test_fails", "test_crashes", "test_hangs", "test_after[0]"):
        line = {"part": "part", "shard": "0/1", "test": f"test_suite.py::{name}", "outcome": "passed", "seconds": 1.0}
        append_line(path, line)
    with path.open("a") as file:
        file.write('{"part": "part", "test": "test_suite.py::test_af')
    (suite / "test_broken.py").unlink()
    result = run_pytest(context, "part", [suite], shards=1, stall=4.0)
    assert (result.outcome, result.counts) == (DONE, {"passed": 7, "skipped": 1})
    started = [line["test"].rpartition("::")[2] for line in read_lines(path) if line.get("outcome") == "started"]
    assert started == ["test_skipped", "test_after[1]", "test_after[2]"]


def test_a_run_out_of_time_says_so_and_pytest_that_does_not_start_says_why(tmp_path, suite):
    late = Context(tmp_path, Children(tmp_path / "log.txt"), time.monotonic() - 1)
    result = run_pytest(late, "part", [suite], shards=1, stall=4.0)
    assert (result.outcome, result.is_complete) == (OUT_OF_TIME, False)
    context = Context(tmp_path, late.children, time.monotonic() + 60)
    result = run_pytest(context, "part", [suite, "--no-such-option"], shards=1, stall=4.0)
    assert (result.outcome, result.is_complete) == (FAILED, True)
    assert "unrecognized arguments: --no-such-option" in result.reason


def test_tests_that_found_no_time_are_left_to_do_and_no_test_at_all_is_a_failure():
    outcomes = [{"outcome": "passed"}, {"outcome": "skipped", "reason": f"needs about 15 s, and 3 s {OUT_OF_BUDGET}"}]
    result = result_of(outcomes, None)
    assert (result.outcome, result.is_complete) == (OUT_OF_TIME, False)
    assert result.counts == {"passed": 1, "not run": 1}
    result = result_of([*outcomes, {"outcome": "failed"}], OUT_OF_TIME)
    assert (result.outcome, result.is_complete) == (FAILED, False)
    assert result_of([], None).outcome == FAILED


def test_children_end_with_the_session_and_start_no_more(tmp_path):
    children = Children(tmp_path / "log.txt")
    threading.Timer(1.0, children.end_all).start()
    start = time.monotonic()
    ended = children.run(["sleep", "60"], seconds=60)
    assert time.monotonic() - start < 20
    assert ended.was_stopped
    assert children.run(["echo", "hello"], seconds=60).was_stopped
    assert "hello" not in (tmp_path / "log.txt").read_text()


def test_variables_that_would_change_what_is_measured_stay_behind(monkeypatch):
    for name in ("TRITON_INTERPRET", "UCTRANS_BACKEND", "PYTEST_XDIST_WORKER"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it when it compiles
    variables = environment()
    assert not {"TRITON_INTERPRET", "UCTRANS_BACKEND", "PYTEST_XDIST_WORKER"} & set(variables)
    assert variables["TRITON_CACHE_DIR"] == "/elsewhere"
    assert variables["TORCHINDUCTOR_CACHE_DIR"].endswith("inductor")


FINDING = "========= Invalid __global__ read of size 4 bytes\n=========     at _forward_kernel+0x10"


@pytest.mark.parametrize(
    ("ended", "outcome", "is_complete", "found", "reason"),
    [
        (Ended(0, False, "========= ERROR SUMMARY: 0 errors"), DONE, True, 0, None),
        (Ended(86, False, f"{FINDING}\n========= ERROR SUMMARY: 3 errors"), FAILED, True, 3, "_forward_kernel"),
        (Ended(86, False, "========= RACECHECK SUMMARY: 2 hazards displayed (1 error)"), FAILED, True, 2, "2 hazards"),
        (Ended(1, False, "wrong result\n========= ERROR SUMMARY: 0 errors"), FAILED, True, 0, "wrong result"),
        (Ended(255, False, "========= Error: Device not supported"), NOT_THERE, False, None, "Device not supported"),
        (Ended(255, False, "========= Error: process died"), FAILED, True, None, "process died"),
        (Ended(-9, True, "========= COMPUTE-SANITIZER"), OUT_OF_TIME, False, None, "time limit"),
    ],
)
def test_what_the_sanitizer_found(ended, outcome, is_complete, found, reason):
    result = sanitizer_result(ended)
    assert (result.outcome, result.is_complete, result.counts.get("found")) == (outcome, is_complete, found)
    assert result.reason is None if reason is None else reason in result.reason


# Backends are no operators, and the maps are made in plain PyTorch on every backend.
WITHOUT_KERNELS = {"BACKENDS", "check_backend", "resolve_backend", "projected_attention_maps"}


def test_the_smallest_cases_hold_every_operator_forward_and_backward(monkeypatch):
    called = set()

    def noting(name, function):
        def run(*arguments, **options):
            called.add(name)
            return function(*arguments, **options)

        return run

    operators = set(uctrans.kernels.__all__) - WITHOUT_KERNELS
    for name in operators:
        monkeypatch.setattr(smallest, name, noting(name, getattr(smallest, name)))
    for _, function, leaves in smallest.cases("cpu", torch.float32):
        results = smallest.outputs_and_gradients(function, leaves, "composed")
        assert len(results) > len(leaves) and all(result.isfinite().all() for result in results)
    assert called == operators


def test_the_operators_run_by_themselves_and_then_under_the_tool(tmp_path, monkeypatch):
    commands = []

    def run(command, seconds, variables=None):
        commands.append([*command, variables])
        return Ended(0, False, "========= ERROR SUMMARY: 0 errors")

    context = Context(tmp_path, SimpleNamespace(run=run), time.monotonic() + 60)
    monkeypatch.setattr(sanitizer_part, "find_sanitizer", lambda: None)
    result = run_sanitizer(context, "racecheck")
    assert (result.outcome, result.is_complete, commands) == (NOT_THERE, True, [])
    monkeypatch.setattr(sanitizer_part, "find_sanitizer", lambda: "/cuda/compute-sanitizer")
    assert run_sanitizer(context, "racecheck").outcome == DONE
    plain, watched = commands
    assert plain[1:3] == ["-m", "benchmarks.evidence.smallest"]
    assert watched[:3] == ["/cuda/compute-sanitizer", "--tool", "racecheck"]
    assert watched[-1] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_cooling_waits_for_the_temperature_at_rest_and_no_longer_than_it_may(monkeypatch):
    monkeypatch.setattr(machine, "POLL_SECONDS", 0.01)
    readings = iter([{"celsius": 60.0}, {"celsius": 50.0}, {"celsius": 41.0}, {"celsius": 30.0}])
    assert cool_down({"celsius": 32.0}, 60, lambda: next(readings)) == {"celsius": 41.0}
    assert cool_down({"celsius": 32.0}, 0.05, lambda: {"celsius": 80.0}) == {"celsius": 80.0}
    assert cool_down(None, 60, lambda: {"celsius": 80.0}) == {"celsius": 80.0}
    assert cool_down({"celsius": 32.0}, 60, lambda: None) is None


def test_a_gpu_that_adds_but_draws_no_random_numbers_does_not_answer(monkeypatch):
    def refuse(*size, device):
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    ones, rand = torch.ones, torch.rand
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch, "rand", lambda *size, device: rand(*size))
    assert machine.gpu_answers()
    monkeypatch.setattr(torch, "rand", refuse)
    assert not machine.gpu_answers()


def test_the_state_is_read_from_nvidia_smi_where_there_is_one(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 3201, 45, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_state() == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "celsius": 45.0}
    assert in_words(gpu_state()) == "1980 MHz, 45 °C"
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() is None


def test_a_profile_counts_launches_and_shares_of_one_step():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(key, count, microseconds, device_type=cuda, is_user_annotation=False):
        times = {"self_device_time_total": microseconds, "self_cpu_time_total": 1e9}
        return SimpleNamespace(
            key=key, count=count, device_type=device_type, is_user_annotation=is_user_annotation, **times
        )

    steps = 2
    events = [
        event("aten::add", 50, 9e6, cpu),
        event("Optimizer.step", 2, 9e6, is_user_annotation=True),
        event("conv", 4 * steps, 3e3 * steps),
        event("add", 6 * steps, 1e3 * steps),
        event("Memcpy DtoD", 3 * steps, 0.0),
        event("cudaGraphLaunch", steps, 5.0, cpu),
        event("cuLaunchKernelEx", 3 * steps, 5.0, cpu),
        event("cudaMemcpyAsync", 3 * steps, 5.0, cpu),
    ]
    found = shares(events, on_gpu=True, steps=steps)
    assert (found["launches"], found["copies"], found["host_launches"]) == (10, 3, 4)
    assert found["kernel_seconds"] == pytest.approx(4e-3)
    assert [(entry["kernel"], entry["share"]) for entry in found["profile"]][:2] == [("conv", 0.75), ("add", 0.25)]
    lines = profile_table(json.loads(json.dumps(found)) | {"median_seconds": 5e-3, "device": "cuda"}).splitlines()
    assert (
        lines[0]
        == "10 kernels, 3 copies and fills a step, by 4 launches of the host; 5.00 ms a step, 4.00 ms of it in kernels"
    )
    assert lines[4] == "| 75.0% | 3.000 | 4 | `conv` |"
