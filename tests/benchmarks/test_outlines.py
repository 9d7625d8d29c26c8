"""The figure of outlines: a panel for each model, and no pixel of the image."""

import numpy as np
import pytest
from skimage.io import imread, imsave

import uctrans
from benchmarks import outlines


@pytest.fixture
def data(tmp_path):
    mask = np.zeros((48, 48), dtype=np.uint8)
    mask[8:20, 8:30] = 255
    image = np.zeros((48, 48, 3), dtype=np.uint8)
    image[..., 1] = 255  # a green that outlines do not have
    for kind, pixels in (("images", image), ("masks", mask)):
        (tmp_path / "test" / kind).mkdir(parents=True)
        imsave(tmp_path / "test" / kind / "a.png", pixels, check_contrast=False)
    return tmp_path


def test_panels_show_outlines_alone(data):
    model = uctrans.create_model("unet", base_channels=4)
    model.save_pretrained(data / "model")
    words = ["-i", str(data), "-o", str(data / "o.png"), "--name", "a", "--part", "0", "0", "32"]
    outlines.main([*words, "--models", str(data / "model"), str(data / "model"), "--titles", "one", "two"])
    red, green, blue = (imread(data / "o.png")[..., channel].astype(int) for channel in range(3))
    assert red.shape[1] > 1.5 * red.shape[0]
    assert (green - np.maximum(red, blue)).max() <= 0
    assert (red == blue)[(red > 128) & (red < 255)].any()  # the gray of the mask


def test_an_unknown_image_and_a_missing_title_are_named(data, capsys):
    words = ["-i", str(data), "-o", str(data / "o.png"), "--models", "a", "b"]
    with pytest.raises(SystemExit):
        outlines.main([*words, "--name", "c"])
    assert "there is no c in test; choose one of a" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        outlines.main([*words, "--name", "a", "--titles", "one"])
    assert "1 for 2 models" in capsys.readouterr().err
