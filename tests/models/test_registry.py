"""Models by name, and the configuration that they record."""

import json

import numpy as np
import pytest

import uctrans
from tests.models.support import NAMES, build
from uctrans.models import registry


def test_small_configurations_cover_the_registry():
    assert uctrans.list_models() == NAMES


class TestConfig:
    def test_holds_plain_copies(self):
        skips = [1, 2]
        model = build("unet", skips=skips, base_channels=np.int64(4))
        skips.append(3)
        assert model.config == {"in_channels": 3, "classes": 1, "base_channels": 4, "skips": [1, 2]}
        assert build("unet", skips=range(1, 3)).config["skips"] == [1, 2]
        assert json.loads(json.dumps(model.config)) == model.config

    def test_of_a_subclass_that_passes_options_on(self):
        class Narrow(uctrans.UNet):
            def __init__(self, **options):
                super().__init__(base_channels=2, **options)

        assert Narrow(classes=2).config == build("unet", base_channels=2, classes=2).config


class TestRegistry:
    def test_near_names(self):
        with pytest.raises(ValueError, match="did you mean 'uctransnet'"):
            uctrans.create_model("uctransnt")
        with pytest.raises(ValueError, match="did you mean 'unet'"):
            uctrans.create_model("UNet")
        with pytest.raises(ValueError, match="did you mean 'dual_branch_uctransnet'"):
            uctrans.create_model("DualBranchUCTransNet")
        with pytest.raises(ValueError, match="choose one of dual_branch_uctransnet, uctransnet, unet"):
            uctrans.create_model("zzz")

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="unet has no option 'depth'; it takes in_channels, classes, base_channels"):
            uctrans.create_model("unet", depth=3)
        with pytest.raises(TypeError, match=r"uctransnet has no option 'clases'; did you mean 'classes'\?"):
            uctrans.create_model("uctransnet", clases=1)

    def test_options_that_are_passed_on(self, monkeypatch):
        monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

        @uctrans.register_model("narrow")
        class Narrow(uctrans.UNet):
            def __init__(self, **options):
                super().__init__(base_channels=2, **options)

        model = uctrans.create_model("narrow", classes=2)
        assert (model.name, model.classes, model.config) == ("narrow", 2, {"classes": 2})

    def test_name_taken(self):
        with pytest.raises(ValueError, match="registered already"):
            uctrans.register_model("unet")(uctrans.UNet)
