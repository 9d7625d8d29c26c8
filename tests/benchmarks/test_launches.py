from collections import Counter

import torch

from benchmarks.launches import BACKENDS, Launched, count, table

SMALL = {"batch": 2, "pixels": 64, "base_channels": 8}


def test_views_and_allocations_launch_nothing():
    with Launched() as launched:
        tensor = torch.empty(4, 4, device="meta")
        (tensor.t()[1:] + 1).relu_()
    assert launched.operators == Counter({"aten::add": 1, "aten::relu_": 1})


def test_the_fused_operators_replace_the_published_ones():
    counts = {backend: count("uctransnet", backend, **SMALL) for backend in BACKENDS}
    assert counts["triton"].total() < counts["reference"].total() / 3
    assert counts["triton"]["uctrans::skip_gate"] == counts["triton"]["uctrans::batch_norm_relu_pool"] == 4
    assert "aten::max_pool2d_with_indices" not in counts["triton"]
    assert not any(name.startswith("uctrans::") for name in counts["reference"])
    assert all(
        operators["aten::convolution"] == counts["reference"]["aten::convolution"] for operators in counts.values()
    )


def test_the_table_has_a_column_a_backend_and_the_largest_differences():
    lines = table({"reference": Counter(a=5, b=2, c=1), "triton": Counter(b=2, c=2)}).splitlines()
    assert lines[0] == "| operators | reference | triton |"
    assert lines[2] == "| all | 8 | 4 |"
    assert lines[3:] == ["| `a` | 5 | 0 |", "| `c` | 1 | 2 |", "| `b` | 2 | 2 |"]
