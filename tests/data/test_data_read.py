"""Every kind of image and mask file becomes uint8 RGB and uint8 labels, or an error that names it."""

import re
import struct

import imageio.v3
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.support import put, random_pixels, write_png
from uctrans.data import DataError, find_samples, get_protocol, labels_to_colours, load_tensors, read_image, read_mask
from uctrans.data.find import IMAGE_SUFFIXES

PALETTE = "#000000,#FF0000,#00ff00"


def refuses(path, message, readers=(read_image, read_mask)):
    for read in readers:
        with pytest.raises(DataError, match=rf"{re.escape(path.name)}: {message}"):
            read(path)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".ppm", ".tga", ".PNG"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    pixels = random_pixels(7, 9, 3)
    image = read_image(put(tmp_path / f"a{suffix}", pixels))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".gif", ".jp2"])
def test_lossy_formats_keep_shape_and_mean(tmp_path, suffix):
    assert suffix in IMAGE_SUFFIXES
    pixels = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    image = read_image(put(tmp_path / f"a{suffix}", pixels))
    assert image.shape == pixels.shape
    assert np.abs(image.astype(int) - pixels).max() <= 8


@pytest.mark.parametrize("height", [3, 4, 7])
def test_gray_becomes_three_equal_channels_and_alpha_is_dropped(tmp_path, height):
    """A low image could be taken for one with channels first."""
    pixels = random_pixels(height, 9, 4)
    pixels[..., [1, 3]] = 255
    gray = np.dstack([pixels[..., 0]] * 3)
    np.testing.assert_array_equal(read_image(put(tmp_path / "gray.png", pixels[..., 0])), gray)
    np.testing.assert_array_equal(read_image(put(tmp_path / "gray_alpha.png", pixels[..., :2])), gray)
    np.testing.assert_array_equal(read_image(put(tmp_path / "rgb_alpha.png", pixels)), pixels[..., :3])


@pytest.mark.parametrize(("name", "channels"), [("gray.png", ()), ("gray.tif", ()), ("rgb.tif", (3,))])
def test_sixteen_bit_is_scaled(tmp_path, name, channels):
    pixels = random_pixels(7, 9, *channels, dtype=np.uint16)
    pixels[0, :4] = np.array([0, 128, 129, 65535]).reshape(4, *[1] * len(channels))
    if name.endswith("png"):
        put(tmp_path / name, pixels)
    else:
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb" if channels else "minisblack")
    expected = np.round(pixels / 257).astype(np.uint8)
    expected = expected if channels else np.dstack([expected] * 3)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image, expected)
    assert image[0, :4, 0].tolist() == [0, 0, 1, 255]


