"""The batched augmentation against torch.rot90, flip and scipy's rotation, and its probabilities."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.kernels.drawn import drawn
from uctrans.data import get_protocol
from uctrans.data.augmentation import (
    draw_turns_and_rotations,
    rotation_maps,
    sample_nearest,
    turn_flip_maps,
    turn_flip_rotate,
)


def make_batch(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    images = torch.rand(batch, 3, height, width, generator=generator) + 0.1
    masks = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    return images, masks


@pytest.mark.parametrize("size", [1, 2, 7, 8, 33, 224])
def test_turns_and_flips_are_exact(size):
    images, masks = make_batch(8, size, size)
    quarter_turns = torch.arange(8) % 4
    axis = torch.arange(8) // 4
    moved_images, moved_masks = sample_nearest(images, masks, turn_flip_maps(quarter_turns.float(), axis.float()))
    for i in range(8):
        turns, flip = int(quarter_turns[i]), int(axis[i])
        assert torch.equal(moved_images[i], images[i].rot90(turns, (1, 2)).flip(1 + flip))
        assert torch.equal(moved_masks[i], masks[i].rot90(turns, (0, 1)).flip(flip))


@pytest.mark.parametrize("shape", [(5, 9), (9, 4), (1, 6)])
def test_half_turns_are_exact_where_the_map_is_not_square(shape):
    images, masks = make_batch(4, *shape)
    turns, axis = torch.tensor([0.0, 2, 0, 2]), torch.tensor([0.0, 0, 1, 1])
    moved_images, moved_masks = sample_nearest(images, masks, turn_flip_maps(turns, axis))
    for i in range(4):
        assert torch.equal(moved_images[i], images[i].rot90(int(turns[i]), (1, 2)).flip(1 + int(axis[i])))
        assert torch.equal(moved_masks[i], masks[i].rot90(int(turns[i]), (0, 1)).flip(int(axis[i])))


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


def test_rotation_by_zero_is_exact():
    images, masks = make_batch(2, 31, 17)
    moved_images, moved_masks = sample_nearest(images, masks, rotation_maps(torch.zeros(2)))
    assert torch.equal(moved_images, images)
    assert torch.equal(moved_masks, masks)


def test_probabilities_and_ranges():
    count = 40_000
    maps = draw_turns_and_rotations(count, True, torch.device("cpu"), torch.Generator().manual_seed(0))
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
    maps = draw_turns_and_rotations(2000, False, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert maps[:, 0, 0].abs().min() > 0.9


def test_samples_are_drawn_independently_and_repeat_with_the_seed():
    images, masks = make_batch(1, 24, 24)
    images, masks = images.expand(64, -1, -1, -1), masks.expand(64, -1, -1)
    moved, moved_masks = turn_flip_rotate(images, masks, torch.Generator().manual_seed(1))
    assert len(torch.unique(moved_masks.flatten(1), dim=0)) > 10
    again, _ = turn_flip_rotate(images, masks, torch.Generator().manual_seed(1))
    other, _ = turn_flip_rotate(images, masks, torch.Generator().manual_seed(2))
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
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(1, 256, (batch, height, width), generator=generator, dtype=torch.uint8)
    images = torch.stack([masks, 255 - masks], dim=1).to(dtype)
    moved_images, moved_masks = get_protocol().augment(images, masks, generator)
    assert (moved_images.shape, moved_images.dtype) == (images.shape, dtype)
    assert (moved_masks.shape, moved_masks.dtype) == (masks.shape, torch.uint8)
    assert torch.equal(moved_images[:, 0], moved_masks.to(dtype))
    filled = moved_masks == 0
    assert torch.equal(moved_images[:, 1], torch.where(filled, 0, 255 - moved_masks).to(dtype))
    assert all(set(moved_masks[i].unique().tolist()) <= {0, *masks[i].unique().tolist()} for i in range(batch))


def test_does_not_change_its_input():
    images, masks = make_batch(16, 12, 12)
    before = images.clone(), masks.clone()
    turn_flip_rotate(images, masks, torch.Generator().manual_seed(0))
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])


def test_never_looks_at_a_value_on_the_host():
    """Tensors without values raise where Python asks for one, as ``.item()`` or an ``if`` would."""
    with FakeTensorMode() as mode:
        images, masks = (mode.from_tensor(tensor) for tensor in make_batch(4, 16, 16))
        moved, _ = turn_flip_rotate(images, masks, torch.Generator())
        with pytest.raises(DataDependentOutputException):
            bool(moved.sum() > 0)
    assert moved.shape == images.shape


@pytest.mark.gpu
def test_can_be_captured_in_a_cuda_graph_and_draws_anew_at_each_replay():
    images, masks = (tensor.cuda() for tensor in make_batch(32, 48, 48))
    generator = torch.Generator("cuda").manual_seed(0)
    turn_flip_rotate(images, masks, generator)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        _, moved = turn_flip_rotate(images, masks, generator)
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
