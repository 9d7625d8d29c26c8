"""Image files that ask for more than they should get: memory, time, another program, other files."""

import json
import lzma
import os
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.support import put, random_pixels, write_png
from uctrans.data import DataError, find_images, read_image, read_mask
from uctrans.data.image_files import MAX_PIXELS, MAX_PIXELS_VARIABLE, ImageSize, read_size
from uctrans.data.instances import read_instances

READERS = (read_image, read_mask, read_instances)
DATA = 4000  # where the bytes of pixels begin in `write_tiff`
# Tags of TIFF, and values of the tag for the compression.
WIDTH, HEIGHT, BITS, COMPRESSION, KIND, STRIP, SAMPLES, ROWS, COUNT, DEPTH = (
    *(256, 257, 258, 259, 262, 273, 277, 278, 279, 32997),
)
TILE_WIDTH, TILE_HEIGHT, TILE, TILE_COUNT = 322, 323, 324, 325
DEFLATE, LZMA = 8, 34925


def write_tiff(path, changes, data=bytes(64), following=(0,)):
    """Write a gray TIFF of 8 x 8 pixels whose tags are changed or left out, with a page for each following offset.

    An offset is given as the number of the page after this one, or 0 after the last.
    """
    tags = {WIDTH: 8, HEIGHT: 8, BITS: 8, COMPRESSION: 1, KIND: 1, STRIP: DATA, SAMPLES: 1, COUNT: len(data)}
    tags = {code: value for code, value in sorted((tags | changes).items()) if value is not None}
    size = 2 + 12 * len(tags) + 4
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", code, 4, 1, tags[code]) for code in tags)
    pages = b"".join(body + struct.pack("<I", 8 + size * page if page else 0) for page in following)
    start = 8 + len(pages) if len(pages) > DATA else DATA
    path.write_bytes((struct.pack("<4sI", b"II*\0", 8) + pages).ljust(start, b"\0") + data)
    return path


def refuses(path, message, readers=READERS):
    for read in readers:
        with pytest.raises(DataError, match=rf"(?s){re.escape(path.name)}: {message}"):
            read(path)


def beyond(height, width):
    return (
        rf"cannot be read, as it has {height} x {width} pixels.*limit of {MAX_PIXELS} that protects the memory; .*"
        rf"set the environment variable {MAX_PIXELS_VARIABLE} to \d+"
    )


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({WIDTH: 100_000, HEIGHT: 100_000}, "100000 x 100000"),
        ({WIDTH: 2**31, HEIGHT: 2**31, COMPRESSION: DEFLATE}, "2147483648 x 2147483648"),
        ({WIDTH: 1, HEIGHT: 10**9}, "1000000000 x 1"),
        ({SAMPLES: 60_000, WIDTH: 4000, HEIGHT: 4000}, "4000 x 4000"),
        ({DEPTH: 100_000_000}, "8 x 8"),  # the depth of a volume
        (
            {
                STRIP: None,
                COUNT: None,
                TILE_WIDTH: 2**20,
                TILE_HEIGHT: 2**20,
                TILE: DATA,
                TILE_COUNT: 64,
                COMPRESSION: DEFLATE,
            },
            "8 x 8",
        ),
    ],
    ids=["large", "larger than a page", "line", "samples", "volume", "tile"],
)
def test_tiff_whose_tags_ask_for_memory(tmp_path, changes, size):
    refuses(write_tiff(tmp_path / "a.tif", changes), beyond(*size.split(" x ")))


