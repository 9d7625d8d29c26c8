"""Small saved models, a model whose answer is known, and a data set that it segments perfectly, half and not at all."""

import importlib

import numpy as np
import pytest
import torch
from skimage.io import imsave

import uctrans
from uctrans.inference import EvaluateConfig, evaluate


class BrightnessModel(torch.nn.Module):
    """Foreground where the mean over the channels is above 1/2; several classes cut the brightness into equal parts."""

    def __init__(self, in_channels=3, classes=1, image_size=16, metadata=None):
        super().__init__()
        self.name, self.in_channels, self.classes = "brightness", in_channels, classes
        self.config = {"in_channels": in_channels, "classes": classes, "image_size": image_size}
        self.metadata = metadata or {}
        self.seen = []

    def forward(self, image):
        assert image.shape[1] == self.in_channels
        self.seen.append(tuple(image.shape))
        brightness = image.mean(1, keepdim=True)
        if self.classes == 1:
            return 50 * (brightness - 0.5)
        centres = (torch.arange(self.classes, device=image.device) + 0.5) / self.classes
        return -500 * (brightness - centres.view(1, -1, 1, 1)).square()


@pytest.fixture
def brightness_model():
    return BrightnessModel


@pytest.fixture
def use_model(monkeypatch):
    """A function that makes every model path load the model it is given."""

    def use(model):
        for module in ("predictor", "export"):
            home = importlib.import_module(f"uctrans.inference.{module}")  # the package's ``export`` is the function
            monkeypatch.setattr(home, "load_model", lambda path, network: model)
        return model

    return use


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = uctrans.create_model("unet", base_channels=4)
    model.metadata = {"protocol": "uctransnet-224", "image_size": [32, 32], "class_names": ["nucleus"]}
    return model.save_pretrained(tmp_path_factory.mktemp("unet") / "model")


@pytest.fixture(scope="session")
def uctransnet_folder(tmp_path_factory):
    torch.manual_seed(0)
    options = {"num_layers": 1, "num_heads": 2, "patch_sizes": (4, 2)}
    model = uctrans.create_model("uctransnet", base_channels=4, image_size=32, **options)
    for parameter in model.parameters():  # positions start at zero, and their interpolation would not be seen
        if parameter.ndim == 4 and parameter.shape[0] == 1:
            torch.nn.init.normal_(parameter)
    return model.save_pretrained(tmp_path_factory.mktemp("uctransnet") / "model")


def gray(labels, levels):
    return np.asarray(levels, dtype=np.uint8)[labels][..., None].repeat(3, -1)


@pytest.fixture
def dataset(tmp_path):
    """Three images of 16 x 16: "all" is segmented perfectly, "half" finds half of the object, "none" nothing of it."""
    images, masks = tmp_path / "data/test/images", tmp_path / "data/test/masks"
    images.mkdir(parents=True)
    masks.mkdir()
    truth = np.zeros((16, 16), dtype=np.uint8)
    truth[4:12, 4:12] = 1
    half = truth.copy()
    half[8:] = 0
    for name, bright in {"all": truth, "half": half, "none": 0 * truth}.items():
        imsave(images / f"{name}.png", gray(bright, [0, 255]), check_contrast=False)
        imsave(masks / f"{name}.png", truth * np.uint8(255), check_contrast=False)
    return tmp_path / "data"


@pytest.fixture
def score(use_model, dataset, tmp_path):
    """A function that evaluates a model on the data set, or on another, into the folder ``scores``."""

    def run(model, data=dataset, **settings):
        use_model(model)
        output = str(tmp_path / "scores")
        return evaluate(EvaluateConfig("model", str(data), output, device="cpu", progress=False, **settings))

    return run
