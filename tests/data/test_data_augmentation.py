"""The batched augmentations against PyTorch, scipy and scikit-image, and their probabilities."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from skimage.color import hed2rgb, rgb2hed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.data.support import NO_CHANGES, generator
from tests.kernels.support import drawn
from uctrans.data import DataError, NativeAugmentation, get_protocol
from uctrans.data.augmentation import (
    blur_gaussian,
    change_colours,
    draw_turns_and_rotations,
    draw_warps,
    rgb_to_stains,
    rotation_maps,
    sample_nearest,
    stains_to_rgb,
    turn_flip_maps,
    turn_flip_rotate,
    warp,
)

CPU = torch.device("cpu")


def make_batch(*shape):
    drawn_by = generator()
    batch, height, width = shape
    images = torch.rand(batch, 3, height, width, generator=drawn_by) + 0.1
    masks = torch.randint(1, 256, shape, generator=drawn_by, dtype=torch.uint8)
    return images, masks


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 7), (8, 8), (33, 33), (5, 9), (9, 4), (1, 6)])
def test_turns_and_flips_are_exact(shape):
    """Images that are not square are turned by half turns only."""
    images, masks = make_batch(8, *shape)
    quarter_turns = torch.arange(8) % 4 if shape[0] == shape[1] else torch.arange(8) % 2 * 2
    axis = torch.arange(8) // 4
    moved_images, moved_masks = sample_nearest(images, masks, turn_flip_maps(quarter_turns.float(), axis.float()))
    for i in range(8):
        turns, flip = int(quarter_turns[i]), int(axis[i])
        assert torch.equal(moved_images[i], images[i].rot90(turns, (1, 2)).flip(1 + flip))
        assert torch.equal(moved_masks[i], masks[i].rot90(turns, (0, 1)).flip(flip))


@pytest.mark.parametrize("shape", [(64, 64), (65, 65), (40, 57)])
def test_rotation_agrees_with_scipy(shape):
    angles = torch.arange(-20, 20)
    images, masks = make_batch(len(angles), *shape)
    moved_images, moved_masks = sample_nearest(images, masks, rotation_maps(angles.float()))
    for i, angle in enumerate(angles.tolist()):
        expected = scipy.ndimage.rotate(masks[i].numpy(), angle, order=0, reshape=False)
        assert (moved_masks[i].numpy() != expected).mean() < 1e-3, angle
        expected = scipy.ndimage.rotate(images[i, 1].numpy(), angle, order=0, reshape=False)
        assert (moved_images[i, 1].numpy() != expected).mean() < 1e-3, angle
    still = int((angles == 0).nonzero())
    assert torch.equal(moved_images[still], images[still])
    assert torch.equal(moved_masks[still], masks[still])


def test_probabilities_and_ranges():
    count = 40_000
    maps = draw_turns_and_rotations(count, True, CPU, generator())
    determinant = torch.linalg.det(maps)
    identity = (maps == torch.eye(2)).all(dim=(1, 2))
    mirrored = determinant < 0  # a turn and one flip mirror; a rotation does not
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.01)
    kinds, counts = torch.unique(maps[mirrored], dim=0, return_counts=True)
    # Four turns and two axes give four different maps, each in two ways.
    assert len(kinds) == 4
    assert (counts / mirrored.sum() - 0.25).abs().max() < 0.02
    rotated = ~mirrored & ~identity
    angles = torch.rad2deg(torch.atan2(maps[rotated, 0, 1], maps[rotated, 0, 0]))
    assert (angles - angles.round()).abs().max() < 1e-3
    values, counts = torch.unique(angles.round().int(), return_counts=True)
    assert values.tolist() == [angle for angle in range(-20, 20) if angle]
    assert (counts / count * 160 - 1).abs().max() < 0.35
    assert identity.float().mean().item() == pytest.approx(0.25 + 0.25 / 40, abs=0.01)


def test_maps_that_are_not_square_are_never_turned_by_a_quarter():
    maps = draw_turns_and_rotations(2000, False, CPU, generator())
    assert maps[:, 0, 0].abs().min() > 0.9


def test_samples_are_drawn_independently_and_repeat_with_the_seed():
    image, mask = make_batch(1, 24, 24)
    images, masks = image.repeat(64, 1, 1, 1), mask.repeat(64, 1, 1)
    moved, moved_masks = turn_flip_rotate(images, masks, generator(1))
    assert len(torch.unique(moved_masks.flatten(1), dim=0)) > 10
    assert torch.equal(images, image.expand_as(images))  # the input stays as it is
    assert torch.equal(masks, mask.expand_as(masks))
    again, _ = turn_flip_rotate(images, masks, generator(1))
    other, _ = turn_flip_rotate(images, masks, generator(2))
    assert torch.equal(moved, again)
    assert not torch.equal(moved, other)


@drawn(
    60,
    lambda st: {
        "batch": st.integers(1, 6),
        "height": st.integers(1, 40),
        "width": st.integers(1, 40),
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.uint8]),
    },
)
def test_image_and_mask_stay_aligned(batch, height, width, seed, dtype):
    drawn_by = generator(seed)
    masks = torch.randint(1, 256, (batch, height, width), generator=drawn_by, dtype=torch.uint8)
    images = torch.stack([masks, 255 - masks], dim=1).to(dtype)
    moved_images, moved_masks = get_protocol().augment(images, masks, drawn_by)
    assert (moved_images.shape, moved_images.dtype) == (images.shape, dtype)
    assert (moved_masks.shape, moved_masks.dtype) == (masks.shape, torch.uint8)
    assert torch.equal(moved_images[:, 0], moved_masks.to(dtype))
    filled = moved_masks == 0
    assert torch.equal(moved_images[:, 1], torch.where(filled, 0, 255 - moved_masks).to(dtype))
    assert all(set(moved_masks[i].unique().tolist()) <= {0, *masks[i].unique().tolist()} for i in range(batch))


def test_never_looks_at_a_value_on_the_host():
    """Tensors without values raise where Python asks for one, as ``.item()`` or an ``if`` would."""
    with FakeTensorMode() as mode:
        images, masks = (mode.from_tensor(tensor) for tensor in make_batch(4, 16, 16))
        moved, _ = turn_flip_rotate(images, masks, torch.Generator())
        with pytest.raises(DataDependentOutputException):
            bool(moved.sum() > 0)
    assert moved.shape == images.shape


def test_warps_turn_and_magnify_as_documented():
    strengths = NativeAugmentation(**NO_CHANGES | {"warp_probability": 1, "rotation": 30, "scale": 0.5})
    maps = draw_warps(4000, strengths, CPU, generator())
    factors = torch.linalg.det(maps).abs().sqrt()
    assert 1 / 1.5 <= factors.min() < 0.68
    assert 1.48 < factors.max() <= 1.5
    upright = maps[torch.linalg.det(maps) > 0]
    degrees = torch.rad2deg(torch.atan2(upright[:, 0, 1], upright[:, 0, 0]))
    from_quarter = (degrees + 45) % 90 - 45
    assert from_quarter.abs().max() <= 30.001
    assert 0.45 < (len(upright) / len(maps)) < 0.55


def test_as_many_crops_are_warped_as_asked():
    shares = []
    for probability in (0, 0.3, 1):
        strengths = NativeAugmentation(**NO_CHANGES | {"warp_probability": probability, "rotation": 30, "scale": 0.5})
        maps = draw_warps(4000, strengths, CPU, generator())
        shares.append((torch.linalg.det(maps).abs() - 1).abs().gt(1e-4).float().mean().item())
    assert shares == pytest.approx([0, 0.3, 1], abs=0.03)


@pytest.mark.parametrize("size", [(24, 24), (18, 30), (30, 18)])
@pytest.mark.parametrize(("rotation", "scale"), [(0, 0.0), (0, 0.5), (1, 0.0), (10, 0.25), (45, 0.25), (120, 0.0)])
def test_the_margin_is_what_the_strongest_warp_reaches(size, rotation, scale):
    """Corners of the crop, at the largest magnification and every angle in range, quarter turns included."""
    degrees = np.radians(np.concatenate([quarter * 90 + np.linspace(-rotation, rotation, 481) for quarter in range(4)]))
    half_height, half_width = np.array(size) / 2 * (1 + scale)
    rows = np.abs(np.cos(degrees) * half_height) + np.abs(np.sin(degrees) * half_width)
    columns = np.abs(np.sin(degrees) * half_height) + np.abs(np.cos(degrees) * half_width)
    reached = rows.max() - size[0] / 2, columns.max() - size[1] / 2
    strengths = NativeAugmentation(**NO_CHANGES | {"warp_probability": 1, "rotation": rotation, "scale": scale})
    assert strengths.margin(size) == tuple(math.ceil(length - 1e-3) for length in reached)


def test_a_small_rotation_needs_a_small_margin():
    strengths = NativeAugmentation(warp_probability=1, rotation=1, scale=0)
    assert strengths.margin((256, 256)) == (3, 3)
    assert NativeAugmentation(warp_probability=0, rotation=45).margin((256, 256)) == (0, 0)


def test_a_warp_samples_what_its_map_says():
    image = torch.arange(49.0).view(1, 1, 7, 7)
    turn = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
    images, masks = warp(image, image[:, 0].to(torch.uint8), turn, (7, 7))
    torch.testing.assert_close(images, torch.rot90(image, 1, (2, 3)))
    assert torch.equal(masks[0], torch.rot90(image[0, 0], 1).to(torch.uint8))
    halved, _ = warp(image, image[:, 0].to(torch.uint8), torch.eye(2)[None] * 2, (3, 3))
    torch.testing.assert_close(halved[0, 0], image[0, 0, 1::2, 1::2])


def test_stains_are_those_of_scikit_image():
    colours = torch.rand(2, 3, 16, 16, generator=generator())
    colours[0, :, 0, 0], colours[0, :, 0, 1] = 0, 1
    stains = rgb_to_stains(colours)
    expected = rgb2hed(colours.permute(0, 2, 3, 1).double().numpy())
    np.testing.assert_allclose(stains.clamp(min=0).permute(0, 2, 3, 1), expected, atol=2e-6)
    torch.testing.assert_close(stains_to_rgb(stains), colours.clamp(min=1e-6), atol=1e-5, rtol=1e-5)
    amounts = torch.rand(2, 3, 8, 8, generator=generator()) * 0.2
    expected = hed2rgb(amounts.permute(0, 2, 3, 1).double().numpy())
    np.testing.assert_allclose(stains_to_rgb(amounts).permute(0, 2, 3, 1), expected, atol=1e-6)


def test_colours_without_strengths_stay():
    images = torch.rand(3, 3, 12, 10, generator=generator())
    changed = change_colours(images, NativeAugmentation(**NO_CHANGES), generator())
    torch.testing.assert_close(changed, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "strengths",
    [
        {"brightness": 0.3},
        {"contrast": 0.5},
        {"gamma": 0.5},
        {"stain_scale": 0.3},
        {"stain_shift": 0.02},
        {"blur": 2.0, "blur_probability": 1},
        {"noise": 0.1},
    ],
)
def test_each_strength_changes_every_sample_in_its_own_way(strengths):
    images = (0.3 + 0.4 * torch.rand(1, 3, 12, 10, generator=generator())).expand(3, -1, -1, -1)
    changed = change_colours(images, NativeAugmentation(**NO_CHANGES | strengths), generator())
    change = (changed - images).abs().flatten(1).amax(1)
    assert change.min() > 1e-3
    assert len(change.unique()) == 3
    if "brightness" in strengths:
        assert change.max() <= 0.3001
        assert (changed - images).flatten(1).std(1).max() < 1e-5


def test_stain_jitter_moves_the_stains():
    images = 0.4 + 0.4 * torch.rand(8, 3, 6, 6, generator=generator())
    strengths = NativeAugmentation(**NO_CHANGES | {"stain_shift": 0.01})
    moved = rgb_to_stains(change_colours(images, strengths, generator())) - rgb_to_stains(images)
    per_stain = moved.mean((2, 3))
    assert per_stain.abs().max() <= 0.0101
    torch.testing.assert_close(moved, per_stain[:, :, None, None].expand_as(moved), atol=1e-5, rtol=0)


def test_stain_scale_enlarges_each_stain_by_up_to_its_share():
    images = 0.4 + 0.4 * torch.rand(1, 3, 4, 4, generator=generator())
    images = images.expand(400, -1, -1, -1)
    strengths = NativeAugmentation(**NO_CHANGES | {"stain_scale": 0.2})
    ratios = rgb_to_stains(change_colours(images, strengths, generator())) / rgb_to_stains(images)
    per_stain = ratios.flatten(2).median(2).values  # (400, 3)
    assert 0.799 < per_stain.min() < 0.81
    assert 1.19 < per_stain.max() < 1.201
    assert (per_stain[:, 0] - per_stain[:, 1]).abs().max() > 0.3  # each stain has its own draw
    torch.testing.assert_close(ratios, per_stain[:, :, None, None].expand_as(ratios), atol=1e-3, rtol=0)


def test_as_many_crops_are_blurred_as_asked():
    images = torch.rand(1, 3, 6, 6, generator=generator()).expand(1000, -1, -1, -1)
    shares = []
    for probability in (0, 0.2, 1):
        strengths = NativeAugmentation(**NO_CHANGES | {"blur_probability": probability, "blur": 2.0})
        change = (change_colours(images, strengths, generator()) - images).abs().flatten(1).amax(1)
        shares.append((change > 1e-3).float().mean().item())
    assert shares[:2] == pytest.approx([0, 0.2], abs=0.04)
    assert shares[2] > 0.8  # the narrowest Gaussians change nothing


def test_blur_is_a_gaussian_of_each_samples_own_width():
    images = torch.zeros(3, 1, 21, 21)
    images[:, :, 10, 10] = 1
    deviations = torch.tensor([0.0, 1.0, 2.0])
    blurred = blur_gaussian(images, deviations, 2.0)
    assert torch.equal(blurred[0], images[0])
    torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(3))
    distance = (torch.arange(21) - 10.0) ** 2
    widths = ((blurred[:, 0].sum(2) * distance).sum(1)).sqrt()
    torch.testing.assert_close(widths, deviations, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"rotation": 200}, "rotation=200 is out of range; give a number from 0 to 180"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"blur": math.nan}, "blur=nan"),
        ({"stain_scale": "much"}, "stain_scale='much'"),
        ({"scale": True}, "scale=True"),
        ({"stains": 0.1}, "there is no 'stains'; choose from warp_probability, .*stain_scale"),
    ],
)
def test_strengths_that_cannot_be(strengths, message):
    with pytest.raises(DataError, match=f"augmentation: {message}"):
        NativeAugmentation.of(strengths)


@pytest.mark.gpu
def test_a_cuda_graph_draws_new_numbers_at_each_replay():
    images, masks = (tensor.cuda() for tensor in make_batch(32, 48, 48))
    on_gpu = torch.Generator("cuda").manual_seed(0)
    turn_flip_rotate(images, masks, on_gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(on_gpu)
    with torch.cuda.graph(graph):
        _, moved = turn_flip_rotate(images, masks, on_gpu)
    results = []
    for _ in range(3):
        graph.replay()
        results.append(moved.clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.gpu
def test_gives_the_same_on_the_gpu_for_the_same_maps():
    images, masks = make_batch(40, 64, 57)
    maps = rotation_maps(torch.arange(-20.0, 20.0))
    expected, _ = sample_nearest(images, masks, maps)
    result, _ = sample_nearest(images.cuda(), masks.cuda(), maps.cuda())
    assert np.mean(result.cpu().numpy() != expected.numpy()) < 1e-4
