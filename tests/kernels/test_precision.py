"""Dtypes under autocast, also where what asks for them is compiled: PyTorch 2.11 traces less than 2.13."""

import pytest
import torch

from uctrans.kernels.checks import check_dtypes_and_devices
from uctrans.kernels.formats import is_autocast_on, output_dtype


def cast(weight, feature):
    check_dtypes_and_devices(weight=weight, feature=feature)
    return weight.to(output_dtype(weight))


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_mixed_dtypes_and_results_under_autocast(compile_it):
    torch._dynamo.reset()
    function = torch.compile(cast, backend="eager", fullgraph=True) if compile_it else cast
    weight, feature = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(weight, feature).dtype == torch.bfloat16
    assert function(weight, weight).dtype == torch.float32


def test_where_autocast_is_on():
    assert not is_autocast_on("cpu")
    assert not is_autocast_on("meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert is_autocast_on("cpu")
        assert not is_autocast_on("meta")
        assert not is_autocast_on("cuda")
