"""Folder layouts, pairing by stem, seeded splits, and what is wrong with a folder."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

from uctrans.data import DataError, find_development_samples, find_images, find_samples
from uctrans.writing import write_png


def put_images(folder, *names, size=(6, 5)):
    for name in names:
        write_png(folder / f"{name}.png", np.zeros(size, dtype=np.uint8))


def names_of(samples):
    return [sample.name for sample in samples]


@pytest.fixture
def flat(tmp_path):
    names = [f"n{i:02d}" for i in range(20)]
    put_images(tmp_path / "images", *names)
    put_images(tmp_path / "masks", *names)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "images", "masks"),
    [("{}", "images", "masks"), ("{}_Folder", "img", "labelcol")],
    ids=["plain", "published"],
)
def test_split_folders(tmp_path, folder, images, masks):
    for split in ("train", "val", "test"):
        base = tmp_path / folder.format(split if folder == "{}" else split.title())
        put_images(base / images, f"{split}_b", f"{split}_a")
        put_images(base / masks, f"{split}_a", f"{split}_b")
    for split in ("train", "val", "test"):
        samples = find_samples(tmp_path, split)
        assert names_of(samples) == [f"{split}_a", f"{split}_b"]
        assert [sample.image.parent.name for sample in samples] == [images] * 2
        assert [sample.mask.parent.name for sample in samples] == [masks] * 2
    assert names_of(find_development_samples(tmp_path)) == ["train_a", "train_b", "val_a", "val_b"]


def test_image_and_mask_may_have_different_extensions(tmp_path):
    put_images(tmp_path / "masks", "a.b")
    put_images(tmp_path / "images", "a.b")
    (tmp_path / "images" / "a.b.png").rename(tmp_path / "images" / "a.b.TIFF")
    (sample,) = find_samples(tmp_path)
    assert (sample.name, sample.image.name, sample.mask.name) == ("a.b", "a.b.TIFF", "a.b.png")


def test_seeded_split_covers_the_folder_once_and_repeats(flat):
    parts = {split: names_of(find_samples(flat, split, seed=3)) for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in parts.items()} == {"train": 12, "val": 4, "test": 4}
    assert sorted([*parts["train"], *parts["val"], *parts["test"]]) == names_of(find_samples(flat))
    assert parts["test"] == names_of(find_samples(flat, "test", seed=3))
    assert parts["test"] != names_of(find_samples(flat, "test", seed=4))


@pytest.mark.parametrize("draw", [{}, {"seed": 3}, {"test_fraction": 0.5}, {"val_fraction": 0.1, "test_fraction": 0}])
def test_folds_never_get_the_test_images_of_a_flat_folder(flat, draw):
    """The defaults are those with which training and evaluation look for their images."""
    development = names_of(find_development_samples(flat, **draw))
    parts = {split: names_of(find_samples(flat, split, **draw)) for split in ("train", "val")}
    assert development == sorted(parts["train"] + parts["val"])
    if draw.get("test_fraction") != 0:
        assert not set(development) & set(names_of(find_samples(flat, "test", **draw)))


def test_flat_folder_of_one_image_has_none_for_folds(tmp_path):
    put_images(tmp_path / "images", "a")
    put_images(tmp_path / "masks", "a")
    with pytest.raises(DataError, match="has 1 images, all of them for testing: add images"):
        find_development_samples(tmp_path)


def test_seeded_split_does_not_depend_on_the_machine(flat):
    assert names_of(find_samples(flat, "test", seed=0)) == ["n10", "n14", "n16", "n18"]


def test_fractions(flat):
    assert len(find_samples(flat, "train", val_fraction=0.5, test_fraction=0.25)) == 5
    assert len(find_samples(flat, "val", val_fraction=0.01, test_fraction=0)) == 1
    with pytest.raises(DataError, match="too few to put any into 'test'"):
        find_samples(flat, "test", test_fraction=0)
    with pytest.raises(DataError, match="below 1"):
        find_samples(flat, "train", val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(DataError, match="0 or more"):
        find_samples(flat, "train", val_fraction=-0.1)


def test_images_without_and_masks_without_partner_are_both_listed(tmp_path):
    put_images(tmp_path / "images", "both", "lonely_image")
    put_images(tmp_path / "masks", "both", "lonely_mask")
    with pytest.raises(DataError, match=r"masks: lonely_image\..*images: lonely_mask\."):
        find_samples(tmp_path)


def test_masks_may_be_optional(tmp_path):
    put_images(tmp_path / "images", "a", "b")
    with pytest.raises(DataError, match="masks is missing"):
        find_samples(tmp_path)
    assert [sample.mask for sample in find_samples(tmp_path, require_masks=False)] == [None, None]
    put_images(tmp_path / "masks", "b")
    assert [sample.mask is None for sample in find_samples(tmp_path, require_masks=False)] == [True, False]


def test_stray_files_bring_one_warning(tmp_path):
    put_images(tmp_path / "images", "a")
    put_images(tmp_path / "masks", "a")
    for stray in ("notes.txt", "Thumbs.db", ".hidden"):
        (tmp_path / "images" / stray).write_text("x")
    with pytest.warns(UserWarning) as caught:
        assert names_of(find_samples(tmp_path)) == ["a"]
    assert len(caught) == 1
    assert "Thumbs.db, notes.txt." in str(caught[0].message)
    assert ".hidden" not in str(caught[0].message)


def test_hidden_files_bring_no_warning(tmp_path):
    put_images(tmp_path, "a")
    (tmp_path / ".DS_Store").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_of(find_images(tmp_path)) == ["a"]


def test_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"images holds no image; known extensions are .*\.png"):
        find_samples(tmp_path)


def test_two_images_of_one_stem(tmp_path):
    put_images(tmp_path / "images", "a")
    put_images(tmp_path / "masks", "a")
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png share a stem.*rename one"):
        find_samples(tmp_path)
    with pytest.raises(DataError, match="share a stem"):
        find_images(tmp_path / "images")


def test_missing_split_folder_names_the_layouts(tmp_path):
    put_images(tmp_path / "train" / "images", "a")
    put_images(tmp_path / "train" / "masks", "a")
    with pytest.raises(DataError, match=r"no folder for the split 'test', only train; understood layouts: .*labelcol"):
        find_samples(tmp_path, "test")
    with pytest.raises(DataError, match="say which split"):
        find_samples(tmp_path)
    with pytest.raises(DataError, match="Unknown split 'dev'"):
        find_samples(tmp_path, "dev")


@pytest.mark.parametrize("make", [lambda root: None, lambda root: (root / "other").mkdir(parents=True)])
def test_folder_that_is_no_dataset(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(DataError, match="understood layouts"):
        find_samples(tmp_path / "data", "train")


def test_split_folder_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train/images is missing; understood layouts"):
        find_samples(tmp_path, "train")


def test_one_name_in_train_and_val(tmp_path):
    for split in ("train", "val"):
        put_images(tmp_path / split / "images", "a")
        put_images(tmp_path / split / "masks", "a")
    with pytest.raises(DataError, match="share a name"):
        find_development_samples(tmp_path)


def test_find_images(tmp_path):
    put_images(tmp_path, "b", "a")
    assert names_of(find_images(tmp_path)) == ["a", "b"]
    (sample,) = find_images(str(tmp_path / "b.png"))
    assert (sample.name, sample.image, sample.mask) == ("b", tmp_path / "b.png", None)
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt is not an image"):
        find_images(tmp_path / "notes.txt")


def test_import_is_light():
    heavy = "skimage scipy defusedxml imageio PIL tifffile monai matplotlib"
    code = f"import sys, uctrans.data; print([name for name in '{heavy}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
