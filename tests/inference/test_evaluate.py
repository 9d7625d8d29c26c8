"""Evaluation on data whose scores are known."""

import csv
import errno
import importlib
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError, fill_polygons, fingerprint, get_protocol, prepare_instances, read_image
from uctrans.data.instances import write_instances
from uctrans.inference import Ensemble, EvaluateConfig, InferenceError, evaluate
from uctrans.writing import FolderError, locked

NAN = math.nan
INSTANCE_SCORES = ("aji", "pq", "sq", "rq", "f1", "ap")
RGB_IMAGES = {"channels": 3, "intensity_range": None, "ignore_label": None}


def column(result, name):
    return [row[name] for row in result.rows]


def summary(result):
    return json.loads((result.output / "summary.json").read_text())


def csv_rows(result):
    with (result.output / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def two_nuclei(dataset):
    """Instance maps for "all" and "half": the upper and the lower half of the object."""
    instances = np.zeros((16, 16), dtype=np.uint16)
    instances[4:8, 4:12], instances[8:12, 4:12] = 7, 9
    for name in ("all", "half"):
        write_instances(dataset / f"test/instances/{name}.png", instances)
    return instances


@pytest.mark.parametrize(
    ("settings", "divisor"),
    [({}, 1), ({"size": "native"}, 255), ({"size": "native", "resolution": "native", "scale": 2}, 255)],
    ids=["bytes", "floats", "scaled"],
)
def test_scores_of_tensors_are_those_of_their_folder(settings, divisor, unet_folder, dataset, tmp_path):
    settings = {"model": str(unet_folder), "device": "cpu", "progress": False, **settings}
    names = ["all", "half", "none"]
    images = torch.stack([torch.from_numpy(imread(dataset / f"test/images/{name}.png")) for name in names])
    masks = torch.stack([torch.from_numpy(imread(dataset / f"test/masks/{name}.png")) for name in names]) > 0
    images = images.permute(0, 3, 1, 2) if divisor == 1 else images.permute(0, 3, 1, 2) / divisor
    of_folder = evaluate(EvaluateConfig(data=str(dataset), output=str(tmp_path / "folder"), **settings))
    config = EvaluateConfig(output=str(tmp_path / "own"), **settings)
    own = evaluate(config, data=(images, masks) if divisor == 1 else list(zip(images, masks, strict=True)))
    assert column(own, "name") == ["data[0]", "data[1]", "data[2]"]
    tolerance = 0 if divisor == 1 else 0.03  # bytes are resized in fixed point
    for key in ("mean", "deviation", "mean_where_present"):
        expected = getattr(of_folder, key)
        assert flat(getattr(own, key)) == pytest.approx(flat(expected), abs=tolerance, nan_ok=True)
    left_out = {"mean", "standard_deviation", "settings", "mean_where_present", "mean_of_others"}
    written, expected = ({k: v for k, v in summary(each).items() if k not in left_out} for each in (own, of_folder))
    assert written == expected
    assert {path.name for path in own.output.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}


def flat(scores):
    return {
        f"{name}.{key}" if isinstance(value, dict) else name: score
        for name, value in scores.items()
        for key, score in (value.items() if isinstance(value, dict) else [(name, value)])
    }


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {}, "data: is empty; name a folder, or give evaluate images and masks"),
        ({"data": "d"}, {"data": []}, "data: is of a folder, and evaluate is given data; leave one"),
        ({"folds": "monuseg", "fold": 0}, {"data": []}, "folds: is of a folder"),
    ],
)
def test_data_that_is_missing_or_given_twice(changes, given, message, tmp_path):
    with pytest.raises(InferenceError, match=f"^{message}"):
        evaluate(EvaluateConfig("model", output=str(tmp_path / "scores"), **changes), **given)


