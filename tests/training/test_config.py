"""Settings: their defaults, their files, and the values that are refused."""

import pytest
import yaml

from uctrans.training import ConfigError, TrainConfig
from uctrans.training.config import changed_fields


def test_defaults_are_the_published_protocol():
    config = TrainConfig(data="d", output="o")
    assert (config.protocol, config.batch_size, config.epochs, config.patience) == ("uctransnet-224", 4, 2000, 50)
    assert (config.learning_rate, config.min_learning_rate, config.restart_period) == (1e-3, 1e-4, 10)
    assert (config.optimizer, config.first_best_epoch, config.dice_weight) == ("adam", 6, 0.5)


def test_yaml_there_and_back_is_the_same(tmp_path):
    config = TrainConfig(
        data="d",
        output="o",
        image_size=(32, 48),
        classes=2,
        class_names=("background", "cell"),
        model_options={"num_layers": 2},
        palette=((0, 0, 0), (255, 0, 0)),
        threads=2,
    )
    config.save_yaml(tmp_path / "config.yaml")
    assert TrainConfig.load_yaml(tmp_path / "config.yaml") == config
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_dict_holds_plain_values_only():
    values = TrainConfig(data="d", output="o", image_size=(32, 48)).to_dict()
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: d\noutput: o\nlearning_rate: 2e-3\nmin_learning_rate: 0\n")
    assert TrainConfig.load_yaml(path).learning_rate == 0.002


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, "{"], ids=["deep", "digits", "torn"])
def test_model_options_that_are_not_json(text):
    with pytest.raises(ConfigError, match=r"model_options: '.* is not JSON"):
        TrainConfig(data="d", output="o", model_options=text)


def test_model_options_may_be_json():
    assert TrainConfig(data="d", output="o", model_options='{"num_layers": 2}').model_options == {"num_layers": 2}


UNUSABLE = {
    "data": [3],
    "output": [""],
    "epochs": [0, "ten", 2.5, True],
    "learning_rate": [0, "fast", float("nan"), 1e-5],
    "image_size": [0, (32, 0), (1, 2, 3)],
    "model_options": ["{num_layers", "[1]", 3],
    "ema_decay": [1.0, -0.1],
    "class_names": [("a", "b")],
    "optimizer": ["sgd"],
    "amp": ["fp16"],
    "channel_order": ["gbr"],
    "resume": ["yes"],
    **{name: [0] for name in ("batch_size", "restart_period", "patience", "first_best_epoch", "val_every", "classes")},
    **{name: [0] for name in ("base_channels", "threads", "fold")},
    **{name: [-1] for name in ("min_learning_rate", "save_minutes", "weight_decay", "seed")},
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in UNUSABLE for value in UNUSABLE[field]])
def test_unusable_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}: .*(give|choose|name|raise|write|lower)"):
        TrainConfig(**{"data": "d", "output": "o", field: value})


def test_checkpointing_is_refused_with_compile():
    with pytest.raises(ConfigError, match=r"^checkpointing: .* switch one of them off"):
        TrainConfig(data="d", output="o", checkpointing=True, compile=True)


def test_a_patience_that_ends_before_the_next_validation_is_refused():
    with pytest.raises(ConfigError, match=r"^patience: 5 epochs .* give at least 10"):
        TrainConfig(data="d", output="o", patience=5, val_every=10)
    TrainConfig(data="d", output="o", patience=10, val_every=10)
    TrainConfig(data="d", output="o", patience=5, val_every=10, epochs=10)  # one validation, at the end


def test_loss_weights_that_are_both_zero_are_refused():
    with pytest.raises(ConfigError, match="dice_weight"):
        TrainConfig(data="d", output="o", dice_weight=0, cross_entropy_weight=0)


def test_unknown_field_suggests_the_nearest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: d\noutput: o\nlearnig_rate: 1\n")
    with pytest.raises(ConfigError, match=r"learnig_rate.*config\.yaml.*did you mean learning_rate"):
        TrainConfig.load_yaml(path)


@pytest.mark.parametrize("text", ["data: [", "just words", "- a\n- b", "", "data: d"])
def test_files_that_hold_no_configuration_are_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        TrainConfig.load_yaml(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        TrainConfig.load_yaml(tmp_path / "nothing.yaml")


def test_changed_fields_leave_out_what_may_change():
    before = TrainConfig(data="d", output="o", seed=1).to_dict()
    now = TrainConfig(
        data="d", output="p", seed=2, epochs=5, patience=7, device="cpu", threads=1, resume=True
    ).to_dict()
    assert changed_fields(before, now) == ["seed: 1 -> 2"]


def test_fields_that_came_after_a_run_was_begun_had_their_defaults():
    now = TrainConfig(data="d", output="o", augmentation={"blur": 1}).to_dict()
    before = {name: value for name, value in now.items() if name not in ("target", "augmentation")}
    assert changed_fields(before, now) == ["augmentation: {} -> {'blur': 1}"]
