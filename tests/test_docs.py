"""The pages cannot go stale: their Python runs, their commands parse, their links and make targets exist."""

import csv
import re
import runpy
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imread

from tests.support import PAGES, ROOT, blocks
from uctrans import UCTransNet, cli, to_upstream
from uctrans.data import find_development_samples, load_folds, write_demo_dataset
from uctrans.training import TrainConfig, train
from uctrans.writing import write_png

RUN_ELSEWHERE = ("docs/layers.md",)  # tests/layers/test_own_network.py
TRAINERS = ("lightning", "accelerate")
SCRIPTS = {
    f"{page}, {number}": block
    for page in PAGES
    if page not in RUN_ELSEWHERE
    for number, block in enumerate(blocks("python", page))
}
TINY = {"epochs": 1, "base_channels": 2, "image_size": 32, "threads": 1, "progress": False}


def commands(page=None):
    lines = (line for block in blocks("sh", page) for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("uctrans ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a dataset, data, and a run on it, runs/first."""
    folder = tmp_path_factory.mktemp("trained")
    write_demo_dataset(folder / "data")
    train(TrainConfig(str(folder / "data"), str(folder / "runs/first"), **TINY))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory, where SIGTERM does again afterwards what it did before: the command line takes it over."""
    monkeypatch.chdir(tmp_path)
    previous = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def working_folder(folder, trained):
    """A working directory with what the pages take for granted: data, a run, downloaded weights."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    weights = to_upstream(UCTransNet(base_channels=2, image_size=64))
    torch.save({"state_dict": weights}, "best_model-UCTransNet.pth.tar")
    Path("docs").symlink_to(ROOT / "docs")
    return folder


def test_the_pages_have_what_these_tests_look_for():
    assert len(blocks("python", "README.md")) == 3
    assert len(blocks("python")) >= 6
    names = {"demo", "prepare", "train", "evaluate", "predict", "export", "study"}
    assert {words.split()[1] for words in commands()} >= names - {"demo"}


def run_python(text, folder):
    """Run a block as it stands; models that ask for the full width get a narrow one."""
    script = folder / "block.py"
    script.write_text(text.replace('create_model("uctransnet", ', 'create_model("uctransnet", base_channels=2, '))
    runpy.run_path(str(script))


def imports(package, script):
    return f"import {package}\n" in script


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not any(imports(p, SCRIPTS[name]) for p in TRAINERS)])
def test_python_runs(name, working_folder):
    run_python(SCRIPTS[name], working_folder)


@pytest.mark.parametrize("package", TRAINERS)
def test_examples_of_trainers_compile(package):
    (script,) = (script for script in SCRIPTS.values() if imports(package, script))
    compile(script, package, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("package", TRAINERS)
def test_examples_of_trainers_run(package, folder):
    pytest.importorskip(package, reason="no requirement of this package: pip install lightning accelerate")
    (script,) = (script for script in SCRIPTS.values() if imports(package, script))
    run_python(script, folder)


def test_commands_parse(working_folder):
    for command in dict.fromkeys(commands()):
        words = shlex.split(command, comments=True)[1:]
        name, settings = cli.parse(words)
        assert words[: len(name.split())] == name.split(), command
        assert settings is not None, command


def run_command(command):
    words = shlex.split(command)[1:]
    settings = {"train": TINY, "evaluate": {"progress": False}}.get(words[0], {})
    flags = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in settings.items()]
    assert cli.main([*words, *flags]) == 0, command


def put_image(path, seed):
    write_png(path, np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def put_annotation(path):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((5, 5), (30, 5), (30, 30), (5, 30)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<Annotations><Region><Vertices>{vertices}</Vertices></Region></Annotations>")


def run_monuseg_recipe(makes_masks):
    (recipe,) = (
        block
        for block in blocks("sh", "docs/data.md")
        if "prepare monuseg" in block and ("--images" in block) == makes_masks
    )
    for command in recipe.splitlines():
        run_command(command)


def test_the_monuseg_recipe_with_the_authors_split_ends_in_scores_of_nuclei(folder):
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[6:30, 6:30] = 255
    for seed, place in enumerate(("train/{}/a", "train/{}/b", "val/{}/c", "test/{}/d", "test/{}/e")):
        put_image(Path(f"data/{place.format('images')}.png"), seed)
        write_png(Path(f"data/{place.format('masks')}.png"), mask)
    for name in "bde":
        put_annotation(Path(f"data/annotations/{name}.xml"))
    run_monuseg_recipe(makes_masks=False)
    maps = sorted(path.relative_to("data").as_posix() for path in Path("data").rglob("instances/*"))
    assert maps == ["test/instances/d.png", "test/instances/e.png", "train/instances/b.png"]
    for path in Path("data").rglob("masks/*"):
        np.testing.assert_array_equal(imread(path), mask)
    with Path("scores/split/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["d", "e"]
    assert all(0 <= float(row[score]) <= 1 for row in rows for score in ("dice", "aji", "pq"))
    assert Path("scores/split/instances.png").is_file()


def test_the_monuseg_recipe_without_masks_runs(folder):
    for number in range(5):
        put_image(Path(f"monuseg/images/{number}.png"), number)
        put_annotation(Path(f"monuseg/annotations/{number}.xml"))
    run_monuseg_recipe(makes_masks=True)
    assert sorted(path.name for path in Path("monuseg").iterdir()) == [
        "annotations",
        "annotations.json",
        "images",
        "instances",
        "masks",
    ]
    assert Path("scores/monuseg/metrics.csv").is_file()


def test_the_folds_of_monuseg_fit_the_authors_split(folder):
    fold = load_folds("monuseg")[0]
    for split, names in {**fold, "test": ["held_out"]}.items():
        for seed, name in enumerate(names):
            put_image(Path(f"data/{split}/images/{name}.png"), seed)
            write_png(Path(f"data/{split}/masks/{name}.png"), np.eye(40, 48, dtype=np.uint8) * np.uint8(255))
    assert len(find_development_samples("data")) == 30
    command = next(line for line in commands("docs/data.md") if "--folds" in line)
    run_command(command)
    assert Path("runs/fold0/best").is_dir()


def test_a_flag_wins_over_the_config_file(working_folder, trained):
    command = next(command for command in commands() if "--config runs/first" in command)
    _, settings = cli.parse(shlex.split(command)[1:])
    assert (settings.data, settings.output) == (str(trained / "data"), "runs/second")
    assert (settings.base_channels, settings.seed) == (TINY["base_channels"], 1)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {target for text in PAGES.values() for target in re.findall(r"^    make ([\w-]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"
