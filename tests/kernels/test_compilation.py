"""Kernels compiled without a GPU: nothing spills, every product is on the matrix units, all launches fit.

Compilation runs in processes of its own, because the interpreter of the other tests cannot be switched off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from uctrans.kernels import compilation
from uctrans.kernels.backend import INTERPRETER_VARIABLE
from uctrans.kernels.compilation import TARGETS, compiling_for

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernel-resources.md"
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
CACHE_VARIABLES = ("TRITON_HOME", "TRITON_CACHE_DIR")  # its entries are named after a hash of all that they rest on
COMPILE = """
import json, torch
from uctrans.kernels import compilation

kernels, problems = compilation.compile_launches({target!r}, compilation.{sizes}(torch.{dtype}))
report = {{"problems": problems, "never_launched": compilation.kernels_without_launch(kernels)}}
print(json.dumps(report | {{"kernels": sorted({{kernel.kernel for kernel in kernels}})}}))
"""


def run(*words):
    """Return the output of ``python *words``, read as JSON."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TRITON_") or name in CACHE_VARIABLES
    }
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in ("sm_80", "sm_100") else []) for name in TARGETS],
)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def found(architecture):
    """Return what the checks know of each kernel of ``kernels_to_catch.py``, by its fault."""
    return run(str(Path(__file__).with_name("kernels_to_catch.py")), architecture)


def test_faults_are_found(architecture, found):
    assert {kernel["architecture"] for kernel in found.values()} == {architecture}
    assert {kernel["shared_limit"] for kernel in found.values()} == {SHARED_LIMITS[architecture]}
    assert all(kernel["products"] == ["bf16"] for kernel in found.values())
    assert all(sum(kernel["matrix_instructions"].values()) > 0 for kernel in found.values())

    words = {"greedy": "shared memory", "wide grid": "grid"}
    if architecture == "sm_90":
        words |= {"spilling": "spills", "off the matrix units": "no HGMMA"}
    for fault, kernel in found.items():
        expected = [words[fault]] if fault in words else []
        assert len(kernel["problems"]) == len(expected), (fault, kernel["problems"])
        assert all(word in problem for word, problem in zip(expected, kernel["problems"], strict=True))


def test_resources_of_a_kernel_are_read(found):
    sound, spilling, unaligned = found["sound"], found["spilling"], found["unaligned"]
    assert sound["constants"] == {"BLOCK_M": "64", "BLOCK_N": "64", "BLOCK_K": "64"}
    assert (sound["warps"], sound["stages"], sound["grid"]) == (4, 3, [1])
    assert sound["stack"] == sound["local_accesses"] == 0 and spilling["stack"] > 0
    assert 0 < sound["registers"] < 128 <= spilling["registers"] <= 512
    assert sound["shared"] > 0
    assert (sound["unaligned"], sound["folded"]) == ([], {})
    assert (unaligned["unaligned"], unaligned["folded"]) == (["left_ptr", "width"], {"stride": "1"})


@pytest.mark.parametrize(
    ("target", "dtype", "sizes"),
    [
        ("sm_90", "bfloat16", "representative"),
        ("sm_80", "bfloat16", "representative"),
        ("sm_100", "bfloat16", "representative"),
        ("gfx942", "float16", "representative"),
        pytest.param("sm_90", "float16", "published", marks=pytest.mark.slow),
        pytest.param("sm_90", "float32", "published", marks=pytest.mark.slow),
        pytest.param("sm_90", "bfloat16", "odd", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_is_sound(target, dtype, sizes):
    report = run("-c", COMPILE.format(target=target, dtype=dtype, sizes=sizes))
    assert report["problems"] == []
    assert report["never_launched"] == []


@pytest.mark.slow
def test_the_page_lists_every_kernel():
    report = run("-c", COMPILE.format(target="sm_90", dtype="bfloat16", sizes="published"))
    rows = [
        line.split("|")[1].strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if "| bfloat16 |" in line
    ]
    assert rows == report["kernels"], "`make resources` writes the page"


def test_a_page_of_kernels_with_faults_is_not_written(monkeypatch, tmp_path, capsys):
    page, faults = tmp_path / "page.md", ["spills 8 bytes"]
    monkeypatch.setattr(compilation, "compile_launches", lambda target, sizes: ([], faults))
    assert compilation.main(["--published", str(page)]) == 1
    assert not page.exists()
    assert "spills 8 bytes" in capsys.readouterr().err
    faults.clear()
    assert compilation.main(["--published", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("# Resources of the kernels")


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv(INTERPRETER_VARIABLE, "1")
    with pytest.raises(RuntimeError, match=INTERPRETER_VARIABLE), compiling_for("cuda", 90):
        pass
