"""Full-resolution crops: where they are cut, what changes them, and the labels that go with them."""

import math

import imageio.v3
import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed

from uctrans.data import (
    DataError,
    NativeAugmentation,
    NativeImages,
    NativeProtocol,
    SegmentationTensors,
    boundary_target,
    find_samples,
    get_protocol,
    load_native,
)
from uctrans.data.augmentation import blur_gaussian, change_colours, draw_warps, rgb_to_stains, stains_to_rgb, warp
from uctrans.data.tensors import reflect

NONE = dict.fromkeys(NativeAugmentation.__dataclass_fields__, 0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def native_images(*labels):
    """Images whose three channels equal their labels, uint8 (H, W)."""
    counts = torch.tensor([label.size for label in labels])
    flat = torch.cat([torch.from_numpy(label).flatten() for label in labels])
    return NativeImages(
        names=[str(number) for number in range(len(labels))],
        pixels=flat.expand(3, -1).contiguous(),
        labels=flat,
        starts=counts.cumsum(0) - counts,
        sizes=torch.tensor([label.shape for label in labels]).T.contiguous(),
    )


def numbered(height, width):
    """A map without symmetry that changes by 2 from row to row and by 1 from column to column."""
    return (np.arange(height)[:, None] * 2 + np.arange(width)).astype(np.uint8)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_reflection_is_that_of_numpy(length):
    expected = np.pad(np.arange(length), 20, mode="reflect")
    assert reflect(torch.arange(-20, length + 20), torch.tensor(length)).tolist() == expected.tolist()


def test_crops_are_cut_out_of_their_images_and_reflected_beyond():
    first, second = noise(9, 14), noise(5, 4)
    data = native_images(first, second)
    corners = torch.tensor([2, -3]), torch.tensor([5, -1])
    images, labels = data.crops(torch.tensor([0, 1]), *corners, (6, 8))
    padded = np.pad(second, ((3, 6), (1, 6)), mode="reflect")
    expected = np.stack([first[2:8, 5:13], padded[:6, :8]])
    np.testing.assert_array_equal(labels, expected)
    assert torch.equal(images, labels[:, None].expand(-1, 3, -1, -1))
    assert images.dtype == labels.dtype == torch.uint8


def test_whole_images_are_batches():
    first, second = noise(9, 14), noise(5, 4)
    images, labels = native_images(first, second).batch(torch.tensor([1]))
    np.testing.assert_array_equal(labels[0], second)
    np.testing.assert_array_equal(images[0, 1], second)


def test_images_of_different_sizes_are_no_batch():
    data = native_images(noise(9, 14), noise(5, 4), noise(9, 14))
    _, labels = data.batch(torch.tensor([2, 0]))
    assert labels.shape == (2, 9, 14)
    with pytest.raises(DataError, match=r"0 \(9 x 14\), 1 \(5 x 4\) pixels .*take one image at a time"):
        data.batch(torch.tensor([0, 1]))


def test_random_crops_reach_every_place_and_no_other():
    """The image of 7 x 12 is larger than the crop of 4 x 9 by 3 each way; that of 2 x 10 is 2 rows smaller."""
    data = native_images(noise(7, 12), noise(2, 10))
    index = torch.arange(4000) % 2
    top, left = data.random_corners(index, (4, 9), generator())
    for image, rows, columns in ((0, range(4), range(4)), (1, range(-2, 1), range(2))):
        corners = set(zip(top[index == image].tolist(), left[index == image].tolist(), strict=True))
        assert corners == {(row, column) for row in rows for column in columns}
    counts = torch.bincount(top[index == 0] * 4 + left[index == 0])
    assert counts.min() > 60  # of 125 expected


def test_crops_follow_the_generator():
    protocol, data = get_protocol("native", 16), native_images(noise(40, 30), noise(12, 50))
    index = torch.tensor([0, 1, 0, 1])
    one, again, other = (protocol.training_batch(data, index, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])
    assert not torch.equal(one[1][0], one[1][2])  # two crops of one image
    assert (one[0].shape, one[0].dtype, one[1].shape, one[1].dtype) == (
        (4, 3, 16, 16), torch.float32, (4, 16, 16), torch.uint8,
    )  # fmt: skip
    assert one[0].min() >= 0
    assert one[0].max() <= 1


def test_without_strengths_crops_are_turned_and_flipped_only():
    protocol = get_protocol("native", (9, 9), augmentation=NativeAugmentation(**NONE))
    assert protocol.augmentation.margin((9, 9)) == (0, 0)
    label = noise(9, 9)
    data = native_images(label)
    images, labels = protocol.training_batch(data, torch.zeros(200, dtype=torch.int64), generator())
    images = (images * 255).round().to(torch.uint8)
    assert torch.equal(images, labels[:, None].expand(-1, 3, -1, -1))
    seen = {crop.numpy().tobytes() for crop in labels}
    symmetries = {np.ascontiguousarray(np.rot90(part, k)).tobytes() for part in (label, label[::-1]) for k in range(4)}
    assert seen == symmetries


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_resized_images_are_augmented_likewise(order):
    """Image and mask by the same map, colours as those of crops, in the order that the network sees."""
    settings = {"image_size": (9, 9), "channel_order": order}
    still = get_protocol("augmented-224", augmentation=NativeAugmentation(**NONE), **settings)
    label = torch.from_numpy(noise(9, 9))
    pixels = torch.stack([label, label // 2, label // 4])
    data = SegmentationTensors(["a"], pixels[None], label[None], [(9, 9)])
    index = torch.zeros(200, dtype=torch.int64)
    images, labels = still.training_batch(data, index, generator())
    expected = torch.stack([labels, labels // 2, labels // 4], 1)
    assert torch.equal((images * 255).round().to(torch.uint8), expected if order == "rgb" else expected.flip(1))
    assert len({crop.numpy().tobytes() for crop in labels}) == 8  # the symmetries of the square
    protocol = get_protocol("augmented-224", **settings)
    changed, masks = protocol.training_batch(data, index, generator())
    assert (changed.shape, changed.dtype, masks.dtype) == ((200, 3, 9, 9), torch.float32, torch.uint8)
    assert len({image.numpy().tobytes() for image in changed}) == 200
    again, _ = protocol.training_batch(data, index, generator())
    assert torch.equal(changed, again)


def test_resized_images_are_scored_as_those_of_the_published_protocol():
    published, augmented = get_protocol("uctransnet-224", 20), get_protocol("augmented-224", 20)
    image, mask = noise(50, 40)[..., None].repeat(3, -1), noise(50, 40) % 2
    np.testing.assert_array_equal(augmented.resize_image(image), published.resize_image(image))
    np.testing.assert_array_equal(augmented.resize_mask(mask, 1), published.resize_mask(mask, 1))


@pytest.mark.parametrize("size", [(24, 24), (18, 30)])
@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"warp_probability": 1, "rotation": 180},
        {"warp_probability": 1, "scale": 1.0},
        {"warp_probability": 1, "rotation": 45, "scale": 0.25},
    ],
)
def test_labels_stay_with_their_images(size, strengths):
    """The map is linear, so what is interpolated differs from the nearest pixel by half of both steps at most."""
    augmentation = NativeAugmentation(**NONE | strengths)
    protocol = get_protocol("native", size, augmentation=augmentation)
    data = native_images(numbered(60, 100), numbered(70, 70)[::-1].copy(), numbered(10, 12))
    images, labels = protocol.training_batch(data, torch.arange(60) % 2, generator())
    differences = (images * 255 - labels[:, None]).abs()
    assert differences.max() <= (1.51 if strengths else 0.01)
    if strengths:
        assert differences.max() > 0.3
    images, labels = protocol.training_batch(data, torch.full((20,), 2), generator())
    assert (images * 255 - labels[:, None]).abs().max() <= (1.51 if strengths else 0.01)


def test_warps_turn_and_magnify_as_documented():
    strengths = NativeAugmentation(**NONE | {"warp_probability": 1, "rotation": 30, "scale": 0.5})
    maps = draw_warps(4000, strengths, torch.device("cpu"), generator())
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
        strengths = NativeAugmentation(**NONE | {"warp_probability": probability, "rotation": 30, "scale": 0.5})
        maps = draw_warps(4000, strengths, torch.device("cpu"), generator())
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
    strengths = NativeAugmentation(**NONE | {"warp_probability": 1, "rotation": rotation, "scale": scale})
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
    changed = change_colours(images, NativeAugmentation(**NONE), generator())
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
    changed = change_colours(images, NativeAugmentation(**NONE | strengths), generator())
    change = (changed - images).abs().flatten(1).amax(1)
    assert change.min() > 1e-3
    assert len(change.unique()) == 3
    if "brightness" in strengths:
        assert change.max() <= 0.3001
        assert (changed - images).flatten(1).std(1).max() < 1e-5


def test_stain_jitter_moves_the_stains():
    images = 0.4 + 0.4 * torch.rand(8, 3, 6, 6, generator=generator())
    strengths = NativeAugmentation(**NONE | {"stain_shift": 0.01})
    moved = rgb_to_stains(change_colours(images, strengths, generator())) - rgb_to_stains(images)
    per_stain = moved.mean((2, 3))
    assert per_stain.abs().max() <= 0.0101
    torch.testing.assert_close(moved, per_stain[:, :, None, None].expand_as(moved), atol=1e-5, rtol=0)


def test_stain_scale_enlarges_each_stain_by_up_to_its_share():
    images = 0.4 + 0.4 * torch.rand(1, 3, 4, 4, generator=generator())
    images = images.expand(400, -1, -1, -1)
    strengths = NativeAugmentation(**NONE | {"stain_scale": 0.2})
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
        strengths = NativeAugmentation(**NONE | {"blur_probability": probability, "blur": 2.0})
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


def test_channel_order_is_that_of_the_input():
    augmentation = NativeAugmentation(**NONE)
    data = native_images(noise(8, 8))
    data.pixels[:2] = 0  # blue alone
    rgb, bgr = (
        get_protocol("native", 8, order, augmentation=augmentation).training_batch(data, torch.tensor([0]), generator())
        for order in ("rgb", "bgr")
    )
    assert torch.equal(bgr[0], rgb[0].flip(1))
    assert rgb[0][0, 2].max() > 0.5
    assert rgb[0][0, 0].max() < 1e-5


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.v3.imwrite(path, pixels)


@pytest.fixture
def dataset(tmp_path):
    """Two images of different sizes with one or two square nuclei."""
    instances = {"a": np.zeros((20, 30), np.uint16), "b": np.zeros((16, 18), np.uint16)}
    instances["a"][2:12, 3:13], instances["a"][2:12, 13:23], instances["b"][4:14, 4:14] = 1, 2, 300
    for name, numbers in instances.items():
        write(tmp_path / "images" / f"{name}.png", noise(*numbers.shape)[..., None].repeat(3, -1))
        write(tmp_path / "masks" / f"{name}.png", (numbers > 0).astype(np.uint8) * 255)
        write(tmp_path / "instances" / f"{name}.png", numbers)
    return tmp_path


def test_load_native(dataset):
    data = load_native(find_samples(dataset), 1)
    assert (len(data), data.names, data.sizes.tolist()) == (2, ["a", "b"], [[20, 16], [30, 18]])
    for position, name in enumerate("ab"):
        images, labels = data.batch(torch.tensor([position]))
        np.testing.assert_array_equal(images[0].permute(1, 2, 0), imageio.v3.imread(dataset / f"images/{name}.png"))
        np.testing.assert_array_equal(labels[0], imageio.v3.imread(dataset / f"masks/{name}.png") > 0)


def test_boundary_target_is_that_of_the_whole_map(dataset):
    data = load_native(find_samples(dataset), 1, target="boundary")
    for position, name in enumerate("ab"):
        expected = boundary_target(imageio.v3.imread(dataset / f"instances/{name}.png").astype(np.int32))
        np.testing.assert_array_equal(data.batch(torch.tensor([position]))[1][0], expected)
        assert set(np.unique(expected)) == {0, 1, 2}


def test_a_mask_of_0_and_1_taken_for_a_map_is_told(dataset):
    parts = imageio.v3.imread(dataset / "instances/a.png")
    parts[:, 12:14] = 0
    write(dataset / "instances/a.png", (parts > 0).astype(np.uint16))
    with pytest.warns(UserWarning, match=r"^1 instance maps hold one number alone, in several places.*a\.png"):
        load_native(find_samples(dataset), 1, target="boundary")


def test_data_that_cannot_be_loaded(dataset):
    with pytest.raises(DataError, match="choose one of mask, boundary"):
        load_native(find_samples(dataset), 1, target="border")
    write(dataset / "instances/b.png", np.eye(16, 18, dtype=np.uint16))
    with pytest.raises(DataError, match=r"instances/b\.png: is not the instance map of its image"):
        load_native(find_samples(dataset), 1, target="boundary")
    write(dataset / "instances/b.png", np.ones((4, 4), np.uint16))
    with pytest.raises(DataError, match=r"b\.png: is 4 x 4 pixels .*image is 16 x 18"):
        load_native(find_samples(dataset), 1, target="boundary")
    (dataset / "instances/b.png").unlink()
    with pytest.raises(DataError, match=r"instances: no instance map.*for b, which the target boundary needs; put"):
        load_native(find_samples(dataset), 1, target="boundary")
    assert len(load_native(find_samples(dataset), 1)) == 2
    with pytest.raises(DataError, match="there are none to load"):
        load_native([], 1)


def test_the_protocol_keeps_images_and_masks():
    protocol = get_protocol("native", 64)
    assert isinstance(protocol, NativeProtocol)
    image, mask = noise(9, 7)[..., None].repeat(3, -1), noise(9, 7)
    assert protocol.resize_image(image) is image
    assert protocol.resize_mask(mask, 1) is mask


@pytest.mark.gpu
def test_crops_are_made_on_the_gpu_without_waiting_for_it():
    protocol, data = get_protocol("native", 32), native_images(noise(40, 60), noise(20, 90)).to("cuda")
    index, on_gpu = torch.tensor([0, 1, 1], device="cuda"), torch.Generator("cuda").manual_seed(0)
    protocol.training_batch(data, index, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = protocol.training_batch(data, index, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.device.type == labels.device.type == "cuda"
    assert (images.shape, labels.shape) == ((3, 3, 32, 32), (3, 32, 32))