@pytest.mark.parametrize("size", ["protocol", "native"])
def test_known_scores(size, brightness_model, score):
    result = score(brightness_model(metadata={"best_epoch": 7}), size=size)
    assert column(result, "name") == ["all", "half", "none"]
    assert column(result, "dice") == pytest.approx([1, 2 / 3, 0])
    assert column(result, "iou") == pytest.approx([1, 1 / 2, 0])
    assert column(result, "hd95") == pytest.approx([0, 4, NAN], nan_ok=True)
    assert result.mean == pytest.approx({"dice": 5 / 9, "iou": 0.5, "hd95": 2})
    assert result.deviation["dice"] == pytest.approx(np.std([1, 2 / 3, 0], ddof=1))
    assert result.count == {"dice": 3, "iou": 3, "hd95": 2}
    lines = result.table().splitlines()
    assert lines[0].split() == ["Dice", "IoU", "HD95", "(px)"]
    assert lines[2].split() == ["half", "0.6667", "0.5000", "4.00"]
    assert lines[5].split() == ["mean", "0.5556", "0.5000", "2.00"]
    assert lines[6].startswith("standard deviation")
    assert "HD95 is undefined for 1 of 3" in lines[-1]
    assert "mean over" not in result.table()
    assert "unsplit" not in result.table()

    assert {path.name for path in result.output.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}
    rows = csv_rows(result)
    assert list(rows[0]) == ["name", "dice", "iou", "hd95"]
    assert rows[1] == {"name": "half", "dice": "0.666667", "iou": "0.500000", "hd95": "4.000000"}
    assert rows[2]["hd95"] == "nan"
    written = summary(result)
    assert written["images"] == 3
    assert written["mean"]["dice"] == pytest.approx(5 / 9)
    assert written["hd95_undefined"] == 1
    assert written["settings"]["split"] == "test"
    assert (
        written["protocol"] == {"name": "uctransnet-224", "image_size": [16, 16], "channel_order": "rgb"} | RGB_IMAGES
    )
    assert written["model"]["metadata"] == {"best_epoch": 7}
    assert imread(result.output / "figure.png").shape[2] >= 3


def test_models_of_the_protocol_native_are_scored_at_native_size(brightness_model, score, dataset):
    two_nuclei(dataset)
    model = brightness_model(image_size=8, metadata={"protocol": "native"})
    result = score(model)
    assert column(result, "dice") == pytest.approx([1, 2 / 3, 0])
    assert "aji" in result.rows[0]
    assert {shape[2:] for shape in model.seen} == {(8, 8)}
    assert result.scored_at == "the size of their masks"
    assert summary(result)["protocol"] == {"name": "native", "image_size": [8, 8], "channel_order": "rgb"} | RGB_IMAGES


def test_models_of_another_protocol_are_scored_as_a_protocol_that_resizes(brightness_model, score):
    """A mask at 16 pixels widens on its way to 224, and so does the prediction: the best is 1."""
    model = brightness_model(image_size=8, metadata={"protocol": "native"})
    result = score(model, size="uctransnet-224")
    assert {shape[2:] for shape in model.seen} == {(8, 8)}
    square, half = np.zeros((2, 16, 16), dtype=np.uint8)
    square[4:12, 4:12], half[4:8, 4:12] = 1, 1
    square, half = (
        get_protocol("uctransnet-224").resize_mask(mask, classes=1).sum(dtype=int) for mask in (square, half)
    )
    assert half > square / 2  # its rim is longer
    assert column(result, "dice") == pytest.approx([1, 2 * half / (square + half), 0])
    assert result.scored_at == "224 x 224 pixels, as uctransnet-224 resizes them"
    assert (summary(result)["protocol"]["name"], summary(result)["scored_at"]) == ("native", result.scored_at)


def test_models_that_resize_alike_are_scored_as_they_see(brightness_model, score):
    own = score(brightness_model(image_size=224))
    named = score(brightness_model(image_size=224), size="uctransnet-224", overwrite=True)
    augmented = score(brightness_model(image_size=224, metadata={"protocol": "augmented-224"}), overwrite=True)
    for result in (named, augmented):
        assert column(result, "dice") == column(own, "dice")
        assert result.scored_at == own.scored_at == "224 x 224 pixels, as uctransnet-224 resizes them"
    assert own.rows[0]["dice"] < 1  # the rim of the mask counts as foreground, and such a model knows of no rim


