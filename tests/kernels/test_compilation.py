"""Kernels compiled for GPUs that are not there: nothing spills, every product is on the matrix units, all launches fit.

Compilation goes on in processes of their own, because the interpreter of the other tests cannot be switched off.
"""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from uctrans.kernels import resources
from uctrans.kernels.backend import INTERPRETER_VARIABLE
from uctrans.kernels.compilation import compiling_for
from uctrans.kernels.resources import SECTIONS, fingerprint

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernel-resources.md"
TARGETS = {"sm_80": ("cuda", "80"), "sm_90": ("cuda", "90"), "sm_100": ("cuda", "100"), "gfx942": ("hip", "gfx942")}
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
CACHE_VARIABLES = ("TRITON_HOME", "TRITON_CACHE_DIR")  # its entries are named after a hash of all that they rest on


def run(*words):
    """What ``python *words`` prints, read as JSON."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TRITON_") or name in CACHE_VARIABLES
    }
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=TARGETS)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def found(architecture):
    """What the checks know of each kernel of ``kernels_to_catch.py``, by its fault."""
    return run(str(Path(__file__).with_name("kernels_to_catch.py")), *TARGETS[architecture])


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


def test_what_a_kernel_uses_is_read(found):
    sound, spilling, unaligned = found["sound"], found["spilling"], found["unaligned"]
    assert sound["constants"] == {"BLOCK_M": "64", "BLOCK_N": "64", "BLOCK_K": "64"}
    assert (sound["warps"], sound["stages"], sound["grid"]) == (4, 3, [1])
    assert sound["stack"] == sound["local_accesses"] == 0 and spilling["stack"] > 0
    assert 0 < sound["registers"] < 128 <= spilling["registers"] <= 512
    assert sound["shared"] > 0
    assert (sound["unaligned"], sound["folded"]) == ([], {})
    assert (unaligned["unaligned"], unaligned["folded"]) == (["left_ptr", "width"], {"stride": "1"})


@pytest.mark.parametrize("section", ["sm_90-bfloat16", "gfx942-float16"])
def test_every_kernel_is_sound(section):
    """Of one section for each family of GPUs; `make resources` compiles all, which takes minutes."""
    report = run("-m", "uctrans.kernels.resources", "--section", section)
    assert report["problems"] == []
    assert report["never_launched"] == []
    if f"with triton {triton.__version__} " in PAGE.read_text():
        (kept,) = re.findall(rf"^## {section}\n\n(.*?)\n(?=\n## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
        difference = difflib.unified_diff(kept.splitlines(), report["table"].splitlines(), "kept", "compiled", n=0)
        assert kept == report["table"], "`make resources` rewrites the page:\n" + "\n".join(difference)


def test_the_page_is_of_these_kernels():
    """It is written only where every kernel of every section is sound."""
    assert f"of the sources {fingerprint()};" in PAGE.read_text(), "`make resources` rewrites the page"
    assert PAGE.read_text().count("\n## ") == len(SECTIONS)


def test_comments_are_no_part_of_what_the_page_is_of(monkeypatch, tmp_path):
    package = Path(resources.__file__).parent
    shutil.copytree(package, tmp_path / "kernels")
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "kernels/resources.py"))
    before, kernel = fingerprint(), tmp_path / "kernels/skip_gate/triton_gate.py"
    kernel.write_text("# a remark\n\n" + kernel.read_text() + "    # another")
    assert fingerprint() == before
    kernel.write_text(kernel.read_text().replace("tl.load", "tl.store", 1))
    assert fingerprint() != before


def test_the_page_is_of_every_file_that_has_a_kernel(monkeypatch, tmp_path):
    package = Path(resources.__file__).parent
    shutil.copytree(package, tmp_path / "kernels")
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "kernels/resources.py"))
    files = [path for path in (tmp_path / "kernels").rglob("*.py") if "\n@triton.jit\n" in path.read_text()]
    assert {"launch.py", "triton_windows.py", "triton.py"} <= {path.name for path in files}
    for path in files:
        before, code = fingerprint(), path.read_text()
        path.write_text(code.replace("\n        ", "\n    ", 1))  # a line that leaves its block
        assert path.read_text() != code and fingerprint() != before, path


def test_a_page_of_kernels_with_faults_is_not_written(monkeypatch, tmp_path, capsys):
    class Here:
        """A pool without processes."""

        __enter__, __exit__ = lambda self: self, lambda self, *_: None
        map = staticmethod(map)

    faults = {"sm_90-bfloat16": ["spills 8 bytes"]}
    monkeypatch.setattr(resources, "ProcessPoolExecutor", lambda *_, **__: Here())
    monkeypatch.setattr(
        resources,
        "compile_section",
        lambda section: {"name": section.name, "table": "| |", "problems": faults.get(section.name, [])},
    )
    assert resources.main(["--output", str(tmp_path / "page.md")]) == 1
    assert not (tmp_path / "page.md").exists()
    assert capsys.readouterr().err.strip() == "sm_90-bfloat16: spills 8 bytes"
    faults.clear()
    assert resources.main(["--output", str(tmp_path / "page.md")]) == 0
    assert f"of the sources {fingerprint()};" in (tmp_path / "page.md").read_text()


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv(INTERPRETER_VARIABLE, "1")
    with pytest.raises(RuntimeError, match=INTERPRETER_VARIABLE), compiling_for("cuda", 90):
        pass
