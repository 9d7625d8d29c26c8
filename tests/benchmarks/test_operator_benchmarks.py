"""Benchmarks of operators: candidates are checked, wrong ones are not timed, and the work is counted right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    test_attention_block,
    test_batch_norm_relu,
    test_channel_attention,
    test_segmentation_loss,
    test_skip_gate,
)
from benchmarks.harness import OPERATOR, PASSES, SEGMENTS, Work, checked_sample
from benchmarks.records import append_line, read_lines, table
from benchmarks.test_attention_block import block
from benchmarks.test_channel_attention import attention, score_variances, sdpa
from benchmarks.test_skip_gate import gates
from uctrans.kernels import channel_attention

ROOT = Path(__file__).parents[2]
MODULES = (test_channel_attention, test_attention_block, test_skip_gate, test_batch_norm_relu, test_segmentation_loss)
TINY = [module.CASES[place] for module in MODULES for place in (0, 1) if "224" not in str(module.CASES[place])]
CHECKED = [(case, candidate) for case in TINY for candidate in case.candidates]


@pytest.mark.parametrize(("case", "candidate"), CHECKED, ids=lambda value: str(value))
def test_every_candidate_is_right(case, candidate):
    torch.manual_seed(0)
    for passes in PASSES if not case.dropout_p else ("both",):
        sample, _ = checked_sample(case, passes, case.function(candidate), case.calls(passes))
        assert sample.seconds() > 0


@pytest.mark.parametrize("case", [case for case in TINY if not case.dropout_p], ids=str)
def test_a_wrong_operator_does_not_race(case):
    def wrong(*arguments):
        outputs = case.function("reference")(*arguments)
        factor = 1 + 2 * case.tolerance
        return factor * outputs if isinstance(outputs, torch.Tensor) else (factor * outputs[0], *outputs[1:])

    with pytest.raises(AssertionError, match="relative errors"):
        checked_sample(case, "forward", wrong, case.calls("forward"))


def test_the_most_important_cases_come_first_on_a_gpu():
    for module in MODULES:
        names = [str(case) for case in module.CASES]
        assert len(set(names)) == len(names)
        first = next(case for case in module.CASES if case.device == "cuda")
        assert first.dtype == torch.bfloat16
        assert first.sizes["pixels"] == 224
        assert OPERATOR in first.names()
        assert any(name.endswith(" compiled") for name in first.names())


class TestAttention:
    @pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
    def test_sdpa_matches_the_published_steps_with_padding_and_either_form_of_the_variance(self, tokens):
        segments = [3, 9, 4]
        generator = torch.Generator().manual_seed(tokens)
        query, key, value = (torch.randn(2, 2, tokens, 16, generator=generator, dtype=torch.float64) for _ in range(3))
        ours = sdpa(query, key, value, segments, 0.0)
        torch.testing.assert_close(ours, channel_attention(query, key, value, segments, backend="reference"))
        scores = query.transpose(-1, -2) @ key / 4
        direct = [part.var((-1, -2), correction=0) for part in scores.split(segments, dim=2)]
        for variance, wanted in zip(score_variances(query, key, segments), direct, strict=True):
            torch.testing.assert_close(variance, wanted)

    def test_sdpa_keeps_to_the_backend_it_is_given(self):
        arguments = [torch.randn(1, 1, 16, 4) for _ in range(3)]
        with pytest.raises(RuntimeError, match="No viable backend"):
            sdpa(*arguments, (4,), 0.0, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)

    def test_work_of_one_image_by_hand(self):
        case = attention(224, 1, torch.bfloat16)
        product, packed = 2 * 960 * 960 * 196 * 4, 4 * 196 * 960
        assert case.work("forward") == Work(2 * product, (3 * packed + 196 * 960) * 2)
        assert case.work("backward") == Work(5 * product, (6 * packed + 196 * 960) * 2)
        assert case.work("both") == case.work("forward") + case.work("backward")
        assert 4 * case.work("forward").flop == pytest.approx(11.6e9, rel=0.01)

    def test_pytorch_counts_the_same_products_in_the_published_steps(self):
        arguments = [torch.empty(2, 4, 49, 960, device="meta", requires_grad=True) for _ in range(3)]
        work = attention(112, 2, torch.float32).work

        def forward():
            return channel_attention(*arguments, SEGMENTS, backend="reference")

        forward_flop = counted_flop(forward)
        assert forward_flop == work("forward").flop
        training_flop = counted_flop(lambda: forward().sum().backward())
        # Stored maps save the published steps one of five: the scores are not computed again.
        assert training_flop - forward_flop == work("backward").flop * 4 / 5

    @pytest.mark.parametrize("pixels", [224, 400, 1024])
    def test_the_block_is_counted_in_the_cheaper_order(self, pixels):
        case = block(pixels, 2, torch.bfloat16)
        meta = [
            argument.to("meta") for argument in block(64, 1, torch.float32, device="cpu").calls("forward")[0].arguments
        ]
        meta[:2] = [torch.empty(2, (pixels // 16) ** 2, 960, device="meta") for _ in range(2)]
        flop = [counted_flop(lambda name=name: case.candidates[name](*meta)) for name in ("reference", "composed")]
        assert case.work("forward").flop == pytest.approx(min(flop))
        assert case.work("both").flop == 3 * case.work("forward").flop


def test_the_work_of_a_gate_is_that_of_its_scales():
    one, three, all_four = (
        gates(224, 4, torch.bfloat16, scales).work("both") for scales in ((0,), (1, 2, 3), (0, 1, 2, 3))
    )
    assert one + three == all_four
    maps = 4 * 64 * 224**2  # elements of the encoder's map at the first scale
    assert one.bytes == pytest.approx(2 * maps * (10 + 5 / 256 + 3 / 4))


def test_pytest_runs_the_races_that_a_record_lacks(tmp_path):
    record = tmp_path / "record.jsonl"
    measured = "test_skip_gate[cpu-float32-pixels_32-batch_2-detail_scale_all,_channels-last-both-reference]"
    append_line(record, {"test": measured})
    # Without what a parallel run of tests leaves there: pytest-benchmark would take itself for one of its workers.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = ["benchmarks/test_skip_gate.py", "benchmarks/test_segmentation_loss.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "--benchmark-only"]
    command += ["-k", "pixels_32 and both and (skip_gate or one_class)", "--record", str(record), "--missing"]
    command += [f"--benchmark-json={tmp_path / 'shown.json'}"]
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert "5 passed, 1 skipped" in ended.stdout
    _, environment, *lines = read_lines(record)
    assert "environment" in environment
    shown = json.loads((tmp_path / "shown.json").read_text())["benchmarks"]
    assert sorted(entry["name"] for entry in shown) == sorted(line["test"] for line in lines)
    for line in lines:
        (stats,) = (entry["stats"] for entry in shown if entry["name"] == line["test"])
        assert stats["data"] == pytest.approx(line["seconds"])  # pytest-benchmark shows what the record has
    assert "skip gate: scale all, channels-last, 32, 2, float32, both, cpu | composed" in table(lines)


def counted_flop(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