def test_images_of_a_fold(brightness_model, score, dataset, tmp_path):
    (dataset / "test").rename(dataset / "train")
    for split in ("val", "test"):
        shutil.copytree(dataset / "train", dataset / split)
        for path in (dataset / split).glob("*/*.png"):
            path.rename(path.with_stem(f"{split}_{path.stem}"))
    folds = [{"train": ["all", "val_all"], "val": ["half"]}, {"train": ["half"], "val": ["val_none", "all"]}]
    (tmp_path / "folds.json").write_text(json.dumps({"folds": folds}))
    settings = {"folds": str(tmp_path / "folds.json"), "overwrite": True}
    assert column(score(brightness_model(), split="val", fold=1, **settings), "name") == ["val_none", "all"]
    result = score(brightness_model(), split="test", fold=1, **settings)
    assert column(result, "name") == ["test_all", "test_half", "test_none"]
    for fold in (2, None):
        with pytest.raises(DataError, match=rf"has folds 0 to 1, not {fold}; name one"):
            score(brightness_model(), split="val", fold=fold, **settings)


def test_tta_is_named_and_an_unsplit_folder_can_be_scored_whole(brightness_model, score, dataset):
    drawn = score(brightness_model(), dataset / "test", tta="flips")
    assert len(drawn.rows) == 1
    assert "comes unsplit: 1 of its 3 images are drawn for test" in drawn.table()
    assert "Each probability is the mean over 4 flips" in drawn.table().splitlines()
    whole = score(brightness_model(), dataset / "test", split="all", tta="d4", overwrite=True)
    assert column(whole, "name") == ["all", "half", "none"]
    assert "unsplit" not in whole.table()
    assert "Each probability is the mean over 8 flips and rotations" in whole.table().splitlines()
    assert len(score(brightness_model(), split="all", overwrite=True).rows) == 3


def record_of(dataset, train=(), val=()):
    """The record of a model that was trained on, and chosen by, images of the data set, under other names."""
    parts = {"train": train, "val": val}
    images = dataset / "test/images" if (dataset / "test").exists() else dataset / "images"
    return {
        part: {fingerprint(read_image(images / f"{name}.png")): f"old_{name}" for name in names}
        for part, names in parts.items()
    }


@pytest.mark.parametrize(
    "settings", [{}, {"size": "native"}, {"size": "uctransnet-224", "resolution": "protocol"}], ids=str
)
def test_images_that_the_model_was_trained_on_or_chosen_by_are_named(brightness_model, score, dataset, settings):
    (dataset / "test/images/half.png").rename(dataset / "test/images/copy.png")
    (dataset / "test/masks/half.png").rename(dataset / "test/masks/copy.png")
    record = record_of(dataset, train=["copy"], val=["none", "copy"])
    result = score(brightness_model(metadata={"images": record}), **settings)
    assert result.known == {"train": {"copy": "old_copy"}, "val": {"none": "old_none"}}
    assert summary(result)["known_images"] == result.known
    assert "images" not in summary(result)["model"]["metadata"]
    (all_alone,) = [row["dice"] for row in result.rows if row["name"] == "all"]
    remark = (
        "Not a test: the model was trained on 1 of these 3 images: copy (as old_copy); the best weights were chosen by "
        f"1 of these 3 images: none (as old_none); the mean Dice of the other 1 is {all_alone:.4f}"
    )
    assert remark in result.table().splitlines()


def test_a_model_that_knows_every_image_is_no_test(brightness_model, score, dataset):
    known = {"images": record_of(dataset, train=["all", "half", "none"])}
    assert "trained on 3 of these 3 images" in score(brightness_model(metadata=known)).table()
    assert "; no image is new to the model" in score(brightness_model(metadata=known), overwrite=True).table()
    advice = "Of a model that was trained on a fold, score val with its folds and fold"
    assert advice in score(brightness_model(metadata=known), split="all", overwrite=True).table().splitlines()
    new = {"images": {"train": {"0123456789abcdef": "all"}, "val": {}}}
    result = score(brightness_model(metadata=new), overwrite=True)
    assert result.known == {"train": {}, "val": {}}
    assert "Not a test" not in result.table()
    other_range = score(brightness_model(metadata=known), intensity_range=(0, 200), overwrite=True).table()
    assert "recognised only in the intensity range of training" in other_range


