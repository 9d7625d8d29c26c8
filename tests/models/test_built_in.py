"""Models that come with the package: found by name, unless a model of the caller's has it."""

from pathlib import Path

import pytest
import torch

import uctrans
from tests.models.support import build, randomised
from uctrans.models import files


@pytest.fixture
def built_in(tmp_path, monkeypatch):
    """The only model that comes with the package, "cells"; the working directory is empty."""
    model = randomised(build("unet"))
    model.save_pretrained(tmp_path / "package/cells")
    monkeypatch.setattr(files, "BUILT_IN_MODELS", tmp_path / "package")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return model


def weight_of(path):
    return next(uctrans.load_model(path).parameters())


def test_a_name_is_enough(built_in):
    assert torch.equal(weight_of("cells"), next(built_in.parameters()))
    assert files.built_in_models() == ["cells"]


@pytest.mark.parametrize("place", [".", "best"])
def test_a_model_of_the_same_name_comes_first(place, built_in):
    other = build("unet")
    other.save_pretrained(Path("cells", place))
    assert torch.equal(weight_of("cells"), next(other.parameters()))


def test_a_run_of_the_same_name_comes_first(built_in):
    Path("cells").mkdir()
    Path("cells/last.pt").touch()
    with pytest.raises(uctrans.ModelFileError, match="cells is a run without best weights yet"):
        uctrans.load_model("cells")


def test_a_folder_of_images_hides_nothing_but_its_path_is_a_path(built_in):
    Path("cells/images").mkdir(parents=True)
    assert torch.equal(weight_of("cells"), next(built_in.parameters()))
    with pytest.raises(uctrans.ModelFileError, match=r"cells has no config\.json"):
        uctrans.load_model("./cells")


@pytest.mark.parametrize("name", ["nucleus", "./cells", "cells/"])
def test_other_names_list_those_that_are_known(name, built_in):
    with pytest.raises(
        uctrans.ModelFileError, match=r"does not exist: give a run folder, .* with the package \(cells\)"
    ):
        uctrans.load_model(name)
