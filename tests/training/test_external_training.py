"""Training of networks of other packages: what is trained and resumed, and what is refused before it begins."""

import dataclasses
from pathlib import Path

import pytest
import torch

import uctrans
from tests.networks import ATTENTION_UNET, EXTERNAL, HALVING, HALVING_OPTIONS, NESTED_UNET_OPTIONS
from uctrans.training import ConfigError, TrainConfig, load_checkpoint, train
from uctrans.training.log import read_metrics

SMALL = {"model": HALVING, "model_options": HALVING_OPTIONS, "epochs": 2}


def weights_of(config, file="last.pt"):
    return load_checkpoint(Path(config.output) / file)["model"]["state"]


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_network_learns_and_loads_by_its_name(name, make_config):
    # The nested U-Net halves four times, and its instance norm refuses the one pixel that 16 would leave.
    config = make_config(model=name, model_options=EXTERNAL[name], image_size=(32, 48), epochs=1)
    result = train(config)
    assert (result.model, result.epochs) == (name, 1)
    model = uctrans.load_model(config.output, network=name)
    assert model.config["options"] == EXTERNAL[name]
    assert model.metadata["image_size"] == [32, 48]
    assert model(torch.rand(1, 3, 32, 48)).shape == (1, 1, 32, 48)


def test_a_resumed_run_ends_with_the_same_weights(make_config, tmp_path, assert_same):
    whole = make_config(**SMALL, ema_decay=0.9, batch_size=3)
    train(whole)
    half = dataclasses.replace(whole, output=str(tmp_path / "half"), epochs=1, patience=9)
    train(half)
    train(dataclasses.replace(half, epochs=2, resume=True))
    assert_same(weights_of(half), weights_of(whole))
    before, now = (read_metrics(Path(each.output) / "metrics.csv") for each in (whole, half))
    assert [row["val_dice"] for row in before] == [row["val_dice"] for row in now]


def test_padding_is_asked_for_by_an_option(make_config):
    config = make_config(**SMALL, image_size=15)
    with pytest.raises(ConfigError, match=r"\(2, 3, 15, 15\).* or \"size_multiple\": 2 in its options"):
        train(config)
    train(dataclasses.replace(config, model_options=HALVING_OPTIONS | {"size_multiple": 2}))
    assert uctrans.load_model(config.output, network=HALVING).size_multiple == 2


def test_a_run_starts_from_the_same_class_alone(make_config, finished, tmp_path):
    first = make_config(**SMALL, output=str(tmp_path / "first"))
    train(first)
    second = make_config(**SMALL, output=str(tmp_path / "second"), init_from=first.output)
    train(dataclasses.replace(second, learning_rate=1e-12, min_learning_rate=0))
    before, after = (weights_of(config, "best.pt")["network.head.weight"] for config in (first, second))
    assert torch.allclose(before, after, atol=1e-6)
    for model, source in (("unet", first.output), (HALVING, str(finished)), (ATTENTION_UNET, first.output)):
        options = EXTERNAL.get(model, {})
        config = make_config(model=model, model_options=options, init_from=source, output=str(tmp_path / "third"))
        with pytest.raises(uctrans.ModelFileError, match=r"holds a tests\.networks:Halving, not a|cannot start a"):
            train(config)
        assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "os:system"}, r"model: os:system is no class of torch\.nn\.Module"),
        ({"model": "tests.networks:Halvin"}, "model: tests.networks:Halvin.* did you mean 'Halving'"),
        ({"model": "nowhere:Net"}, "model: nowhere:Net: there is no module nowhere"),
        ({"model": "torch:nn.Conv2d"}, "model: 'torch:nn.Conv2d' names no class; write package.module:Class"),
        ({"model": "tests.networks.Halving"}, "model: unknown model .*like monai.networks.nets:AttentionUnet"),
        ({"model_options": {}}, "model_options: .* lacks bands, labels; it requires bands, labels"),
        ({"model_options": HALVING_OPTIONS | {"depth": 3}}, "model_options: .* has no argument depth"),
        ({"model_options": HALVING_OPTIONS | {"width": 0.5}}, "model_options: .* cannot be built from"),
        ({"model_options": HALVING_OPTIONS | {"size_multiple": 0}}, "model_options: size_multiple must be"),
        ({"model_options": {"bands": 1, "labels": 1}}, "model_options: .* fails on images .* to have 1 channels"),
        ({"model_options": {"bands": 3, "labels": 2}}, "model_options: .* the run has 1 classes"),
        (
            {"model": "monai.networks.nets:BasicUNetPlusPlus", "image_size": 32}
            | {"model_options": NESTED_UNET_OPTIONS | {"deep_supervision": True}},
            "model_options: .* returns a list of 4; it must return logits",
        ),
        ({"model": "tests.networks:Pooled", "batch_size": 3}, "batch_size: with 3, the last batch of 7 images has one"),
    ],
    ids=[
        *("function", "misspelt class", "misspelt module", "path of attributes", "no colon"),
        *("missing", "unknown", "raises", "padding", "channels", "classes", "deep supervision", "batch of one"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_file_is_written(changes, message, make_config):
    config = make_config(**SMALL | changes)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(config.output).exists()


def test_a_configuration_file_alone_names_no_class(make_config, tmp_path):
    config = make_config(**SMALL)
    config.save_yaml(tmp_path / "config.yaml")
    for network in (None, ATTENTION_UNET):
        with pytest.raises(ConfigError, match=f'names the class {HALVING}.*network="{HALVING}"'):
            TrainConfig.load_yaml(tmp_path / "config.yaml", network)
    assert TrainConfig.load_yaml(tmp_path / "config.yaml", network=HALVING) == config
