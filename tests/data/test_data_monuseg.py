"""Outlines in XML become masks and instance maps; broken annotations become errors that name the file."""

import json
import os
import sys
import time
import tracemalloc

import numpy as np
import pytest
from skimage.io import imread

from tests.data.support import put
from uctrans.data import (
    DataError,
    PreparedImage,
    fill_polygons,
    find_images,
    find_samples,
    prepare_instances,
    prepare_monuseg,
    read_annotation,
    read_mask,
)
from uctrans.data.monuseg import MAX_XML_BYTES

SQUARE = [(2, 3), (5, 3), (5, 8), (2, 8)]


def write_xml(path, *regions, attributes=' MicronsPerPixel="0.2525"'):
    vertices = ("".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in region) for region in regions)
    body = "".join(
        f'<Region Id="{i}"><Vertices>{inner}</Vertices></Region>' for i, inner in enumerate(vertices, start=1)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<Annotations{attributes}><Annotation><Regions>{body}</Regions></Annotation></Annotations>")
    return path


@pytest.fixture
def images(tmp_path):
    put(tmp_path / "images" / "a.png", np.zeros((12, 10, 3), dtype=np.uint8))
    return tmp_path / "images"


def test_writes_masks_and_instance_maps(tmp_path, images):
    write_xml(tmp_path / "xml" / "a.xml", SQUARE, [(7, 1), (9, 1), (9, 4)])
    (prepared,) = prepare_monuseg(tmp_path / "xml", images, tmp_path)
    assert prepared == PreparedImage("a", nuclei=2, skipped=0, hidden=0, microns_per_pixel=0.2525)
    instances = imread(tmp_path / "instances" / "a.png")
    mask = imread(tmp_path / "masks" / "a.png")
    assert (instances.dtype, mask.dtype, instances.shape) == (np.uint16, np.uint8, (12, 10))
    assert np.unique(instances).tolist() == [0, 1, 2]
    assert (instances[4:8, 3:5] == 1).all()
    assert np.argwhere(instances == 1)[:, 0].max() <= 8
    np.testing.assert_array_equal(mask, np.where(instances > 0, 255, 0))
    summary = {"a": {"nuclei": 2, "skipped": 0, "hidden": 0, "microns_per_pixel": 0.2525}}
    assert json.loads((tmp_path / "annotations.json").read_text()) == summary
    (sample,) = find_samples(tmp_path)
    assert read_mask(sample.mask, shape=(12, 10)).sum() == (mask > 0).sum()


def test_one_file_and_a_folder_shared_by_images_and_annotations(images, tmp_path, recwarn):
    path = write_xml(images / "a.XML", SQUARE)
    assert [item.name for item in prepare_monuseg(path, images, tmp_path / "one")] == ["a"]
    assert [item.name for item in prepare_monuseg(images, images, tmp_path / "folder")] == ["a"]
    assert not recwarn.list


def test_images_without_annotation_are_passed_over(tmp_path, images):
    put(images / "b.png", np.zeros((4, 4), dtype=np.uint8))
    write_xml(tmp_path / "xml" / "a.xml", SQUARE)
    prepare_monuseg(tmp_path / "xml", images, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["a.png"]


@pytest.mark.parametrize(("folder", "overwrite"), [("masks", False), ("instances", True)])
def test_the_image_folder_is_never_written_to(tmp_path, images, folder, overwrite):
    images = images.rename(tmp_path / folder)
    link = tmp_path / "link"
    link.symlink_to(images)
    before = (images / "a.png").read_bytes()
    path = write_xml(tmp_path / "a.xml", SQUARE)
    for source in (images, link):
        with pytest.raises(DataError, match=rf"{folder}: is the folder of the images.*choose another output folder"):
            prepare_monuseg(path, source, tmp_path, overwrite=overwrite)
    assert (images / "a.png").read_bytes() == before
    assert not (tmp_path / "annotations.json").exists()


@pytest.mark.parametrize("existing", ["masks/a.png", "instances/a.png", "annotations.json"])
def test_existing_files_are_replaced_only_when_asked(tmp_path, images, existing):
    path = write_xml(tmp_path / "a.xml", SQUARE)
    file = tmp_path / "out" / existing
    file.parent.mkdir(parents=True)
    file.write_bytes(b"hand-made")
    with pytest.raises(DataError, match=rf"{existing}: 1 of the files to write exist already; .*set overwrite"):
        prepare_monuseg(path, images, tmp_path / "out")
    assert [item.read_bytes() for item in (tmp_path / "out").rglob("*.*")] == [b"hand-made"]
    prepare_monuseg(path, images, tmp_path / "out", overwrite=True)
    assert file.read_bytes() != b"hand-made"


def test_masks_of_other_images_may_be_there(tmp_path, images):
    put(tmp_path / "masks" / "b.png", np.zeros((4, 4), dtype=np.uint8))
    prepare_monuseg(write_xml(tmp_path / "a.xml", SQUARE), images, tmp_path)
    assert sorted(file.name for file in (tmp_path / "masks").iterdir()) == ["a.png", "b.png"]


def test_vertices_outside_the_image_are_cut_off(tmp_path, images):
    write_xml(tmp_path / "a.xml", [(-5, -5), (4, -5), (4, 4), (-5, 4)], [(8, 10), (40, 10), (40, 40), (8, 40)])
    prepare_monuseg(tmp_path / "a.xml", images, tmp_path)
    instances = imread(tmp_path / "instances" / "a.png")
    assert (instances[:4, :4] == 1).all()
    assert (instances[11:, 9:] == 2).all()
    assert (instances[5:9] == 0).all()


def test_cut_off_polygons_equal_a_crop_of_whole_ones():
    generator = np.random.default_rng(0)
    polygons = [generator.uniform(-20, 60, (5, 2)) for _ in range(10)]
    whole = fill_polygons([polygon + 20 for polygon in polygons], (80, 80))[20:60, 20:60]
    np.testing.assert_array_equal(fill_polygons(polygons, (40, 40)) > 0, whole > 0)


def test_regions_with_few_vertices_are_counted_in_one_warning(tmp_path):
    path = write_xml(tmp_path / "a.xml", SQUARE, [(1, 1), (2, 2)], [], [(3, 3)])
    with pytest.warns(UserWarning, match=r"a\.xml: 3 regions with fewer than 3 vertices were skipped") as caught:
        annotation = read_annotation(path)
    assert len(caught) == 1
    assert (len(annotation.polygons), annotation.skipped) == (1, 3)
    np.testing.assert_array_equal(annotation.polygons[0], SQUARE)


@pytest.mark.parametrize("attributes", ["", ' MicronsPerPixel=""', ' MicronsPerPixel="?"', ' MicronsPerPixel="0"'])
def test_resolution_may_be_missing(tmp_path, attributes):
    assert read_annotation(write_xml(tmp_path / "a.xml", SQUARE, attributes=attributes)).microns_per_pixel is None


def test_annotation_without_nuclei_gives_an_empty_mask_and_a_warning(tmp_path, images):
    with pytest.warns(UserWarning, match=r"a\.xml: outlines no nucleus inside its image"):
        prepare_monuseg(write_xml(tmp_path / "a.xml", [(50, 50), (60, 50), (60, 60)]), images, tmp_path)
    assert imread(tmp_path / "masks" / "a.png").max() == 0


def test_annotation_without_image(tmp_path, images):
    write_xml(tmp_path / "xml" / "a.xml", SQUARE)
    write_xml(tmp_path / "xml" / "b.xml", SQUARE)
    with pytest.raises(DataError, match=r"images: has no image of the same stem for the annotations b\.xml; add"):
        prepare_monuseg(tmp_path / "xml", images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "not xml", "<Annotations><Region></Annotations>"])
def test_file_that_is_no_xml(tmp_path, images, content):
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(DataError, match=r"a\.xml: is not well-formed XML .*export it again"):
        prepare_monuseg(tmp_path / "a.xml", images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["foo", "shift_jis", "rot13", "idna"])
def test_encoding_that_cannot_be_read(tmp_path, encoding):
    (tmp_path / "a.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?><Annotations/>')
    with pytest.raises(DataError, match=r"a\.xml: declares a text encoding that cannot be read .*save it as UTF-8"):
        read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize(
    "declaration",
    ['<!ENTITY a "x"><!ENTITY b "&a;&a;&a;&a;">', '<!ENTITY b SYSTEM "file:///etc/hostname">'],
    ids=["expansion", "external"],
)
def test_entities_are_refused(tmp_path, declaration):
    (tmp_path / "a.xml").write_text(f"<!DOCTYPE x [{declaration}]><Annotations>&b;</Annotations>")
    with pytest.raises(DataError, match=r"a\.xml: declares entities.*was not read"):
        read_annotation(tmp_path / "a.xml")


def test_xml_of_another_kind(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match=r"a\.xml: is not an Aperio annotation \(its root is <annotation>"):
        read_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize("vertex", ['X="1"', 'X="1" Y="b"', 'X="nan" Y="2"', 'X="1" Y="inf"', 'X="1e300" Y="1"'])
def test_vertex_without_coordinates(tmp_path, vertex):
    path = write_xml(tmp_path / "a.xml", SQUARE)
    path.write_text(path.read_text().replace('X="5" Y="3"', vertex))
    with pytest.raises(DataError, match=r"a\.xml: region 1 has a vertex with X=.*not two numbers"):
        read_annotation(path)


@pytest.mark.parametrize("part", ["<a>" * 200, "<Regions>" * 100_000])
def test_deeply_nested_elements(tmp_path, part):
    path = tmp_path / "a.xml"
    path.write_text(f"<Annotations>{part}")
    with pytest.raises(DataError, match=r"a\.xml: is nested in more than 100 levels"):
        read_annotation(path)


def test_paths_that_are_no_annotation(tmp_path, images):
    os.mkfifo(tmp_path / "a.xml")
    for path in (tmp_path / "a.xml", tmp_path):
        with pytest.raises(DataError, match=r"a\.xml: is a named pipe, not a file; name an XML file"):
            prepare_monuseg(path, images, tmp_path / "out")
    with pytest.raises(DataError, match="zero: is a device, not a file"):
        read_annotation("/dev/zero")
    (tmp_path / "b.xml").write_bytes(b"<Annotations>")
    os.truncate(tmp_path / "b.xml", MAX_XML_BYTES + 1)  # a hole, which takes no space
    with pytest.raises(DataError, match=r"b\.xml: is larger than 536870912 bytes"):
        read_annotation(tmp_path / "b.xml")


def test_elements_without_outlines_take_no_memory(tmp_path):
    path = write_xml(tmp_path / "a.xml", SQUARE)
    path.write_text(path.read_text().replace("<Vertices>", "<Vertices>" + "<Attribute Name='x'/>" * 20_000))
    read_annotation(path)  # what is imported for the first time is not counted
    tracemalloc.start()
    try:
        (polygon,) = read_annotation(path).polygons
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(polygon, SQUARE)


@pytest.mark.slow
def test_time_grows_with_the_length_of_an_attribute_alone(tmp_path):
    seconds = []
    for megabytes in (16, 64):
        (tmp_path / "a.xml").write_text(f'<Annotations a="{"x" * (megabytes << 20)}"/>')
        start = time.process_time()
        assert read_annotation(tmp_path / "a.xml").polygons == []
        seconds.append(time.process_time() - start)
    assert seconds[1] < 9 * seconds[0]  # 16 times if it grew with the square


def test_outlines_that_would_take_hours_to_fill(tmp_path, images):
    angles = np.linspace(0, 2 * np.pi, 50_000)
    ring = np.stack([500 + 480 * np.cos(angles), 500 + 480 * np.sin(angles)], 1)
    with pytest.raises(DataError, match=r"polygons: their vertices and the pixels in them would take 5e\+10 tests"):
        fill_polygons([ring], (1000, 1000))
    assert fill_polygons([ring + 2000], (1000, 1000)).max() == 0  # outside of the image
    path = write_xml(tmp_path / "a.xml", np.repeat(np.array(SQUARE) * 300, 10**4, axis=0))
    put(images / "a.png", np.zeros((2000, 2000), np.uint8))
    with pytest.raises(DataError, match=r"a\.xml: polygons: their vertices"):
        prepare_monuseg(path, images, tmp_path / "out")


def test_missing_folders_and_files(tmp_path, images):
    with pytest.raises(DataError, match="nowhere: does not exist"):
        prepare_monuseg(tmp_path / "nowhere", images, tmp_path)
    with pytest.raises(DataError, match=r"holds no \.xml file"):
        prepare_monuseg(images, images, tmp_path)
    path = write_xml(tmp_path / "a.xml", SQUARE)
    with pytest.raises(DataError, match="nowhere: is not a folder"):
        prepare_monuseg(path, tmp_path / "nowhere", tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_annotation(tmp_path / "b.xml")


def test_without_defusedxml_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "defusedxml", None)
    with pytest.raises(ImportError, match=r'pip install "uctrans\[training\]"'):
        read_annotation(write_xml(tmp_path / "a.xml", SQUARE))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_large_outline_never_swallows_a_nucleus_inside_it(order):
    small, large = np.array(SQUARE), np.array([(0, 0), (11, 0), (11, 11), (0, 11)])
    instances = fill_polygons([(small, large)[index] for index in order], (12, 12))
    small_number, large_number = order.index(0) + 1, order.index(1) + 1
    assert (instances[4:8, 3:5] == small_number).all()
    assert (instances[0, 0], instances[10, 10]) == (large_number, large_number)
    assert np.unique(instances).tolist() == [1, 2]


def test_hidden_nuclei_give_a_warning_and_numbers_have_no_gaps():
    square, large = np.array(SQUARE), np.array([(0, 0), (11, 0), (11, 11), (0, 11)])
    halves = [np.array([(2, 3), (5, 3), (5, 5), (2, 5)]), np.array([(2, 6), (5, 6), (5, 8), (2, 8)])]
    outside = square + 100
    with pytest.warns(UserWarning, match="2 outlines lie wholly under others"):
        instances = fill_polygons([square, outside, large, *halves, halves[0]], (12, 12))
    assert np.unique(instances).tolist() == [1, 2, 3]
    assert (instances[0, 0], instances[4, 3], instances[7, 3]) == (1, 2, 3)  # of equal halves the earlier is on top


def test_overlaps_that_leave_every_nucleus_a_pixel_are_no_reason_to_warn(recwarn):
    left, right = np.array([(0, 0), (6, 0), (6, 6), (0, 6)]), np.array([(4, 0), (11, 0), (11, 6), (4, 6)])
    instances = fill_polygons([right, left], (12, 12))
    assert (instances[3, 3:8] == [2, 2, 2, 2, 1]).all()
    assert not recwarn.list


def test_prepare_counts_hidden_nuclei_and_names_the_file(tmp_path, images):
    write_xml(tmp_path / "a.xml", SQUARE, SQUARE, [(7, 1), (9, 1), (9, 4)])
    with pytest.warns(UserWarning, match=r"a\.xml: 1 outlines lie wholly under others") as caught:
        (prepared,) = prepare_monuseg(tmp_path / "a.xml", images, tmp_path)
    assert len(caught) == 1
    assert (prepared.nuclei, prepared.hidden) == (2, 1)
    assert json.loads((tmp_path / "annotations.json").read_text())["a"]["hidden"] == 1
    assert np.unique(imread(tmp_path / "instances" / "a.png")).tolist() == [0, 1, 2]


def test_no_polygons():
    assert fill_polygons([], (3, 4)).tolist() == [[0] * 4] * 3


def test_more_nuclei_than_a_map_can_number():
    with pytest.raises(DataError, match="65536 nuclei"):
        fill_polygons([np.array(SQUARE)] * 65536, (4, 4))


SIZE = 96


def circle(row, column, radius):
    """Return the outline of a nucleus, (vertices, 2) of (x, y)."""
    angles = np.linspace(0, 2 * np.pi, 40)[:-1]
    return np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], axis=1)


