"""The session of evidence: what it runs, records and leaves; small parts play the real ones, but for one dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_evidence
from benchmarks.evidence.children import Children, python
from benchmarks.evidence.parts import DONE, FAILED, INTERRUPTED, OUT_OF_TIME, RUNNING, Part, Result
from benchmarks.evidence.plan import NEEDS_NO_GPU, dry_parts, gpu_parts, gpu_tests, operator_tests
from benchmarks.evidence.record import EvidenceRecord
from benchmarks.evidence.table import page
from benchmarks.records import FIRST_GUESS, append_line, read_lines

ROOT = Path(__file__).parents[2]
DRY_RUN = ["--dry-run", "--output"]


def part(name, run=lambda context: Result(DONE, True), share=0.1):
    return Part(name, f"{name} in words", share, run)


def take(folder, *parts, words=()):
    """A session over ``parts``; the exit status and the record it leaves."""
    status = gpu_evidence.main([*DRY_RUN, str(folder), *words], parts)
    return status, json.loads((folder / "evidence.json").read_text())


@pytest.fixture
def counted():
    """A part that counts how often it runs."""

    def run(context):
        run.times += 1
        return Result(DONE, True, {"passed": run.times})

    run.times = 0
    return run


@pytest.mark.slow
def test_a_dry_run_leaves_every_kind_of_evidence_and_runs_nothing_again(tmp_path, monkeypatch, capsys):
    status = gpu_evidence.main([*DRY_RUN, str(tmp_path)])
    record = json.loads((tmp_path / "evidence.json").read_text())
    assert status == 0, (tmp_path / "log.txt").read_text()
    assert {name: entry["outcome"] for name, entry in record["parts"].items()} == dict.fromkeys(
        [part.name for part in dry_parts()], DONE
    )
    assert record["environment"]["torch"] == torch.__version__
    assert {line["part"] for line in record["tests"] if line["outcome"] == "passed"} == {
        "gpu-tests",
        "operator-tests",
        "benchmarks",
        "profile",
    }
    measured = {line["group"]: line for line in record["benchmarks"] if line.get("outcome") == "measured"}
    assert len(measured["forward"]["seconds"]) > 1
    assert measured["profile of a training step"]["info"]["launches"] > 0
    page = (tmp_path / "evidence.md").read_text()
    assert "nothing here was measured on a GPU" in page
    assert all(f"| {part.name} |" in page for part in dry_parts())

    monkeypatch.setattr(Children, "run", lambda *_: pytest.fail("something ran again"))
    assert gpu_evidence.main([*DRY_RUN, str(tmp_path)]) == 0
    assert "--again profile repeats it" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_evidence.main(["--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert "No CUDA GPU" in message and "make gpu PYTHON=" in message and "--dry-run" in message
    assert not (tmp_path / "new").exists()


def test_a_part_that_fails_is_recorded_and_does_not_stop_the_rest(tmp_path, counted, capsys):
    def breaks(context):
        raise RuntimeError("an illegal access")

    dies = python("-c", "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")

    def crashes(context):
        ended = context.children.run(dies, context.seconds_left)
        return Result(FAILED, True, reason=ended.reason)

    status, record = take(tmp_path, part("breaks", breaks), part("crashes", crashes), part("goes on", counted))
    assert status == 1
    parts = record["parts"]
    assert (parts["breaks"]["outcome"], parts["breaks"]["reason"]) == (FAILED, "RuntimeError: an illegal access")
    assert parts["crashes"]["reason"] == "killed by SIGSEGV\nlast words"
    assert (parts["goes on"]["outcome"], parts["goes on"]["counts"]) == (DONE, {"passed": 1})
    assert "| crashes | crashes in words | failed |" in (tmp_path / "evidence.md").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[1/3] breaks: up to") and "RuntimeError: an illegal access" in printed[0]
    assert printed[2].startswith("[3/3] goes on") and "done; 1 passed" in printed[2]


def test_a_part_out_of_time_leaves_the_others_their_shares_and_goes_on_later(tmp_path, counted):
    def too_long(context):
        ended = context.children.run(python("-c", "import time; time.sleep(60)"), context.seconds_left)
        return Result(OUT_OF_TIME, False, reason=ended.reason) if ended.was_stopped else Result(DONE, True)

    long = part("long", too_long, share=0.5)
    start = time.monotonic()
    status, record = take(tmp_path, long, part("short", counted, share=0.5), words=["--minutes", "0.1"])
    assert time.monotonic() - start < 30
    assert status == 0
    assert record["parts"]["long"]["outcome"] == OUT_OF_TIME
    assert not record["parts"]["long"]["is_complete"]
    assert counted.times == 1

    _, record = take(tmp_path, part("long", counted), part("short", counted))
    assert counted.times == 2
    assert record["parts"]["long"]["outcome"] == DONE
    assert len(record["runs"]) == 2


def test_a_part_for_which_no_time_is_left_is_not_started(tmp_path, counted):
    _, record = take(tmp_path, part("late", counted), words=["--minutes", "0.01"])
    assert record["parts"]["late"]["reason"] == "no time was left for it"
    assert counted.times == 0


def test_time_that_a_part_leaves_goes_to_those_after_it(tmp_path):
    limits = []

    def note(context):
        limits.append(context.seconds_left)
        return Result(DONE, True)

    take(tmp_path, *(part(name, note, share) for name, share in (("a", 0.5), ("b", 0.2), ("c", 0.3))))
    assert limits == pytest.approx([270, 378, 540], abs=5)


def test_shares_of_parts_that_do_not_run_go_to_the_others(tmp_path):
    limits = {}

    def note(name, is_complete=True):
        def run(context):
            limits[name] = context.seconds_left
            return Result(DONE if is_complete else OUT_OF_TIME, is_complete)

        return part(name, run, {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.5}[name])

    parts = [note("a"), note("b", is_complete=False), note("c", is_complete=False), note("d")]
    take(tmp_path, *parts, words=["--minutes", "10", "--parts", "a,b,c"])
    assert limits == pytest.approx({"a": 120, "b": 360, "c": 600}, abs=5)
    take(tmp_path, *parts[:3], words=["--minutes", "10"])
    assert limits == pytest.approx({"a": 120, "b": 300, "c": 600}, abs=5)


def test_again_forgets_the_lines_of_one_part_alone(tmp_path, counted):
    take(tmp_path, part("first", counted), part("second", counted))
    for name in ("first", "second"):
        append_line(tmp_path / "outcomes.jsonl", {"part": name, "test": f"x.py::test_{name}[1]", "outcome": "passed"})
        append_line(tmp_path / "benchmarks.jsonl", {"test": f"test_{name}[1]", "outcome": "failed", "reason": ""})
    take(tmp_path, part("first", counted), part("second", counted), words=["--again", "second"])
    assert counted.times == 3
    assert [line["part"] for line in read_lines(tmp_path / "outcomes.jsonl")] == ["first"]
    assert [line["test"] for line in read_lines(tmp_path / "benchmarks.jsonl")] == ["test_first[1]"]


def test_again_failed_repeats_failures_and_keeps_what_is_good(tmp_path, counted):
    def fails(context):
        counted.times += 1
        return Result(FAILED, True, reason="2 failed or crashed")

    parts = [part("bad", fails), part("good", counted)]
    take(tmp_path, *parts)
    outcomes = {"a": ["passed"], "b": ["started", "failed"], "c": ["started", "crashed"], "d": ["failed", "passed"]}
    for name, ends in outcomes.items():
        for outcome in ends:
            append_line(tmp_path / "outcomes.jsonl", {"part": "bad", "test": f"x.py::{name}", "outcome": outcome})
    for name, outcome in (("a", "measured"), ("b", "failed"), ("c", "measured"), ("e", "failed")):
        line = {"test": name, "group": "g", "outcome": outcome, "reason": "", "info": {}, "seconds": [1.0]}
        append_line(tmp_path / "benchmarks.jsonl", line)
    take(tmp_path, *parts)
    assert counted.times == 2
    take(tmp_path, *parts, words=["--again-failed"])
    assert counted.times == 3  # the good part is kept
    kept = [line["test"].rpartition("::")[2] for line in read_lines(tmp_path / "outcomes.jsonl")]
    assert kept == ["a", "d", "d"]
    assert [line["test"] for line in read_lines(tmp_path / "benchmarks.jsonl")] == ["a", "e"]


def test_the_page_says_what_was_found_on_other_sources(tmp_path):
    record = EvidenceRecord(tmp_path, is_dry_run=True)
    for name, made_on in (("x", "one"), ("y", "one")):
        append_line(tmp_path / "outcomes.jsonl", {"part": "a", "test": name, "outcome": "passed", "sources": made_on})
    assert "different sources" not in page(record.content())
    append_line(tmp_path / "outcomes.jsonl", {"part": "a", "test": "x", "outcome": "passed", "sources": "two"})
    text = page(record.content())
    assert "on different sources" in text and "- one: 1 a" in text and "- two: 1 a" in text


def test_chosen_parts_and_those_that_do_not_exist(tmp_path, counted, capsys):
    _, record = take(tmp_path, part("first"), part("second", counted), words=["--parts", "second"])
    assert list(record["parts"]) == ["second"]
    assert gpu_evidence.main([*DRY_RUN, str(tmp_path), "--parts", "secnd"], [part("first"), part("second")]) == 2
    assert "there is no part 'secnd'; did you mean second?" in capsys.readouterr().err
    assert counted.times == 1


def test_the_list_names_every_part_and_its_cost(tmp_path, capsys):
    assert gpu_evidence.main(["--list", "--minutes", "10", "--output", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(gpu_parts())
    assert next(line for line in lines if line.startswith("benchmarks")).split()[1] == "276"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ['{"what": "evidence", "par', "[]", '{"runs": 1}'])
def test_half_a_record_is_kept_aside_and_the_lines_beside_it_are_used(tmp_path, counted, capsys, content):
    (tmp_path / "evidence.json").write_text(content)
    with (tmp_path / "outcomes.jsonl").open("w") as file:
        file.write('{"part": "a", "test": "x", "outcome": "passed", "seconds": 1.0}\n{"part": "a", "te')
    status, record = take(tmp_path, part("a", counted))
    assert status == 0
    assert (tmp_path / "evidence-unreadable.json").read_text() == content
    assert "cannot be read" in capsys.readouterr().out
    assert [line["test"] for line in record["tests"]] == ["x"]
    assert counted.times == 1


def test_records_of_a_gpu_a_dry_run_and_another_gpu_do_not_mix(tmp_path, monkeypatch, capsys):
    take(tmp_path / "dry", part("a"))
    monkeypatch.setattr(gpu_evidence, "gpu_name", lambda: "GPU one")
    assert gpu_evidence.main(["--output", str(tmp_path / "dry")], [part("a")]) == 2
    assert "holds the record of a dry run; choose another --output" in capsys.readouterr().err
    monkeypatch.setattr(gpu_evidence, "RESULTS", tmp_path)
    assert gpu_evidence.main([], [part("a")]) == 0
    assert (tmp_path / "gpu-one" / "evidence.json").exists()
    monkeypatch.setattr(gpu_evidence, "gpu_name", lambda: "GPU two")
    assert gpu_evidence.main(["--output", str(tmp_path / "gpu-one")], [part("b")]) == 2
    assert "holds evidence of GPU one, and this is GPU two" in capsys.readouterr().err


def test_what_no_table_knows_costs_the_page_and_nothing_else(tmp_path, counted):
    append_line(tmp_path / "benchmarks.jsonl", {"test": "a", "group": "odd", "outcome": "measured", "info": None})
    status, record = take(tmp_path, part("a", counted))
    assert (status, counted.times, record["benchmarks"][0]["group"]) == (0, 1, "odd")
    assert "evidence.json has everything" in (tmp_path / "evidence.md").read_text()


SESSION = """
import sys
from benchmarks import gpu_evidence
from benchmarks.evidence.children import python
from benchmarks.evidence.parts import DONE, Part, Result

