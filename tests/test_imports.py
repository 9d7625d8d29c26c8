"""What importing costs: no optional package, no GPU, hardly more time than importing torch."""

import json
import os
import statistics
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    *("triton", "monai", "skimage", "matplotlib", "jsonargparse"),
    *("tensorboard", "yaml", "tqdm", "onnx", "onnxruntime", "huggingface_hub"),
)
# Kernels and what launches them import triton at the top; nothing imports them before something is launched.
TRITON_FILES = ("triton*", "launch")
MODULES_BEYOND_TORCH = 160  # half of them our own; scikit-image alone would be several hundred
TIME_BEYOND_TORCH = 1.0  # of the time that importing torch takes; a lax bound on a quantity that noise moves

# Each module is imported in a child of a process that has imported torch, so each begins as a fresh interpreter would.
IMPORT_EACH = """
import importlib, json, os, sys
import torch

before = set(sys.modules)
for name in {names!r}:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
            new = sorted(set(sys.modules) - before)
            print(json.dumps({{"name": name, "new": new, "cuda": torch.cuda.is_initialized()}}), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def module_names():
    files = {path: "uctrans" for path in (ROOT / "uctrans").rglob("*.py") if "kernels" not in path.parts}
    files |= dict.fromkeys((ROOT / "kernels").rglob("*.py"), "uctrans.kernels")
    names = []
    for path, package in files.items():
        parts = path.relative_to(ROOT / package.rpartition(".")[2]).with_suffix("").parts
        names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return sorted(set(names) - {"uctrans.__main__"})  # which runs the command


def is_triton_code(name):
    package, _, file = name.rpartition(".")
    return package.startswith("uctrans.kernels") and any(fnmatch(file, pattern) for pattern in TRITON_FILES)


def run(source, **environment):
    """Standard output of ``source`` in a fresh interpreter that imports from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def imports():
    """What each module brought in, by its name."""
    output = run(IMPORT_EACH.format(names=module_names()), CUDA_VISIBLE_DEVICES="")
    return {report["name"]: report for report in map(json.loads, output.splitlines())}


def test_every_module_imports(imports):
    assert {"uctrans", "uctrans.kernels", "uctrans.kernels.backend", "uctrans.cli"} <= set(module_names())
    expected = [name for name in module_names() if find_spec("triton") or not is_triton_code(name)]
    assert sorted(imports) == expected


def test_no_module_imports_an_optional_package(imports):
    brought = {
        name: {new.partition(".")[0] for new in report["new"]} & set(OPTIONAL) for name, report in imports.items()
    }
    expected = {name: {"triton"} if is_triton_code(name) else set() for name in imports}
    assert brought == expected


def test_no_module_touches_a_gpu(imports):
    assert [name for name, report in imports.items() if report["cuda"]] == []


def test_no_module_imports_much(imports):
    counts = {name: len(report["new"]) for name, report in imports.items()}
    assert {name: count for name, count in counts.items() if count > MODULES_BEYOND_TORCH} == {}


@pytest.mark.parametrize("blocked", [("triton",), ("skimage", "monai", "jsonargparse", "yaml", "tqdm", "matplotlib")])
def test_a_model_runs_without_optional_packages(blocked):
    run(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import torch, uctrans, uctrans.layers, uctrans.kernels\n"
        "uctrans.create_model('uctransnet', base_channels=2, image_size=32).eval()(torch.rand(1, 3, 32, 32))"
    )


def test_importing_takes_little_longer_than_importing_torch():
    source = (
        "import time; start = time.perf_counter(); import torch; between = time.perf_counter(); import uctrans\n"
        "print((time.perf_counter() - between) / (between - start))"
    )
    assert statistics.median(float(run(source)) for _ in range(3)) < TIME_BEYOND_TORCH
