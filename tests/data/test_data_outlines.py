"""Instance maps from outlines in XML, beside masks that stay as they are."""

import numpy as np
import pytest
from skimage.io import imread, imsave

from uctrans.data import DataError, fill_polygons, prepare_instances

SIZE = 96


def circle(row, column, radius):
    """The outline of a nucleus, (vertices, 2) of (x, y)."""
    angles = np.linspace(0, 2 * np.pi, 40)[:-1]
    return np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], axis=1)


# Two nuclei that touch, one that the image cuts off, and one alone.
OUTLINES = [circle(30, 20, 11), circle(30, 41, 11), circle(95, 60, 12), circle(60, 75, 9)]


def write_image(folder, name, outlines=OUTLINES):
    """An image that is bright in its nuclei, and its mask, a row lower than the outlines say."""
    foreground = fill_polygons([outline + np.array([0, 1]) for outline in outlines], (SIZE, SIZE)) > 0
    pixels = foreground * np.uint8(255)
    for kind, content in (("images", pixels[..., None].repeat(3, -1)), ("masks", pixels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        imsave(folder / kind / f"{name}.png", content, check_contrast=False)


def write_annotation(path, outlines=OUTLINES):
    vertices = ("".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in outline) for outline in outlines)
    regions = "".join(f"<Region><Vertices>{inner}</Vertices></Region>" for inner in vertices)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>")


@pytest.fixture
def split(tmp_path):
    """A dataset that comes split; one of two training images, none for validation and the test image have outlines."""
    for folder, name in (("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")):
        write_image(tmp_path / folder, name)
    for name in ("b", "d"):
        write_annotation(tmp_path / "annotations" / f"{name}.xml")
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
    write_annotation(split / "annotations" / "e.xml")
    with pytest.raises(DataError, match=r"no image of the same stem for the annotations e\.xml; add the images"):
        prepare_instances(split / "annotations", split)
    write_image(split / "val", "d")
    with pytest.raises(DataError, match=r"images/d\.png: shares its name with .*images/d\.png"):
        prepare_instances(split / "annotations" / "d.xml", split)
    assert not list(split.rglob("instances"))


def test_outlines_of_another_picture_of_the_same_name(split):
    write_annotation(split / "annotations" / "d.xml", [outline[:, ::-1] for outline in OUTLINES])
    with pytest.raises(DataError, match=r"d\.xml: its outlines do not fit the mask .*test.masks.d\.png \(Dice 0\."):
        prepare_instances(split / "annotations", split)
    assert not list(split.rglob("instances"))


def test_instance_maps_are_replaced_only_when_asked_and_masks_never(split):
    prepare_instances(split / "annotations", split)
    made = content(split)
    with pytest.raises(DataError, match=r"b\.png.*: 3 of the files to write exist already; .*; masks stay as they are"):
        prepare_instances(split / "annotations", split)
    write_annotation(split / "annotations" / "d.xml", OUTLINES[:3])
    prepare_instances(split / "annotations", split, overwrite=True)
    changed = {name for name, inside in content(split).items() if inside != made[name]}
    assert changed == {"annotations/d.xml", "test/instances/d.png", "annotations.json"}
    imsave(split / "test/instances/d.tif", imread(split / "test/instances/d.png"), check_contrast=False)
    (split / "test/instances/d.png").unlink()
    with pytest.raises(DataError, match=r"instance maps that are not PNG files \(.*d\.tif\); remove them"):
        prepare_instances(split / "annotations", split, overwrite=True)


def test_a_flat_dataset_with_masks(tmp_path):
    write_image(tmp_path, "a")
    write_annotation(tmp_path / "a.xml")
    mask = (tmp_path / "masks/a.png").read_bytes()
    prepare_instances(tmp_path / "a.xml", tmp_path)
    assert imread(tmp_path / "instances/a.png").max() == 4
    assert (tmp_path / "masks/a.png").read_bytes() == mask


def test_folders_without_masks(tmp_path):
    write_image(tmp_path, "a")
    write_annotation(tmp_path / "a.xml")
    (tmp_path / "masks").rename(tmp_path / "labels")
    with pytest.raises(DataError, match="has images and no masks; give images as well"):
        prepare_instances(tmp_path / "a.xml", tmp_path)
    with pytest.raises(DataError, match="nowhere: is not a folder"):
        prepare_instances(tmp_path / "a.xml", tmp_path / "nowhere")