def test_what_is_said_of_images_drawn_from_an_unsplit_folder_is_true(brightness_model, score, dataset):
    folder = dataset / "test"
    (drawn,) = column(score(brightness_model(), folder), "name")
    (other, _) = sorted({"all", "half", "none"} - {drawn})
    drawn_of = f"{folder} comes unsplit: 1 of its 3 images are drawn for test"
    ending = "; --split all scores every one"
    for record, said in (
        (None, f"{drawn_of}, and the model does not record whether it was trained on them{ending}"),
        (record_of(folder, train=[other]), f"{drawn_of}, and the model has seen none of them in training{ending}"),
        (
            {"train": {"0123456789abcdef": drawn}, "val": {}},
            f"{drawn_of}, and the model may have seen {drawn} in training, with other pixels or read in another "
            f"intensity range{ending}",
        ),
        (record_of(folder, train=[drawn]), f"{drawn_of}{ending}"),
    ):
        metadata = {} if record is None else {"images": record}
        assert said in score(brightness_model(metadata=metadata), folder, overwrite=True).table().splitlines()


def test_an_ensemble_knows_the_images_of_all_members(brightness_model):
    records = [{"train": {"1": "a"}, "val": {"2": "b"}}, {"train": {"2": "b"}, "val": {"1": "a"}}]
    models = [brightness_model(metadata={"images": record}) for record in records]
    assert Ensemble(models, ["x", "y"]).metadata["images"] == {
        "train": {"1": "a", "2": "b"}, "val": {"2": "b", "1": "a"}
    }  # fmt: skip
    assert "images" not in Ensemble([models[0], brightness_model()], ["x", "y"]).metadata


def test_native_scores_are_against_the_mask_as_it_is(brightness_model, score, dataset):
    """A model at 8 pixels cannot draw an object of one pixel; at the protocol's size the mask loses it as well."""
    for path in dataset.glob("test/*/*.png"):
        path.unlink()
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[4:12, 4:12] = 255
    mask = image[..., 0].copy()
    mask[4:12, 12] = 255
    imsave(dataset / "test/images/a.png", image, check_contrast=False)
    imsave(dataset / "test/masks/a.png", mask, check_contrast=False)
    at_protocol = score(brightness_model(image_size=8), size="protocol")
    at_native = score(brightness_model(image_size=8), size="native", resolution="native", overwrite=True)
    assert at_protocol.mean["dice"] == pytest.approx(2 * 16 / (16 + 20))  # the mask's rim counts as foreground
    assert at_native.mean["dice"] == pytest.approx(2 * 64 / (64 + 72))


def test_several_classes(brightness_model, score, dataset):
    labels = np.zeros((16, 16), dtype=np.uint8)
    labels[:8], labels[8:12] = 1, 2
    for name in ("all", "half", "none"):
        imsave(dataset / f"test/masks/{name}.png", labels, check_contrast=False)
        shown = np.array([20, 127, 240], dtype=np.uint8)[labels if name == "all" else np.minimum(labels, 1)]
        imsave(dataset / f"test/images/{name}.png", shown[..., None].repeat(3, -1), check_contrast=False)
    result = score(brightness_model(classes=3, metadata={"class_names": ["background", "nucleus", "stroma"]}))
    half = result.rows[1]
    assert (half["dice_nucleus"], half["dice_stroma"]) == (pytest.approx(2 * 8 / (8 + 12)), 0)
    assert half["dice"] == pytest.approx(0.4)
    assert math.isnan(half["hd95_stroma"])
    assert half["hd95"] == half["hd95_nucleus"]
    assert result.rows[0]["dice"] == 1
    assert any(line.startswith("mean, stroma") for line in result.table().splitlines())