# Two nuclei that touch, one that the image cuts off, and one alone.
OUTLINES = [circle(30, 20, 11), circle(30, 41, 11), circle(95, 60, 12), circle(60, 75, 9)]


def write_image(folder, name, outlines=OUTLINES):
    """Write an image that is bright in its nuclei, and its mask, a row lower than the outlines."""
    foreground = fill_polygons([outline + np.array([0, 1]) for outline in outlines], (SIZE, SIZE)) > 0
    pixels = foreground * np.uint8(255)
    for kind, content in (("images", pixels[..., None].repeat(3, -1)), ("masks", pixels)):
        put(folder / kind / f"{name}.png", content)


@pytest.fixture
def split(tmp_path):
    """Write a dataset that comes split; one of two training images and the test image have outlines."""
    for folder, name in (("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")):
        write_image(tmp_path / folder, name)
    for name in ("b", "d"):
        write_xml(tmp_path / "annotations" / f"{name}.xml", *OUTLINES)
    return tmp_path


def content(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}


def test_outlines_become_instance_maps_of_their_splits(split):
    before = content(split)
    prepared = prepare_instances(split / "annotations", split)
    assert [(item.name, item.nuclei) for item in prepared] == [("b", 4), ("d", 4)]
    after = content(split)
    assert before.items() <= after.items()  # masks above all
    assert set(after) - set(before) == {"train/instances/b.png", "test/instances/d.png", "annotations.json"}
    np.testing.assert_array_equal(imread(split / "test/instances/d.png"), fill_polygons(OUTLINES, (SIZE, SIZE)))


