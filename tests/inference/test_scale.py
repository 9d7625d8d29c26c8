"""The factor by which images are enlarged before a network sees them: sizes, smoothing, objects, refusals."""

import numpy as np
import pytest
import torch
from skimage.io import imread, imsave

from uctrans.inference import Ensemble, InferenceError, PredictConfig, Predictor, predict
from uctrans.inference.predictor import resize_smoothly, to_labels

IMAGE = np.zeros((30, 20, 3), dtype=np.uint8)
IMAGE[6:18, 8:14] = 255


@pytest.mark.parametrize(("scale", "seen"), [(2, (60, 40)), (1.25, (38, 25)), (0.5, (15, 10)), (0.1, (3, 2))])
def test_the_network_sees_the_scaled_image_and_the_answer_has_the_size_of_the_image(scale, seen, brightness_model):
    model = brightness_model(metadata={"protocol": "native"})
    found = Predictor(model, device="cpu", tile=64, scale=scale).probabilities_of_image(IMAGE)
    assert model.seen == [(1, 3, *seen)]
    assert found.shape == (1, 30, 20)
    assert found.dtype == torch.float32
    if scale >= 0.5:
        assert torch.equal(to_labels(found[None])[0], torch.from_numpy(IMAGE[..., 0] // 255))


def test_tiles_transforms_and_ensembles_change_nothing_for_a_network_of_single_pixels(brightness_model):
    models = [brightness_model(metadata={"protocol": "native"}) for _ in range(2)]
    whole = Predictor(models[0], device="cpu", tile=64, scale=2).probabilities_of_image(IMAGE)
    for model, tta in ((models[0], "d4"), (Ensemble(models, ["a", "b"]), "none")):
        tiled = Predictor(model, device="cpu", tile=16, tta=tta, scale=2).probabilities_of_image(IMAGE)
        assert {shape[2:] for shape in models[1].seen} in (set(), {(16, 16)})
        torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    assert models[1].seen


def test_what_shrinks_is_smoothed():
    stripes = torch.tensor([0.0, 1.0]).repeat(8).view(1, 1, 1, 16).expand(1, 1, 16, 16)
    torch.testing.assert_close(resize_smoothly(stripes, (8, 8))[..., 1:-1], torch.full((1, 1, 8, 6), 0.5))
    assert resize_smoothly(stripes[..., :2], (16, 8))[0, 0, 0].tolist() == pytest.approx(
        [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    )


@pytest.mark.parametrize("scale", [0.5, 3])
def test_sizes_of_objects_are_in_pixels_of_the_image(scale, brightness_model, use_model, tmp_path):
    use_model(brightness_model(metadata={"protocol": "native"}))
    imsave(tmp_path / "square.png", IMAGE, check_contrast=False)
    settings = {"device": "cpu", "progress": False, "instances": True, "scale": scale, "overwrite": True}
    for smallest, objects in ((72, 1), (73, 0)):  # 12 x 6 pixels
        config = PredictConfig("m", str(tmp_path / "square.png"), str(tmp_path / "masks"), **settings)
        config.smallest_object = smallest
        predict(config)
        instances = imread(tmp_path / "masks/square_instances.png")
        assert instances.shape == (30, 20)
        assert instances.max() == objects


def test_scores_are_taken_at_the_size_of_the_masks(brightness_model, score):
    result = score(brightness_model(metadata={"protocol": "native"}), scale=2)
    assert [row["dice"] for row in result.rows] == pytest.approx([1, 2 / 3, 0])
    assert result.scored_at == "the size of their masks"


@pytest.mark.parametrize("scale", [0, -1, 0.09, 10.5, float("nan"), float("inf")])
def test_factors_out_of_range_are_refused(scale, brightness_model):
    with pytest.raises(InferenceError, match=f"scale: {scale} is out of range; give 0.1 to 10"):
        Predictor(brightness_model(), device="cpu", resolution="native", scale=scale)


def test_a_protocol_that_resizes_leaves_no_scale(brightness_model):
    with pytest.raises(InferenceError, match=r"the protocol uctransnet-224 shows .* at 16 x 16 pixels"):
        Predictor(brightness_model(), device="cpu", scale=2)
    model = brightness_model()
    Predictor(model, device="cpu", resolution="native", tile=64, scale=2).probabilities_of_image(IMAGE)
    assert model.seen == [(1, 3, 60, 40)]
