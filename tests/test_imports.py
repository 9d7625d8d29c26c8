"""The cost of importing (no optional package, no GPU, few modules beyond torch) and the direction of imports."""

import ast
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    *("triton", "monai", "skimage", "matplotlib", "jsonargparse"),
    *("tensorboard", "yaml", "tqdm", "onnx", "onnxruntime", "huggingface_hub"),
)
# Kernels and what launches them import triton at the top; nothing imports them before something is launched.
TRITON_FILES = ("triton*", "launch", "compilation")
MODULES_BEYOND_TORCH = 160  # half of them our own; scikit-image alone would be several hundred

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


# What a part of uctrans may import besides itself; kernels can be used alone.
MAY_IMPORT = {
    "kernels": (),
    "layers": ("kernels",),
    "models": ("kernels", "layers"),
    "data": (),
    "training": ("kernels", "layers", "models", "data"),
    "inference": ("kernels", "layers", "models", "data"),
    "study": ("models", "data", "training", "inference"),
}


def module_files():
    """Return the file of every module of uctrans, by the module's name."""
    files = {}
    for folder, package in (("uctrans", "uctrans"), ("kernels", "uctrans.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder)
            if folder == "kernels" or relative.parts[0] != "kernels":
                files[".".join((package, *relative.with_suffix("").parts)).removesuffix(".__init__")] = path
    return files


def module_names():
    return sorted(module_files().keys() - {"uctrans.__main__"})  # importing it runs the command


def imported_modules(name, path, files):
    """Return the modules of uctrans that ``name`` imports anywhere: in functions, and the launchers of operators."""
    text = path.read_text(encoding="utf-8")
    found = {f"{name.rpartition('.')[0]}.{module}" for module in re.findall(r'launcher=f"{__package__}\.(\w+):', text)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level or not (node.module or "").startswith("uctrans"), f"{path}: imports uctrans absolutely"
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = ".".join((*package[: len(package) - node.level + 1], *([node.module] if node.module else [])))
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base for alias in node.names}
    return (found & files.keys()) - {name}


@pytest.fixture(scope="module")
def import_graph():
    files = module_files()
    return {name: imported_modules(name, path, files) for name, path in files.items()}


def is_triton_code(name):
    package, _, file = name.rpartition(".")
    return package.startswith("uctrans.kernels") and any(fnmatch(file, pattern) for pattern in TRITON_FILES)


def run(source, **environment):
    """Standard output of ``source`` in a fresh interpreter that imports from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_have_no_circle(import_graph):
    assert len(tuple(TopologicalSorter(import_graph).static_order())) == len(import_graph)


def test_imports_run_one_way(import_graph):
    wrong = [
        f"{name} imports {imported}"
        for name, found in import_graph.items()
        for imported in found
        if (part := name.split(".")[1:2]) and part[0] in MAY_IMPORT and imported.split(".")[1:2] != part
        if imported.split(".")[1:2] and imported.split(".")[1] in MAY_IMPORT
        and imported.split(".")[1] not in MAY_IMPORT[part[0]]
    ]  # fmt: skip
    assert wrong == []


@pytest.fixture(scope="module")
def imports():
    """Return the modules that each module imported, by its name."""
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


def test_training_and_prediction_run_without_triton():
    """As beside PyTorch's build for the CPU, which brings none."""
    run(
        "import sys; sys.modules['triton'] = None\n"
        "import numpy, torch, uctrans\n"
        "from uctrans.inference import Predictor\n"
        "from uctrans.training import segmentation_loss\n"
        "model = uctrans.create_model('uctransnet', base_channels=2, image_size=32)\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "masks = torch.ones(2, 32, 32, dtype=torch.uint8)\n"
        "segmentation_loss(model(torch.rand(2, 3, 32, 32)), masks).backward()\n"
        "optimizer.step()\n"
        "Predictor(model, device='cpu').probabilities_of_image(numpy.zeros((32, 32, 3), numpy.uint8))\n"
        "try:\n"
        "    uctrans.create_model('uctransnet', base_channels=2, backend='triton')(torch.rand(1, 3, 32, 32))\n"
        "except NotImplementedError as error:\n"
        "    assert 'pip install triton' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('triton ran')\n"
    )


@pytest.mark.parametrize("blocked", [("triton",), ("skimage", "monai", "jsonargparse", "yaml", "tqdm", "matplotlib")])
def test_a_model_runs_without_optional_packages(blocked):
    run(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import torch, uctrans, uctrans.layers, uctrans.kernels\n"
        "uctrans.create_model('uctransnet', base_channels=2, image_size=32).eval()(torch.rand(1, 3, 32, 32))"
    )
