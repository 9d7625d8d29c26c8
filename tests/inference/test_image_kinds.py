"""Images of other channels, ranges and orientations, from the files to masks and scores."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from uctrans import cli, load_model
from uctrans.data import get_protocol, load_native, load_tensors, protocol_of
from uctrans.data.find import Sample
from uctrans.inference import EvaluateConfig, PredictConfig, evaluate, predict
from uctrans.training import TrainConfig
from uctrans.training.build import build_protocol, load_data
from uctrans.training.distributed import Processes
from uctrans.training.own import NOTHING

TRUTH = np.zeros((16, 16), np.uint8)
TRUTH[4:12, 2:9] = 1  # lies otherwise if it is turned or mirrored
TINY = [
    "--model",
    "unet",
    "--base-channels",
    "2",
    "--image-size",
    "16",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--no-progress",
    "--epochs",
    "1",
]


def put_image(path, values):
    """Write (H, W) or (H, W, C) channels that are not declared as colours or alpha."""
    path.parent.mkdir(parents=True, exist_ok=True)
    several = {} if values.ndim == 2 or values.shape[2] == 1 else {"planarconfig": "contig"}
    tifffile.imwrite(path, values.squeeze(), photometric="minisblack", **several)


def put_mask(path, mask=TRUTH):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask * np.uint8(255)).save(path)


def segment(root, use_model, model, **settings):
    """Return the mask and the Dice of ``a.*`` in the test images of ``root``."""
    use_model(model)
    common = {"device": "cpu", "progress": False, **settings}
    predict(PredictConfig("model", str(root / "test/images"), str(root / "masks"), **common))
    scores = evaluate(EvaluateConfig("model", str(root), str(root / "scores"), **common))
    return np.array(Image.open(root / "masks/a.png")) // 255, scores.mean["dice"]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_networks_of_other_channels(tmp_path, use_model, brightness_model, channels):
    put_image(tmp_path / "test/images/a.tif", np.repeat(TRUTH[..., None] * np.uint8(255), channels, axis=2))
    put_mask(tmp_path / "test/masks/a.png")
    mask, dice = segment(tmp_path, use_model, brightness_model(channels))
    np.testing.assert_array_equal(mask, TRUTH)
    assert dice == 1
    settings = {"size": "native", "device": "cpu", "progress": False}
    assert evaluate(EvaluateConfig("model", str(tmp_path), str(tmp_path / "native"), **settings)).mean["dice"] == 1


@pytest.mark.parametrize("own", [True, False], ids=["of the model", "given"])
def test_range_of_the_values(tmp_path, use_model, brightness_model, own):
    put_image(tmp_path / "test/images/a.tif", TRUTH.astype(np.uint16) * 2500 + 500)
    put_mask(tmp_path / "test/masks/a.png")
    model = brightness_model(metadata={"intensity_range": [0, 4095]} if own else {})
    mask, dice = segment(tmp_path, use_model, model, **({} if own else {"intensity_range": (0, 4095)}))
    np.testing.assert_array_equal(mask, TRUTH)
    assert dice == 1
    assert json.loads((tmp_path / "scores/summary.json").read_text())["protocol"]["intensity_range"] == [0, 4095]


def test_values_that_are_nearly_black_are_said_once_a_command(tmp_path, use_model, brightness_model):
    for name in "abc":
        put_image(tmp_path / f"test/images/{name}.tif", TRUTH.astype(np.uint16) * 4000)
        put_mask(tmp_path / f"test/masks/{name}.png")
    with pytest.warns(UserWarning, match=r"^3 images hold 16-bit values up to 4000 .* 0,4095,") as caught:
        mask, dice = segment(tmp_path, use_model, brightness_model(), batch_size=1)
    assert len(caught) == 2
    assert (mask.sum(), dice) == (0, 0)


def test_a_bright_image_hides_no_dark_ones(tmp_path, use_model, brightness_model):
    for name, white in (("a", 65535), ("dark", 4095)):
        put_image(tmp_path / f"test/images/{name}.tif", TRUTH.astype(np.uint16) * white)
        put_mask(tmp_path / f"test/masks/{name}.png")
    with pytest.warns(UserWarning, match=r"^1 images hold 16-bit values up to 4095 .*dark.tif"):
        segment(tmp_path, use_model, brightness_model(), batch_size=1)


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_photographs_are_segmented_as_shown(tmp_path, use_model, brightness_model, suffix, orientation):
    (tmp_path / "test/images").mkdir(parents=True)
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    tags = Image.Exif()
    tags[274] = orientation
    stored = Image.fromarray(TRUTH * np.uint8(255)).convert("RGB").resize((64, 64), 0).transpose(back)
    stored.save(tmp_path / f"test/images/a{suffix}", exif=tags)
    put_mask(tmp_path / "test/masks/a.png", TRUTH.repeat(4, 0).repeat(4, 1))
    mask, dice = segment(tmp_path, use_model, brightness_model(image_size=64))
    np.testing.assert_array_equal(mask[2::4, 2::4], TRUTH)
    assert dice > 0.95


@pytest.mark.parametrize("protocol", ["uctransnet-224", "native"])
def test_a_network_of_five_channels_from_the_command_line(tmp_path, protocol, capsys):
    generator = np.random.default_rng(0)
    for number in range(6):
        values = generator.integers(0, 4096, (16, 16, 5)).astype(np.uint16)
        put_image(tmp_path / f"data/images/{number}.tif", values)
        put_mask(tmp_path / f"data/masks/{number}.png")
    data, run = tmp_path / "data", tmp_path / "run"
    settings = ["--in-channels", "5", "--intensity-range", "0,4095", "--protocol", protocol]
    assert cli.main(["train", "-i", str(data), "-o", str(run), *TINY, *settings]) == 0
    model = load_model(run)
    assert (model.in_channels, model.metadata["intensity_range"]) == (5, [0, 4095])
    assert yaml.safe_load((run / "config.yaml").read_text())["in_channels"] == 5
    common = ["--model", str(run), "--device", "cpu", "--no-progress"]
    assert cli.main(["evaluate", "-i", str(data), "-o", str(tmp_path / "scores"), *common]) == 0
    assert cli.main(["predict", "-i", str(data / "images"), "-o", str(tmp_path / "masks"), *common]) == 0
    assert Image.open(tmp_path / "masks/0_overlay.png").mode == "RGB"
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["uctransnet-224", "native"])
def test_training_says_once_what_is_doubtful(tmp_path, protocol):
    for split in ("train", "val"):
        put_image(tmp_path / split / f"images/{split}.tif", TRUTH.astype(np.uint16) * 1000)
        put_mask(tmp_path / split / f"masks/{split}.png")
    config = TrainConfig(str(tmp_path), "run", protocol=protocol, image_size=16)
    cpu = Processes(rank=0, count=1, device=torch.device("cpu"))
    with pytest.warns(
        UserWarning, match="^2 images hold 16-bit values up to 1000 .* --intensity-range 0,1023"
    ) as caught:
        load_data(config, build_protocol(config), cpu, NOTHING)
    assert len(caught) == 1


def test_tensors_hold_every_channel_stretched(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 2)).astype(np.uint16)
    put_image(tmp_path / "a.tif", values)
    put_mask(tmp_path / "m.png")
    samples = [Sample("a", tmp_path / "a.tif", tmp_path / "m.png")]
    expected = torch.from_numpy(values.astype(np.uint8)).permute(2, 0, 1)
    settings = {"channels": 2, "intensity_range": (0, 255)}
    small = load_tensors(samples, get_protocol(image_size=16, **settings), 1)
    assert torch.equal(small.images[0], expected)
    native = load_native(samples, 1, protocol=get_protocol("native", **settings))
    assert torch.equal(native.batch(torch.tensor([0]))[0][0], expected)


@pytest.mark.parametrize("name", ["uctransnet-224", "augmented-224", "native"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_every_channel_is_augmented_alike(tmp_path, name, channels):
    """Stains are those of RGB; equal channels stay equal under the other changes, but for the noise."""
    put_image(tmp_path / "a.tif", np.repeat(TRUTH[..., None] * np.uint8(90), channels, axis=2))
    put_mask(tmp_path / "m.png")
    samples = [Sample("a", tmp_path / "a.tif", tmp_path / "m.png")]
    protocol = get_protocol(name, image_size=16, channels=channels)
    data = load_native(samples, 1, protocol=protocol) if name == "native" else load_tensors(samples, protocol, 1)
    index = torch.zeros(8, dtype=torch.int64)
    images, _ = protocol.training_batch(data, index, torch.Generator().manual_seed(0))
    assert images.shape == (8, channels, 16, 16)
    assert (images - images[:, :1]).abs().mean() < 0.03
    assert images.max() <= 1


def test_order_of_colours_needs_three():
    with pytest.raises(ValueError, match="channel_order: bgr is an order of three colours, but there are 5 channels"):
        get_protocol(channels=5, channel_order="bgr")


def test_protocol_of_a_model_has_its_channels_and_range():
    model = SimpleNamespace(metadata={"intensity_range": [0, 1023]}, config={}, in_channels=4)
    protocol = protocol_of(model)
    assert (protocol.channels, protocol.intensity_range) == (4, (0, 1023))
    assert protocol_of(model, intensity_range=(0, 5)).intensity_range == (0, 5)
