"""Kernels compiled without a GPU: nothing spills, every product is on the matrix units, all launches fit.

Compilation runs in processes of its own, because the interpreter of the other tests cannot be switched off.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from uctrans.kernels import compilation  # noqa: E402
from uctrans.kernels.backend import INTERPRETER_VARIABLE  # noqa: E402
from uctrans.kernels.compilation import TARGETS, compiling_for  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernel-resources.md"
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
CACHE_VARIABLES = ("TRITON_HOME", "TRITON_CACHE_DIR")  # its entries are named after a hash of all that they rest on
KERNELS = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)  # functions that are launched end so
COMPILE = """
import json, torch
from uctrans.kernels import compilation

kernels, problems = compilation.compile_launches({target!r}, {sizes})
print(json.dumps({{"problems": problems, "launched": sorted({{kernel.kernel for kernel in kernels}})}}))
"""
EACH_ONCE = "compilation.Sizes(torch.{dtype}, maps=((64, 224, 16),), has_variants=False)"


def run(*words):
    """Return the standard output of ``python *words``, in which Triton compiles by its defaults."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TRITON_") or name in CACHE_VARIABLES
    }
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in ("sm_80", "sm_100") else []) for name in TARGETS],
)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def found(architecture):
    """Return what the checks know of each kernel of ``kernels_to_catch.py``, by its fault."""
    return json.loads(run(str(Path(__file__).with_name("kernels_to_catch.py")), architecture))


def test_faults_are_found(architecture, found):
    assert {kernel["architecture"] for kernel in found.values()} == {architecture}
    assert {kernel["shared_limit"] for kernel in found.values()} == {SHARED_LIMITS[architecture]}
    assert all(kernel["products"] == ["bf16"] for kernel in found.values())
    assert all(sum(kernel["matrix_instructions"].values()) > 0 for kernel in found.values())

    words = {"greedy": "shared memory", "wide grid": "grid"}
    if architecture == "sm_90":
        words |= {"spilling": "spills", "off the matrix units": "no HGMMA", "half idle": "computes rows of 64x64 in"}
    for fault, kernel in found.items():
        expected = [words[fault]] if fault in words else []
        assert len(kernel["problems"]) == len(expected), (fault, kernel["problems"])
        assert all(word in problem for word, problem in zip(expected, kernel["problems"], strict=True))


def test_resources_of_a_kernel_are_read(architecture, found):
    sound, spilling = found["sound"], found["spilling"]
    assert sound["constants"] == {"BLOCK_M": "64", "BLOCK_N": "64", "BLOCK_K": "64"}
    assert (sound["warps"], sound["stages"], sound["grid"]) == (4, 3, [1])
    assert sound["stack"] == sound["local_accesses"] == 0 and spilling["stack"] > 0
    assert 0 < sound["registers"] < 128 <= spilling["registers"] <= 512
    assert sound["shared"] > 0
    assert (sound["tensor_memory"] > 0) == (architecture == "sm_100")
    if architecture == "sm_90":  # rows that are not aligned are not copied ahead into shared memory
        assert found["unaligned"]["shared"] < sound["shared"]


def test_accesses_count_within_loops_alone():
    listing = """
        /*0000*/                   LDL R1, [R0] ;                  /* 0x0000000000017983 */
        /*0010*/                   BRA 0x30 ;                      /* 0x0000000000047947 */
        /*0020*/                   STL.64 [R1+0x8], R2 ;           /* 0x0000080201007387 */
        /*0030*/              @!P0 BRA 0x20 ;                      /* 0xfffffffc00f88947 */
        /*0040*/                   LDL.LU R3, [R1] ;               /* 0x0000000001037983 */
        /*0050*/                   EXIT ;                          /* 0x000000000000794d */
        /*0060*/                   BRA 0x60;                       /* 0xfffffffc00fc7947 */
    """
    assert compilation._local_accesses_in_loops(listing) == 1


@pytest.mark.parametrize(
    ("target", "dtype", "sizes"),
    [
        ("sm_90", "bfloat16", EACH_ONCE),
        ("sm_80", "bfloat16", EACH_ONCE),
        ("sm_100", "bfloat16", EACH_ONCE),
        ("gfx942", "float16", EACH_ONCE),
        pytest.param("sm_90", "float32", "compilation.Sizes(torch.{dtype})", marks=pytest.mark.slow),
        pytest.param("sm_90", "bfloat16", "compilation.odd(torch.{dtype})", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_is_sound(target, dtype, sizes):
    report = json.loads(run("-c", COMPILE.format(target=target, sizes=sizes.format(dtype=dtype))))
    assert report["problems"] == []
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    assert report["launched"] == sorted({name for source in sources for name in KERNELS.findall(source)})


@pytest.mark.slow
def test_the_page_is_what_the_compiler_gives(tmp_path):
    written = PAGE.read_text(encoding="utf-8")
    if f"{triton.__version__} registers" not in written:
        pytest.skip(f"{PAGE.name} has no columns of Triton {triton.__version__}")
    copy = tmp_path / PAGE.name
    copy.write_text(written, encoding="utf-8")
    run("-m", "uctrans.kernels.compilation", "--published", str(copy))
    assert copy.read_text(encoding="utf-8") == written, "`make resources` writes the page"


def compiled_kernel(name, registers):
    fields = dict.fromkeys(compilation.CompiledKernel.__annotations__, 0)
    return compilation.CompiledKernel(**fields | {"kernel": name, "registers": registers})


def test_a_page_keeps_the_columns_of_other_versions(monkeypatch, tmp_path, capsys):
    page, problems = tmp_path / "page.md", []

    def write(version, *kernels):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(compilation, "compile_launches", lambda target, sizes: (kernels, problems))
        return compilation.main(["--published", str(page)])

    def table():
        return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]

    assert write("3.6.0", compiled_kernel("gone_kernel", 8), compiled_kernel("kept_kernel", 16)) == 0
    assert write("3.7.1", *(compiled_kernel(*cells) for cells in (("kept_kernel", 32), ("kept_kernel", 24)))) == 0
    columns = [f"{version} {use}" for version in ("3.6.0", "3.7.1") for use in ("registers", "shared", "stack")]
    expected = [
        f"| kernel | dtype | {' | '.join(columns)} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| kept_kernel | bfloat16 | 16 | 0 | 0 | 32 | 0 | 0 |",
        "| kept_kernel | float16 | 16 | 0 | 0 | 32 | 0 | 0 |",
    ]
    assert table() == expected

    problems.append("spills 8 bytes")
    assert write("3.7.1") == 1
    assert "spills 8 bytes" in capsys.readouterr().err
    assert table() == expected


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv(INTERPRETER_VARIABLE, "1")
    with pytest.raises(RuntimeError, match=INTERPRETER_VARIABLE), compiling_for("cuda", 90):
        pass
