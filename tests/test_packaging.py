"""Wheel, source distribution, editable install, checkout and torch.hub all import, from the files of their own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "hubconf.py", "LICENSE"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "uctrans", "kernels"),
)
WHERE = "import uctrans, uctrans.kernels, uctrans.data; print(uctrans.__file__, uctrans.kernels.__file__, sep='\\n')"


def run(*words, cwd="/", pythonpath=None):
    """Standard output of a command, with ``pythonpath`` and nothing else added to the search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def imported_from(folder, preamble=""):
    """Where uctrans and uctrans.kernels come from with ``folder`` on the search path, whatever is installed here."""
    # -S leaves out the .pth files of an editable install; torch comes from the folder of the packages alone.
    packages = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    lines = run(sys.executable, "-S", "-c", packages + preamble + WHERE, pythonpath=folder).split()
    return [Path(line) for line in lines]


def build(hook, source, output):
    """Call a build hook of setuptools in ``source``, without the network; the file it made."""
    output.mkdir()
    script = f"import setuptools.build_meta as backend; backend.{hook}({str(output)!r})"
    run(sys.executable, "-c", script, cwd=source)
    (made,) = output.iterdir()
    return made


def unpacked(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, links kept, nothing built in it."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout):
    return build("build_wheel", checkout, checkout.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(checkout):
    return build("build_sdist", checkout, checkout.parent / "sdist")


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_each_module_once(wheel, checkout):
    held = [name for name in names_in(wheel) if ".dist-info/" not in name]
    assert len(held) == len(set(held))
    modules = [path for path in (checkout / "uctrans").rglob("*.py") if "kernels" not in path.parts]
    expected = {path.relative_to(checkout).as_posix() for path in modules}
    expected |= {f"uctrans/{path.relative_to(checkout).as_posix()}" for path in (checkout / "kernels").rglob("*.py")}
    assert {name for name in held if name.endswith(".py")} == expected
    data = {"uctrans/data/folds/monuseg.json", "uctrans/py.typed"}
    data |= {f"uctrans/models/pretrained/nuclei/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    assert {name for name in held if not name.endswith(".py")} == data


def test_a_wheel_from_the_source_distribution_is_the_same(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
        members = archive.getnames()
    assert not any("uctrans/kernels" in name for name in members), "the link travels as a copy"
    (source,) = tmp_path.iterdir()
    again = build("build_wheel", source, tmp_path / "wheel")
    assert sorted(names_in(again)) == sorted(names_in(wheel))


def test_the_source_distribution_holds_all_files_but_the_largest(checkout, tmp_path):
    source = shutil.copytree(checkout, tmp_path / "source", symlinks=True)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    made = build("build_sdist", source, tmp_path / "sdist")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    left_out = {name for name in files - held if not name.startswith(("build/", "uctrans/kernels/"))}
    assert left_out == {"tests/models/parity/uctransnet_base8_img64.npz"}


def test_the_wheel_imports(wheel, tmp_path):
    folder = unpacked(wheel, tmp_path / "site")
    assert imported_from(folder) == [folder / "uctrans/__init__.py", folder / "uctrans/kernels/__init__.py"]


def test_a_checkout_imports(checkout):
    assert imported_from(checkout) == [checkout / "uctrans/__init__.py", checkout / "uctrans/kernels/__init__.py"]


@pytest.mark.parametrize("link", ["kept", "missing"])
def test_an_editable_install_imports(link, checkout, tmp_path):
    source = shutil.copytree(checkout, tmp_path / "source", symlinks=True)
    if link == "missing":
        (source / "uctrans/kernels").unlink()
    site = unpacked(build("build_editable", source, tmp_path / "wheel"), tmp_path / "site")
    preamble = f"import site; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n"
    files = imported_from(None, preamble)
    assert [file.resolve() for file in files] == [source / "uctrans/__init__.py", source / "kernels/__init__.py"]


def test_requirements(wheel):
    (metadata,) = [name for name in names_in(wheel) if name.endswith("METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", text, flags=re.MULTILINE)
    core = {name for name, rest in required if "extra" not in rest}
    assert core == {"torch", "numpy", "einops", "safetensors", "scikit-image"}, "PyTorch for CUDA brings its Triton"
    assert "monai" in {name for name, rest in required if 'extra == "training"' in rest}
    (triton,) = [rest for name, rest in required if name == "triton"]
    assert 'platform_system == "Linux"' in triton
    assert 'extra == "dev"' in triton
    assert re.search(r"^Requires-Python: >=3\.11$", text, flags=re.MULTILINE)
    assert re.search(r"^Project-URL: Paper, https://arxiv\.org/abs/2109\.04335$", text, flags=re.MULTILINE)
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", text, flags=re.MULTILINE)


def test_constraints_pair_torch_with_its_triton():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["torch==2.13.0", "triton==3.7.1"]
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)


@pytest.mark.parametrize("link", ["kept", "a text file"])
def test_torch_hub(link, checkout, tmp_path):
    source = shutil.copytree(checkout, tmp_path / "source", symlinks=True)
    if link == "a text file":
        (source / "uctrans/kernels").unlink()
        (source / "uctrans/kernels").write_text("../kernels")
    script = (
        "import torch\n"
        f"load = lambda name, **options: torch.hub.load({str(source)!r}, name, source='local', **options)\n"
        "load('uctransnet', base_channels=2, image_size=32).save_pretrained('saved')\n"
        "print(load('uctransnet', pretrained='saved').config['base_channels'], load('unet', base_channels=2).name)\n"
        "try:\n"
        "    load('unet', pretrained='saved')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    lines = run(sys.executable, "-c", script, cwd=tmp_path, pythonpath=source).splitlines()
    assert lines == ["2 unet", "saved holds a 'uctransnet', not a 'unet'"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    words = ["make", f"PYTHON={old}", f"VENV={tmp_path}/venv", "test"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Python 3.11 or newer" in result.stderr
    assert str(old) in result.stderr
    assert not (tmp_path / "venv").exists()


def run_make(*words, **variables):
    """As from a shell: make tells a make that it runs, as ``make test`` does here, to print more."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    environment |= variables
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    listed = run_make("PYTHON=python").stdout
    lines = dict(line.removeprefix("make ").split(maxsplit=1) for line in listed.splitlines())
    assert list(lines) == targets
