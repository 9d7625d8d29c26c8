"""The command line: what it prints, what it refuses, and how it ends."""

import errno
import functools
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from torch import OutOfMemoryError

from uctrans import __version__, cli
from uctrans.data import read_mask, write_demo_dataset
from uctrans.demo import DemoConfig, DemoError, run_demo
from uctrans.inference import PredictConfig
from uctrans.writing import FolderError, locked, write_png

ROOT = Path(__file__).parents[1]
EXPORT = ["export", "-i", "model", "-o", "exported"]
TINY = ("--base-channels", "2", "--image-size", "32", "--batch-size", "5", "--threads", "1", "--no-progress")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demo_dataset(tmp_path_factory.mktemp("demo") / "data")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", "-i", str(data), "-o", str(folder), "--epochs", "1", *TINY]) == 0
    return folder


@pytest.fixture(autouse=True)
def signal_handlers():
    """main() takes over SIGTERM; give it back."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def error_of(capsys, *words):
    """The one line on stderr with which ``uctrans *words`` ends."""
    assert cli.main([str(word) for word in words]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("uctrans: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def stand_in(monkeypatch, run, function):
    """Let the command that runs ``run``, "module:name", call ``function``."""
    monkeypatch.setattr(run.replace(":", "."), functools.wraps(pkgutil.resolve_name(run))(function))


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(words, capsys):
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"uctrans {__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_explains_every_setting(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "examples: uctrans" in output
    assert "-o PATH" in output
    assert re.findall(r"--[\w-]+ \S+ \(type:", output) == [], "settings without an explanation"
    assert re.findall(r"--\w+_\w+", output) == [], "flags are typed with hyphens"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_examples_parse(name):
    for example in cli.COMMANDS[name].examples:
        if "--config" not in example and "--resume" not in example:
            assert cli.parse(example.split()[1:])[0] == name


def test_hyphens_and_switches():
    base = ["train", "-i", "data", "-o", "run"]
    assert cli.parse([*base, "--base-channels", "3"])[1].base_channels == 3
    assert cli.parse([*base, "--base_channels=3"])[1].base_channels == 3
    assert cli.parse([*base, "--resume"])[1].resume is True
    assert cli.parse([*base, "--resume", "--seed", "3"])[1].resume is True
    assert cli.parse([*base, "--resume", "false"])[1].resume is False
    assert cli.parse([*base, "--no-progress"])[1].progress is False


def test_values_of_every_kind():
    words = ["-i", "data", "-o", "run", "--image-size", "[64,96]", "--class-names", "[cell]", "--learning-rate", "1e-4"]
    settings = cli.parse(["train", *words, "--model-options", '{"num_layers": 2}'])[1]
    assert settings.image_size == (64, 96)
    assert settings.class_names == ("cell",)
    assert settings.learning_rate == 1e-4
    assert settings.model_options == {"num_layers": 2}


def test_a_flag_wins_over_the_config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data: folder\nepochs: 5\nseed: 4\n")
    settings = cli.parse(["train", "--config", str(file), "-o", "run", "--seed", "9"])[1]
    assert (settings.data, settings.output, settings.epochs, settings.seed) == ("folder", "run", 5, 9)


def test_a_runs_config_repeats_it(trained, tmp_path):
    written = yaml.safe_load((trained / "config.yaml").read_text())
    settings = cli.parse(["train", "--config", str(trained / "config.yaml")])[1]
    assert settings.to_dict() == written


def test_resume_continues_with_the_settings_of_the_run(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = yaml.safe_load((run / "config.yaml").read_text())
    settings = cli.parse(["train", f"--output={run}", "--resume"])[1]
    assert settings.to_dict() == {**before, "output": str(run), "resume": True}
    assert cli.main(["train", "--resume", "-o", str(run), "--epochs", "2"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text()) == {**before, "output": str(run), "epochs": 2}
    assert "seed: 0 -> 3" in error_of(capsys, "train", "-o", run, "--resume", "--seed", "3")

    words = ["train", "--config", str(run / "config.yaml"), "-o", str(tmp_path / "second"), "--epochs", "1"]
    assert cli.main(words) == 0


def test_a_class_in_a_file_is_imported_only_if_the_command_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("hostile.py").write_text("raise AssertionError('imported by a file')")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("data: data\noutput: run\nmodel: hostile:Net\n")
    for words in ("train -o run --resume", "train --config run/config.yaml -o other"):
        assert f"if you trust this class, name it yourself: uctrans {words} --model hostile:Net\n" in error_of(
            capsys, *words.split()
        )
    Path("study.yaml").write_text("models: [unet, 'hostile:Net']\n")
    words = "study models -i data -o study --config study.yaml"
    assert f"uctrans {words} --models unet,hostile:Net" in error_of(capsys, *words.split())
    Path("images.yaml").write_text("network: hostile:Net\n")
    for name in ("evaluate", "predict", "export"):
        words = [
            "--config",
            "images.yaml",
            "--model",
            "run",
            "-o",
            "out",
            *(["-i", "data"] if name != "export" else []),
        ]
        assert f"{' '.join(words)} --network hostile:Net" in error_of(capsys, name, *words)
    both = ["train", "-o", "run", "--resume", "--model", "tests.networks:Halving", "--config", "run/config.yaml"]
    assert "names the class hostile:Net" in error_of(capsys, *both)  # the file comes last
    assert "hostile" not in sys.modules
    named = ["train", "-o", "run", "--resume", "--model=tests.networks:Halving"]
    assert cli.parse(named)[1].model == "tests.networks:Halving"
    misspelt = ["train", "-i", "data", "-o", "new", "--model", "./my net:Net"]
    assert cli.parse(misspelt)[1].model == "./my net:Net"  # which train refuses by its own message
    listed = ["study", "models", "-i", "data", "-o", "study", "--models", '["unet", "tests.networks:Halving"]']
    assert cli.parse(listed)[1].models == ("unet", "tests.networks:Halving")


def test_a_network_in_the_current_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as a console script has it
    monkeypatch.chdir(tmp_path)
    Path("mine_alone.py").write_text("from tests.networks import Halving as MyNet")
    options = ("--model-options", '{"bands": 3, "labels": 1}')
    words = ("train", "-i", data, "-o", "run", "--epochs", "1", *TINY, "--model", "mine_alone:MyNet")
    assert "lacks bands, labels; it requires bands, labels" in error_of(capsys, *words)
    assert cli.main([str(word) for word in (*words, *options)]) == 0
    assert cli.main(["train", "-o", "run", "--resume", "--epochs", "2", "--model", "mine_alone:MyNet"]) == 0
    images = ("-i", str(data / "test" / "images"), "--no-progress")
    predict = ("predict", *images, "--model", "run", "--network", "mine_alone:MyNet")
    assert cli.main([*predict, "-o", "masks"]) == 0
    odd = ("--resolution", "native", "--tile", "33")
    capsys.readouterr()
    assert "set size_multiple in the model's config.json" in error_of(capsys, *predict, "-o", "odd", *odd)


def test_only_resume_takes_settings_from_the_output_folder(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data: there\nepochs: 5\n")
    (tmp_path / "other.yaml").write_text("data: here\n")
    resume = ["train", "-o", str(tmp_path), "--resume"]
    assert cli.parse(resume)[1].epochs == 5
    assert cli.parse([*resume, "--config", str(tmp_path / "other.yaml")])[1].epochs == 2000
    assert "data" in error_of(capsys, *resume, "false")
    assert "no run to resume" in error_of(capsys, "train", "-o", tmp_path / "nothing", "--resume")


def test_a_run_without_its_settings_says_how_to_go_on(trained, data, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "config.yaml").unlink()
    message = error_of(capsys, "train", "-o", run, "--resume")
    assert f"{run}/config.yaml is missing, so {run}/last.pt can only be continued with the settings" in message
    assert "-i DATA" in message
    assert "base_channels: 2 -> 64" in error_of(capsys, "train", "-i", data, "-o", run, "--resume")
    assert cli.main(["train", "-i", str(data), "-o", str(run), "--resume", "--epochs", "1", *TINY]) == 0
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("epoch: 3", "epoch"),
        ("- 1\n- 2", "config.yaml: holds no 'field: value' lines; write it like a run's config.yaml"),
        ("", "config.yaml: holds no 'field: value' lines"),
        ("# epochs: 3", "config.yaml: holds no 'field: value' lines"),
        ("epochs: [", "config"),
        ("model_options: &all [*all]", "config.yaml: holds the alias *all, in whose place the value belongs; write it"),
        ("config: other.yaml", "config.yaml: names another config file; write it like a run's config.yaml"),
        ("model_options: '{a: &all [*all]}'", "config.yaml: model_options: holds the alias *all"),
        ("seed: " + "1" * 10_000, "config.yaml: is not YAML"),
        ("epochs: many", "epochs"),
        ("compile: maybe", "--compile: maybe does not fit; give true or false"),
    ],
    ids=["field", "list", "empty", "comment", "torn", "alias", "nested", "text", "digits", "number", "switch"],
)
def test_a_bad_config_file(content, named, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert named in error_of(capsys, "train", "-i", "data", "-o", tmp_path / "run", "--config", file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["-c{}", "--config={}", "--config {} --config other.yaml"])
def test_a_config_that_would_block_for_ever(option, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other.yaml").write_text("epochs: 1\n")
    words = option.format(tmp_path / "pipe").replace("other.yaml", str(tmp_path / "other.yaml")).split()
    assert "pipe: is a named pipe, not a file" in error_of(
        capsys, "train", "-i", "data", "-o", tmp_path / "run", *words
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("bogus", "no such command: bogus; choose one of demo, "),
        ("prepare", "prepare monuseg"),
        ("prepare camelyon", "prepare monuseg"),
        ("train", "data, output"),
        ("train -i data -o run --epoch 3", "--epoch 3"),
        ("train -i data -o run --epochs many", "epochs"),
        ("train -i data -o run --epochs 0", "epochs"),
        ("train -i data -o run --config nowhere.yaml", "nowhere.yaml"),
        ("train -i nowhere -o run", "nowhere"),
        ("train -i data -o run --model resnet", "resnet"),
        ("evaluate -i data -o scores --model nowhere", "nowhere"),
        ("predict -i nowhere -o masks --model nowhere", "nowhere"),
        ("export --model nowhere -o exported", "nowhere"),
        ("prepare monuseg -i nowhere --images nowhere -o out", "nowhere"),
        ("prepare monuseg -i nowhere -o data", "nowhere: does not exist; name an XML file"),
        ("train -i data -o run --device tpu", "tpu"),
    ],
)
def test_mistakes_end_in_one_line(words, named, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    assert named in error_of(capsys, *words.split())


def test_prepare_replaces_masks_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "images" / "a.png", np.zeros((12, 10, 3), dtype=np.uint8))
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((2, 3), (5, 3), (5, 8)))
    (tmp_path / "a.xml").write_text(f"<Annotations><Region><Vertices>{vertices}</Vertices></Region></Annotations>")
    words = ["prepare", "monuseg", "-i", "a.xml", "--images", "images", "-o", "out"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "For training, put the images of images into out/images.",
        "Wrote the maps of 1 images, 1 nuclei",
    ]
    Path("out/masks/a.png").write_bytes(b"hand-made")
    assert "overwrite" in error_of(capsys, *words)
    assert Path("out/masks/a.png").read_bytes() == b"hand-made"
    assert cli.main([*words, "--overwrite"]) == 0
    assert read_mask("out/masks/a.png").sum() > 0


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "No space left on device", "run/last.pt"), "No space left on device: 'run/last.pt'"),
        (FileExistsError(17, "File exists", "run"), "File exists"),
        (ImportError('pip install "uctrans[training]"'), 'pip install "uctrans[training]"'),
        (ValueError("two\nlines"), "two lines"),
        (NotImplementedError("no second derivative"), "no second derivative"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: free memory, or use a machine with more (Unable to"),
    ],
)
def test_errors_the_user_can_mend(error, shown, monkeypatch, capsys):
    def fail(settings):
        raise error

    stand_in(monkeypatch, "uctrans.inference:export", fail)
    assert shown in error_of(capsys, *EXPORT)
    monkeypatch.setenv("UCTRANS_DEBUG", "1")
    with pytest.raises((type(error), OutOfMemoryError)):
        cli.main(EXPORT)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(settings):
        raise RuntimeError("the tensors disagree")

    stand_in(monkeypatch, "uctrans.inference:export", fail)
    with pytest.raises(RuntimeError, match="disagree"):
        cli.main(EXPORT)


def test_without_jsonargparse(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert 'pip install "uctrans[training]"' in error_of(capsys, "train", "-i", "data", "-o", "run")
    assert cli.main(["--help"]) == 0


@pytest.mark.parametrize(("stopped_by", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("epochs", 0)])
def test_a_run_that_a_signal_stopped_says_so_in_its_status(stopped_by, status, monkeypatch):
    run = SimpleNamespace(run_folder="run", best_epoch=1, best_score=0.5, epochs=1, stopped_by=stopped_by, model="unet")
    stand_in(monkeypatch, "uctrans.training:train", lambda settings: run)
    assert cli.main(["train", "-i", "data", "-o", "run"]) == status


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_signals_end_training_with_a_checkpoint(number, status, data, tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, "-m", "uctrans", "train", "-i", data, "-o", run, "--epochs", "2000", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert (run / "last.pt").exists()
    assert "Traceback" not in errors


def test_train_evaluate_predict(trained, data, tmp_path, capsys):
    assert (trained / "best" / "model.safetensors").exists()
    scores, masks = tmp_path / "scores", tmp_path / "masks"
    assert cli.main(["evaluate", "-i", str(data), "-o", str(scores), "--model", str(trained)]) == 0
    assert "mean" in capsys.readouterr().out
    assert {path.name for path in scores.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}
    images = data / "test" / "images"
    assert cli.main(["predict", "-i", str(images), "-o", str(masks), "--model", str(trained)]) == 0
    assert "Wrote 6 files" in capsys.readouterr().out
    assert {path.name for path in images.iterdir()} < {path.name for path in masks.iterdir()}


def test_the_demo_leaves_everything_it_names_and_runs_again(tmp_path):
    folder = tmp_path / "demo"
    config = DemoConfig(output=str(folder), epochs=1, base_channels=2, progress=False)
    for _ in range(2):
        result = run_demo(config)
        assert 0 <= result.test_dice <= 1
        named = [line.split()[0] for line in str(result).splitlines()[1:]]
        assert len(named) == 5
        assert all(Path(path).exists() for path in named)


def test_the_demo_touches_no_other_folder(tmp_path):
    kept = tmp_path / "run" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(DemoError, match=str(tmp_path)):
        run_demo(DemoConfig(output=str(tmp_path), epochs=1))
    assert kept.read_text() == "mine"
    with pytest.raises(FolderError, match="cannot be made a folder"):
        run_demo(DemoConfig(output=str(kept), epochs=1))


def test_a_second_demo_in_the_folder_clears_nothing_away(tmp_path):
    (tmp_path / ".uctrans-demo").touch()
    (tmp_path / "run").mkdir()
    with locked(tmp_path), pytest.raises(FolderError, match="is in use by process"):
        run_demo(DemoConfig(output=str(tmp_path), epochs=1))
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("palette", ["#000000,#ff0000", '["#000000", "#ff0000"]', "#000000, #ff0000"])
def test_palette_of_colours_with_hashes(palette, tmp_path):
    words = ["train", "-i", "data", "-o", "run", "--classes", "2"]
    expected = ("#000000", "#ff0000")
    assert cli.parse([*words, "--palette", palette, "--class-names", "glass,cells"])[1].palette == expected
    config = tmp_path / "config.yaml"
    config.write_text(f"data: data\noutput: run\nclass_names: null\npalette: {palette!r}\n")
    settings = cli.parse(["train", "--config", str(config)])[1]
    assert (settings.palette, settings.class_names) == (expected, None)


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        ("train -i data -o run --image-size=[64,96]", "image_size", (64, 96)),
        ("export -i model -o folder --image-size none", "image_size", None),
        ("export -i model -o folder --formats torch,onnx", "formats", ("torch", "onnx")),
        ("train -i data -o run --image-size 64,96", "image_size", (64, 96)),
        ("train -i data -o run --image-size 64", "image_size", 64),
        ("export -i model -o folder --formats onnx", "formats", ("onnx",)),
        ("export -i model -o folder --image-size 64,96", "image_size", (64, 96)),
        ("study skips -i data -o study --seeds 5", "seed_list", [0, 1, 2, 3, 4]),
        ("study skips -i data -o study --seeds 3,7", "seed_list", [3, 7]),
        ("study skips -i data -o study --seeds [7]", "seed_list", [7]),
        ("study skips -i data -o study --patience 50,100", "patience", (50, 100)),
        ("study models -i data -o study --models unet", "models", ("unet",)),
        ("study models -i data -o study --models unet,uctransnet", "models", ("unet", "uctransnet")),
    ],
)
def test_lists_are_written_without_brackets(words, field, expected):
    assert getattr(cli.parse(words.split())[1], field) == expected


def test_lists_in_a_config_file(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    words = ["export", "-i", "model", "-o", "folder", "--config", str(config)]
    config.write_text("image_size: [64, 96]\nformats: [onnx]\n")
    settings = cli.parse(words)[1]
    assert (settings.image_size, settings.formats) == ((64, 96), ("onnx",))
    config.write_text("image_size: null\nformats: onnx\n")
    settings = cli.parse(words)[1]
    assert (settings.image_size, settings.formats) == (None, ("onnx",))
    config.write_text("image_size: [many]\n")
    assert "--image-size: ['many'] does not fit; write it like 224 or 224,320" in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train -i data -o run --image-size many", "--image-size: 'many' does not fit; write it like 224 or 224,320 ("),
        ("train -i data -o run --image-size 64,", "--image-size: '64,' does not fit; write it like 224 or 224,320 ("),
        ("train -i data -o run --threads many", "--threads: many does not fit; give a whole number or null ("),
        ("train -i data -o run --image-size 1,2,3", "--image-size: '1,2,3' does not fit; write it like 224 or 224,320"),
        ("train -i data -o run --epochs 1.5", "--epochs: 1.5 does not fit; give a whole number ("),
        ("train -i data -o run --resume maybe", "--resume: 'maybe' does not fit; give true or false ("),
    ],
)
def test_values_of_another_type_are_named_in_plain_words(words, message, capsys):
    assert message in error_of(capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian", "-i", "data"], "did you mean train?"),
        (["train", "-i", "data", "-o", "run", "--epohcs", "3"], "did you mean --epochs?"),
        (["train", "-i", "data", "-o", "run", "--base-chanels=3"], "did you mean --base-channels?"),
    ],
)
def test_near_names_of_commands_and_flags(words, hint, capsys):
    assert cli.main(words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "masks/a.png"),
            2,
            "'masks/a.png': the disk is full; free space",
        ),
        (KeyboardInterrupt(), 130, "uctrans: interrupted"),
        (cli.Terminated(), 143, "uctrans: terminated"),
    ],
)
def test_a_stopped_prediction_says_how_much_is_done(error, status, message, monkeypatch, capsys):
    def stop(config):
        error.add_note("3 of 9 images are done; the same command continues")
        raise error

    stand_in(monkeypatch, "uctrans.inference:predict", stop)
    assert cli.main(["predict", "-i", "images", "-o", "masks", "--model", "run"]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.endswith("; 3 of 9 images are done; the same command continues\n")


def test_a_command_whose_reader_has_gone_ends_as_usual(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    done = []

    def print_and_work(settings):
        for number in range(3):
            print("a line", flush=True)
            done.append(number)
        return []

    stand_in(monkeypatch, "uctrans.inference:export", print_and_work)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert cli.main(EXPORT) == 0
        assert cli.main(["--help"]) == 0
    assert done == [0, 1, 2]


def test_a_report_that_finds_a_full_disk_is_an_error(monkeypatch, capsys):
    stand_in(monkeypatch, "uctrans.inference:export", lambda settings: [])
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli.main(EXPORT) == cli.USER_ERROR
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_in_a_pipe_that_is_closed_is_completed(data, tmp_path):
    words = [sys.executable, "-m", "uctrans", "train", "-i", data, "-o", tmp_path / "run", "--epochs", "2", *TINY[:-1]]
    command = f"{shlex.join(map(str, words))} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "all epochs done" in (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]


FOREIGN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "words",
    [
        f"train -i {FOREIGN} -o run",
        f"train -i data -o {FOREIGN}",
        f"train -o {FOREIGN} --resume",
        f"evaluate -i data -o scores --model {FOREIGN}",
        f"predict -i {FOREIGN}/a.png -o masks --model run",
        f"predict -i data --output={FOREIGN} --model run",
        f"study models -i data -o {FOREIGN}",
        f"export -i {FOREIGN} -o exported",
        f"train --config {FOREIGN}.yaml",
        f"{FOREIGN}",
    ],
)
def test_an_argument_that_is_not_utf8_is_shown_escaped(words, capsys):
    assert "caf\\udce9" in error_of(capsys, *words.split())


def test_an_image_whose_name_is_not_utf8_is_shown_escaped(data, trained, tmp_path, capsys):
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    for kind in ("images", "masks"):
        for split in ("train", "test"):
            first = min((copied / split / kind).iterdir())
            first.rename(first.with_name(f"{FOREIGN}.png"))
    outputs = [tmp_path / name for name in ("run", "study", "scores", "masks")]
    commands = [
        ["train", "-i", copied, "-o", outputs[0], *TINY],
        ["study", "models", "-i", copied, "-o", outputs[1], "--models", "unet", "--base-channels", "2"],
        ["evaluate", "-i", copied, "-o", outputs[2], "--model", trained],
        ["predict", "-i", copied / "test" / "images", "-o", outputs[3], "--model", trained],
        ["predict", "-i", copied / "test" / "images" / f"{FOREIGN}.png", "-o", outputs[3], "--model", trained],
    ]
    for words in commands:
        assert "caf\\udce9" in error_of(capsys, *words), words
    assert not any(output.exists() for output in outputs)


def test_warnings_are_one_line_of_the_program(monkeypatch, capsys):
    def warn(config: PredictConfig) -> list:
        text = warnings.formatwarning(UserWarning("a first line\nand a second"), UserWarning, "file.py", 7)
        print(text, end="", file=sys.stderr)
        return []

    monkeypatch.setattr("uctrans.inference.predict", warn)
    form = warnings.formatwarning
    assert cli.main(["predict", "-i", "images", "-o", "masks", "--model", "run"]) == 0
    assert capsys.readouterr().err == "uctrans: warning: a first line and a second\n"
    assert warnings.formatwarning is form


def test_report_of_a_run_without_best_weights():
    from uctrans.training import RunResult

    text = cli.COMMANDS["train"].report(RunResult(Path("runs/a"), 0, float("nan"), 2, "SIGINT", "mynet:MyNet"))
    assert text.startswith("No best weights yet after 2 epochs (stopped by: SIGINT)")
    assert text.endswith("uctrans train -o runs/a --resume --model mynet:MyNet")
