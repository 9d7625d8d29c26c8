"""The precision that launchers ask of products: torch's own, however it was set."""

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.support import DEVICE
from uctrans.kernels import channel_attention
from uctrans.kernels.testing import AttentionShape, attention_inputs

pytest.importorskip("triton")

from uctrans.kernels import launch

MATMUL = torch.backends.cuda.matmul
NEEDS_FP32_PRECISION = pytest.mark.skipif(
    not hasattr(MATMUL, "fp32_precision"), reason="this torch has no fp32_precision"
)


@pytest.fixture(autouse=True)
def restored_precision():
    """Every test starts from torch's defaults and leaves what it found."""
    holders = [torch.backends, MATMUL, torch.backends.mkldnn.matmul] if hasattr(MATMUL, "fp32_precision") else []
    before = [holder.fp32_precision for holder in holders]
    legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for holder in holders:
        holder.fp32_precision = "none"
    yield
    for holder in holders:
        holder.fp32_precision = "ieee"  # what reading the older setting takes
    torch.set_float32_matmul_precision(legacy)
    for holder, precision in zip(holders, before, strict=True):
        holder.fp32_precision = precision


def set_matmul_precision(name):
    return lambda: torch.set_float32_matmul_precision(name)


def set_allow_tf32(is_allowed):
    return lambda: setattr(MATMUL, "allow_tf32", is_allowed)


def set_fp32_precision(everywhere, matmul):
    def call():
        torch.backends.fp32_precision = everywhere
        MATMUL.fp32_precision = matmul

    return call


SPELLINGS = [
    pytest.param(lambda: None, "ieee", id="untouched"),
    pytest.param(set_matmul_precision("highest"), "ieee", id="highest"),
    pytest.param(set_matmul_precision("high"), "tf32", id="high"),
    pytest.param(set_matmul_precision("medium"), "tf32", id="medium"),
    pytest.param(set_allow_tf32(False), "ieee", id="allow_tf32=False"),
    pytest.param(set_allow_tf32(True), "tf32", id="allow_tf32=True"),
    *(
        pytest.param(
            set_fp32_precision(everywhere, matmul),
            expected,
            id=f"torch.backends {everywhere}, matmul {matmul}",
            marks=NEEDS_FP32_PRECISION,
        )
        for everywhere, matmul, expected in (
            ("none", "none", "ieee"),
            ("none", "tf32", "tf32"),
            ("none", "ieee", "ieee"),
            ("tf32", "none", "tf32"),
            ("tf32", "ieee", "ieee"),
            ("ieee", "none", "ieee"),
            ("ieee", "tf32", "tf32"),
        )
    ),
]


@pytest.mark.parametrize(("set_precision", "expected"), SPELLINGS)
def test_products_are_as_exact_as_those_of_torch(set_precision, expected):
    set_precision()
    assert launch.product_precision(torch.float32) == expected
    assert launch.product_precision(torch.float16) == "ieee"


@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_torch_without_fp32_precision(is_allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=is_allowed))
    assert launch.product_precision(torch.float32) == ("tf32" if is_allowed else "ieee")


@NEEDS_FP32_PRECISION
def test_the_operator_runs_where_tf32_was_allowed_for_all_of_torch():
    torch.backends.fp32_precision = "tf32"
    shape = AttentionShape(1, 1, 5, (2, 3), 4)
    inputs = [tensor.detach().to(DEVICE).requires_grad_() for tensor in attention_inputs(shape, torch.float32)]
    output = channel_attention(*inputs, shape.segments, backend="triton")
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), inputs))
