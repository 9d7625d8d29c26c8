"""Records: complete after every line, readable after a kill, and shown as a table."""

from pathlib import Path

import pytest
import torch

from benchmarks.records import append_line, environment, read_lines, table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_half_a_line_is_left_out_and_spoils_no_other(tmp_path):
    path = tmp_path / "deeper" / "record.jsonl"
    assert read_lines(path) == []
    append_line(path, {"test": "a"})
    with path.open("a") as file:
        file.write('{"test": "b", "inf')
    append_line(path, {"test": "c"})
    append_line(path, {"test": "d"})
    assert [line["test"] for line in read_lines(path)] == ["a", "c", "d"]


def test_the_environment_says_what_is_measured_on():
    described = environment()
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["commit"] is None or len(described["commit"]) == 40


def test_the_table_has_the_latest_of_each_measurement():
    def line(test, **info):
        return {"test": test, "group": "gate", "info": {"candidate": "composed", "batch": 4} | info, "seconds": []}

    lines = [
        {"environment": {}},
        line("a", median_seconds=0.5, ratio=1.0, ratio_quartiles=[0.9, 1.1]),
        line("b", peak_bytes=3 << 20),
        line("a", median_seconds=0.002, ratio=2.0, ratio_quartiles=[1.5, 2.5], roofline_share=0.25),
    ]
    assert table(lines).splitlines()[2:] == [
        "| gate: 4 | composed | 2.000 | 2.00 (1.50 to 2.50) | 25% |  |",
        "| gate: 4 | composed |  |  |  | 3 |",
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.jsonl")))
def test_kept_records_can_be_read(name):
    lines = read_lines(RESULTS / name)
    assert len(table(lines).splitlines()) > 10
    assert "commit" in lines[0]["environment"]