def test_empty_masks_are_counted_and_the_mean_of_the_others_given(brightness_model, score, dataset):
    """The empty mask of "none" scores 1 by its empty prediction."""
    imsave(dataset / "test/masks/none.png", np.zeros((16, 16), dtype=np.uint8), check_contrast=False)
    result = score(brightness_model())
    assert column(result, "dice") == pytest.approx([1, 2 / 3, 1])
    assert (result.empty, result.present) == (1, {"foreground": 2})
    assert result.mean_of_others == pytest.approx({"dice": 5 / 6, "iou": 3 / 4, "hd95": 2})
    assert (
        "1 of 3 masks are empty, where an empty prediction scores Dice 1 and any other 0; mean of the others: "
        "Dice 0.8333, IoU 0.7500, HD95 (px) 2.00"
    ) in result.table().splitlines()
    written = summary(result)
    assert (written["empty"], written["mean_of_others"]["dice"]) == (1, pytest.approx(5 / 6))
    assert csv_rows(result)[2]["dice"] == "1.000000"


@pytest.mark.parametrize("size", ["protocol", "native"])
def test_masks_without_any_foreground_have_no_score(size, brightness_model, score, dataset):
    for path in dataset.glob("test/masks/*.png"):
        imsave(path, np.zeros((16, 16), dtype=np.uint8), check_contrast=False)
    write_instances(dataset / "test/instances/all.png", np.zeros((16, 16), dtype=np.uint16))
    result = score(brightness_model(), size=size)
    assert all(math.isnan(score) for score in result.mean.values())
    assert set(result.count.values()) == {0}
    lines = result.table().splitlines()
    assert lines[1].split()[:4] == ["all", "n/a", "n/a", "n/a"]
    assert "n/a: no mask has foreground, so there is nothing to score" in lines
    assert not any("HD95 is undefined" in line for line in lines)
    assert csv_rows(result)[0]["dice"] == "nan"
    assert summary(result)["mean"]["dice"] is None


def test_a_class_that_no_mask_has_is_in_no_mean(brightness_model, score, dataset):
    """Class 1 covers the object; nothing is class 2, which "half" predicts in one corner."""
    for name in ("all", "half", "none"):
        labels = imread(dataset / f"test/masks/{name}.png") // 255
        imsave(dataset / f"test/masks/{name}.png", labels, check_contrast=False)
        shown = np.where(imread(dataset / f"test/images/{name}.png") > 0, 127, 20).astype(np.uint8)
        if name == "half":
            shown[:2, :2] = 250
        imsave(dataset / f"test/images/{name}.png", shown, check_contrast=False)
    result = score(brightness_model(classes=3))
    assert column(result, "dice") == column(result, "dice_1") == pytest.approx([1, 2 / 3, 0])
    assert all(map(math.isnan, column(result, "dice_2")))
    assert [row["dice_2"] for row in csv_rows(result)] == ["nan"] * 3
    assert summary(result)["mean"]["dice_2"] is None
    lines = result.table().splitlines()
    assert next(line for line in lines if line.startswith("mean, 2")).split()[2:] == ["n/a"] * 3
    assert "n/a: no mask has 2, so there is nothing to score" in lines
    imsave(dataset / "test/masks/none.png", np.full((16, 16), 2, dtype=np.uint8), check_contrast=False)
    result = score(brightness_model(classes=3), overwrite=True)
    assert column(result, "dice_2") == [1, 0, 0]
    assert result.present == {"1": 2, "2": 1}
    assert (
        "1 of 3 masks have 2; its mean over these: Dice 0.0000, IoU 0.0000, HD95 (px) n/a"
        in result.table().splitlines()
    )


