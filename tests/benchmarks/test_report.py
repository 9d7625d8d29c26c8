"""Records as tables, and README's blocks and pictures made of them; all records here are made up."""

import json

import pytest

from benchmarks.report import ReportError, main, update
from benchmarks.tables import device_report, machine, table

RECORD = {
    "machine_info": {"cpu": {"brand_raw": "A Processor"}},
    "benchmarks": [
        {
            "group": "network, inference",
            "stats": {"median": 0.05},
            "extra_info": {
                "base_channels": 16,
                "batch": 4,
                "pixels": 224,
                "baseline_median": 0.1,
                "ratio": 1.96,
                "ratio_range": [1.5, 2.25],
                "threads": 2,
                "torch": "2.13.0",
            },
        },
        {
            "group": "peak memory of a training step",
            "stats": {"median": 1.0},
            "extra_info": {
                "base_channels": 64,
                "batch": 1,
                "pixels": 512,
                "peak_mib": 700.4,
                "reference_peak_mib": 900.0,
            },
        },
    ],
}


def test_rows_hold_the_measured_numbers():
    lines = table(RECORD).splitlines()
    assert lines[2] == "| network, inference, 16 base channels | 4 x 224² | 100 | 50 | 1.96 | 1.50 to 2.25 |"
    assert lines[-1] == "| training step, 64 base channels | 1 x 512² | 900 | 700 |"


def test_machine_is_named():
    assert machine(RECORD) == "A Processor, 2 threads, torch 2.13.0, float32"


WORKLOAD = {"batch": 32, "pixels": 224, "dtype": "bfloat16", "dropout_p": 0.0, "gflop": 92.5, "gigabytes": 0.156}
OPERATOR = WORKLOAD | {
    "candidate": "operator",
    "median_seconds": 200e-6,
    "warm_median_seconds": 190e-6,
    "roofline_fraction": 0.585,
    "bound": "compute",
    "ratio": 1.0,
    "ratio_quartiles": [0.99, 1.01],
    "target": 0.55,
    "target_value": 0.585,
    "met": True,
}
SDPA = WORKLOAD | {
    "candidate": "sdpa",
    "variant": "flash, compiled",
    "median_seconds": 240e-6,
    "ratio": 1.2,
    "ratio_quartiles": [1.19, 1.22],
    "target": 1.3,
    "target_value": 1.2,
    "met": False,
}
CEILINGS = {"bandwidth": 4.3e12, "flop_rates": {"bfloat16": 790e12}, "source": "by hand"}
ENVIRONMENT = {"device": "A GPU", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "time": "now"}


def measured(test, group, info):
    return {"test": test, "group": group, "outcome": "measured", "info": info, "seconds": []}


def test_device_report_holds_times_targets_and_what_is_missing():
    report = device_report(
        [
            {"environment": ENVIRONMENT | {"known_ceilings": CEILINGS}},
            {"test": "operator", "outcome": "skipped", "reason": "needs about 15 s"},
            measured("operator", "forward", OPERATOR),
            measured("sdpa", "forward", SDPA | {"ratio": 1.1}),
            measured("sdpa", "forward", SDPA),
            measured("memory", "peak memory", WORKLOAD | {"candidate": "operator", "peak_bytes": 2**28}),
            {"test": "broken[a]", "outcome": "failed", "reason": "Traceback\nE   OutOfMemoryError: none left"},
            {"test": "late[a]", "outcome": "skipped", "reason": "needs about 90 s"},
            {"test": "late[b]", "outcome": "skipped", "reason": "needs about 90 s"},
        ]
    )
    lines = report.splitlines()
    assert "A GPU, torch 2.11, triton 3.6, CUDA 13.0, now" in lines
    assert "known ceilings: 4.30 TB/s, bfloat16 790 TFLOP/s (by hand)" in lines
    assert (
        "| 32 x 224², bfloat16 | 200.0 / 190.0 | 92.5 | 0.156 | 58% (compute) | 0.990 to 1.010 "
        "| 240.0 µs, 1.20x (1.19 to 1.22) [flash, compiled] |" in lines
    )
    assert "| forward | 32 x 224², bfloat16 | share of the roofline | 0.55 | 0.58 | yes |" in lines
    assert "| forward | 32 x 224², bfloat16 | times as fast as sdpa | 1.30 | 1.20 | **no**, -8% |" in lines
    assert "| 32 x 224², bfloat16 | 256 |" in lines
    assert "| broken[a]: failed | 1 | E   OutOfMemoryError: none left |" in lines
    assert "| late: skipped | 2 | out of time or not there |" in lines
    assert not any(line.startswith("| operator") for line in lines)


def test_candidates_without_an_operator_are_compared_with_a_baseline_and_a_copy():
    info = {
        "batch": 1,
        "pixels": 224,
        "dtype": "float32",
        "detail": "scale 1, channels-last",
        "candidate": "transposed",
    }
    info |= {"median_seconds": 0.05394, "least_seconds": 0.0125, "times_baseline": 0.731}
    info |= {"times_baseline_quartiles": [0.72, 0.75]}
    lines = device_report([measured("a", "convolution, forward", info)]).splitlines()
    assert "| 1 x 224², float32, scale 1, channels-last | transposed | 53.94 | 0.73 (0.72 to 0.75) | 4.3 |" in lines


