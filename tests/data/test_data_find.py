"""Folder layouts, pairing by stem, seeded splits, and what is wrong with a folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from functools import partial

import numpy as np
import pytest

from tests.data.support import names_of, put, put_pairs
from uctrans.data import (
    DataError,
    find_development_samples,
    find_images,
    find_samples,
    find_split,
    load_folds,
    make_folds,
    read_image,
)
from uctrans.data.find import describe_draw, find_all_samples
from uctrans.data.instances import find_instances

BLACK = np.zeros((4, 4), dtype=np.uint8)


@pytest.fixture
def flat(tmp_path):
    return put_pairs(tmp_path, *(f"n{i:02d}" for i in range(20)))


@pytest.mark.parametrize(
    ("folder", "images", "masks"),
    [("{}", "images", "masks"), ("{}_Folder", "img", "labelcol")],
    ids=["plain", "published"],
)
def test_split_folders(tmp_path, folder, images, masks):
    for split in ("train", "val", "test"):
        base = tmp_path / folder.format(split if folder == "{}" else split.title())
        put_pairs(base, f"{split}_b", f"{split}_a", images=images, masks=masks)
    for split in ("train", "val", "test"):
        samples = find_samples(tmp_path, split)
        assert names_of(samples) == [f"{split}_a", f"{split}_b"]
        assert [sample.image.parent.name for sample in samples] == [images] * 2
        assert [sample.mask.parent.name for sample in samples] == [masks] * 2
    assert names_of(find_development_samples(tmp_path)) == ["train_a", "train_b", "val_a", "val_b"]
    assert len(find_all_samples(tmp_path)) == 6
    assert describe_draw(tmp_path, "val", 2) is None


def test_image_and_mask_may_have_different_extensions(tmp_path):
    put_pairs(tmp_path, "a.b")
    (tmp_path / "images" / "a.b.png").rename(tmp_path / "images" / "a.b.TIFF")
    (sample,) = find_samples(tmp_path)
    assert (sample.name, sample.image.name, sample.mask.name) == ("a.b", "a.b.TIFF", "a.b.png")


def test_seeded_split_covers_the_folder_once_and_repeats(flat):
    parts = {split: names_of(find_samples(flat, split, seed=3)) for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in parts.items()} == {"train": 12, "val": 4, "test": 4}
    assert sorted([*parts["train"], *parts["val"], *parts["test"]]) == names_of(find_samples(flat))
    assert parts["test"] == names_of(find_samples(flat, "test", seed=3))
    assert parts["test"] != names_of(find_samples(flat, "test", seed=4))
    assert describe_draw(flat, "test", 4) == f"{flat} comes unsplit: 4 of its 20 images are drawn for test"


@pytest.mark.parametrize("draw", [{}, {"seed": 3}, {"test_fraction": 0.5}, {"val_fraction": 0.1, "test_fraction": 0}])
def test_folds_never_get_the_test_images_of_a_flat_folder(flat, draw):
    """The defaults are those with which training and evaluation look for their images."""
    development = names_of(find_development_samples(flat, **draw))
    parts = {split: names_of(find_samples(flat, split, **draw)) for split in ("train", "val")}
    assert development == sorted(parts["train"] + parts["val"])
    if draw.get("test_fraction") != 0:
        assert not set(development) & set(names_of(find_samples(flat, "test", **draw)))


def test_flat_folder_of_one_image_has_none_for_folds(tmp_path):
    with pytest.raises(DataError, match="has 1 images, all of them for testing; add images"):
        find_development_samples(put_pairs(tmp_path, "a"))


def test_seeded_split_does_not_depend_on_the_machine(flat):
    assert names_of(find_samples(flat, "test", seed=0)) == ["n10", "n14", "n16", "n18"]


def test_fractions(flat):
    assert len(find_samples(flat, "train", val_fraction=0.5, test_fraction=0.25)) == 5
    assert len(find_samples(flat, "val", val_fraction=0.01, test_fraction=0)) == 1
    with pytest.raises(DataError, match="too few to put any into 'test'"):
        find_samples(flat, "test", test_fraction=0)
    for fractions in ({"val_fraction": 0.5, "test_fraction": 0.5}, {"val_fraction": -0.1}):
        with pytest.raises(DataError, match="leave nothing to train on; give two numbers"):
            find_samples(flat, "train", **fractions)


def test_images_without_and_masks_without_partner_are_both_listed(tmp_path):
    put_pairs(tmp_path, "both")
    put(tmp_path / "images" / "lonely_image.png", BLACK)
    put(tmp_path / "masks" / "lonely_mask.png", BLACK)
    with pytest.raises(DataError, match=r"masks: lonely_image;.*images: lonely_mask\); add, rename or remove"):
        find_samples(tmp_path)


def test_masks_may_be_optional(tmp_path):
    for name in "ab":
        put(tmp_path / "images" / f"{name}.png", BLACK)
    with pytest.raises(DataError, match="masks: is missing; put one mask for each image there"):
        find_samples(tmp_path)
    assert [sample.mask for sample in find_samples(tmp_path, require_masks=False)] == [None, None]
    put(tmp_path / "masks" / "b.png", BLACK)
    assert [sample.mask is None for sample in find_samples(tmp_path, require_masks=False)] == [True, False]


def test_stray_files_bring_one_warning_and_hidden_files_none(tmp_path):
    put_pairs(tmp_path, "a")
    for stray in ("notes.txt", "Thumbs.db", ".hidden"):
        (tmp_path / "images" / stray).write_text("x")
    (tmp_path / "masks" / ".DS_Store").write_text("x")
    with pytest.warns(UserWarning) as caught:
        assert names_of(find_samples(tmp_path)) == ["a"]
    assert len(caught) == 1
    assert str(caught[0].message).endswith("images: ignored files that are not images: Thumbs.db, notes.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_of(find_images(tmp_path / "masks")) == ["a"]


def test_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"images: holds no image; use .* extensions .*\.png"):
        find_samples(tmp_path)


@pytest.mark.parametrize("folder", ["data", "caf\udce9"])
def test_names_that_are_not_utf8_are_shown_escaped(folder, tmp_path):
    root = tmp_path / folder
    put_pairs(root, "a" if folder != "data" else "caf\udce9")
    for find in (lambda: find_samples(root), lambda: find_images(root / "images")):
        with pytest.raises(DataError, match=r"caf\\udce9.*: is not UTF-8; rename the file or its folder") as raised:
            find()
        str(raised.value).encode()


def test_two_images_of_one_stem(tmp_path):
    put_pairs(tmp_path, "a")
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    for find, path in ((find_samples, tmp_path), (find_images, tmp_path / "images")):
        with pytest.raises(DataError, match=r"a\.jpg: shares its stem with a\.png.*rename one"):
            find(path)


def test_missing_split_folder_names_the_layouts(tmp_path):
    put_pairs(tmp_path / "train", "a")
    with pytest.raises(DataError, match=r"no folder for the split 'test', only train; a dataset .*labelcol"):
        find_samples(tmp_path, "test")
    with pytest.raises(DataError, match="say which split"):
        find_samples(tmp_path)
    with pytest.raises(DataError, match="split: 'dev' is unknown"):
        find_samples(tmp_path, "dev")


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="data: is not a folder; a dataset folder holds"):
        find_samples(tmp_path / "data", "train")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="holds no dataset; a dataset folder holds"):
        find_samples(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train/images: is missing; a dataset folder holds"):
        find_samples(tmp_path, "train")


def test_one_name_in_train_and_val(tmp_path):
    for split in ("train", "val"):
        put_pairs(tmp_path / split, "a")
    for find in (find_development_samples, find_all_samples):
        with pytest.raises(DataError, match=r"val/images/a\.png: shares its name with .*train/images/a\.png"):
            find(tmp_path)


@pytest.mark.parametrize(
    ("folder", "images", "masks"),
    [("{}", "images", "masks"), ("{}_Folder", "img", "labelcol")],
    ids=["plain", "published"],
)
def test_folder_without_val_has_it_drawn_from_train(tmp_path, folder, images, masks):
    for split, names in {"train": [f"n{i:02d}" for i in range(20)], "test": ["t0", "t1"]}.items():
        base = tmp_path / folder.format(split if folder == "{}" else split.title())
        put_pairs(base, *names, images=images, masks=masks)
    parts = {split: names_of(find_samples(tmp_path, split)) for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in parts.items()} == {"train": 16, "val": 4, "test": 2}
    development = names_of(find_development_samples(tmp_path))
    assert development == sorted(parts["train"] + parts["val"]) == [f"n{i:02d}" for i in range(20)]
    assert parts["val"] != names_of(find_samples(tmp_path, "val", seed=1))
    assert len(find_all_samples(tmp_path)) == 22
    said = describe_draw(tmp_path, "val", 4)
    assert re.search(
        r"without a folder for val: 4 of the 20 images in .*train.* are drawn for val", said, re.IGNORECASE
    )
    assert describe_draw(tmp_path, "test", 2) is None
    folds = tmp_path / "folds.json"
    folds.write_text(json.dumps({"folds": make_folds(development, 4)}))
    assert len(find_split(tmp_path, "val", str(folds), 3)) == 5


@pytest.mark.parametrize("name", ["validation", "Val", "dev"])
def test_folder_that_may_be_for_validation_is_not_passed_over(tmp_path, name):
    put_pairs(tmp_path / "train", "a", "b")
    put_pairs(tmp_path / name, "c")
    with pytest.raises(DataError, match=rf"{name}: may be the folder for validation; rename it val"):
        find_samples(tmp_path, "val")


@pytest.mark.parametrize("part", ["images", "masks"])
def test_links_to_nothing_are_missing_files(tmp_path, part):
    put_pairs(tmp_path, "a", "b", "c")
    for name in "bc":
        (tmp_path / part / f"{name}.png").unlink()
        (tmp_path / part / f"{name}.png").symlink_to(f"/nowhere/{name}.png")
    message = r"b\.png: is a link to /nowhere/b\.png, which is not there; .* \(2 such links in the folder\)"
    with pytest.raises(DataError, match=message):
        find_samples(tmp_path)
    for find in (find_images, read_image):
        with pytest.raises(DataError, match=r"b\.png: is a link to /nowhere/b\.png"):
            find(tmp_path / part / "b.png")


@pytest.mark.parametrize("folder", ["", "val", "val/masks", "train/images"])
def test_folders_that_are_links_to_nothing(tmp_path, folder):
    """A link that is not there must not look like a dataset without val."""
    for split in ("train", "val", "test"):
        put_pairs(tmp_path / "data" / split, split)
    place = tmp_path / "data" / folder
    shutil.rmtree(place)
    place.symlink_to("/nowhere")
    with pytest.raises(DataError, match=f"{folder}: is a link to /nowhere, which is not there"):
        [find_samples(tmp_path / "data", split) for split in ("train", "val")]


def test_links_to_images_are_images(tmp_path):
    put_pairs(tmp_path / "elsewhere", "a")
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "b.png").symlink_to(tmp_path / "elsewhere" / part / "a.png")
    assert names_of(find_samples(tmp_path)) == ["b"]


def test_names_pair_whatever_their_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Schnittfläche") for form in ("NFC", "NFD"))
    put(tmp_path / "images" / f"{decomposed}.png", BLACK)
    put(tmp_path / "masks" / f"{composed}.png", BLACK)
    put(tmp_path / "instances" / f"{decomposed}.png", BLACK)
    (sample,) = find_samples(tmp_path)
    assert sample.name == composed
    assert list(find_instances([sample])) == [composed]
    (tmp_path / "folds.json").write_text(json.dumps({"folds": [{"train": [decomposed], "val": ["b"]}]}))
    assert load_folds(tmp_path / "folds.json")[0]["train"] == [composed]
    put(tmp_path / "images" / f"{composed}.tif", BLACK)
    with pytest.raises(DataError, match="shares its stem"):
        find_samples(tmp_path)


def test_find_images(tmp_path):
    for name in "ba":
        put(tmp_path / f"{name}.png", BLACK)
    assert names_of(find_images(tmp_path)) == ["a", "b"]
    (sample,) = find_images(str(tmp_path / "b.png"))
    assert (sample.name, sample.image, sample.mask) == ("b", tmp_path / "b.png", None)
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt: is not an image"):
        find_images(tmp_path / "notes.txt")


def test_import_is_light():
    heavy = "skimage scipy defusedxml imageio PIL tifffile monai matplotlib"
    code = f"import sys, uctrans.data; print([name for name in '{heavy}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def count_calls(function):
    """Return the number of calls of Python functions and of C that ``function`` makes."""
    count = 0

    def add(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(add)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def walk(root):
    """Call everything that lists the files of a dataset."""
    samples = find_samples(root)
    find_samples(root, "train")
    find_development_samples(root)
    find_images(root / "images")
    find_instances(samples)
    describe_draw(root, "val", 1)
    with pytest.raises(DataError, match="do not pair"):
        find_samples(root / "unpaired")
    names = names_of(samples)
    with pytest.raises(DataError, match="more than once"):
        make_folds([*names, *names])
    (root / "folds.json").write_text(json.dumps({"folds": make_folds(names, 2)}))
    with pytest.raises(DataError, match="test images never belong in a fold"):
        load_folds(root / "folds.json", root)


def touch_files(root, count):
    for folder in ("images", "masks", "instances", "unpaired/images", "unpaired/masks"):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{'xy'[folder == 'unpaired/masks']}{number:06}.png").touch()
            if count < 1000:
                (root / folder / f"{number:06}.txt").touch()
    return root


@pytest.mark.filterwarnings("ignore:.*ignored files that are not images")
def test_work_grows_with_the_number_of_files_alone(tmp_path):
    small, large = (count_calls(partial(walk, touch_files(tmp_path / str(count), count))) for count in (40, 160))
    assert large < 4.1 * small


FIND_IN_CHILD = """
import resource, time
from tests.data.test_data_find import walk
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
walk(__import__("pathlib").Path({root!r}))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.process_time() - start)
"""


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path):
    """All of `walk` together, which lists some folders several times, may take what eight lists may."""
    source = FIND_IN_CHILD.format(root=str(touch_files(tmp_path, 100_000)))
    output = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    megabytes, seconds = map(float, output.split())
    assert megabytes < 400
    assert seconds < 40


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"b\xff.png")
    for folder in ("images", "masks"):
        put(tmp_path / folder / "a.png", BLACK)
    (tmp_path / "images" / os.fsdecode(b"b\xff.txt")).touch()
    with pytest.warns(UserWarning, match=r"not images: b\\udcff\.txt$"):
        find_samples(tmp_path)
    put(tmp_path / "images" / "c.png", BLACK).rename(tmp_path / "images" / name)
    for find in (lambda: find_images(tmp_path / "images"), lambda: find_images(tmp_path / "images" / name)):
        with pytest.raises(DataError, match=r"b\\udcff\.png: is not UTF-8; rename the file or its folder"):
            find()


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    put_pairs(tmp_path, "a")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root may list every folder
    for find in (lambda: find_samples(tmp_path), lambda: find_images(tmp_path / "images")):
        with pytest.raises(DataError, match=r"images: cannot be listed \(Permission denied\); check the folder and"):
            find()


def test_links_that_lead_in_a_circle(tmp_path):
    put_pairs(tmp_path, "a")
    (tmp_path / "images/b.png").symlink_to("b.png")
    with pytest.raises(DataError, match=r"images/b\.png: is a link to b\.png, which is not there"):
        find_samples(tmp_path)
    (tmp_path / "images/b.png").unlink()
    (tmp_path / "images/b.png").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"not images: b\.png"):
        assert names_of(find_samples(tmp_path)) == ["a"]
