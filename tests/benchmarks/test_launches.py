"""Operators that a training step dispatches: counted without views, and not more than they were."""

from collections import Counter

import pytest
import torch

from benchmarks.launches import BACKENDS, Launched, dispatched_operators, operator_table


def test_views_and_allocations_launch_nothing():
    with Launched() as launched:
        tensor = torch.empty(4, 4, device="meta")
        (tensor.t()[1:] + 1).relu_()
    assert launched.operators == Counter({"aten::add": 1, "aten::relu_": 1})


@pytest.fixture(scope="module")
def counts():
    return {backend: dispatched_operators("uctransnet", backend) for backend in BACKENDS}


def test_a_training_step_launches_no_more_than_it_did(counts):
    assert counts["reference"].total() == 1677  # the published sequence does not change
    assert counts["composed"].total() <= 2097
    assert counts["triton"].total() <= 284
    assert dispatched_operators("dual_branch_uctransnet", "triton").total() <= 582


def test_the_fused_operators_replace_the_published_ones(counts):
    assert counts["triton"]["uctrans::skip_gate"] == counts["triton"]["uctrans::batch_norm_relu_pool"] == 4
    assert "aten::max_pool2d_with_indices" not in counts["triton"]
    assert counts["triton"]["aten::native_batch_norm"] == counts["triton"]["aten::_foreach_copy_"] == 0
    assert not any(name.startswith("uctrans::") for name in counts["reference"])
    assert len({operators["aten::convolution"] for operators in counts.values()}) == 1


def test_the_table_has_a_column_a_backend_and_the_largest_differences():
    lines = operator_table({"reference": Counter(a=5, b=2, c=1), "triton": Counter(b=2, c=2)}).splitlines()
    assert lines[0] == "| operators | reference | triton |"
    assert lines[2] == "| all | 8 | 4 |"
    assert lines[3:] == ["| `a` | 5 | 0 |", "| `c` | 1 | 2 |", "| `b` | 2 | 2 |"]