README = """# Title

Before.

<!-- results:cpu -->
old
<!-- /results:cpu -->

Between.

<!-- results:gpu -->
No GPU yet.
<!-- /results:gpu -->

After.
"""


def cpu_record(time="2026-01-01T00:00:00", ratio=2.0, group="network, inference"):
    """A record of ``make benchmark`` with one race."""
    info = {"base_channels": 16, "batch": 4, "pixels": 224, "mode": "inference", "threads": 2, "torch": "2.13.0"}
    info |= {"baseline_seconds": [0.1, 0.2, 0.3], "ratio": ratio, "ratio_range": [1.5, 2.25], "baseline_median": 0.2}
    info |= {"layout": "contiguous", "passes": "forward", "scale": 0} if group.startswith("skip gate") else {}
    return {
        "machine_info": {"cpu": {"brand_raw": "A Processor"}},
        "commit_info": {"id": "abcdef0123456"},
        "datetime": time,
        "benchmarks": [{"group": group, "stats": {"data": [0.05, 0.1, 0.15], "median": 0.1}, "extra_info": info}],
    }


def raced(candidate, **changes):
    """What is noted of a race of the operator alone."""
    info = {"batch": 32, "pixels": 224, "dtype": "bfloat16", "dropout_p": 0.0, "heads": 4, "passes": "both"}
    info |= {"candidate": candidate, "median_seconds": 3e-4, "gflop": 90.0, "gigabytes": 0.1, "tflop_per_second": 300.0}
    return info | {"ratio": 1.5, "ratio_quartiles": [1.4, 1.6], "operator_median_seconds": 2e-4, **changes}


def gpu_record(time="2026-02-01T00:00:00Z", **changes):
    """A record of ``make gpu``."""
    network = {"model": "uctransnet", "base_channels": 64, "batch": 4, "pixels": 224, "dtype": "float32"}
    network |= {"candidate": "published", "median_seconds": 0.04, "ratio": 8.5, "ratio_quartiles": [8.4, 8.6]}
    benchmarks = [
        measured("own", "both", raced("operator", ratio=1.0, ratio_quartiles=[0.99, 1.01])),
        measured("reference", "both", raced("reference", target=1.2, target_value=1.5, met=True)),
        measured("reference at B4", "both", raced("reference", batch=4)),
        measured("reference at 512", "both", raced("reference", pixels=512)),
        measured("step", "training step", network),
    ]
    about = ENVIRONMENT | {"device": "NVIDIA X", "capability": [9, 0], "time": time, "commit": "fedcba9876"}
    about["measured_ceilings"] = {"bandwidth": 4e12, "flop_rates": {"bfloat16": 8e14}, "source": "made up"}
    tests = [{"part": "gpu-tests", "outcome": "passed"}] * 3 + [{"part": "benchmarks", "outcome": "passed"}]
    record = {"what": "evidence", "dry_run": False, "environment": about, "parts": {}, "tests": tests}
    return record | {"benchmarks": benchmarks} | changes


@pytest.fixture
def root(tmp_path):
    """A checkout with a README and a folder for records."""
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path


def save(root, name, record):
    path = root / "benchmarks" / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def test_a_record_of_a_cpu_becomes_its_block_and_its_picture_and_nothing_else_changes(root):
    save(root, "cpu.json", cpu_record())
    written = update(root)
    readme = (root / "README.md").read_text()
    assert "| UCTransNet, 16 base channels | 4 x 224² | 2.00x (1.50 to 2.25) | - |" in readme
    assert "A Processor, 2 threads, torch 2.13.0, float32" in readme and "abcdef0, 2026-01-01" in " ".join(
        readme.split()
    )
    assert max(map(len, readme.splitlines())) <= 120
    assert readme.startswith("# Title\n\nBefore.\n\n<!-- results:cpu -->\n")
    assert readme.endswith(README.partition("<!-- /results:cpu -->")[2]) and "old" not in readme
    figure = root / "docs" / "figures" / "speedup-cpu.svg"
    assert written == [root / "README.md", figure]
    drawn = figure.read_text()
    assert "UCTransNet, 16 base channels, 4 x 224²" in drawn
    update(root)
    assert (figure.read_text(), (root / "README.md").read_text()) == (drawn, readme)


def test_of_each_group_the_newest_record_of_a_cpu_counts(root):
    save(root, "a.json", cpu_record(time="2026-03-01T00:00:00", ratio=3.0))
    save(root, "b.json", cpu_record(time="2026-01-01T00:00:00", ratio=2.0))
    save(root, "c.json", cpu_record(time="2026-02-01T00:00:00", ratio=1.25, group="skip gate, scale 1, forward"))
    update(root)
    readme = (root / "README.md").read_text()
    assert "3.00x" in readme and "2.00x" not in readme
    assert "| 4 x 224², scale 0 | 1.25 | - | - | - |" in readme