@pytest.mark.parametrize("size", ["protocol", "native", "uctransnet-224"])
def test_ignored_pixels_are_not_scored(size, brightness_model, score, dataset):
    """The lower half of the object, which "half" misses, is ignored; of "none" there is nothing else."""
    for name in ("all", "half", "none"):
        mask = imread(dataset / f"test/masks/{name}.png")
        mask[8:] = 7
        mask[:] = 7 if name == "none" else mask
        imsave(dataset / f"test/masks/{name}.png", mask, check_contrast=False)
    instances = np.zeros((16, 16), dtype=np.uint16)
    instances[4:8, 4:12], instances[8:12, 4:12] = 7, 9
    for name in ("all", "half"):
        write_instances(dataset / f"test/instances/{name}.png", instances)
    model = brightness_model(
        metadata={"ignore_label": 7, "protocol": "native"} if size != "protocol" else {"ignore_label": 7}
    )
    result = score(model, size=size)
    if size == "uctransnet-224":  # the rim of the resized prediction is the mask's, but for the ignored half
        assert column(result, "dice")[:2] == pytest.approx([1, 1], abs=0.01)
    else:
        assert column(result, "dice")[:2] == [1, 1]
        assert column(result, "hd95")[:2] == [0, 0]
    assert math.isnan(result.rows[2]["dice"])
    assert (result.count["dice"], result.ignored, result.empty) == (2, 1, 0)
    assert "1 of 3 masks are ignored as a whole; their images have no score" in result.table().splitlines()
    assert "HD95 is undefined" not in result.table()
    if size == "native":
        assert column(result, "aji")[:2] == column(result, "pq")[:2] == [1, 1]
    assert summary(result)["protocol"]["ignore_label"] == 7


def test_instance_maps_beside_the_masks_are_scored_at_native_size(brightness_model, score, dataset):
    plain = score(brightness_model())
    two_nuclei(dataset)
    result = score(brightness_model(), size="native", overwrite=True)
    assert list(result.rows[0]) == ["name", "dice", "iou", "hd95", *INSTANCE_SCORES]
    # "all" predicts both as one square of 64: each has an IoU of 1/2, no match; "half" hits one of two
    for row, expected in zip(
        result.rows, [(0.5, 0, NAN, 0, 0, 0), (0.5, 2 / 3, 1, 2 / 3, 2 / 3, 0.5), (NAN,) * 6], strict=True
    ):
        assert [row[key] for key in INSTANCE_SCORES] == pytest.approx(expected, nan_ok=True)
    assert column(result, "dice") == pytest.approx([1, 2 / 3, 0])
    assert (result.mean["aji"], result.mean["pq"]) == pytest.approx((0.5, 1 / 3))
    assert (result.count["aji"], result.count["sq"]) == (2, 1)
    assert [row["pq"] for row in csv_rows(result)[1:]] == ["0.666667", "nan"]
    assert summary(result)["mean"]["pq"] == pytest.approx(1 / 3)
    lines = result.table().splitlines()
    assert lines[0].split() == ["Dice", "IoU", "HD95", "(px)", "AJI", "PQ", "SQ", "RQ", "=", "F1", "AP", "at", "0.5"]
    assert lines[2].split() == ["half", "0.6667", "0.5000", "4.00", "0.5000", "0.6667", "1.0000", "0.6667", "0.5000"]
    assert lines[-2] == "AJI, PQ, SQ, RQ and AP are those of the 2 of 3 images with an instance map"
    assert lines[-1] == "SQ is undefined for 1 of 2 images: no nucleus was matched"
    assert (result.output / "instances.png").is_file()

    at_protocol = score(brightness_model(), overwrite=True)  # replaces the picture of nuclei, which it does not score
    assert {path.name for path in result.output.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}
    assert [list(row) for row in at_protocol.rows] == [list(row) for row in plain.rows]
    assert (plain.unscored_instance_maps, at_protocol.unscored_instance_maps) == (0, 2)
    remark = "2 instance maps beside the masks were not scored: set size to native for AJI and PQ"
    assert at_protocol.table().splitlines() == [*plain.table().splitlines(), remark]


def test_settings_of_the_watershed_reach_scores_and_picture(brightness_model, score, dataset, monkeypatch):
    instances, rows = two_nuclei(dataset), []
    evaluation = importlib.import_module("uctrans.inference.evaluate")  # the package's attribute is the function
    monkeypatch.setattr(evaluation, "instance_figure", lambda path, drawn: rows.extend(drawn))
    result = score(brightness_model(), size="native", smallest_object=33)
    assert column(result, "aji")[:2] == [0.5, 0]  # the half of 32 pixels is left out
    assert [(row.name, row.aji) for row in rows] == [("all", 0.5), ("half", 0)]
    np.testing.assert_array_equal(rows[0].truth, instances)
    np.testing.assert_array_equal(rows[0].prediction, instances > 0)
    assert not rows[1].prediction.any()
    np.testing.assert_array_equal(rows[1].image, imread(dataset / "test/images/half.png"))


