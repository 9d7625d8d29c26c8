"""The log of a run: metrics, lines, bar and picture."""

import errno
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
from skimage.io import imread

from uctrans.training import TrainingError, train
from uctrans.training.log import COLUMNS, RunLog, SilentLog, draw_progress, read_metrics


def row(epoch, **changes):
    values = dict.fromkeys(COLUMNS, 0.5) | {"epoch": epoch, "best_epoch": 1, "val_loss": None, "val_dice": None}
    return values | changes


@pytest.fixture
def log_config(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    return make_config


def test_metrics_are_written_and_read_back(log_config):
    config = log_config()
    with RunLog(config, 0, 0, 2) as log:
        log.epoch(row(1, train_loss=1 / 3))
        log.epoch(row(2, val_dice=0.25, val_loss=math.pi))
    rows = read_metrics(Path(config.output) / "metrics.csv")
    assert rows == [row(1, train_loss=1 / 3), row(2, val_dice=0.25, val_loss=math.pi)]
    assert read_metrics(Path(config.output) / "none.csv") == []


@pytest.mark.parametrize("tail", ["", "4,0.0", "4,0.5,0.5,0.5,,,1,0.5,0.5,0.5", '4,"'])
def test_rows_after_the_checkpoint_and_cut_lines_are_dropped_on_resume(log_config, tail):
    config = log_config()
    path = Path(config.output) / "metrics.csv"
    with RunLog(config, 0, 0, 2) as log:
        for epoch in (1, 2, 3):
            log.epoch(row(epoch))
    with path.open("a") as file:
        file.write(tail)
    with RunLog(config, 2, 0, 2) as log:
        assert [kept["epoch"] for kept in log.rows] == [1, 2]
        log.epoch(row(3))
    assert [kept["epoch"] for kept in read_metrics(path)] == [1, 2, 3]
    assert path.read_text().count("epoch") == 2  # epoch and best_epoch, in one header


def test_one_line_an_epoch_where_progress_is_shown(log_config, capsys):
    with RunLog(log_config(progress=True), 0, 0, 2) as log:
        log.step()
        log.epoch(row(1, val_dice=0.25, val_loss=0.75))
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert "epoch 1, loss 0.5000, Dice 0.5000, validation loss 0.7500 Dice 0.2500, best 0.5000 at 1" in captured.out
    assert captured.err == ""  # no bar where the output is no terminal


def test_nothing_is_shown_without_progress(log_config, capsys, tmp_path):
    with RunLog(log_config(), 0, 0, 2) as log:
        log.step()
        log.epoch(row(1))
    assert capsys.readouterr() == ("", "")
    assert "epoch 1" in (tmp_path / "run" / "log.txt").read_text()


def test_the_bar_starts_at_the_steps_already_done_and_tells_the_time_left(log_config, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with RunLog(log_config(epochs=5, progress=True), 2, 1, 10) as log:
        assert (log.bar.initial, log.bar.total) == (21, 50)
        for _ in range(4):
            log.step()
        log.bar.refresh()
    assert re.search(r"25/50 \[\d\d:\d\d<\d\d:\d\d", capsys.readouterr().err)


@pytest.mark.parametrize(
    "rows", [[row(1, best_epoch=None, best_dice=None)], [row(1, val_dice=0.3, val_loss=0.2), row(2)]]
)
def test_picture_is_drawn(tmp_path, rows):
    draw_progress(rows, tmp_path / "progress.png")
    picture = imread(tmp_path / "progress.png")
    assert picture.shape == (400, 1000, 4)
    assert picture[..., :3].std() > 1
    assert list(tmp_path.iterdir()) == [tmp_path / "progress.png"]


def test_file_that_cannot_be_written_is_named(log_config, monkeypatch):
    with RunLog(log_config(), 0, 0, 2) as log:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("uctrans.training.log.open_to_append", full)
            with pytest.raises(TrainingError, match=r"metrics\.csv: cannot be written .*No space.*resume"):
                log.epoch(row(1))


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with SilentLog() as log:
        log.line("text")
        log.step()
        log.epoch(row(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_log_says_from_where_validation_images_are_drawn(make_config, image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "data" / "train")
    result = train(make_config(data=str(tmp_path / "data"), epochs=1))
    text = (result.run_folder / "log.txt").read_text()
    assert "6 images, validating on 1" in text
    assert re.search("without a folder for val: 1 of the 7 images in .* are drawn for val by a fixed seed", text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]" + b"," * 9 + b"\n"], ids=["not UTF-8", "no number"])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(f"{','.join(COLUMNS)}\n".encode() + content)
    with pytest.raises(TrainingError, match=r"metrics\.csv: is damaged .*; restore it, or delete it"):
        read_metrics(tmp_path / "metrics.csv")


def test_a_planted_log_is_not_written_through(make_config, tmp_path):
    (tmp_path / "target").write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to(tmp_path / "target")
    with pytest.raises(TrainingError, match=r"log\.txt: cannot be written"):
        train(make_config())
    assert (tmp_path / "target").read_text() == "keep"