def test_outlines_are_sorted_to_their_splits_or_refused(split):
    write_xml(split / "annotations" / "e.xml", *OUTLINES)
    with pytest.raises(DataError, match=r"no image of the same stem for the annotations e\.xml; add the images"):
        prepare_instances(split / "annotations", split)
    write_image(split / "val", "d")
    with pytest.raises(DataError, match=r"images/d\.png: shares its name with .*images/d\.png"):
        prepare_instances(split / "annotations" / "d.xml", split)
    assert not list(split.rglob("instances"))


def test_outlines_of_another_picture_of_the_same_name(split):
    write_xml(split / "annotations" / "d.xml", *(outline[:, ::-1] for outline in OUTLINES))
    with pytest.raises(DataError, match=r"d\.xml: its outlines do not fit the mask .*test.masks.d\.png \(Dice 0\."):
        prepare_instances(split / "annotations", split)
    assert not list(split.rglob("instances"))


def test_instance_maps_are_replaced_only_when_asked_and_masks_never(split):
    prepare_instances(split / "annotations", split)
    made = content(split)
    with pytest.raises(DataError, match=r"b\.png.*: 3 of the files to write exist already; .*; masks stay as they are"):
        prepare_instances(split / "annotations", split)
    write_xml(split / "annotations" / "d.xml", *OUTLINES[:3])
    prepare_instances(split / "annotations", split, overwrite=True)
    changed = {name for name, inside in content(split).items() if inside != made[name]}
    assert changed == {"annotations/d.xml", "test/instances/d.png", "annotations.json"}
    put(split / "test/instances/d.tif", imread(split / "test/instances/d.png"))
    (split / "test/instances/d.png").unlink()
    with pytest.raises(DataError, match=r"instance maps that are not PNG files \(.*d\.tif\); remove them"):
        prepare_instances(split / "annotations", split, overwrite=True)


