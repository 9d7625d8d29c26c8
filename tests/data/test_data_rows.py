"""Rows of an image file are those of the whole image, whatever the layout of the file."""

import itertools
import threading
import zlib

import numpy as np
import pytest
import tifffile
from skimage.io import imsave

from uctrans.data import DataError, read_image
from uctrans.data import rows as rows_module
from uctrans.data.read import Doubts
from uctrans.data.rows import open_rows

SIZE = (600, 70)
LAYOUTS = {
    "tiles": {"tile": (32, 48), "compression": "zlib"},
    "tiles with a predictor": {"tile": (32, 48), "compression": "zlib", "predictor": True},
    "tiles without compression": {"tile": (32, 48)},
    "tiles larger than the image": {"tile": (1024, 1024), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "rows": {"rowsperstrip": 1, "compression": "zlib"},
    "one piece": {},
    "one piece, other byte order": {"byteorder": ">"},
    "tiles, other byte order": {"byteorder": ">", "tile": (32, 48), "compression": "zlib"},
    "large offsets": {"bigtiff": True, "tile": (32, 48), "compression": "zlib"},
}


def picture(samples=3, dtype=np.uint8, size=SIZE):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (*size, samples), dtype=dtype, endpoint=True)
    return values[..., 0] if samples == 1 else values


def write(path, pixels, **layout):
    tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", **layout)


def read_by_rows(path, channels=3, intensity_range=None, steps=(0, 100, 300, 301, 600), doubts=None):
    with open_rows(path, channels, intensity_range, doubts or Doubts()) as rows:
        parts = [rows.read(top, bottom) for top, bottom in itertools.pairwise(steps)]
        assert rows.size == SIZE
    return np.concatenate(parts)


@pytest.fixture
def in_parts(monkeypatch):
    """Fail if a file is decoded as a whole."""
    monkeypatch.setattr(rows_module, "decode_image", None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("samples", "dtype"), [(3, np.uint8), (1, np.uint8), (3, np.uint16)])
def test_layouts_of_tiff(layout, samples, dtype, tmp_path, in_parts):
    path = tmp_path / "a.tif"
    write(path, picture(samples, dtype), **LAYOUTS[layout])
    np.testing.assert_array_equal(read_by_rows(path), read_image(path))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore:1 images hold values up to 4095")
def test_channels_and_ranges(channels, tmp_path, in_parts):
    path = tmp_path / "a.tif"
    write(path, picture(3, np.uint16) // 16, tile=(32, 48))
    doubts = Doubts()
    found = read_by_rows(path, channels, (100, 4000), doubts=doubts)
    np.testing.assert_array_equal(found, read_image(path, channels, (100, 4000)))
    assert doubts.highest[path] == (4095, 4000)


def test_a_page_with_reduced_copies(tmp_path, in_parts):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(picture(), photometric="rgb", tile=(32, 48), subifds=0)
        file.write(picture()[::2, ::2], photometric="rgb", tile=(32, 48), subfiletype=1)
    np.testing.assert_array_equal(read_by_rows(path), read_image(path))


@pytest.mark.parametrize("kind", ["png", "alpha", "orientation", "palette", "planes", "lzw"])
@pytest.mark.filterwarnings("ignore:1 images have an alpha channel")
def test_other_files_are_decoded_as_a_whole(kind, tmp_path):
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    if kind == "png":
        imsave(path, picture(), check_contrast=False)
    elif kind == "alpha":
        tifffile.imwrite(path, picture(4), photometric="rgb", extrasamples=["unassalpha"], tile=(32, 48))
    elif kind == "orientation":
        write(path, picture(size=SIZE[::-1]), tile=(32, 48), extratags=[(274, 3, 1, 6, False)])
    elif kind == "palette":
        colours = np.random.default_rng(0).integers(0, 1 << 16, (3, 256), dtype=np.uint16)
        tifffile.imwrite(path, picture(1), photometric="palette", colormap=colours)
    elif kind == "planes":
        tifffile.imwrite(path, np.moveaxis(picture(), -1, 0), photometric="rgb", planarconfig="separate")
    else:
        from PIL import Image

        Image.fromarray(picture()).save(path, compression="tiff_lzw")
    np.testing.assert_array_equal(read_by_rows(path), read_image(path))


def test_wrong_channels_are_named(tmp_path):
    path = tmp_path / "a.tif"
    write(path, picture(3), tile=(32, 48))
    with pytest.raises(DataError, match="has 3 channels, but the network takes 4"):
        read_by_rows(path, 4)


def test_the_next_rows_are_decoded_in_a_thread_and_few_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    write(path, picture(size=(5000, 16)), tile=(16, 16), compression="zlib")
    decoded, threads, image_of = [], set(), rows_module.image_of
    begun = threading.Event()

    def note(picture, *arguments):
        threads.add(threading.current_thread())
        decoded.append(len(picture.channels))
        if len(decoded) == 2:
            begun.set()
        return image_of(picture, *arguments)

    monkeypatch.setattr(rows_module, "image_of", note)
    with open_rows(path, 3, None, Doubts()) as rows:
        rows.read(0, 10)
        assert begun.wait(20)  # the band after the one that was asked for
        for top in range(0, 5000, 100):
            rows.read(top, min(top + 200, 5000))
        assert len(rows.read.__self__._decoded) <= rows_module.KEPT_BANDS + 3
    assert sum(decoded) == 5000
    assert threading.main_thread() not in threads


def test_a_damaged_tile_is_an_error_of_the_file(tmp_path):
    path = tmp_path / "a.tif"
    write(path, picture(), tile=(32, 48), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tif: cannot be read, it may be damaged"):
        read_by_rows(path)


def test_a_tile_that_unpacks_to_more_than_its_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "HARMLESS_BYTES", 100)
    path = tmp_path / "a.tif"
    bombs = (zlib.compress(bytes(1 << 20)) for _ in range(38))
    tifffile.imwrite(path, bombs, shape=(*SIZE, 3), dtype=np.uint8, photometric="rgb", tile=(32, 48), compression=8)
    with pytest.raises(DataError, match="unpacks to more than its pixels"):
        read_by_rows(path)