def put_deep_png(path, pixels):
    """Write (H, W, 1..4) uint16 as a 16-bit PNG; Pillow cannot write these."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return write_png(path, rows, pixels.shape[:2], 16, {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]])


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("name", ["deep.png", "deep.bmp"], ids=["named png", "named otherwise"])
def test_sixteen_bit_png_with_colours_or_alpha_is_refused_rather_than_cut(tmp_path, channels, name):
    path = put_deep_png(tmp_path / name, random_pixels(5, 6, channels, dtype=np.uint16) % 3)
    refuses(path, "is a 16-bit PNG with colours or alpha.*save it as 8-bit PNG, as 16-bit TIFF")


def test_sixteen_bit_png_of_one_channel_keeps_every_label(tmp_path):
    labels = random_pixels(5, 6, 1, dtype=np.uint16) % 3
    np.testing.assert_array_equal(read_mask(put_deep_png(tmp_path / "a.png", labels), classes=3), labels[..., 0])


@pytest.mark.parametrize("content", [b"P6\n2 1\n65535\n" + bytes(range(12)), b"P3\n2 1\n65535\n1 2 3 4 5 6\n"])
def test_sixteen_bit_ppm_is_refused_rather_than_cut(tmp_path, content):
    (tmp_path / "a.ppm").write_bytes(content)
    refuses(tmp_path / "a.ppm", "is a 16-bit PPM.*save it as 16-bit TIFF")


@pytest.mark.parametrize("content", [b"P6\n2 1\n255\n" + bytes(range(6)), b"P3\n2 1\n255\n0 1 2 3 4 5\n"])
def test_eight_bit_ppm(tmp_path, content):
    (tmp_path / "a.ppm").write_bytes(content)
    assert read_image(tmp_path / "a.ppm").ravel().tolist() == [0, 1, 2, 3, 4, 5]


def test_black_and_white(tmp_path):
    pixels = random_pixels(8, 8) > 99
    assert (read_image(put(tmp_path / "a.png", pixels))[..., 0] == np.where(pixels, 255, 0)).all()
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), pixels)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", palette=["#000000", "#ffffff"]), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".gif", ".bmp", ".webp"])
def test_truncated_file(tmp_path, suffix):
    path = put(tmp_path / f"cut{suffix}", random_pixels(40, 40, 3))
    content = path.read_bytes()
    for keep in (0.5, 0.95):
        path.write_bytes(content[: int(len(content) * keep)])
        refuses(path, "cannot be read.*replace it or save it again", [read_image])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_file_that_is_missing_or_no_image(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    refuses(path, "is not a file")
    for content in (b"", b"not an image"):
        path.write_bytes(content)
        refuses(path, "cannot be read")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_that_are_no_8_or_16_bit_integers(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5), dtype=dtype))
    refuses(tmp_path / "a.tif", f"holds {np.dtype(dtype)} values; save it with 8-bit or 16-bit")


def test_several_pages_or_frames(tmp_path):
    stack = random_pixels(50, 40, 4)
    tifffile.imwrite(tmp_path / "stack.tif", random_pixels(5, 8, 9), photometric="minisblack")
    tifffile.imwrite(tmp_path / "narrow.tif", stack, photometric="minisblack")  # looks like channels
    tifffile.imwrite(tmp_path / "three.tif", stack[:3], photometric="minisblack")  # looks like planes
    tifffile.imwrite(tmp_path / "imagej.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    imageio.v3.imwrite(tmp_path / "film.gif", random_pixels(2, 8, 9, 3))
    for name, pages in (("stack", 5), ("narrow", 50), ("three", 3), ("imagej", 50)):
        refuses(tmp_path / f"{name}.tif", rf"holds several pages or frames \({pages}\); save one image")
    refuses(tmp_path / "film.gif", r"holds several pages or frames \(2 or more\)")


def test_photograph_with_a_preview_behind_it(tmp_path):
    pixels = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    preview = Image.fromarray(pixels[::2, ::2])
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - pixels).max() <= 8


def test_reduced_copies_are_no_further_pages(tmp_path):
    pixels = random_pixels(32, 32, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, photometric="rgb")
        file.write(pixels[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), pixels)


def test_tiff_with_channels_in_separate_planes(tmp_path):
    pixels = random_pixels(7, 9, 3)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize(("name", "space"), [("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.tif", "LAB")])
def test_colours_that_are_not_rgb(tmp_path, name, space):
    Image.fromarray(random_pixels(8, 8, 3)).convert(space).save(tmp_path / name)
    refuses(tmp_path / name, r"holds \w+ colours; convert it to RGB")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff(tmp_path, compression):
    forms = {"rgb": random_pixels(20, 30, 3), "gray": random_pixels(20, 30), "bilevel": random_pixels(20, 30) > 99}
    forms["deep"] = random_pixels(20, 30, dtype=np.uint16)
    for name, pixels in forms.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif", compression=compression)
        Image.fromarray(pixels).save(tmp_path / f"{name}_plain.tif")
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.tif"), read_image(tmp_path / f"{name}_plain.tif"))


def test_jpeg_in_tiff(tmp_path):
    pixels = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression="jpeg")
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - pixels).max() <= 8
    content = (tmp_path / "a.tif").read_bytes()
    start = content.index(b"\xff\xd8")
    (tmp_path / "a.tif").write_bytes(content[:start] + bytes(40) + content[start + 40 :])
    refuses(tmp_path / "a.tif", "cannot be read, it may be damaged.*replace it or save it again; or install")


def test_what_only_imagecodecs_decodes_is_refused_rather_than_cut(tmp_path, monkeypatch):
    def refuse(page):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    tifffile.imwrite(tmp_path / "a.tif", random_pixels(7, 9, 3, dtype=np.uint16), photometric="rgb")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    refuses(tmp_path / "a.tif", r"holds 16-bit colours compressed by \w+; install the package imagecodecs")


@pytest.mark.parametrize("size", [b"\xff\xff\xff\x7f", b"\0\0\0\0"])
def test_tiff_of_an_impossible_size(tmp_path, size):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 9), dtype=np.uint8))
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tag = file.pages[0].tags["ImageWidth"]
    content[tag.offset + 2 : tag.offset + 4] = struct.pack("<H", 4)  # a 32-bit value
    content[tag.offset + 8 : tag.offset + 12] = size
    (tmp_path / "a.tif").write_bytes(content)
    refuses(tmp_path / "a.tif", "cannot be read")


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_tiff_that_stores_white_as_zero(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), dtype=dtype), photometric="miniswhite")
    refuses(tmp_path / "a.tif", "stores white as 0 .*save it as PNG, or as TIFF with .*MINISBLACK")


def put_indexed(path, indexes, colours, **options):
    image = Image.fromarray(indexes)
    image.putpalette([value for colour in colours for value in colour])
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"}), ("a.gif", {}), ("a.bmp", {})],
    ids=["png", "tiff", "lzw tiff", "gif", "bmp"],
)
def test_indexed_files_give_colours(tmp_path, name, options):
    indexes = random_pixels(8, 9) % 3
    colours = [(255, 255, 255), (255, 0, 0), (0, 0, 9)]
    path = put_indexed(tmp_path / name, indexes, colours, **options)
    np.testing.assert_array_equal(read_image(path), np.array(colours)[indexes])
    np.testing.assert_array_equal(read_mask(path, 3, colours), indexes)


def test_indexed_tiff_with_8_bit_colours(tmp_path):
    indexes = random_pixels(8, 9) % 2
    colours = np.zeros((3, 256), dtype=np.uint16)
    colours[:, 1] = 250
    tifffile.imwrite(tmp_path / "a.tif", indexes, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.dstack([indexes * 250] * 3))


def test_binary_masks_of_every_form_are_equal(tmp_path, recwarn):
    mask = (random_pixels(9, 7) > 128).astype(np.uint8)
    forms = {
        "ones.png": mask,
        "white.png": mask * 255,
        "gray.png": np.dstack([mask * 255] * 3),
        "rgba.png": np.dstack([mask * 255] * 3 + [np.full_like(mask, 255)]),
        "red.png": np.dstack([mask * 200, mask * 0, mask * 0]),
        "deep.png": mask.astype(np.uint16) * 40000,
        "white.gif": mask * 255,
    }
    for name, pixels in forms.items():
        result = read_mask(put(tmp_path / name, pixels))
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, mask, err_msg=name)
    for value in (0, 255):
        result = read_mask(put(tmp_path / "uniform.png", np.full((4, 5), value, dtype=np.uint8)))
        assert (result == (value > 0)).all()
    assert not recwarn.list


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_binary_mask_without_background_warns(tmp_path, suffix):
    path = put_indexed(tmp_path / f"a{suffix}", random_pixels(8, 9) % 2, [(255, 255, 255), (255, 0, 0)])
    with pytest.warns(UserWarning, match=rf"two distinct values, both above 0.*a{suffix}.*background as 0") as caught:
        assert read_mask(path).all()
    assert len(caught) == 1


@pytest.mark.parametrize("channels", [(), (3,)])
def test_binary_mask_of_many_values_warns(tmp_path, channels):
    pixels = np.zeros((4, 5, *channels), dtype=np.uint8)
    pixels[0, 0], pixels[1, 1] = 3, 255
    with pytest.warns(UserWarning, match=r"more than two distinct values.*a\.png") as caught:
        assert read_mask(put(tmp_path / "a.png", pixels)).sum() == 2
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("mask", "finding"),
    [(random_pixels(8, 8), "more than two"), (random_pixels(8, 8) % 2 + 1, "two distinct values, both above 0")],
)
def test_doubtful_binary_masks_warn_once_for_a_dataset(tmp_path, mask, finding):
    for name in ("a", "b", "c"):
        put(tmp_path / "images" / f"{name}.png", random_pixels(8, 8, 3))
        put(tmp_path / "masks" / f"{name}.png", mask.astype(np.uint8))
    with pytest.warns(UserWarning, match=rf"^3 binary masks hold {finding}.*a\.png, .*b\.png, .*c\.png\.") as caught:
        load_tensors(find_samples(tmp_path), get_protocol(image_size=8), 1)
    assert len(caught) == 1


def test_label_index_masks(tmp_path):
    labels = random_pixels(9, 7) % 4
    for pixels in (labels, np.dstack([labels] * 3), labels.astype(np.uint16)):
        np.testing.assert_array_equal(read_mask(put(tmp_path / "a.png", pixels), classes=4), labels)


@pytest.mark.parametrize(
    ("pixels", "settings", "message"),
    [
        (np.array([[0, 1], [2, 255]], np.uint8), {"classes": 2}, "holds label values 2, 255, but .* 0 to 1; raise"),
        (np.array([[0, 256]], np.uint16), {"classes": 2}, "holds label values 256"),
        (random_pixels(4, 4, 3), {"classes": 3}, "is a coloured mask; give a palette"),
        (np.zeros((4, 4), np.uint16), {"classes": 3, "palette": PALETTE}, "holds 16-bit .* 8 bits a channel"),
        (np.zeros((9, 8), np.uint8), {"shape": (8, 9)}, r"is 9 x 8 pixels \(height x width\), but its image is 8 x 9"),
    ],
)
def test_mask_that_does_not_fit(tmp_path, pixels, settings, message):
    with pytest.raises(DataError, match=rf"a\.png: {message}"):
        read_mask(put(tmp_path / "a.png", pixels), **settings)


@pytest.mark.parametrize("classes", [0, 257])
def test_number_of_classes(tmp_path, classes):
    with pytest.raises(DataError, match="1 to 256 classes"):
        read_mask(put(tmp_path / "a.png", random_pixels(4, 4)), classes=classes)


def test_mask_of_another_size_than_its_image(tmp_path):
    put(tmp_path / "images" / "a.png", random_pixels(8, 9, 3))
    put(tmp_path / "masks" / "a.png", np.zeros((9, 8), dtype=np.uint8))
    with pytest.raises(DataError, match=r"masks/a\.png: is 9 x 8 pixels .*, but its image is 8 x 9"):
        load_tensors(find_samples(tmp_path), get_protocol(image_size=8), 1)


def test_colour_coded_mask(tmp_path):
    labels = random_pixels(9, 7) % 3
    colours = labels_to_colours(labels, PALETTE)
    path = put(tmp_path / "a.png", colours)
    np.testing.assert_array_equal(read_mask(path, 3, PALETTE), labels)
    np.testing.assert_array_equal(read_mask(path, 3, [(0, 0, 0), (255, 0, 0), (0, 255, 0)]), labels)
    with pytest.raises(DataError, match="palette: has 3 colours, but classes=4 needs 4"):
        read_mask(path, 4, PALETTE)
    binary = put(tmp_path / "b.png", labels_to_colours(labels % 2, "#ffffff,#0000ff"))
    np.testing.assert_array_equal(read_mask(binary, 1, "#ffffff,#0000ff"), labels % 2)
    colours[0, :2] = (1, 2, 254)
    with pytest.raises(DataError, match=r"a\.png: 1 colours are not in the palette .*#0102fe \(2 pixels\); add them"):
        read_mask(put(tmp_path / "a.png", colours), 3, PALETTE)