def test_a_flat_dataset_with_masks(tmp_path):
    write_image(tmp_path, "a")
    write_xml(tmp_path / "a.xml", *OUTLINES)
    mask = (tmp_path / "masks/a.png").read_bytes()
    prepare_instances(tmp_path / "a.xml", tmp_path)
    assert imread(tmp_path / "instances/a.png").max() == 4
    (tmp_path / "instances/a.png").unlink()
    (tmp_path / "instances").rmdir()
    (tmp_path / "instances").symlink_to("masks")
    message = "instances: is the folder of the masks, which the results would replace; .*remove the link"
    with pytest.raises(DataError, match=message):
        prepare_instances(tmp_path / "a.xml", tmp_path, overwrite=True)
    with pytest.raises(DataError, match=message):
        prepare_monuseg(tmp_path / "a.xml", tmp_path / "images", tmp_path, overwrite=True)
    assert (tmp_path / "masks/a.png").read_bytes() == mask


def test_folders_without_masks(tmp_path):
    write_image(tmp_path, "a")
    write_xml(tmp_path / "a.xml", *OUTLINES)
    (tmp_path / "masks").rename(tmp_path / "labels")
    with pytest.raises(DataError, match="has images and no masks; give images as well"):
        prepare_instances(tmp_path / "a.xml", tmp_path)
    with pytest.raises(DataError, match="nowhere: is not a folder"):
        prepare_instances(tmp_path / "a.xml", tmp_path / "nowhere")


