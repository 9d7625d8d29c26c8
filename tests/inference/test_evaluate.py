"""Evaluation on data whose scores are known."""

import csv
import importlib
import json
import math
import shutil

import numpy as np
import pytest
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError, get_protocol
from uctrans.data.instances import write_instances
from uctrans.inference import EvaluateConfig, InferenceError, evaluate

evaluate_module = importlib.import_module("uctrans.inference.evaluate")  # the package's attribute is the function


def config(dataset, tmp_path, **settings):
    return EvaluateConfig("model", str(dataset), str(tmp_path / "scores"), device="cpu", progress=False, **settings)


@pytest.mark.parametrize("size", ["protocol", "native"])
def test_known_scores(size, brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    result = evaluate(config(dataset, tmp_path, size=size))
    assert [row["name"] for row in result.rows] == ["all", "half", "none"]
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0])
    assert [row["iou"] for row in result.rows] == pytest.approx([1, 1 / 2, 0])
    assert [row["hd95"] for row in result.rows] == pytest.approx([0, 4, math.nan], nan_ok=True)
    assert result.mean == pytest.approx({"dice": 5 / 9, "iou": 0.5, "hd95": 2})
    assert result.deviation["dice"] == pytest.approx(np.std([1, 2 / 3, 0], ddof=1))
    assert result.count == {"dice": 3, "iou": 3, "hd95": 2}


def test_files(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model(metadata={"best_epoch": 7}))
    result = evaluate(config(dataset, tmp_path))
    assert {path.name for path in result.output.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}
    with (result.output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "dice", "iou", "hd95"]
    assert rows[1] == {"name": "half", "dice": "0.666667", "iou": "0.500000", "hd95": "4.000000"}
    assert rows[2]["hd95"] == "nan"
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary["images"] == 3
    assert summary["mean"]["dice"] == pytest.approx(5 / 9)
    assert summary["hd95_undefined"] == 1
    assert summary["settings"]["split"] == "test"
    assert summary["protocol"] == {"name": "uctransnet-224", "image_size": [16, 16], "channel_order": "rgb"}
    assert summary["model"]["metadata"] == {"best_epoch": 7}
    assert imread(result.output / "figure.png").shape[2] >= 3


def test_models_of_the_protocol_native_are_scored_at_native_size(brightness_model, use_model, dataset, tmp_path):
    two_nuclei(dataset)
    model = use_model(brightness_model(image_size=8, metadata={"protocol": "native"}))
    result = evaluate(config(dataset, tmp_path))
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0])
    assert "aji" in result.rows[0]
    assert {shape[2:] for shape in model.seen} == {(8, 8)}
    assert result.scored_at == "the size of their masks"
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary["protocol"] == {"name": "native", "image_size": [8, 8], "channel_order": "rgb"}


def test_models_of_another_protocol_are_scored_as_a_protocol_that_resizes(
    brightness_model, use_model, dataset, tmp_path
):
    """A mask at 16 pixels widens on its way to 224, and so does the prediction: the best is 1."""
    model = use_model(brightness_model(image_size=8, metadata={"protocol": "native"}))
    result = evaluate(config(dataset, tmp_path, size="uctransnet-224"))
    assert {shape[2:] for shape in model.seen} == {(8, 8)}
    square, half = np.zeros((2, 16, 16), dtype=np.uint8)
    square[4:12, 4:12], half[4:8, 4:12] = 1, 1
    square, half = (
        get_protocol("uctransnet-224").resize_mask(mask, classes=1).sum(dtype=int) for mask in (square, half)
    )
    assert half > square / 2  # its rim is longer
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 * half / (square + half), 0])
    assert result.scored_at == "224 x 224 pixels, as uctransnet-224 resizes them"
    summary = json.loads((result.output / "summary.json").read_text())
    assert (summary["protocol"]["name"], summary["scored_at"]) == ("native", result.scored_at)
    assert imread(result.output / "figure.png").shape[2] >= 3


def test_models_that_resize_alike_are_scored_as_they_see(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model(image_size=224))
    own = evaluate(config(dataset, tmp_path))
    named = evaluate(config(dataset, tmp_path, size="uctransnet-224", overwrite=True))
    use_model(brightness_model(image_size=224, metadata={"protocol": "augmented-224"}))
    augmented = evaluate(config(dataset, tmp_path, overwrite=True))
    for result in (named, augmented):
        assert [row["dice"] for row in result.rows] == [row["dice"] for row in own.rows]
        assert result.scored_at == own.scored_at == "224 x 224 pixels, as uctransnet-224 resizes them"
    assert own.rows[0]["dice"] < 1  # the rim of the mask counts as foreground, and such a model knows of no rim


