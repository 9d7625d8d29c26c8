"""Nothing in a file that varies is left out without a word, and the same rules hold whatever library decodes it."""

import re

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps, TiffImagePlugin

from tests.data.support import put, random_pixels, write_png
from uctrans.data import DataError, read_image, read_mask
from uctrans.data.decode import decode_file
from uctrans.data.instances import read_instances

LZW = {"compression": "tiff_lzw"}  # Pillow decodes it here, and tifffile the others
TIFF_FORMS = [{}, LZW, {"compression": "tiff_adobe_deflate"}]
COLOURS = [(0, 0, 0), (255, 0, 0), (255, 255, 255)]


def put_turned(path, pixels, orientation, **options):
    """Write pixels as a sensor stores them, with the tag that says how a viewer shows them."""
    if path.suffix == ".tif":
        options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
        options["tiffinfo"][274] = orientation
    else:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_masks_and_maps_lie_as_viewers_show_them(tmp_path, orientation):
    pixels, labels = random_pixels(5, 7, 3), random_pixels(5, 7) % 4
    with Image.open(put_turned(tmp_path / "viewed.png", labels, orientation)) as image:
        shown = np.array(ImageOps.exif_transpose(image))
    with Image.open(put_turned(tmp_path / "viewed.png", pixels, orientation)) as image:
        shown_pixels = np.array(ImageOps.exif_transpose(image))
    for name, options in [("a.png", {}), *(("a.tif", options) for options in TIFF_FORMS)]:
        path = put_turned(tmp_path / name, pixels, orientation, **options)
        np.testing.assert_array_equal(read_image(path), shown_pixels)
        path = put_turned(tmp_path / name, labels, orientation, **options)
        np.testing.assert_array_equal(read_mask(path, 4, shape=shown.shape), shown)
        np.testing.assert_array_equal(read_instances(path), shown)
    path = put_turned(tmp_path / "a.webp", pixels, orientation, lossless=True)
    np.testing.assert_array_equal(read_image(path), shown_pixels)


def test_photograph_of_a_turned_camera(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    image = read_image(put_turned(tmp_path / "a.jpg", pixels, 6, quality=95))
    assert image.shape == (32, 16, 3)
    assert image[:8, 8:].mean() > 250


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_damaged_exif_leaves_the_pixels(tmp_path, name):
    Image.new("RGB", (7, 5)).save(tmp_path / name, exif=b"Exif\0\0no tags at all")
    assert read_image(tmp_path / name).shape == (5, 7, 3)


def test_indexes_turn_with_their_colours(tmp_path):
    indexed = Image.fromarray(random_pixels(5, 7) % 3)
    indexed.putpalette([value for colour in COLOURS for value in colour])
    tags = Image.Exif()
    tags[274] = 8
    indexed.save(tmp_path / "a.png", exif=tags)
    picture = decode_file(tmp_path / "a.png")
    np.testing.assert_array_equal(np.array(COLOURS)[picture.indexes], picture.channels)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 3, COLOURS), np.rot90(random_pixels(5, 7) % 3))


@pytest.mark.parametrize("high", [1023, 4095, 16383])
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_values_of_a_camera_in_16_bits(tmp_path, high, suffix):
    values = np.linspace(0, high, 256).reshape(16, 16).round().astype(np.uint16)
    path = put(tmp_path / f"a{suffix}", values)
    with pytest.warns(UserWarning, match=rf"up to {high} .*a{suffix}\. Set.* --intensity-range 0,{high},"):
        assert read_image(path).max() < 65
    assert read_image(path, intensity_range=(0, high))[..., 0].ravel().tolist() == list(range(256))
    with pytest.warns(UserWarning, match=f"values up to {high}, beyond the intensity range, which ends at 511"):
        assert read_image(path, intensity_range=(0, 511)).max() == 255