def test_other_formats_whose_headers_ask_for_memory(tmp_path):
    write_png(tmp_path / "a.png", bytes(100), (100_000, 100_000), 8, 2)
    (tmp_path / "a.pgm").write_bytes(b"P5 100000 100000 255\n12")
    (tmp_path / "a.bmp").write_bytes(
        b"BM" + struct.pack("<IHHIIiiHHIIIIII", 60, 0, 0, 54, 40, 100_000, 100_000, 1, 24, *[0] * 6)
    )
    for suffix in ("png", "pgm", "bmp"):
        refuses(tmp_path / f"a.{suffix}", beyond(100_000, 100_000))
    screen, frame = struct.pack("<HH", 4, 4), struct.pack("<HHHH", 0, 0, 65535, 65535)
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + screen + b"\x80" + bytes(8) + b"," + frame + b"\0\2\2\x44\1\0;")
    refuses(tmp_path / "a.gif", beyond(65535, 65535))
    write_png(tmp_path / "a.png", bytes(100), (1_000_000_000, 1), 8, 0)
    refuses(tmp_path / "a.png", beyond(1_000_000_000, 1))


def test_the_limit_is_a_setting(tmp_path, monkeypatch):
    pixels = random_pixels(8, 8, 3)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    put(tmp_path / "a.png", pixels)
    tifffile.imwrite(tmp_path / "five.tif", random_pixels(8, 8, 5), photometric="minisblack", planarconfig="contig")
    for suffix in ("tif", "png"):
        path = tmp_path / f"a.{suffix}"
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, "63")
        refuses(path, rf"cannot be read, as it has 8 x 8 pixels \(.*limit of 63 .*{MAX_PIXELS_VARIABLE} to 64$")
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, "64")
        np.testing.assert_array_equal(read_image(path), pixels)
    five = tmp_path / "five.tif"
    with pytest.raises(DataError, match=rf"8 x 8 pixels of 5 channels .*{MAX_PIXELS_VARIABLE} to 80$"):
        read_image(five, 5)
    for value in ("many", "0", "-1", "1e9"):
        monkeypatch.setenv(MAX_PIXELS_VARIABLE, value)
        with pytest.raises(DataError, match=rf"{MAX_PIXELS_VARIABLE}: '{value}' is no number of pixels; give one such"):
            read_image(five, 5)


@pytest.mark.parametrize("compression", [DEFLATE, LZMA])
def test_strip_that_unpacks_to_more_than_its_pixels(tmp_path, compression):
    pack = zlib.compress if compression == DEFLATE else lzma.compress
    bomb = pack(bytes(1_000_000))
    bomb += bytes(max(0, 40_000 - len(bomb)))
    path = write_tiff(tmp_path / "a.tif", {COMPRESSION: compression, WIDTH: 200, HEIGHT: 200}, bomb)
    refuses(path, "cannot be read, it may be damaged .a strip or tile unpacks to more than its pixels")
    large = np.zeros((500, 500), np.uint8)
    noise = random_pixels(500, 500)
    for pixels in (large, noise):
        tifffile.imwrite(tmp_path / "b.tif", pixels, compression="zlib", rowsperstrip=500)
        np.testing.assert_array_equal(read_image(tmp_path / "b.tif")[..., 0], pixels)


def test_strips_that_are_too_few_or_share_their_bytes(tmp_path):
    path = write_tiff(tmp_path / "few.tif", {COMPRESSION: DEFLATE, ROWS: 1}, zlib.compress(bytes(8)))
    refuses(path, "cannot be read, it may be damaged .its strips or tiles are not those of its size")
    path = write_tiff(tmp_path / "long.tif", {COMPRESSION: DEFLATE, COUNT: 10**6}, zlib.compress(bytes(64)))
    refuses(path, "cannot be read")


@pytest.mark.parametrize("following", [[1, 2, 1], [*range(1, 250), 120]], ids=["short", "beyond the hundredth"])
def test_circle_of_pages(tmp_path, following):
    path = write_tiff(tmp_path / "a.tif", {}, following=following)
    refuses(path, "cannot be read, it may be damaged .its pages form a circle")


def test_very_many_pages(tmp_path):
    path = write_tiff(tmp_path / "a.tif", {STRIP: 8}, following=[*range(1, 1200), 0])
    refuses(path, r"holds more than 1000 pages; save one image to a file", [read_mask])


