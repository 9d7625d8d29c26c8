"""The Markdown table of a benchmark record."""

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
