"""Training on full-resolution crops, and of the boundary-aware target."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imread, imsave

import uctrans
from uctrans.data import DataError
from uctrans.data.instances import write_instances
from uctrans.inference import EvaluateConfig, PredictConfig, evaluate, predict
from uctrans.inference.instances import is_boundary_aware
from uctrans.inference.predictor import load_predictor
from uctrans.training import ConfigError, load_checkpoint, train
from uctrans.training.distributed import Processes
from uctrans.training.loop import train_step
from uctrans.training.losses import scored_logits
from uctrans.training.run import Run
from uctrans.training.validation import predict_logits, validate

CPU = Processes(rank=0, count=1, device=torch.device("cpu"))
SIZES = {"train": [(40, 36), (20, 50), (12, 14)], "val": [(24, 40), (16, 16)], "test": [(30, 28)]}


@pytest.fixture(scope="session")
def nuclei_folder(tmp_path_factory):
    """Six images of different sizes with two bright squares that touch, masks and instance maps."""
    root, generator = tmp_path_factory.mktemp("nuclei"), np.random.default_rng(0)
    for split, sizes in SIZES.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number, (height, width) in enumerate(sizes):
            instances = np.zeros((height, width), np.uint16)
            instances[2:11, 2:8], instances[2:11, 8:13] = 1, 2
            image = generator.integers(0, 60, (height, width, 3)) + (instances[..., None] > 0) * 160
            name = f"{split}{number}.png"
            imsave(root / split / "images" / name, image.astype(np.uint8), check_contrast=False)
            imsave(root / split / "masks" / name, (instances > 0).astype(np.uint8) * 255, check_contrast=False)
            write_instances(root / split / "instances" / name, instances)
    return root


@pytest.fixture
def make_native(make_config, nuclei_folder):
    def make(**changes):
        return make_config(
            **{"data": str(nuclei_folder), "protocol": "native", "crops_per_image": 3, "batch_size": 3} | changes
        )

    return make


def test_an_epoch_takes_every_image_as_often_as_it_is_cropped(make_native):
    run = Run(make_native(batch_size=4, image_size=24), CPU)
    run.begin_epoch()
    assert run.steps_per_epoch == 3  # 3 images x 3 crops in batches of 4
    assert torch.bincount(run.order).tolist() == [3, 3, 3]
    assert run.images_before(2) == 8
    assert Run(make_native(crops_per_image=None), CPU).images_per_epoch == 48


def test_an_epoch_takes_as_many_crops_as_have_the_pixels_of_an_image(make_native):
    run = Run(make_native(crops_per_image="area", image_size=20), CPU)
    run.begin_epoch()
    assert torch.bincount(run.order).tolist() == [4, 2, 1]  # of 40 x 36, 20 x 50 and 12 x 14 pixels
    assert run.images_per_epoch == 7


def test_a_step_sees_crops_and_lowers_the_loss(make_native):
    run = Run(make_native(image_size=24), CPU)
    run.begin_epoch()
    seen = []
    handle = run.model.register_forward_pre_hook(lambda model, inputs: seen.append(tuple(inputs[0].shape)))
    train_step(run, run.batch(0))
    handle.remove()
    assert seen == [(3, 3, 24, 24)]
    before = validate(run.model, run.val_data, run.protocol, run.config, CPU).read(CPU)[0]
    for step in range(20):
        train_step(run, run.batch(step % 2))
    assert validate(run.model, run.val_data, run.protocol, run.config, CPU).read(CPU)[0] < before - 0.05


def test_run_in_two_parts_is_the_run_in_one(make_native, tmp_path, assert_same):
    settings = {"target": "boundary", "augmentation": {"rotation": 180}}
    train(make_native(output=str(tmp_path / "straight"), epochs=2, **settings))
    train(make_native(epochs=1, **settings))
    torch.manual_seed(99)
    train(make_native(epochs=2, resume=True, **settings))
    ends = [load_checkpoint(tmp_path / name / "last.pt") for name in ("straight", "run")]
    for end in ends:
        del end["train_config"]
    assert_same(*ends)


def test_run_left_in_the_middle_of_an_epoch_continues_with_the_same_crops(make_native, assert_same):
    def steps(run, count):
        run.begin_epoch()
        for _ in range(count):
            train_step(run, run.batch(run.steps_done))
            run.steps_done += 1
        return run

    straight = steps(Run(make_native(), CPU), 3)
    left = copy.deepcopy(steps(Run(make_native(), CPU), 1).state_dict())
    torch.manual_seed(99)
    resumed = Run(make_native(), CPU)
    resumed.load_state_dict(left, Path("last.pt"))
    assert_same(straight.state_dict(), steps(resumed, 2).state_dict())


def test_another_seed_is_another_run(make_native):
    orders = []
    for seed in (0, 0, 1):
        run = Run(make_native(seed=seed), CPU)
        run.begin_epoch()
        batch = run.protocol.training_batch(run.train_data, run.batch(0), run.augment_generator)
        orders.append(batch[0])
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("target", ["mask", "boundary"])
def test_validation_predicts_as_prediction_does(make_native, tmp_path, target):
    """The Dice of validation is that of evaluation, and its logits those of the blended tiles."""
    config = make_native(epochs=2, target=target)
    result = train(config)
    run = Run(config, CPU)
    model = uctrans.load_model(result.run_folder)
    dice = validate(model.eval(), run.val_data, run.protocol, config, CPU).read(CPU)[1]
    assert dice == pytest.approx(result.best_score, abs=1e-6)
    scores = evaluate(
        EvaluateConfig(
            str(result.run_folder), config.data, str(tmp_path / "scores"), "val", device="cpu", progress=False
        )
    )
    assert scores.mean["dice"] == pytest.approx(dice, abs=2e-3)
    assert {"aji", "pq"} <= set(scores.mean)
    image = run.val_data.batch(torch.tensor([0]))[0]
    logits = predict_logits(model, run.protocol.to_input(image), run.protocol, config)
    predictor = load_predictor(result.run_folder, device="cpu")
    expected = predictor.probabilities_of_image(image[0].permute(1, 2, 0).numpy())
    probabilities = logits.sigmoid() if target == "mask" else logits.softmax(1)
    torch.testing.assert_close(probabilities[0], expected, atol=1e-4, rtol=0)


def test_boundary_target_from_training_to_instances(make_native, nuclei_folder, tmp_path):
    config = make_native(target="boundary", epochs=2, class_names=("nucleus",))
    result = train(config)
    model = uctrans.load_model(result.run_folder)
    assert (model.classes, model.metadata["target"], is_boundary_aware(model)) == (3, "boundary", True)
    assert json.loads((result.run_folder / "best" / "config.json").read_text())["metadata"]["protocol"] == "native"
    source, target = str(nuclei_folder / "test/images"), str(tmp_path / "predicted")
    settings = {"instances": True, "device": "cpu", "progress": False}
    written = predict(PredictConfig(str(result.run_folder), source, target, **settings))
    assert len(written) == 4
    instances = imread(tmp_path / "predicted/test0_instances.png")
    assert (instances.shape, instances.dtype) == ((30, 28), np.uint16)


def test_boundary_logits_are_scored_by_their_nuclei(make_native):
    logits = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    nucleus = scored_logits(logits, make_native(target="boundary"))
    torch.testing.assert_close(nucleus.sigmoid()[:, 0], 1 - logits.softmax(1)[:, 0])
    assert scored_logits(logits, make_native()) is logits


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "border"}, ConfigError, "target: 'border' is not known; choose one of mask, boundary"),
        ({"target": "boundary", "classes": 3}, ConfigError, "set classes to 1"),
        (
            {"target": "boundary", "protocol": "uctransnet-224", "crops_per_image": None},
            ConfigError,
            "protocol to native",
        ),
        ({"protocol": "uctransnet-224"}, DataError, "crops_per_image: the protocol uctransnet-224 has no such option"),
        ({"crops_per_image": 0}, DataError, "crops_per_image: 0 is no number of crops; give 1 or more, or area"),
        ({"crops_per_image": "size"}, DataError, "crops_per_image: 'size' is no number of crops"),
        ({"augmentation": {"zoom": 1}}, DataError, "augmentation: there is no 'zoom'"),
        ({"augmentation": {"rotation": 400}}, DataError, "rotation=400 is out of range; give a number from 0 to 180"),
        ({"augmentation": "{"}, ConfigError, "augmentation: '{' is not JSON"),
    ],
)
def test_settings_that_cannot_be(make_native, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Run(make_native(**changes), CPU)


def test_boundary_target_without_instance_maps(make_native, image_folder):
    with pytest.raises(DataError, match=r"train/instances: no instance map.*for train0, train1"):
        train(make_native(target="boundary", data=str(image_folder)))
