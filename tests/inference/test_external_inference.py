"""Evaluation, prediction and export of networks of other packages, where their class is named."""

import pytest
import torch

import uctrans
from tests.networks import HALVING, HALVING_OPTIONS
from uctrans.inference import (
    EvaluateConfig,
    ExportConfig,
    InferenceError,
    PredictConfig,
    evaluate,
    export,
    load_predictor,
    predict,
)
from uctrans.models import ModelFileError, NetworkError
from uctrans.models.external import find_model_class

QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a network that takes even sides, or with ``size_multiple=2`` any."""

    def save(**arguments):
        torch.manual_seed(0)
        model = find_model_class(HALVING)(options=HALVING_OPTIONS, **arguments)
        model.metadata = {"protocol": "uctransnet-224", "image_size": [16, 16]}
        return str(model.save_pretrained(tmp_path_factory.mktemp("halving") / "model"))

    return save


def test_evaluate_predict_and_instances(saved, dataset, tmp_path):
    model, images = saved(), str(dataset / "test" / "images")
    with pytest.raises(ModelFileError, match=f"--network {HALVING}"):
        evaluate(EvaluateConfig(model, str(dataset), str(tmp_path / "scores"), **QUIET))
    assert not (tmp_path / "scores").exists()
    scores = evaluate(EvaluateConfig(model, str(dataset), str(tmp_path / "scores"), network=HALVING, **QUIET))
    assert 0 <= scores.mean["dice"] <= 1
    written = predict(PredictConfig(model, images, str(tmp_path / "masks"), network=HALVING, instances=True, **QUIET))
    assert len(written) == 12


def test_an_ensemble_of_named_networks(saved, unet_folder):
    settings = {"device": "cpu"}
    members = f"{saved()},{saved()}"
    ensemble = load_predictor(members, network=HALVING, **settings)
    single = load_predictor(saved(), network=HALVING, **settings)
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(ensemble.probabilities(images), single.probabilities(images), atol=1e-5)
    with pytest.raises(ModelFileError, match=f"holds a unet, not a {HALVING}"):
        load_predictor(f"{saved()},{unet_folder}", network=HALVING, **settings)
    with pytest.raises(InferenceError, match="cannot be averaged, they differ in image_size"):
        load_predictor(f"{saved()},{unet_folder}", network=("unet", HALVING), **settings)


def test_images_of_any_size_need_padding(saved):
    image = torch.randint(0, 256, (15, 13, 3), dtype=torch.uint8).numpy()
    settings = {"network": HALVING, "resolution": "native", "device": "cpu"}
    with pytest.raises(NetworkError, match=r"Halving fails on images \(1, 3, 15, 13\) .* size_multiple"):
        load_predictor(saved(), **settings).probabilities_of_image(image)
    padded = load_predictor(saved(size_multiple=2), **settings)
    assert padded.probabilities_of_image(image).shape == (1, 15, 13)


def test_export(saved, tmp_path):
    model, output = saved(size_multiple=2), tmp_path / "exported"
    files = export(ExportConfig(model, str(output), ("torch",), dynamic="size", network=HALVING))
    image = torch.rand(3, 3, 12, 20)
    loaded = uctrans.load_model(model, network=HALVING)
    assert torch.allclose(torch.export.load(files[0]).module()(image), loaded(image), atol=1e-5)