@pytest.mark.parametrize(
    ("sizes", "data"),
    [
        ('SizeX="8" SizeY="8" SizeC="1000000000"', "<TiffData/>"),
        ('SizeX="8" SizeY="8" SizeC="&#49;000000000"', "<TiffData/>"),
        ('SizeX="8" SizeY="8" SizeC="3"', '<TiffData IFD="0" PlaneCount="3000000000"/>'),
        ('SizeX="8" SizeY="8" SizeC="3"', '<TiffData IFD="0" FirstC="3000000000"/>'),
        ('SizeX="80000" SizeY="80000" SizeC="1"', "<TiffData/>"),
    ],
)
def test_ome_metadata_that_ask_for_memory(tmp_path, sizes, data):
    pixels = f'<Pixels ID="P" DimensionOrder="XYCZT" Type="uint8" SizeZ="1" SizeT="1" {sizes}>{data}</Pixels>'
    description = f'<?xml version="1.0"?><OME xmlns="x"><Image ID="I">{pixels}</Image></OME>'
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint8), description=description, metadata=None)
    refuses(tmp_path / "a.tif", "has OME metadata that its pages do not fit; save it as a plain TIFF file")


def test_ome_metadata_never_open_another_file(tmp_path):
    tifffile.imwrite(tmp_path / "other.tif", np.full((8, 8), 7, np.uint8))
    data = '<TiffData FirstC="0" IFD="0"><UUID FileName="other.tif">urn:uuid:b</UUID></TiffData>'
    pixels = '<Pixels ID="P" DimensionOrder="XYCZT" Type="uint8" SizeX="8" SizeY="8" SizeC="1" SizeZ="1" SizeT="1">'
    description = f'<?xml version="1.0"?><OME xmlns="x"><Image ID="I">{pixels}{data}</Pixels></Image></OME>'
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint8), description=description, metadata=None)
    assert not read_image(tmp_path / "a.tif").any()


def test_other_metadata_that_ask_for_memory(tmp_path):
    shaped = json.dumps({"shape": [10**9, 8, 8], "axes": "CYX"})
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint8), description=shaped, metadata=None)
    refuses(tmp_path / "a.tif", beyond(8, 8))
    imagej = "ImageJ=1.11a\nimages=1000000000\nchannels=1000000000\nhyperstack=true\n"
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((8, 8), np.uint8), description=imagej, metadata=None)
    assert read_image(tmp_path / "b.tif").shape == (8, 8, 3)  # tifffile finds that the file is too short for it


def test_only_known_formats_reach_pillow(tmp_path, monkeypatch):
    """Pillow runs Ghostscript for PostScript; its other formats were read as well, whatever the name of the file."""
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments: pytest.fail("Ghostscript ran"))
    for suffix, kind in ((".png", "ICO"), (".jpg", "PCX"), (".bmp", "SGI"), (".tif", "DDS")):
        Image.fromarray(random_pixels(16, 16)).save(tmp_path / f"{kind}{suffix}", format=kind)
    for path in tmp_path.iterdir():
        refuses(path, "cannot be read")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_films_under_the_name_of_a_picture(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 90, 250)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
    refuses(tmp_path / "a.png", "holds several pages or frames")


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_text_of_a_png_that_unpacks_to_much(tmp_path, name):
    path = write_png(tmp_path / "a.png", bytes(12), (3, 3), 8, 0)
    body = b"a\0" + (b"\1\0\0\0" if name == b"iTXt" else b"\0") + zlib.compress(bytes(20_000_000))
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])  # behind the header
    refuses(path, "cannot be read, it may be damaged .Decompressed data too large")


def test_jpeg_of_very_many_scans(tmp_path):
    Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(tmp_path / "a.jpg", progressive=True)
    assert not read_image(tmp_path / "a.jpg", 1).any()
    content = (tmp_path / "a.jpg").read_bytes()
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    (tmp_path / "a.jpg").write_bytes(content[:start] + content[start:end] * 1300 + content[end:])
    refuses(tmp_path / "a.jpg", r"cannot be read, it may be damaged .it passes 13\d\d times over its pixels")