@pytest.mark.slow
def test_filled_polygons_agree_with_the_stored_masks(monuseg, tmp_path):
    """The stored masks are thinner than the outlines and shifted by a pixel, so they overlap well but are not equal."""
    files = sorted((monuseg / "annotations").glob("*.xml"))
    split_of = {sample.name: split for split in ("train", "val", "test") for sample in find_samples(monuseg, split)}
    for split in {split_of[file.stem] for file in files}:
        (tmp_path / split).mkdir()
    for file in files:
        (tmp_path / split_of[file.stem] / file.name).symlink_to(file)
    scores = {}
    for folder in sorted(tmp_path.iterdir()):
        for item in prepare_monuseg(folder, monuseg / folder.name / "images", folder / "out"):
            assert item.nuclei > 200
            assert item.hidden <= 2
            assert item.microns_per_pixel == pytest.approx(0.25, abs=0.01)
            filled = read_mask(folder / "out" / "masks" / f"{item.name}.png") > 0
            stored = read_mask(monuseg / folder.name / "masks" / f"{item.name}.png") > 0
            scores[item.name] = 2 * (filled & stored).sum() / (filled.sum() + stored.sum())
            instances = imread(folder / "out" / "instances" / f"{item.name}.png")
            assert len(np.unique(instances)) == item.nuclei + 1
        assert len(find_images(folder / "out" / "masks")) == len(list(folder.glob("*.xml")))
    assert len(scores) == len(files) == 18
    assert min(scores.values()) >= 0.90, scores