def wait(context):
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    context.children.run(python("-c", code, sys.argv[2]), context.seconds_left)
    return Result(DONE, True)

sys.exit(gpu_evidence.main(["--dry-run", "--output", sys.argv[1]], [Part("waits", "waits", 1.0, wait)]))
"""


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGTERM, INTERRUPTED), (signal.SIGKILL, RUNNING)])
def test_a_session_that_is_stopped_leaves_a_record_to_go_on_from(tmp_path, counted, number, outcome):
    folder, note = tmp_path / "evidence", tmp_path / "child"
    session = subprocess.Popen([sys.executable, "-c", SESSION, str(folder), str(note)], cwd=ROOT)
    try:
        until(lambda: note.exists() and note.read_text())
        child = int(note.read_text())
        session.send_signal(number)
        session.wait(timeout=30)
        if number == signal.SIGTERM:
            assert session.returncode == 130
            until(lambda: not is_alive(child), seconds=20)
        else:
            os.kill(child, signal.SIGKILL)
    finally:
        session.kill()
        session.wait()
    assert json.loads((folder / "evidence.json").read_text())["parts"]["waits"]["outcome"] == outcome
    _, record = take(folder, part("waits", counted))
    assert (record["parts"]["waits"]["outcome"], counted.times) == (DONE, 1)


def until(happens, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process):
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_plan_takes_all_of_the_time_and_finds_its_tests():
    assert sum(part.share for part in gpu_parts()) == pytest.approx(1)
    share = next(part.share for part in gpu_parts() if part.name == "benchmarks")
    assert max(FIRST_GUESS.values()) < share * 60 * gpu_evidence.MINUTES  # or no session would start it
    assert [part.name for part in dry_parts()] == [part.name for part in gpu_parts() if part.name != "racecheck"]
    assert "tests/kernels/test_gpu.py" in gpu_tests()
    assert gpu_tests()[0].startswith("tests/kernels") and all((ROOT / path).exists() for path in gpu_tests())
    files = operator_tests()
    assert "triton" in files[0] and "tests/layers/test_layers.py" in files
    assert NEEDS_NO_GPU not in files and (ROOT / NEEDS_NO_GPU).exists()