def test_the_newest_record_of_a_gpu_becomes_its_block_and_pictures(root):
    save(root, "cpu.json", cpu_record())
    save(root, "nvidia-x/evidence.json", gpu_record())
    (root / "benchmarks" / "results" / "nvidia-x" / "evidence.md").write_text("all of it")
    save(root, "old/evidence.json", gpu_record(time="2025-01-01T00:00:00Z", tests=[]))
    save(root, "dry/evidence.json", gpu_record(time="2027-01-01T00:00:00Z", dry_run=True))
    written = update(root)
    block = (root / "README.md").read_text().partition("<!-- results:gpu -->")[2]
    assert "No GPU yet" not in block
    assert "On an NVIDIA X, torch 2.11, triton 3.6, CUDA 13.0, 2026-02-01 at commit fedcba9;" in block.splitlines()[1]
    assert "[all of it](benchmarks/results/nvidia-x/evidence.md)" in " ".join(block.split())
    assert "Tests on it: 3 passed." in block
    assert "| training step | uctransnet, 64 base channels, 4 x 224² | - | 8.50x (8.40 to 8.60) |" in block
    assert "| both | 32 x 224², bfloat16 | 0.300 | 1.50x (1.40 to 1.60) |" in block
    assert "| both | 32 x 224², bfloat16 | times as fast as reference | 1.20 | 1.50 | yes |" in block
    figures = [f"{name}-gpu.svg" for name in ("speedup", "roofline", "scaling")]
    assert [path.name for path in written] == ["README.md", "speedup-cpu.svg", *figures]
    assert all(f"(docs/figures/{name})" in block for name in figures)
    assert "made up" in (root / "docs" / "figures" / "roofline-gpu.svg").read_text()


def test_json_lines_of_a_gpu_are_a_record_too_and_those_of_a_cpu_are_none(root):
    record = gpu_record()
    for name, about in (("gpu.jsonl", record["environment"]), ("cpu.jsonl", ENVIRONMENT | {"cuda": None})):
        lines = [json.dumps(line) for line in ({"environment": about}, *record["benchmarks"])]
        (root / "benchmarks" / "results" / name).write_text("\n".join(lines))
    update(root)
    block = (root / "README.md").read_text().partition("<!-- results:gpu -->")[2]
    assert "[benchmarks/results/gpu.jsonl](benchmarks/results/gpu.jsonl)" in block and "8.50x" in block


def test_without_a_record_or_a_place_for_it_nothing_is_written(root, capsys):
    assert main([], root) == 1
    assert "has no record; make benchmark or make gpu takes one" in capsys.readouterr().err
    save(root, "cpu.json", cpu_record())
    (root / "README.md").write_text("# No place\n")
    with pytest.raises(ReportError, match="<!-- results:cpu --> and <!-- /results:cpu -->"):
        update(root)
    assert (root / "README.md").read_text() == "# No place\n"


def test_records_that_are_named_are_printed(root, capsys):
    paths = [save(root, "cpu.json", RECORD), save(root, "x/evidence.json", gpu_record())]
    assert main(list(map(str, paths)), root) == 0
    printed = capsys.readouterr().out
    assert "| network, inference, 16 base channels | 4 x 224² |" in printed
    assert "| uctransnet, 64 base channels, 4 x 224² | - | - | 40.000, 8.50x (8.40 to 8.60) |" in printed
    assert (root / "README.md").read_text() == README


def test_what_has_no_table_of_its_own_is_shown_with_all_its_numbers():
    info = {"candidate": "ours", "seconds_to_dice": 41.5, "epochs": 120, "batch": 4, "pixels": 224, "dtype": "bfloat16"}
    lines = device_report([measured("a", "seconds to a Dice", info)]).splitlines()
    assert "| what | ms | ratio (quartiles) | seconds to dice | epochs |" in lines
    assert "| ours, 4 x 224², bfloat16 | - | - | 41.5 | 120 |" in lines


def test_peaks_of_networks_tell_checkpointing_apart_and_name_their_targets():
    network = {"model": "unet", "base_channels": 64, "batch": 4, "pixels": 224, "candidate": "published"}
    goal = {"target": 0.4, "target_value": 0.3, "met": True, "target_of": "share of the peak of published"}
    lines = device_report(
        [
            measured("a", "peak memory of a training step", network | {"peak_bytes": 2**30} | goal),
            measured("b", "peak memory of a training step", network | {"peak_bytes": 2**29, "detail": "checkpointing"}),
        ]
    ).splitlines()
    assert "| unet, 64 base channels, 4 x 224² | 1024 |" in lines
    assert "| unet, 64 base channels, 4 x 224², checkpointing | 512 |" in lines
    assert any("| share of the peak of published | 0.40 | 0.30 | yes |" in line for line in lines)
