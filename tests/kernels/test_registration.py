"""Registration of operators, and the form that a public function takes."""

from contextlib import contextmanager

import pytest
import torch

from uctrans.kernels import backend as backends
from uctrans.kernels import channel_attention, packed_layer_norm
from uctrans.kernels.backend import choose_form, obstacle_to_triton, resolve_backend
from uctrans.kernels.registration import register_operator
from uctrans.kernels.testing import AttentionShape, attention_inputs

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

    @pytest.mark.parametrize(
        "transform",
        [
            lambda function: torch.func.jvp(function, (TOKENS,), (TOKENS,)),
            lambda function: torch.func.grad(lambda tokens: function(tokens).sum())(TOKENS),
            lambda function: torch.func.vmap(function)(TOKENS[None]),
        ],
        ids=["jvp", "grad", "vmap"],
    )
    def test_transforms(self, transform, monkeypatch):
        def normalise(backend):
            return lambda tokens: packed_layer_norm(tokens, [4], CHANNELS, CHANNELS, backend=backend)

        with pytest.raises(NotImplementedError, match=r"no torch.func transform .*; use backend='composed'"):
            transform(normalise("triton"))
        monkeypatch.setenv("UCTRANS_BACKEND", "triton")
        torch.testing.assert_close(transform(normalise("auto")), transform(normalise("composed")))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = "uctrans::packed_layer_norm runs on a CUDA device, .*TRITON_INTERPRET=1; use backend='composed'"
    with pytest.raises(NotImplementedError, match=words):
        torch.ops.uctrans.packed_layer_norm(TOKENS, [4], CHANNELS, CHANNELS, 1e-6, torch.float32)
    assert packed_layer_norm(TOKENS, [4], CHANNELS, CHANNELS).shape == TOKENS.shape


class TestBackend:
    @pytest.fixture
    def inputs(self):
        return [*attention_inputs(AttentionShape(2, 2, 9, (4, 8), 12), torch.float32), (4, 8)]

    def test_environment_variable_overrides_auto_only(self, inputs, monkeypatch):
        results = {backend: channel_attention(*inputs, backend=backend) for backend in ("reference", "composed")}
        assert not torch.equal(results["reference"], results["composed"])
        monkeypatch.setenv("UCTRANS_BACKEND", "reference")
        assert torch.equal(channel_attention(*inputs), results["reference"])
        assert torch.equal(channel_attention(*inputs, backend="composed"), results["composed"])
        monkeypatch.setenv("UCTRANS_BACKEND", "")
        assert resolve_backend("auto", torch.device("cpu")) == "composed"
        monkeypatch.setenv("UCTRANS_BACKEND", "cuda")
        with pytest.raises(ValueError, match="UCTRANS_BACKEND is 'cuda'"):
            channel_attention(*inputs)

    def test_capability_that_the_kernels_are_not_made_for(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        device = torch.device("cuda", 0)
        assert obstacle_to_triton(device) == "the Triton operators need CUDA capability 8.0 or newer; Tesla T4 has 7.5"
        with pytest.raises(NotImplementedError, match=r"Tesla T4 has 7\.5; use backend='composed'"):
            resolve_backend("triton", device)
        assert resolve_backend("auto", device) == "composed"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert resolve_backend("auto", device) == "triton"

    def test_triton_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(backends, "find_spec", lambda name: None)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
        with pytest.raises(NotImplementedError, match=r"pip install triton==3\.7\.1 \(for PyTorch 2\.13, on Linux\)"):
            resolve_backend("triton", torch.device("cuda"))
        monkeypatch.setattr(torch, "__version__", "9.1.0")
        with pytest.raises(NotImplementedError, match=r"pip install triton \(for PyTorch 9\.1, on Linux\)"):
            resolve_backend("triton", torch.device("cuda"))
        assert resolve_backend("auto", torch.device("cuda")) == "composed"


def double(scale, tensors):
    """Launch nothing: the launcher of an operator that exists for the test below."""
    return tensors[0] * scale


def test_operators_launch_on_the_device_of_their_first_tensor(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    @register_operator("doubled", "(Tensor scale, Tensor[] tensors) -> Tensor", launcher=f"{__name__}:double")
    def fake(scale, tensors):
        return torch.empty_like(tensors[0])

    current = []

    @contextmanager
    def recorded(tensor):
        current.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", recorded)
    scale = torch.tensor(2.0)
    assert torch.equal(torch.ops.uctrans.doubled(scale, [CHANNELS]), 2 * CHANNELS)
    assert [tensor.data_ptr() for tensor in current] == [scale.data_ptr()]
