"""Dtypes under autocast, also in compiled code (PyTorch 2.11 traces less than 2.13), and the alignment of rows."""

import pytest
import torch

from uctrans.kernels.checks import check_dtypes_and_devices
from uctrans.kernels.formats import has_aligned_rows, is_autocast_on, output_dtype


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


@pytest.mark.parametrize(
    ("change", "is_aligned"),
    [
        (lambda base: base[:-8].view(1, 2, 3, 48), True),
        (lambda base: base[8:].view(1, 2, 3, 48), True),
        (lambda base: base[1:-7].view(1, 2, 3, 48), False),  # starts one entry into its memory
        (lambda base: base[:-8].view(1, 2, 3, 48)[..., :40], True),  # rows 48 apart
        (lambda base: base[:-8].view(1, 2, 3, 48)[..., :47], True),  # an odd width, and rows 48 apart
        (lambda base: base[:-26].view(1, 2, 3, 45)[..., :40], False),  # rows 45 apart
        (lambda base: base[:-8].view(1, 2, 48, 3).transpose(2, 3), False),  # channels 3 apart
        (lambda base: base[:48].expand(1, 2, 3, 48), True),  # one row for all
    ],
)
def test_alignment_is_that_of_rows_in_memory(change, is_aligned):
    tensor = change(torch.empty(296, dtype=torch.float16, device="meta"))
    plain = torch.empty(2, 8, dtype=torch.float16, device="meta")
    assert has_aligned_rows(plain, tensor) is is_aligned