def test_range_with_a_lowest_value(tmp_path):
    path = put(tmp_path / "a.png", np.array([[0, 100, 150, 200]], np.uint16))
    assert read_image(path, intensity_range=(100, 200))[0, :, 0].tolist() == [0, 0, 128, 255]
    path = put(tmp_path / "b.png", np.array([[0, 100, 150, 200]], np.uint8))
    assert read_image(path, intensity_range=(100, 200))[0, :, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(("given", "message"), [((5, 5), "5,5 is no range; give"), ((0, 70000), "0,70000 is no range")])
def test_range_that_is_none(tmp_path, given, message):
    with pytest.raises(DataError, match=f"intensity_range: {message}"):
        read_image(put(tmp_path / "a.png", random_pixels(4, 4)), intensity_range=given)


def test_range_of_16_bits_does_not_fit_8_bits(tmp_path):
    with pytest.raises(DataError, match=r"a\.png: holds 8-bit values, but the intensity range ends at 4095"):
        read_image(put(tmp_path / "a.png", random_pixels(4, 4)), intensity_range=(0, 4095))


def put_channels(folder, pixels):
    """Return TIFF files of the same (H, W, C) channels: side by side, in planes, and in pages that say so."""
    planes = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(folder / "contiguous.tif", pixels, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(folder / "planes.tif", planes, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(folder / "imagej.tif", planes, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(folder / "a.ome.tif", planes, metadata={"axes": "CYX"}, photometric="minisblack")
    return sorted(folder.glob("*.tif"))


@pytest.mark.parametrize("count", [2, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_channel_is_read_or_the_file_is_refused(tmp_path, count, dtype):
    pixels = random_pixels(6, 7, count, dtype=dtype)
    expected = pixels if dtype == np.uint8 else np.round(pixels / 257)
    for path in put_channels(tmp_path, pixels):
        np.testing.assert_array_equal(read_image(path, count), expected, err_msg=path.name)
        with pytest.raises(DataError, match=rf"{count} channels, but .* takes 3; .* --in-channels {count}"):
            read_image(path)
        with pytest.raises(DataError, match=rf"{path.name}: has {count} channels; save a mask with one channel"):
            read_mask(path)
    tifffile.imwrite(tmp_path / "pages.tif", np.moveaxis(pixels, -1, 0), photometric="minisblack")
    np.testing.assert_array_equal(read_image(tmp_path / "pages.tif", count), expected)


def test_channels_without_information_are_left_out(tmp_path, recwarn):
    pixels = random_pixels(6, 7, 4)
    pixels[..., 3] = 255
    for path in put_channels(tmp_path, pixels):
        np.testing.assert_array_equal(read_image(path), pixels[..., :3])
    np.testing.assert_array_equal(read_image(put(tmp_path / "rgba.png", pixels)), pixels[..., :3])
    two = np.dstack([pixels[..., 0], np.full((6, 7), 9, np.uint8)])
    for path in put_channels(tmp_path, two):
        np.testing.assert_array_equal(read_image(path), np.dstack([pixels[..., 0]] * 3))
        np.testing.assert_array_equal(read_image(path, 1), pixels[..., :1])
    red_green = pixels[..., :3] * np.array([1, 1, 0], np.uint8)
    np.testing.assert_array_equal(read_image(put(tmp_path / "red_green.png", red_green), 2), red_green[..., :2])
    assert not recwarn.list


def test_one_channel_is_gray(tmp_path):
    pixels = random_pixels(6, 7, 3)
    path = put(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], np.rint(pixels @ (0.299, 0.587, 0.114)))
    np.testing.assert_array_equal(read_image(put(tmp_path / "b.png", pixels[..., 0]), 1), pixels[..., :1])
    with pytest.raises(DataError, match="has 1 channels, but the network takes 2"):
        read_image(tmp_path / "b.png", 2)


@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
def test_extra_samples_that_nobody_declared(tmp_path, photometric):
    pixels = random_pixels(6, 7, 4 if photometric == "rgb" else 2)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric=photometric, planarconfig="contig", extrasamples=["unspecified"])
    np.testing.assert_array_equal(read_image(path, pixels.shape[2]), pixels)
    with pytest.raises(DataError, match=rf"a\.tif: has {pixels.shape[2]} channels, but the network takes 3"):
        read_image(path)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_either_order_of_bytes(tmp_path, byteorder):
    pixels = random_pixels(6, 7, 4, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", byteorder=byteorder)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 4), np.round(pixels / 257))


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_that_varies_is_said_or_read(tmp_path, channels, suffix):
    pixels = random_pixels(6, 7, channels)
    path = tmp_path / f"a{suffix}"
    for options in [{}] if suffix == ".png" else TIFF_FORMS:
        Image.fromarray(pixels).save(path, **options)
        with pytest.warns(UserWarning, match=rf"an alpha channel that differs from pixel to pixel.*a{suffix}"):
            image = read_image(path)
        np.testing.assert_array_equal(image, np.broadcast_to(pixels[..., : channels - 1], image.shape))
        np.testing.assert_array_equal(read_image(path, channels), pixels)
        with pytest.raises(DataError, match="has an alpha channel that tells pixels of one colour apart"):
            read_mask(put_alpha_alone(path, channels, **options))


def put_alpha_alone(path, channels, **options):
    pixels = np.full((4, 4, channels), 255, np.uint8)
    pixels[:2, :, -1] = 0
    Image.fromarray(pixels).save(path, **options)
    return path


def test_alpha_that_says_what_the_colours_say_may_stay(tmp_path):
    mask = random_pixels(6, 7) % 2
    path = put(tmp_path / "a.png", np.dstack([mask * 255] * 4))
    np.testing.assert_array_equal(read_mask(path), mask)


def test_colours_multiplied_by_alpha_are_divided_again(tmp_path):
    pixels = np.array([[[100, 50, 0, 128], [10, 20, 30, 0]]], np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["assocalpha"])
    with pytest.warns(UserWarning, match="an alpha channel that differs"):
        assert read_image(tmp_path / "a.tif").tolist() == [[[199, 99, 0], [10, 20, 30]]]


def test_a_compression_that_this_python_has_no_module_for(tmp_path, monkeypatch):
    def refuse(*_):
        raise ModuleNotFoundError("No module named 'compression'")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    pixels = random_pixels(6, 7)
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression="zlib")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 1)[..., 0], pixels)  # Pillow decodes it
    tifffile.imwrite(tmp_path / "b.tif", random_pixels(6, 7, 3, dtype=np.uint16), photometric="rgb", compression="zlib")
    with pytest.raises(DataError, match=r"b\.tif: holds 16-bit colours compressed by \w+; install .*imagecodecs"):
        read_image(tmp_path / "b.tif")


def test_undeclared_channels_that_only_imagecodecs_decodes(tmp_path, monkeypatch):
    def refuse(page):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    path = put_channels(tmp_path, random_pixels(6, 7, 4))[1]
    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(DataError, match=r"has 4 channels, not declared as colours or alpha.*install .*imagecodecs"):
        read_image(path, 4)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tif"])
def test_palette_that_hides_the_labels(tmp_path, name):
    indexed = Image.fromarray(random_pixels(6, 7) % 2)
    indexed.putpalette([9, 9, 9, 9, 9, 9])
    indexed.save(tmp_path / name)
    for classes in (1, 2):
        with pytest.raises(DataError, match=rf"{name}: has a palette that gives one colour to several indexes"):
            read_mask(tmp_path / name, classes)


def test_transparent_index(tmp_path):
    indexed = Image.fromarray(random_pixels(6, 7) % 2)
    indexed.putpalette([255, 255, 255, 250, 250, 250])
    indexed.save(tmp_path / "a.png", transparency=0)
    with pytest.warns(UserWarning, match="an alpha channel that differs"):
        assert read_image(tmp_path / "a.png").min() == 250
    with pytest.warns(UserWarning, match="both above 0"):
        assert read_mask(tmp_path / "a.png").all()


@pytest.mark.parametrize("white", [3, 255, 1000, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_of_any_depth(tmp_path, white, plain):
    """Masks hold the values of the file; images are stretched from the white that it declares."""
    values = np.array([[0, 1], [2, 3]])
    path = tmp_path / "a.pgm"
    body = b"0 1 2 3\n" if plain else values.astype(">u2" if white > 255 else "u1").tobytes()
    path.write_bytes(b"%s\n2 2\n%d\n" % (b"P2" if plain else b"P5", white) + body)
    np.testing.assert_array_equal(read_mask(path, 4), values)
    np.testing.assert_array_equal(read_image(path, intensity_range=(0, 3))[..., 0], values * 85)
    if white < 65535:
        np.testing.assert_array_equal(read_image(path)[..., 0], np.rint(values * 255 / white))
    else:
        with pytest.warns(UserWarning, match="16-bit values up to 3"):
            assert not read_image(path).any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits(tmp_path, bits):
    values = random_pixels(4, 16) % 2**bits
    packed = (values.reshape(4, -1, 8 // bits) << np.arange(8 - bits, -1, -bits)).sum(-1).astype(np.uint8)
    path = write_png(tmp_path / "a.png", b"".join(b"\0" + row.tobytes() for row in packed), (4, 16), bits, 0)
    np.testing.assert_array_equal(read_mask(path, 2**bits), values)
    np.testing.assert_array_equal(read_image(path)[..., 0], values * (255 // (2**bits - 1)))


def lossy_masks(folder):
    labels = np.zeros((32, 32), np.uint8)
    labels[8:24, 8:24] = 200
    forms = {"a.jpg": {}, "a.webp": {}, "a.jp2": {"irreversible": True}, "a.tif": {"compression": "jpeg"}}
    for name, options in forms.items():
        Image.fromarray(labels).save(folder / name, **options)
    return [folder / name for name in forms]


def test_lossy_masks_warn_or_say_so_in_the_error(tmp_path):
    for path in lossy_masks(tmp_path):
        with pytest.warns(UserWarning, match=rf"have a lossy compression.*{path.name}\. .*save it again") as caught:
            read_mask(path)
        assert len(caught) == 1
        with pytest.warns(UserWarning, match="lossy compression"):
            read_mask(path, 256)
        with pytest.raises(
            DataError, match=r"holds label values.*lossy compression, which changes values: save it again"
        ):
            read_mask(path, 2)
        with pytest.raises(DataError, match=rf"{path.name}: has a lossy compression"):
            read_instances(path)


def test_masks_without_loss_in_the_same_formats(tmp_path, recwarn):
    mask = (random_pixels(16, 16) % 2) * 255
    for name, options in (("a.webp", {"lossless": True}), ("a.jp2", {"irreversible": False})):
        Image.fromarray(mask).save(tmp_path / name, **options)
        np.testing.assert_array_equal(read_mask(tmp_path / name), mask > 0)
    assert not recwarn.list


def test_numbered_objects_under_a_binary_network(tmp_path):
    with pytest.warns(UserWarning, match="more than two distinct values.*That is right if the values number") as caught:
        assert read_mask(put(tmp_path / "a.png", np.arange(12, dtype=np.uint8).reshape(3, 4))).sum() == 11
    assert len(caught) == 1


def test_errors_and_warnings_name_the_palette_of_a_mask(tmp_path):
    labels = random_pixels(6, 7) % 3
    indexed = Image.fromarray(labels)
    indexed.putpalette([255, 255, 255, 255, 0, 0, 0, 0, 9])
    indexed.save(tmp_path / "indexed.png")
    put(tmp_path / "colours.png", np.array(COLOURS, np.uint8)[labels])
    for name, palette in (("indexed", "#ffffff,#ff0000,#000009"), ("colours", "#000000,#ff0000,#ffffff")):
        path = tmp_path / f"{name}.png"
        with pytest.raises(DataError, match=rf'coloured mask; .*--classes 3 --palette "{palette}"') as raised:
            read_mask(path, 3)
        suggested = re.search('--palette "(.*?)"', str(raised.value))[1]
        np.testing.assert_array_equal(read_mask(path, 3, suggested), labels)
        with pytest.warns(UserWarning, match=rf'hold the colours .*--classes 3 --palette "{palette}"'):
            read_mask(path)
    indexed = Image.fromarray(labels % 2)
    indexed.putpalette([255, 255, 255, 255, 0, 0])
    indexed.save(tmp_path / "indexed.png")
    with pytest.warns(UserWarning, match='both above 0.*such as --palette "#ffffff,#ff0000"'):
        read_mask(tmp_path / "indexed.png")


def test_a_mask_that_lies_across_its_image_gets_the_remedy(tmp_path):
    """A photograph was turned by its tag, its mask was not."""
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"4 x 6 .* image is 6 x 4; turn the mask as viewers show the image"):
        read_mask(tmp_path / "mask.png", 1, shape=(6, 4))


def test_pictures_beyond_the_size_that_pillow_takes(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    path = put(tmp_path / "a.png", random_pixels(8, 8))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert read_image(path).shape == (8, 8, 3)
    assert Image.MAX_IMAGE_PIXELS == 20
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "command"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"/annex/objects/MD5\n", "git annex"),
    ],
)
def test_pointer_in_the_place_of_an_image(tmp_path, content, command):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png: is a pointer to an image that is not here; fetch it with {command}"):
        read_image(tmp_path / "a.png")