def test_images_of_a_fold(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    (dataset / "test").rename(dataset / "train")
    for split in ("val", "test"):
        shutil.copytree(dataset / "train", dataset / split)
        for path in (dataset / split).glob("*/*.png"):
            path.rename(path.with_stem(f"{split}_{path.stem}"))
    folds = [{"train": ["all", "val_all"], "val": ["half"]}, {"train": ["half"], "val": ["val_none", "all"]}]
    (tmp_path / "folds.json").write_text(json.dumps({"folds": folds}))
    settings = {"folds": str(tmp_path / "folds.json"), "overwrite": True}
    result = evaluate(config(dataset, tmp_path, split="val", fold=1, **settings))
    assert [row["name"] for row in result.rows] == ["val_none", "all"]
    result = evaluate(config(dataset, tmp_path, split="test", fold=1, **settings))
    assert [row["name"] for row in result.rows] == ["test_all", "test_half", "test_none"]
    with pytest.raises(DataError, match=r"has folds 0 to 1, not 2; name one"):
        evaluate(config(dataset, tmp_path, split="val", fold=2, **settings))
    with pytest.raises(DataError, match=r"has folds 0 to 1, not None; name one"):
        evaluate(config(dataset, tmp_path, split="val", **settings))


def test_what_probabilities_are_the_mean_of_is_told(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    lines = {
        tta: evaluate(config(dataset, tmp_path, tta=tta, overwrite=True)).table() for tta in ("none", "flips", "d4")
    }
    assert "mean over" not in lines["none"]
    assert "Each probability is the mean over 4 flips" in lines["flips"]
    assert "Each probability is the mean over 8 flips and rotations" in lines["d4"]


def test_a_folder_that_comes_unsplit_is_told_and_can_be_scored_whole(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    drawn = evaluate(config(dataset / "test", tmp_path))
    assert len(drawn.rows) == 1
    assert "comes unsplit: 1 of its 3 images are drawn for test" in drawn.table()
    whole = evaluate(config(dataset / "test", tmp_path, split="all", overwrite=True))
    assert [row["name"] for row in whole.rows] == ["all", "half", "none"]
    assert "unsplit" not in whole.table()
    assert len(evaluate(config(dataset, tmp_path, split="all", overwrite=True)).rows) == 3
    assert "unsplit" not in evaluate(config(dataset, tmp_path, overwrite=True)).table()


def test_table(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    lines = evaluate(config(dataset, tmp_path)).table().splitlines()
    assert lines[0].split() == ["Dice", "IoU", "HD95", "(px)"]
    assert lines[2].split() == ["half", "0.6667", "0.5000", "4.00"]
    assert lines[5].split() == ["mean", "0.5556", "0.5000", "2.00"]
    assert lines[6].startswith("standard deviation")
    assert "HD95 is undefined for 1 of 3" in lines[-1]


def test_native_scores_are_against_the_mask_as_it_is(brightness_model, use_model, dataset, tmp_path):
    """A model at 8 pixels cannot draw an object of one pixel; at the protocol's size the mask loses it as well."""
    use_model(brightness_model(image_size=8))
    for path in dataset.glob("test/*/*.png"):
        path.unlink()
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[4:12, 4:12] = 255
    mask = image[..., 0].copy()
    mask[4:12, 12] = 255
    imsave(dataset / "test/images/a.png", image, check_contrast=False)
    imsave(dataset / "test/masks/a.png", mask, check_contrast=False)
    at_protocol = evaluate(config(dataset, tmp_path, size="protocol"))
    at_native = evaluate(config(dataset, tmp_path, size="native", resolution="native", overwrite=True))
    assert at_protocol.mean["dice"] == pytest.approx(2 * 16 / (16 + 20))  # the mask's rim counts as foreground
    assert at_native.mean["dice"] == pytest.approx(2 * 64 / (64 + 72))


def test_several_classes(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model(classes=3, metadata={"class_names": ["background", "nucleus", "stroma"]}))
    labels = np.zeros((16, 16), dtype=np.uint8)
    labels[:8], labels[8:12] = 1, 2
    for name in ("all", "half", "none"):
        imsave(dataset / f"test/masks/{name}.png", labels, check_contrast=False)
        shown = np.array([20, 127, 240], dtype=np.uint8)[labels if name == "all" else np.minimum(labels, 1)]
        imsave(dataset / f"test/images/{name}.png", shown[..., None].repeat(3, -1), check_contrast=False)
    result = evaluate(config(dataset, tmp_path))
    half = result.rows[1]
    assert (half["dice_nucleus"], half["dice_stroma"]) == (pytest.approx(2 * 8 / (8 + 12)), 0)
    assert half["dice"] == pytest.approx(0.4)
    assert math.isnan(half["hd95_stroma"])
    assert half["hd95"] == half["hd95_nucleus"]
    assert result.rows[0]["dice"] == 1
    assert any(line.startswith("mean, stroma") for line in result.table().splitlines())


def two_nuclei(dataset):
    """Instance maps for "all" and "half": the upper and the lower half of the object."""
    instances = np.zeros((16, 16), dtype=np.uint16)
    instances[4:8, 4:12], instances[8:12, 4:12] = 7, 9
    for name in ("all", "half"):
        write_instances(dataset / f"test/instances/{name}.png", instances)
    return instances


def test_instance_maps_beside_the_masks_are_scored(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    two_nuclei(dataset)
    result = evaluate(config(dataset, tmp_path, size="native"))
    assert list(result.rows[0]) == ["name", "dice", "iou", "hd95", "aji", "pq", "sq", "rq", "f1"]
    nan = math.nan
    # "all" predicts both as one square of 64: each has an IoU of 1/2, no match; "half" hits one of two
    for row, expected in zip(
        result.rows, [(0.5, 0, nan, 0, 0), (0.5, 2 / 3, 1, 2 / 3, 2 / 3), (nan,) * 5], strict=True
    ):
        assert [row[key] for key in ("aji", "pq", "sq", "rq", "f1")] == pytest.approx(expected, nan_ok=True)
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0])
    assert result.mean["aji"] == pytest.approx(0.5)
    assert result.mean["pq"] == pytest.approx(1 / 3)
    assert (result.count["aji"], result.count["sq"]) == (2, 1)
    with (result.output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[1]["pq"], rows[2]["pq"]) == ("0.666667", "nan")
    assert json.loads((result.output / "summary.json").read_text())["mean"]["pq"] == pytest.approx(1 / 3)
    lines = result.table().splitlines()
    assert lines[0].split() == ["Dice", "IoU", "HD95", "(px)", "AJI", "PQ", "SQ", "RQ", "=", "F1"]
    assert lines[2].split() == ["half", "0.6667", "0.5000", "4.00", "0.5000", "0.6667", "1.0000", "0.6667"]
    assert lines[-2] == "AJI, PQ, SQ and RQ are of the 2 of 3 images with an instance map"
    assert lines[-1] == "SQ is undefined for 1 of 2 images: no nucleus was matched"


def test_the_picture_of_nuclei_is_that_of_this_evaluation(brightness_model, use_model, dataset, tmp_path, monkeypatch):
    use_model(brightness_model())
    instances, rows = two_nuclei(dataset), []
    draw = evaluate_module.instance_figure
    monkeypatch.setattr(
        evaluate_module, "instance_figure", lambda path, chosen: (rows.extend(chosen), draw(path, chosen))
    )
    result = evaluate(config(dataset, tmp_path, size="native", smallest_object=33))
    assert imread(result.output / "instances.png").shape[2] >= 3
    assert [(row.name, row.aji) for row in rows] == [("all", 0.5), ("half", 0)]
    np.testing.assert_array_equal(rows[0].truth, instances)
    np.testing.assert_array_equal(rows[0].prediction, instances > 0)
    assert not rows[1].prediction.any()
    np.testing.assert_array_equal(rows[1].image, imread(dataset / "test/images/half.png"))
    evaluate(config(dataset, tmp_path, overwrite=True))  # at the protocol's size nuclei are not scored
    assert {path.name for path in result.output.iterdir()} == {"metrics.csv", "summary.json", "figure.png"}


@pytest.mark.parametrize("broken", ["instances", "masks"])
def test_all_truth_is_checked_before_the_first_image_is_predicted(
    broken, brightness_model, use_model, dataset, tmp_path
):
    model = use_model(brightness_model())
    instances = two_nuclei(dataset)
    if broken == "instances":
        write_instances(dataset / "test/instances/none.png", np.roll(instances, 8, axis=1))
    else:
        imsave(dataset / "test/masks/none.png", np.zeros((8, 16), dtype=np.uint8), check_contrast=False)
    with pytest.raises(DataError, match=rf"{broken}.none\.png: is"):
        evaluate(config(dataset, tmp_path, size="native"))
    assert not model.seen


def test_settings_of_the_watershed_are_used(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    two_nuclei(dataset)
    result = evaluate(config(dataset, tmp_path, size="native", smallest_object=33))
    assert [row["aji"] for row in result.rows[:2]] == [0.5, 0]  # the half of 32 pixels is left out


def test_at_the_protocol_size_instance_maps_are_named_and_not_scored(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    plain = evaluate(config(dataset, tmp_path))
    two_nuclei(dataset)
    result = evaluate(config(dataset, tmp_path, overwrite=True))
    assert [list(row) for row in result.rows] == [list(row) for row in plain.rows]
    assert (plain.unscored_instance_maps, result.unscored_instance_maps) == (0, 2)
    remark = "2 instance maps lie beside the masks: set size to native for AJI and PQ"
    assert result.table().splitlines() == [*plain.table().splitlines(), remark]


@pytest.mark.parametrize("size", ["protocol", "native"])
def test_a_boundary_aware_model_is_scored_as_nucleus_and_background(
    size, brightness_model, use_model, dataset, tmp_path
):
    """Bright is the border, gray the interior: the border parts two nuclei that the mask joins."""
    use_model(brightness_model(classes=3, metadata={"target": "boundary"}))
    two_nuclei(dataset)
    shown = np.zeros((16, 16), dtype=np.uint8)
    shown[4:12, 4:12] = 127
    shown[7:9, 4:12] = 255
    for path in dataset.glob("test/images/*.png"):
        imsave(path, shown[..., None].repeat(3, -1), check_contrast=False)
    result = evaluate(config(dataset, tmp_path, size=size, smallest_object=20))
    assert [row["dice"] for row in result.rows] == [1, 1, 1]
    if size == "native":
        assert [row["aji"] for row in result.rows[:2]] == [1, 1]


def test_an_instance_map_of_another_size(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    write_instances(dataset / "test/instances/half.png", two_nuclei(dataset)[:8])
    with pytest.raises(DataError, match=r"half\.png: is 8 x 16 pixels .* its image is 16 x 16"):
        evaluate(config(dataset, tmp_path, size="native"))
    assert not (tmp_path / "scores").exists()


def test_batches_do_not_change_scores(unet_folder, dataset, tmp_path):
    settings = {"device": "cpu", "progress": False}
    single = evaluate(EvaluateConfig(str(unet_folder), str(dataset), str(tmp_path / "a"), batch_size=1, **settings))
    batched = evaluate(EvaluateConfig(str(unet_folder), str(dataset), str(tmp_path / "b"), batch_size=3, **settings))
    assert [row["dice"] for row in single.rows] == pytest.approx([row["dice"] for row in batched.rows])


def test_an_evaluation_is_not_replaced_unasked(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    evaluate(config(dataset, tmp_path))
    written = (tmp_path / "scores/metrics.csv").read_bytes()
    use_model(brightness_model(classes=1, image_size=8))
    with pytest.raises(InferenceError, match="set overwrite"):
        evaluate(config(dataset, tmp_path))
    assert (tmp_path / "scores/metrics.csv").read_bytes() == written
    evaluate(config(dataset, tmp_path, threshold=0.3, overwrite=True))
    assert json.loads((tmp_path / "scores/summary.json").read_text())["settings"]["threshold"] == 0.3


def test_bad_data(brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model(classes=2))
    with pytest.raises(DataError, match="label values 255"):
        evaluate(config(dataset, tmp_path))
    use_model(brightness_model())
    with pytest.raises(DataError, match="split"):
        evaluate(config(dataset, tmp_path, split="val"))
    (dataset / "test/masks/half.png").unlink()
    with pytest.raises(DataError, match="half"):
        evaluate(config(dataset, tmp_path))
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "full"}, "size must be"),
        ({"threshold": 1.0}, "threshold must lie between"),
        ({"resolution": "native"}, "set size to native"),
        ({"tta": "all"}, "tta must be"),
        ({"smallest_object": -1}, "smallest_object must be 0 or more"),
        ({"seed_distance": 0}, "seed_distance 1 or more"),
    ],
)
def test_bad_settings(settings, message, brightness_model, use_model, dataset, tmp_path):
    use_model(brightness_model())
    with pytest.raises(InferenceError, match=message):
        evaluate(config(dataset, tmp_path, **settings))


def test_bad_paths(dataset, tmp_path):
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        evaluate(EvaluateConfig(str(tmp_path / "nowhere"), str(dataset), str(tmp_path / "scores"), device="cpu"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InferenceError, match="is a file"):
        evaluate(EvaluateConfig("model", str(dataset), str(tmp_path / "file")))
    with pytest.raises(InferenceError, match="No output folder"):
        evaluate(EvaluateConfig("model", str(dataset), ""))