@pytest.mark.parametrize("broken", ["instances", "masks"])
def test_all_truth_is_checked_before_the_first_image_is_predicted(broken, brightness_model, score, dataset):
    model = brightness_model()
    instances = two_nuclei(dataset)
    if broken == "instances":
        write_instances(dataset / "test/instances/none.png", np.roll(instances, 8, axis=1))
    else:
        imsave(dataset / "test/masks/none.png", np.zeros((8, 16), dtype=np.uint8), check_contrast=False)
    with pytest.raises(DataError, match=rf"{broken}.none\.png: is"):
        score(model, size="native")
    assert not model.seen


@pytest.mark.parametrize("size", ["protocol", "native"])
def test_a_boundary_aware_model_is_scored_as_nucleus_and_background(size, brightness_model, score, dataset):
    """Bright is the border, gray the interior: the border parts two nuclei that the mask joins."""
    two_nuclei(dataset)
    shown = np.zeros((16, 16), dtype=np.uint8)
    shown[4:12, 4:12] = 127
    shown[7:9, 4:12] = 255
    for path in dataset.glob("test/images/*.png"):
        imsave(path, shown[..., None].repeat(3, -1), check_contrast=False)
    result = score(brightness_model(classes=3, metadata={"target": "boundary"}), size=size, smallest_object=20)
    assert column(result, "dice") == [1, 1, 1]
    if size == "native":
        assert column(result, "aji")[:2] == [1, 1]


