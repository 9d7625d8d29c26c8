"""Masks that training refuses or names: without foreground, without a class, partly ignored."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.io import imread, imsave

from tests.training.conftest import CPU
from uctrans.data import DataError
from uctrans.data.read import IGNORED
from uctrans.inference.metrics import dice
from uctrans.models import load_model
from uctrans.training import ConfigError, train
from uctrans.training.run import Run
from uctrans.training.validation import predict_logits, validate


@pytest.fixture
def folder(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "data")


def change(folder, part, function, count=None):
    """Replace the first masks of a part, or all, by a function of them."""
    for path in sorted((folder / part / "masks").iterdir())[:count]:
        imsave(path, function(imread(path)).astype(np.uint8), check_contrast=False)


@pytest.mark.parametrize("protocol", ["uctransnet-224", "native"])
@pytest.mark.parametrize(("part", "name"), [("train", "7 training"), ("val", "3 validation")])
def test_masks_without_any_foreground_are_refused(part, name, protocol, folder, make_config):
    change(folder, part, lambda mask: 0 * mask)
    config = make_config(data=str(folder), protocol=protocol)
    with pytest.raises(DataError, match=f"none of the {name} masks has any foreground, .* check that these are"):
        train(config)
    assert not list((folder.parent / "run").glob("*.pt"))
    if part == "train":
        change(folder, part, lambda mask: mask + 255)
        with pytest.raises(DataError, match=r"foreground, or is all of it ignored \(ignore_label\), so"):
            train(make_config(data=str(folder), ignore_label=255))


@pytest.mark.parametrize(("part", "name"), [("train", "7 training"), ("val", "3 validation")])
def test_masks_without_any_background_are_refused(part, name, folder, make_config):
    change(folder, part, lambda mask: 0 * mask + 255)
    with pytest.raises(DataError, match=f"every pixel of the {name} masks is foreground, .* background first"):
        train(make_config(data=str(folder)))
    for each in ("train", "val"):
        change(folder, each, lambda mask: np.minimum(mask, 1))
    train(make_config(data=str(folder), classes=2, epochs=1))  # of several classes, any may cover all


def test_empty_masks_are_named(folder, make_config):
    change(folder, "train", lambda mask: 0 * mask, 5)
    change(folder, "val", lambda mask: 0 * mask, 1)
    train(make_config(data=str(folder), epochs=1))
    log = (folder.parent / "run" / "log.txt").read_text()
    assert "5 of 7 training masks have no foreground\n" in log
    assert "1 of 3 validation masks have no foreground, each of which scores Dice 1 if nothing is predicted" in log


def test_classes_that_no_mask_has_are_named_and_not_scored(folder, make_run):
    for part in ("train", "val"):
        change(folder, part, lambda mask: mask // 255)
    run = make_run(data=str(folder), classes=3, class_names=("ground", "cell", "gland"))
    assert run.remarks == (
        "no training mask has class 2 (gland), so it cannot be learned",
        "no validation mask has class 2 (gland), so the validation Dice leaves it out",
    )
    assert run.scored_classes == [1]
    change(folder, "val", lambda mask: 2 * mask, 1)
    run = make_run(data=str(folder), classes=3)
    assert run.remarks == ("no training mask has class 2, so it cannot be learned",)
    assert run.scored_classes is None


@pytest.mark.parametrize("changes", [{}, {"classes": 2}, {"protocol": "native"}], ids=str)
def test_ignored_pixels_are_trained_on_and_scored_nowhere(changes, folder, make_config):
    """The label to ignore takes the left of all masks and the whole of one of each part."""
    for part in ("train", "val"):
        change(folder, part, lambda mask: mask // 255 if "classes" in changes else mask)
        change(folder, part, lambda mask: np.where(np.arange(24) < 9, 77, mask))
        change(folder, part, lambda mask: np.full_like(mask, 77), 1)
    config = make_config(data=str(folder), ignore_label=77, epochs=2, **changes)
    result = train(config)
    log = (result.run_folder / "log.txt").read_text()
    assert "% of the pixels of the training masks are ignored" in log
    assert "1 of 7" not in log  # a mask that is ignored as a whole is not empty
    run = Run(replace(config, output=f"{config.output}2"), CPU)
    model = load_model(result.run_folder)
    assert model.metadata["ignore_label"] == 77
    totals = validate(model, run.val_data, run.protocol, config, CPU)
    assert totals.images.item() == 2
    assert totals.read(CPU)[1] == pytest.approx(result.best_score)
    expected = []
    for position in range(3):
        images, masks = run.val_data.batch(torch.tensor([position]))
        with torch.no_grad():
            logits = predict_logits(model.eval(), run.protocol.to_input(images), run.protocol, config)
        labels = (logits[:, 0] > 0).long() if config.classes == 1 else logits.argmax(1)
        expected.append(dice(labels, masks, config.classes, ignore_label=IGNORED).item())
    assert result.best_score == pytest.approx(np.nanmean(expected))


def test_labels_that_cannot_be_ignored(make_config):
    for changes, message in (
        ({"ignore_label": 0}, "ignore_label: 0 is the background of binary masks"),
        ({"ignore_label": -1}, "ignore_label: -1 is too small"),
        ({"ignore_label": 3, "classes": 256}, "ignore_label: masks of 256 classes leave no label"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(**changes)


def test_a_label_that_no_mask_has_is_named(make_run):
    assert make_run(ignore_label=9).remarks == (
        "no pixel of the training masks is ignored: none has ignore_label 9",
        "no pixel of the validation masks is ignored: none has ignore_label 9",
    )
