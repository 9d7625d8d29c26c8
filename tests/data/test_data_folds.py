"""Folds: the shipped file, the function that makes them, and files that do not fit the dataset."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.support import put_pairs
from uctrans.data import DataError, find_samples, find_split, load_folds, make_folds

NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def root(tmp_path):
    for split, names in {"train": NAMES[:3], "val": NAMES[3:], "test": ["t"]}.items():
        put_pairs(tmp_path / "data" / split, *names)
    return tmp_path / "data"


def write_folds(folder, folds):
    path = folder / "folds.json"
    path.write_text(json.dumps({"folds": folds}))
    return path


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 40), n=st.integers(2, 8), seed=st.integers(0, 1000))
def test_every_name_validates_once(count, n, seed):
    names = [f"n{i}" for i in range(max(count, n))]
    folds = make_folds(names, n, seed)
    assert len(folds) == n
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(names)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(names)
    sizes = [len(fold["val"]) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert folds == make_folds(names[::-1], n, seed)


def test_folds_that_cannot_be_made():
    with pytest.raises(DataError, match="6 cannot be made of 5 images"):
        make_folds(NAMES, 6)
    with pytest.raises(DataError, match="1 cannot be made"):
        make_folds(NAMES, 1)
    with pytest.raises(DataError, match="names: a are given more than once"):
        make_folds([*NAMES, "a"], 2)


def test_shipped_folds_are_what_the_function_makes():
    folds = load_folds("monuseg")
    names = sorted(folds[0]["train"] + folds[0]["val"])
    assert len(names) == 30
    assert folds == make_folds(names, n=5, seed=0)


def test_shipped_folds_are_the_train_and_val_images_of_monuseg(monuseg):
    folds = load_folds("monuseg", monuseg)
    names = {name for fold in folds for name in fold["train"] + fold["val"]}
    expected = {sample.name for split in ("train", "val") for sample in find_samples(monuseg, split)}
    assert names == expected
    assert not names & {sample.name for sample in find_samples(monuseg, "test")}


def test_load_folds(root, tmp_path):
    folds = make_folds(NAMES, 2)
    assert load_folds(write_folds(tmp_path, folds), root) == folds
    assert load_folds(str(write_folds(tmp_path, folds))) == folds


@pytest.mark.parametrize("name", ["nobody", "t"], ids=["unknown image", "test image"])
def test_names_the_dataset_does_not_have(root, tmp_path, name):
    path = write_folds(tmp_path, [{"train": ["a", name], "val": ["b"]}])
    with pytest.raises(DataError, match=rf"folds\.json: names images that are not among the 5 .*: {name}; use folds"):
        load_folds(path, root)


def test_drawn_test_images_of_a_flat_folder(tmp_path):
    put_pairs(tmp_path / "flat", *NAMES)
    (drawn,) = (sample.name for sample in find_samples(tmp_path / "flat", "test"))
    rest = [name for name in NAMES if name != drawn]
    assert load_folds(write_folds(tmp_path, make_folds(rest, 2)), tmp_path / "flat") == make_folds(rest, 2)
    with pytest.raises(DataError, match=rf"among the 4 of train and val .*: {drawn}; .*drawn for testing"):
        load_folds(write_folds(tmp_path, make_folds(NAMES, 2)), tmp_path / "flat")


def test_name_in_train_and_val(tmp_path):
    with pytest.raises(DataError, match="fold 0 has b in train and in val"):
        load_folds(write_folds(tmp_path, [{"train": ["a", "b"], "val": ["b"]}]))


@pytest.mark.parametrize(
    "folds", [[], {}, ["a"], [{"train": ["a"]}], [{"train": ["a"], "val": []}], [{"train": ["a"], "val": [1]}]]
)
def test_malformed_folds(tmp_path, folds):
    with pytest.raises(DataError, match=r"folds\.json: holds no folds; write"):
        load_folds(write_folds(tmp_path, folds))


@pytest.mark.parametrize("content", [b"[]", b"3"])
def test_folds_file_of_another_form(tmp_path, content):
    (tmp_path / "folds.json").write_bytes(content)
    with pytest.raises(DataError, match="holds no folds"):
        load_folds(tmp_path / "folds.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_folds_file_that_is_not_json(tmp_path, content):
    (tmp_path / "folds.json").write_bytes(content)
    with pytest.raises(DataError, match=r"folds\.json: is not JSON"):
        load_folds(tmp_path / "folds.json")


def test_folds_that_do_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"nor one of the folds that come with the package; choose from monuseg"):
        load_folds(tmp_path / "other.json")


@pytest.mark.parametrize("folds", [None, "monuseg"])
def test_an_unknown_split_is_refused(folds, tmp_path):
    with pytest.raises(DataError, match="split: 'tst' is unknown; choose one of train, val, test, all"):
        find_split(tmp_path, "tst", folds, 0)
