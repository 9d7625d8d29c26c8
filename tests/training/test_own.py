"""Runs on data, a transform and a loss that a program gives: the same as on a folder, resumed and refused like them."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import uctrans
from uctrans import cli
from uctrans.data import DataError, Protocol, find_samples, read_image, read_mask
from uctrans.training import CheckpointError, ConfigError, TrainConfig, load_checkpoint, segmentation_loss, train
from uctrans.training.build import build_protocol, load_data
from uctrans.training.distributed import Processes
from uctrans.training.log import read_metrics
from uctrans.training.own import Own

MEASURED = ("seconds", "images_per_second")
NATIVE = {"protocol": "native", "crops_per_image": 2}


class Pairs(Dataset):
    """The images and masks of a part of a folder, as floating point and as bool."""

    def __init__(self, folder, part):
        self.samples = find_samples(folder, part)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, position):
        sample = self.samples[position]
        return torch.tensor(read_image(sample.image)).permute(2, 0, 1) / 255, read_mask(sample.mask) > 0


def in_memory(folder):
    """Training and validation images, uint8, and their masks."""

    def tensors(part):
        samples = find_samples(folder, part)
        images = torch.stack([torch.tensor(read_image(sample.image)).permute(2, 0, 1) for sample in samples])
        return images, torch.stack([torch.tensor(read_mask(sample.mask)) for sample in samples]).long()

    return {"train_data": tensors("train"), "val_data": tensors("val")}


def datasets(folder):
    return {"train_data": Pairs(folder, "train"), "val_data": Pairs(folder, "val")}


def turn_and_add_noise(images, masks):
    if torch.rand(()) < 0.5:
        images, masks = images.flip(-1), masks.flip(-1)
    return images + 0.1 * torch.rand_like(images), masks


def binary_cross_entropy(logits, masks):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], masks.float())


def scores(folder):
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_metrics(Path(folder) / "metrics.csv")
    ]


def state(folder):
    return load_checkpoint(Path(folder) / "last.pt")["model"]["state"]


@pytest.fixture
def own_config(make_config):
    """Make the settings of a small run without a folder of data."""
    return functools.partial(make_config, data="", epochs=2)


@pytest.fixture
def trained_on_own(own_config, image_folder):
    """The settings and the data of a run of one epoch with a loss of the caller."""
    config, given = own_config(epochs=1), {**in_memory(image_folder), "loss": binary_cross_entropy}
    train(config, **given)
    return dataclasses.replace(config, resume=True), given


@pytest.mark.parametrize("changes", [{}, NATIVE | {"channel_order": "bgr"}], ids=["resized", "native"])
def test_a_run_on_tensors_is_the_run_on_their_folder(
    make_config, own_config, image_folder, tmp_path, assert_same, changes
):
    in_folder = train(make_config(epochs=2, **changes)).run_folder
    given = datasets(image_folder) if changes else in_memory(image_folder)
    own = train(own_config(output=str(tmp_path / "own"), **changes), **given).run_folder
    assert scores(own) == scores(in_folder)
    assert_same(state(own), state(in_folder))
    records = [uctrans.load_model(folder).metadata["images"] for folder in (own, in_folder)]
    assert [set(record["train"]) for record in records] == [set(records[0]["train"])] * 2
    assert "train_data[0]" in records[0]["train"].values()
    assert ("images are resized to 16 x 16 pixels" in (own / "log.txt").read_text()) != bool(changes)


def test_a_run_on_a_dataset_in_two_parts_is_the_run_in_one(own_config, image_folder, tmp_path, assert_same):
    given = datasets(image_folder) | {"transform": turn_and_add_noise, "loss": binary_cross_entropy}
    straight = train(own_config(output=str(tmp_path / "straight"), **NATIVE), **given).run_folder
    parts = own_config(epochs=1, **NATIVE)
    train(parts, **given)
    torch.manual_seed(99)
    settings = TrainConfig.load_yaml(Path(parts.output) / "config.yaml")
    assert (settings.data, settings.transform, settings.loss) == ("", "turn_and_add_noise", "binary_cross_entropy")
    train(dataclasses.replace(settings, epochs=2, resume=True), **given)
    assert scores(parts.output) == scores(straight)
    assert_same(state(parts.output), state(straight))


def test_transform_and_loss_take_the_place_of_those_of_the_project(make_config, tmp_path, monkeypatch, assert_same):
    seen = []

    def unchanged(images, masks):
        seen.append((images.shape, images.dtype, masks.shape, masks.dtype))
        return images, masks

    own = make_config(epochs=1)
    train(own, transform=unchanged, loss=segmentation_loss)
    assert seen[0] == ((4, 3, 16, 16), torch.float32, (4, 16, 16), torch.uint8)
    assert len(seen) == 2
    monkeypatch.setattr(Protocol, "augment", lambda self, images, masks, generator: (images, masks))
    settings = make_config(epochs=1, output=str(tmp_path / "other"))
    train(settings)
    assert scores(own.output) == scores(settings.output)
    assert_same(state(own.output), state(settings.output))


def test_the_validation_loss_is_that_of_the_caller(own_config, image_folder):
    config, cross_entropy = own_config(epochs=1, classes=2), torch.nn.CrossEntropyLoss()
    train(config, **in_memory(image_folder), loss=lambda logits, masks: 3 + 0 * cross_entropy(logits, masks))
    assert scores(config.output)[0]["val_loss"] == scores(config.output)[0]["train_loss"] == 3


def test_early_stopping_ends_a_run_with_a_loss_of_the_caller(own_config, image_folder):
    config = own_config(epochs=9, patience=1)
    result = train(config, **in_memory(image_folder), loss=lambda logits, masks: 0 * logits.sum())
    assert (result.stopped_by, result.best_epoch) == ("early stopping", 1)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {}, r"data: is empty; name a folder, or call train\(config, train_data="),
        ({}, {"train_data": []}, r"val_data: is missing, and train_data is given; .*random_split"),
        ({}, {"val_data": []}, r"train_data: is missing, and val_data is given"),
        (
            {"data": "d"},
            {"train_data": [], "val_data": []},
            "data: belongs to a folder, and train_data is given; leave",
        ),
        ({"folds": "monuseg", "fold": 0}, {"train_data": [], "val_data": []}, "folds: belongs to a folder"),
        ({"palette": "#000000,#ff0000"}, {"train_data": [], "val_data": []}, "palette: belongs to a folder"),
        ({"target": "boundary"}, {"train_data": [], "val_data": []}, "target: boundary needs the instance maps"),
        ({"data": "d", "augmentation": {"blur": 1}}, {"transform": max}, "augmentation: transform takes its place"),
        ({"data": "d"}, {"loss": "dice"}, "loss: 'dice' cannot be called; give a function"),
        ({"data": "d", "loss": "focal"}, {}, r"loss: names the function focal of a program; give it again.*loss=focal"),
    ],
)
def test_what_is_missing_or_given_twice(changes, given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        train(TrainConfig(output="run", **changes), **given)


def test_data_that_cannot_be_trained_on_is_named(own_config, image_folder):
    given = in_memory(image_folder)
    empty = {"val_data": (given["val_data"][0], 0 * given["val_data"][1])}
    with pytest.raises(DataError, match="val_data: none of the 3 validation masks has any foreground"):
        train(own_config(), **given | empty)
    with pytest.raises(DataError, match=r"train_data\[0\]: the image has the shape \(3, 24, 24\); give \(1, H, W\)"):
        train(own_config(in_channels=1), **given)
    with pytest.raises(ConfigError, match=r"transform: returned a Tensor; return two tensors"):
        train(own_config(), **given, transform=lambda images, masks: images)
    assert not list(Path(own_config().output).glob("*"))  # the mended call may take the folder


IMAGES, MASKS = torch.zeros(2, 3, 4, 5), torch.ones(2, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((IMAGES, None), r"returned a tuple; return two tensors, \(images, masks\)"),
        ((IMAGES[:1], MASKS), r"returned images \(1, 3, 4, 5\) float32 .*return floating-point images \(2, 3, H, W\)"),
        ((IMAGES.byte(), MASKS), r"returned images \(2, 3, 4, 5\) uint8"),
        ((IMAGES, MASKS.float()), r"returned images .* and masks \(2, 4, 5\) float32; .* whole labels"),
        ((IMAGES[..., :4], MASKS), r"returned images \(2, 3, 4, 4\) float32 and masks \(2, 4, 5\) uint8; return"),
        ((IMAGES, MASKS * 2), "returned the label 2; keep the labels"),
        ((IMAGES, MASKS.long() - 101), "returned the label -100; keep the labels"),
        ((IMAGES, MASKS * 255), "returned the label 255; keep .* mark pixels without one with 255 and ignore_label"),
    ],
)
def test_what_a_transform_may_not_return(result, message):
    with pytest.raises(ConfigError, match=f"^transform: {message}"):
        Own(transform=lambda images, masks: result).checked_transform(TrainConfig(output="run"))(IMAGES, MASKS)


def test_a_transform_may_ignore_pixels_where_the_run_does():
    own, config = (
        Own(transform=lambda images, masks: (images, masks.long() * 255)),
        TrainConfig(output="run", ignore_label=7),
    )
    assert own.checked_transform(config)(IMAGES, MASKS)[1].unique().tolist() == [255]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, masks: logits.mean((1, 2, 3)), r"returned \(2,\) float32; return a scalar tensor"),
        (lambda logits, masks: 0.5, r"returned a float; return a scalar"),
        (lambda logits, masks: logits.detach().mean(), r"returned a value without gradient; compute it"),
    ],
    ids=["vector", "number", "detached"],
)
def test_what_a_loss_may_not_return(loss, message):
    with pytest.raises(ConfigError, match=f"^loss: {message}"):
        Own(loss=loss).loss_of(torch.zeros(2, 1, 4, 5, requires_grad=True), MASKS)


def test_a_run_resumes_with_what_it_began_with_alone(trained_on_own, image_folder, capsys):
    config, given = trained_on_own
    with pytest.raises(ConfigError, match=r"other settings \(loss: 'binary_cross_entropy' -> None\)"):
        train(config, **given | {"loss": None})
    with pytest.raises(ConfigError, match=r"other settings \(loss: 'binary_cross_entropy' -> 'segmentation_loss'\)"):
        train(config, **given | {"loss": functools.partial(segmentation_loss, dice_weight=0)})
    images, masks = given["train_data"]
    with pytest.raises(CheckpointError, match=r"labels of the train images in train_data have changed"):
        train(config, **given | {"train_data": (images, 1 - masks)})
    with pytest.raises(CheckpointError, match=r"the train images in train_data \(train_data\[0\], .*have changed"):
        train(config, **given | {"train_data": (255 - images, masks)})
    with pytest.raises(
        CheckpointError, match=r"train images are not those the run began with \(first: train_data\[6\]\)"
    ):
        train(config, **given | {"train_data": (images[:6], masks[:6])})
    with pytest.raises(CheckpointError, match=r"train images are not those the run began with"):
        train(dataclasses.replace(config, data=str(image_folder)), loss=binary_cross_entropy)
    assert cli.main(["train", "-o", config.output, "--resume"]) == cli.USER_ERROR
    assert "data: is empty; name a folder, or call train(config, train_data=..." in capsys.readouterr().err
    assert train(dataclasses.replace(config, epochs=2), **given).epochs == 2


def test_processes_with_different_data_are_refused(own_config, image_folder):
    class Two(Processes):
        def gather(self, value):
            return [value, ("other", value[1])]

    config, own = own_config(), Own(**in_memory(image_folder))
    with pytest.raises(DataError, match=r"train_data, val_data: differ between the processes; .*seeded"):
        load_data(config, build_protocol(config), Two(0, 2, torch.device("cpu")), own)