@pytest.mark.parametrize(
    ("mode", "read"),
    [
        ("RGB", partial(read_image, channels=1)),
        ("RGB", read_mask),
        ("P", partial(read_mask, classes=4, palette="#000000,#010101,#020202,#030303")),
    ],
    ids=["luma", "coloured mask", "palette"],
)
def test_large_images_take_little_more_memory_than_their_pixels(tmp_path, mode, read):
    """64-bit numbers for all pixels would take 216 MB, for one strip 32 MB; the memory of Pillow is not counted."""
    pixels = np.arange(3000 * 3000, dtype=np.uint8).reshape(3000, 3000) % 4
    image = Image.fromarray(np.dstack([pixels * 50, pixels, pixels]) if mode == "RGB" else pixels)
    if mode == "P":
        image.putpalette(np.repeat(np.arange(4), 3).tolist())
    image.save(tmp_path / "a.png", compress_level=1)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(action="ignore"):
            read(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


READ_IN_CHILD = """
import resource
from uctrans.data import read_image
assert read_image({path!r}).shape == (13000, 13000, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_png_of_13000_pixels_within_two_gigabytes(tmp_path):
    Image.fromarray(np.tile(random_pixels(500, 500, 3), (26, 26, 1))).save(tmp_path / "a.png", compress_level=1)
    source = READ_IN_CHILD.format(path=str(tmp_path / "a.png"))
    output = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert int(output) < 2000


def test_pictures_without_pixels(tmp_path):
    for size in ((0, 5), (5, 0)):
        refuses(write_png(tmp_path / "a.png", b"", size, 8, 0), "cannot be read")
        refuses(write_tiff(tmp_path / "a.tif", {WIDTH: size[0], HEIGHT: size[1]}), "cannot be read")
    (tmp_path / "a.pgm").write_bytes(b"P5 0 5 255\n")
    refuses(tmp_path / "a.pgm", "cannot be read")


def test_paths_that_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    refuses(tmp_path / "pipe.png", "is a named pipe, not a file; replace it by an image")
    (sample,) = find_images(tmp_path / "pipe.png")
    refuses(sample.image, "is a named pipe, not a file")
    refuses(tmp_path / "folder.png", "is a folder, not a file")
    refuses(tmp_path / "zero.png", "is a device, not a file")
    refuses(tmp_path / "loop.png", "cannot be read.*symbolic links")
    refuses(tmp_path / "gone.png", "is not a file; check the path")
    refuses(tmp_path / ("x" * 300 + ".png"), "cannot be read.*name too long")
    with pytest.raises(DataError, match=r"cannot be read.*null"):
        read_image(tmp_path / "a\0.png")
    with pytest.raises(DataError, match="is not a file") as caught:
        read_image(Path(os.fsdecode(b"/tmp/\xff.png")))
    assert str(caught.value).encode("ascii", "backslashreplace")


def test_size_without_decoding(tmp_path, monkeypatch):
    pixels = random_pixels(6, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=turned(6))
    tifffile.imwrite(tmp_path / "a.tif", random_pixels(6, 7, 5), photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "pages.tif", random_pixels(3, 6, 7), photometric="minisblack")
    write_png(tmp_path / "a.png", bytes(100), (100_000, 90_000), 8, 2)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert read_size(tmp_path / "a.jpg") == ImageSize("JPEG", 6, 7, 3)
    assert read_size(str(tmp_path / "a.tif")) == ImageSize("TIFF", 6, 7, 5)
    assert read_size(tmp_path / "pages.tif") == ImageSize("TIFF", 6, 7, 3)
    assert read_size(tmp_path / "a.png") == ImageSize("PNG", 100_000, 90_000, 3)
    with pytest.raises(DataError, match=r"gone\.tif: is not a file"):
        read_size(tmp_path / "gone.tif")


def turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def test_threads_that_read_leave_the_limit_of_pillow(tmp_path, recwarn):
    path = put(tmp_path / "a.png", random_pixels(8, 8))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        threads = [threading.Thread(target=lambda: [read_image(path) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Image.MAX_IMAGE_PIXELS == 20
    assert before == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list
