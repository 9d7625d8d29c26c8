"""An ensemble gives the mean of its members' probabilities, wherever a model is named, and refuses what differs."""

import json

import pytest
import torch

import uctrans
from uctrans.inference import (
    Ensemble,
    EvaluateConfig,
    InferenceError,
    PredictConfig,
    Predictor,
    evaluate,
    load_predictor,
    predict,
)

SIZE = 32


def saved(folder, seed, classes=1, base_channels=4, model="unet", **metadata):
    """The path of a network with weights of its own."""
    torch.manual_seed(seed)
    options = {"image_size": SIZE, "num_layers": 1, "num_heads": 2} if model == "uctransnet" else {}
    network = uctrans.create_model(model, base_channels=base_channels, classes=classes, **options)
    network.metadata = {"protocol": "uctransnet-224", "image_size": [SIZE, SIZE], **metadata}
    return str(network.save_pretrained(folder / f"{model}-{seed}"))


@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_are_the_mean_of_the_members(classes, tmp_path):
    paths = [saved(tmp_path, 0, classes), saved(tmp_path, 1, classes), saved(tmp_path, 2, classes, model="uctransnet")]
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    members = [Predictor(uctrans.load_model(path), device="cpu", tta="flips").probabilities(images) for path in paths]
    together = load_predictor(",".join(paths), device="cpu", tta="flips").probabilities(images)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.stack(members).mean(0), rtol=1e-5, atol=1e-6)
    assert (together - members[0]).abs().max() > 1e-3, "nothing to tell apart"


def test_certain_members_give_finite_logits(brightness_model):
    ensemble = Ensemble([brightness_model(), brightness_model()], ["a", "b"])
    logits = ensemble(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(1, 3, 1, 1) * 100 - 50)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.sigmoid().flatten(), torch.tensor([1e-7, 1 - 1e-7]))


def test_evaluate_and_predict_take_several_models(tmp_path, dataset):
    paths = [saved(tmp_path, 0, palette=["#000000", "#ffffff"]), saved(tmp_path, 1, palette=["#000000", "#ffffff"])]
    model = f"{paths[0]}, {paths[1]}"
    result = evaluate(
        EvaluateConfig(model=model, data=str(dataset), output=str(tmp_path / "scores"), device="cpu", progress=False)
    )
    assert len(result.rows) == 3
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["model"]["name"] == "ensemble"
    assert summary["model"]["metadata"]["members"] == paths
    assert [member["name"] for member in summary["model"]["config"]["members"]] == ["unet", "unet"]
    output = str(tmp_path / "masks")
    written = predict(PredictConfig(model, str(dataset / "test" / "images"), output, device="cpu", progress=False))
    assert len(written) == 6


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": 3}, r"classes: 1 and 3"),
        ({"channel_order": "bgr"}, r"channel_order: 'rgb' and 'bgr'"),
        ({"protocol": "native"}, r"protocol: 'uctransnet-224' and 'native'"),
        ({"image_size": [64, 32]}, r"image_size: \[32, 32\] and \[64, 32\]"),
        ({"class_names": ["nucleus"]}, r"class_names: None and \['nucleus'\]"),
    ],
)
def test_members_that_differ_are_refused(changes, named, tmp_path):
    paths = [saved(tmp_path, 0), saved(tmp_path, 1, **changes)]
    with pytest.raises(InferenceError, match=rf"unet-0 and .*unet-1 cannot be averaged, they differ in {named}\. Name"):
        load_predictor(",".join(paths), device="cpu")


def test_an_empty_name_and_a_single_model_are_refused(tmp_path):
    path = saved(tmp_path, 0)
    with pytest.raises(InferenceError, match="A name is empty"):
        load_predictor(f"{path},", device="cpu")
    with pytest.raises(InferenceError, match="needs two models or more, got 1"):
        Ensemble([uctrans.load_model(path)], [path])


def test_a_comma_in_the_name_of_a_folder_is_no_list(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert load_predictor(saved(tmp_path / "a,b", 0), device="cpu").model.name == "unet"
