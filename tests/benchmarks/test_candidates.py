"""Who races computes channel attention; who does not is kept out."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend

from benchmarks import candidates, gate, selection
from benchmarks.candidates import CANDIDATES, Problem, calls, score_variances, sdpa, sdpa_on, variants
from benchmarks.timing import run_pass
from uctrans.kernels import channel_attention

SMALL = Problem(32, 2, torch.float32, segments=(4, 12), heads=2, patch=8, device="cpu")
DROPPING = Problem(32, 2, torch.float32, 0.25, segments=(24, 40), heads=2, patch=8, device="cpu")
UNCOMPILED = [name for name in CANDIDATES if "compiled" not in name]


@pytest.fixture(autouse=True)
def fresh_selection():
    selection._built.clear()


@pytest.mark.parametrize("passes", ["forward", "backward", "both"])
@pytest.mark.parametrize("candidate", UNCOMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_are_exact(dtype, candidate, passes):
    problem = Problem(32, 3, dtype, segments=(16, 32), heads=2, patch=8, device="cpu")
    (call,) = calls(problem, 1)
    function = next(iter(variants(candidate, problem).values()))
    results = run_pass(function, passes, call)
    expected = results[1:] if passes == "backward" else results
    assert 0 < gate.assert_exact(problem, passes, call, expected) <= gate.TOLERANCES[dtype]


@pytest.mark.parametrize("candidate", UNCOMPILED)
def test_candidates_drop_at_the_rate_asked_for(candidate):
    (call,) = calls(DROPPING, 1)
    gate.assert_drops(DROPPING, next(iter(variants(candidate, DROPPING).values())), "both", call)


@pytest.mark.slow
@pytest.mark.parametrize("candidate", ["reference compiled", "sdpa"])
def test_compiled_candidates_race(candidate):
    entrant = selection.fastest(candidate, SMALL, "forward", calls(SMALL, 1))
    assert entrant.sample() > 0
    tried = {**entrant.notes["variants_seconds"], **entrant.notes["variants_refused"]}
    assert entrant.notes["variant"] in entrant.notes["variants_seconds"]
    if candidate == "sdpa":
        assert set(tried) >= {"torch's choice", "flash", "cudnn", "efficient"}
        assert any(name.endswith(", compiled") for name in entrant.notes["variants_seconds"])
        assert entrant.notes["torch_chooses"] == "flash"


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
def test_sdpa_matches_the_paper_with_padding_and_either_form_of_the_variance(tokens):
    segments = [3, 9, 4]
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(2, 2, tokens, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    ours = sdpa(query, key, value, segments, 0.0, 1e-5)
    torch.testing.assert_close(ours, channel_attention(query, key, value, segments, backend="reference"))
    scores = query.transpose(-1, -2) @ key / 4
    direct = [block.var((-1, -2), correction=0) for block in scores.split(segments, dim=2)]
    for variance, wanted in zip(score_variances(query, key, segments), direct, strict=True):
        torch.testing.assert_close(variance, wanted)


def test_sdpa_variants_differ_in_their_backend():
    (call,) = calls(SMALL, 1)
    assert sdpa_on("flash", SMALL)(*call.arguments).shape == (2, 16, 16)
    with pytest.raises(RuntimeError, match="No viable backend"):
        sdpa_on("cudnn", SMALL)(*call.arguments)


def test_compiled_sdpa_keeps_to_its_backend(monkeypatch):
    kernels = []

    def look(graph, inputs):
        kernels.append({str(node.target) for node in graph.graph.nodes if "scaled_dot" in str(node.target)})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look)
    monkeypatch.setattr(candidates, "compiled", lambda function, _: torch.compile(function, backend=backend))
    monkeypatch.setitem(candidates.SDPA_BACKENDS, "math", SDPBackend.MATH)
    (call,) = calls(SMALL, 1)
    for name in ("flash", "math"):
        run_pass(sdpa_on(name, SMALL, compile_it=True), "forward", call)
    fused, plain = kernels
    assert "flash" in fused.pop() and not plain


@pytest.mark.parametrize("passes", ["forward", "both"])
def test_another_function_does_not_race(monkeypatch, passes):
    def without_instance_norm(query, key, value):
        attention = (query.transpose(-1, -2) @ key / 4).softmax(dim=-1)
        return (attention @ value.transpose(-1, -2)).mean(dim=1).transpose(1, 2)

    monkeypatch.setattr(selection, "variants", lambda candidate, problem: {"wrong": without_instance_norm})
    with pytest.raises(RuntimeError, match="relative errors"):
        selection.fastest("reference", SMALL, passes, calls(SMALL, 1))
    assert "relative errors" in selection.operator_or_reason(SMALL, passes, calls(SMALL, 1))
    with pytest.raises(RuntimeError, match="relative errors"):
        selection.any_right("reference", SMALL, calls(SMALL, 1)[0])


def test_results_that_are_not_finite_do_not_race(monkeypatch):
    monkeypatch.setattr(selection, "variants", lambda *_: {"nan": lambda q, k, v: q.mean(dim=1) * torch.nan})
    with pytest.raises(RuntimeError, match="not finite"):
        selection.fastest("reference", DROPPING, "forward", calls(DROPPING, 1))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_another_rate_of_dropout_does_not_race(rate):
    (call,) = calls(DROPPING, 1)

    def function(query, key, value):
        return channel_attention(query, key, value, DROPPING.segments, dropout_p=rate, backend="reference")

    with pytest.raises(AssertionError, match="is off by"):
        gate.assert_drops(DROPPING, function, "forward", call)


def test_a_slower_right_variant_beats_a_faster_wrong_one(monkeypatch):
    right = next(iter(variants("composed", SMALL).values()))
    offered = {"wrong": lambda q, k, v: q.mean(dim=1), "right": right}
    monkeypatch.setattr(selection, "variants", lambda *_: offered)
    entrant = selection.fastest("composed", SMALL, "forward", calls(SMALL, 1))
    assert entrant.notes["variant"] == "right"
    assert "relative errors" in entrant.notes["variants_refused"]["wrong"]


def test_calls_are_random_and_differ():
    first, second = calls(SMALL, 2)
    assert first.arguments[0].std().item() == pytest.approx(1.0, abs=0.2)
    assert not torch.equal(first.arguments[0], second.arguments[0])
    assert not torch.equal(first.arguments[1], first.arguments[2])
