"""The Markdown table of a benchmark record."""

from benchmarks.report import machine, table

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
