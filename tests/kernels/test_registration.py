"""What every operator has from its registration, and which form a public function takes."""

import pytest
import torch

from uctrans.kernels import packed_layer_norm
from uctrans.kernels.backend import choose_form

CPU = torch.device("cpu")
TOKENS = torch.zeros(1, 2, 4)
CHANNELS = torch.ones(4)


class TestForm:
    @pytest.fixture(autouse=True)
    def interpreter(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    @pytest.mark.parametrize("backend", ["triton", "composed", "reference"])
    def test_is_the_backend_asked_for(self, backend):
        assert choose_form(backend, TOKENS, "packed_linear") == backend

    @pytest.mark.parametrize("backend", ["triton", "composed", "reference"])
    def test_beyond_the_limits_of_the_kernels(self, backend):
        expected = "composed" if backend == "triton" else backend
        assert choose_form(backend, TOKENS, "packed_linear", fits=False) == expected

    def test_float64(self, monkeypatch):
        words = "operator of packed_linear computes in float32; use backend='composed'"
        with pytest.raises(NotImplementedError, match=words):
            choose_form("triton", TOKENS.double(), "packed_linear")
        monkeypatch.setenv("UCTRANS_BACKEND", "triton")
        assert choose_form("auto", TOKENS, "packed_linear") == "triton"
        assert choose_form("auto", TOKENS.double(), "packed_linear") == "composed"


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = "uctrans::packed_layer_norm runs on a CUDA device, .*TRITON_INTERPRET=1; use backend='composed'"
    with pytest.raises(NotImplementedError, match=words):
        torch.ops.uctrans.packed_layer_norm(TOKENS, [4], CHANNELS, CHANNELS, 1e-6, torch.float32)
    assert packed_layer_norm(TOKENS, [4], CHANNELS, CHANNELS).shape == TOKENS.shape