def test_outlines_become_scores(brightness_model, score, tmp_path):
    """From the outlines of two nuclei that touch and two others, over instance maps, to AJI and PQ."""
    size, root = 96, tmp_path / "nuclei"
    angles = np.linspace(0, 2 * np.pi, 40)[:-1]
    circles = ((30, 20, 11), (30, 41, 11), (95, 60, 12), (60, 75, 9))
    outlines = [
        np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], 1)
        for row, column, radius in circles
    ]
    lower = fill_polygons([outline + np.array([0, 1]) for outline in outlines], (size, size)) > 0
    for kind, pixels in (("images", lower[..., None].repeat(3, -1)), ("masks", lower)):
        (root / "test" / kind).mkdir(parents=True)
        imsave(root / "test" / kind / "d.png", pixels * np.uint8(255), check_contrast=False)
    vertices = ("".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in outline) for outline in outlines)
    regions = "".join(f"<Region><Vertices>{inner}</Vertices></Region>" for inner in vertices)
    (root / "d.xml").write_text(f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>")
    prepare_instances(root / "d.xml", root)
    result = score(brightness_model(image_size=size), root, size="native")
    assert result.mean["dice"] == 1
    assert 0.85 < result.mean["aji"] < 0.95  # every nucleus is found, one row too low
    assert result.mean["rq"] == 1


def test_batches_do_not_change_scores(unet_folder, dataset, tmp_path):
    settings = {"device": "cpu", "progress": False}
    single = evaluate(EvaluateConfig(str(unet_folder), str(dataset), str(tmp_path / "a"), batch_size=1, **settings))
    batched = evaluate(EvaluateConfig(str(unet_folder), str(dataset), str(tmp_path / "b"), batch_size=3, **settings))
    assert column(single, "dice") == pytest.approx(column(batched, "dice"))


def test_an_evaluation_is_not_replaced_unasked(brightness_model, score):
    result = score(brightness_model())
    written = (result.output / "metrics.csv").read_bytes()
    with pytest.raises(InferenceError, match="set overwrite"):
        score(brightness_model(image_size=8))
    assert (result.output / "metrics.csv").read_bytes() == written
    assert summary(score(brightness_model(), threshold=0.3, overwrite=True))["settings"]["threshold"] == 0.3


@pytest.mark.parametrize("renamed", range(3))
def test_an_interrupted_replacement_leaves_no_summary_of_other_scores(renamed, brightness_model, score, monkeypatch):
    folder = score(brightness_model()).output
    replace = Path.replace
    targets = []

    def interrupted(path, target):
        if target.parent == folder and not target.name.startswith("."):
            if len(targets) == renamed:
                raise KeyboardInterrupt
            targets.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(brightness_model(), threshold=0.3, overwrite=True)
    assert len(targets) == renamed
    assert not (folder / "summary.json").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_an_evaluation_that_is_killed_leaves_no_summary_of_other_scores(brightness_model, score, is_killed_at):
    inverse = brightness_model()
    inverse.forward = lambda image: 50 * (0.5 - image.mean(1, keepdim=True))
    result = score(brightness_model())
    folder, before = result.output, summary(result)["mean"]["dice"]
    for number in itertools.count():
        if not is_killed_at(number, lambda: score(inverse, overwrite=True)):
            break
        if (folder / "summary.json").exists():
            scores = [float(row["dice"]) for row in csv_rows(result)]
            assert summary(result)["mean"]["dice"] == pytest.approx(np.mean(scores))
        result = score(brightness_model(), overwrite=True)
        assert {path.name for path in folder.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}
    assert number > 3
    assert summary(result)["mean"]["dice"] < before


def test_a_failed_evaluation_keeps_the_former_one(brightness_model, score, monkeypatch):
    folder = score(brightness_model()).output
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    evaluation = importlib.import_module("uctrans.inference.evaluate")
    monkeypatch.setattr(evaluation, "write_json", full)
    inverse = brightness_model()
    inverse.forward = lambda image: 50 * (0.5 - image.mean(1, keepdim=True))
    with pytest.raises(OSError, match="No space left"):
        score(inverse, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_bad_data(brightness_model, score, dataset, tmp_path):
    with pytest.raises(DataError, match="label values 255"):
        score(brightness_model(classes=2))
    with pytest.raises(DataError, match="split"):
        score(brightness_model(), split="val")
    write_instances(dataset / "test/instances/half.png", two_nuclei(dataset)[:8])
    with pytest.raises(DataError, match=r"half\.png: is 8 x 16 pixels .* its image is 16 x 16"):
        score(brightness_model(), size="native")
    (dataset / "test/masks/half.png").unlink()
    with pytest.raises(DataError, match="half"):
        score(brightness_model())
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "full"}, "size: 'full' is not known; choose one of protocol, native, augmented-224, uctransnet-224"),
        ({"threshold": 1.0}, "threshold: 1.0 is out of range"),
        ({"resolution": "native"}, "resolution: native .*; set size to native"),
        ({"tta": "all"}, "tta: 'all' is not known"),
        ({"smallest_object": -1}, "smallest_object: -1 is negative"),
        ({"seed_distance": 0}, "seed_distance: 0 is too small"),
    ],
)
def test_bad_settings(settings, message, brightness_model, score):
    with pytest.raises(InferenceError, match=message):
        score(brightness_model(), **settings)


def test_bad_paths(dataset, tmp_path):
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        evaluate(EvaluateConfig(str(tmp_path / "nowhere"), str(dataset), str(tmp_path / "scores"), device="cpu"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InferenceError, match="is a file"):
        evaluate(EvaluateConfig("model", str(dataset), str(tmp_path / "file")))
    with pytest.raises(InferenceError, match="no folder is given"):
        evaluate(EvaluateConfig("model", str(dataset), ""))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    with pytest.raises(InferenceError, match="run is the folder of a run"):
        evaluate(EvaluateConfig("model", str(dataset), str(tmp_path / "run"), overwrite=True))
    with locked(tmp_path / "scores"), pytest.raises(FolderError, match="is in use by process"):
        evaluate(EvaluateConfig("model", str(dataset), str(tmp_path / "scores")))


def test_the_masks_are_no_output(dataset, use_model, brightness_model):
    use_model(brightness_model())
    masks = dataset / "test/masks"
    with pytest.raises(InferenceError, match="holds the masks of a data set; choose another folder"):
        evaluate(EvaluateConfig("model", str(dataset), str(masks), device="cpu", progress=False, overwrite=True))
    assert sorted(path.name for path in masks.iterdir()) == ["all.png", "half.png", "none.png"]
