"""Checkpoints of the authors' code: conversion in both directions, other image sizes, damaged files."""

import numpy as np
import pytest
import torch
from torch import nn

import uctrans
from tests.models.support import build, randomised


class TestUpstream:
    def model(self, **options):
        return randomised(build("uctransnet", **options))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"in_channels": 1, "classes": 9},
            {"num_layers": 1, "num_heads": 3, "mlp_ratio": 2, "image_size": 64},
            {"patch_sizes": (8, 4, 2)},
            {"patch_sizes": (8, 4, 2), "base_channels": (6, 5, 9)},
        ],
        ids=str,
    )
    def test_out_and_in_bit_for_bit(self, options):
        model = self.model(**options)
        published = uctrans.to_upstream(model)
        loaded = uctrans.load_upstream(published)
        assert loaded.config == model.config
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        back = uctrans.to_upstream(loaded)
        assert back.keys() == published.keys()
        assert all(torch.equal(back[key], value) for key, value in published.items())

    @pytest.mark.parametrize("wrap", [False, True], ids=["bare", "training checkpoint"])
    def test_file_as_the_authors_write_it(self, tmp_path, wrap):
        model = self.model()
        state = {f"module.{key}": value for key, value in uctrans.to_upstream(model).items()}
        contents = {"epoch": 3, "best_model": True, "val_loss": np.float64(0.3), "state_dict": state} if wrap else state
        path = tmp_path / "best_model-UCTransNet.pth.tar"
        torch.save(contents, path)
        image = torch.rand(1, 3, 32, 32)
        for loaded in (uctrans.load_upstream(path), uctrans.load_model(path)):
            assert torch.equal(loaded(image), model(image))

    def test_bgr_weights_take_rgb_images(self):
        model = self.model()
        published = uctrans.to_upstream(model)
        mirrored = uctrans.load_upstream(published, channel_order="bgr")
        image = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(mirrored(image), model(image.flip(1)))
        back = uctrans.to_upstream(mirrored, channel_order="bgr")
        assert all(torch.equal(back[key], value) for key, value in published.items())

    def test_same_weights_at_another_image_size(self):
        model = self.model()
        loaded = uctrans.load_upstream(uctrans.to_upstream(model), image_size=(48, 80))
        resized = uctrans.resize_positions(model, (48, 80))
        assert loaded.config == resized.config
        assert all(torch.equal(value, resized.state_dict()[name]) for name, value in loaded.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_dtype_is_kept(self, dtype):
        published = uctrans.to_upstream(self.model().to(dtype))
        back = uctrans.to_upstream(uctrans.load_upstream(published))
        assert all(torch.equal(back[key], value) for key, value in published.items())

    def test_resizing_keeps_all_but_the_positions(self):
        model = uctrans.set_backend(self.model().double(), "reference")
        model.metadata = {"notes": ["first"]}
        resized = uctrans.resize_positions(model, 64)
        resized.metadata["notes"].append("second")
        assert model.metadata == {"notes": ["first"]}
        assert resized.decoder[0].gate.backend == "reference"
        assert resized.config == model.config | {"image_size": 64}
        state = resized.state_dict()
        kept = {key: value for key, value in model.state_dict().items() if not key.endswith(".position")}
        assert all(torch.equal(state[key], value) for key, value in kept.items())
        position = model.transformer.embeddings[1].position
        expected = nn.functional.interpolate(position, size=(4, 4), mode="bicubic", align_corners=False)
        torch.testing.assert_close(resized.transformer.embeddings[1].position, expected)

    @pytest.mark.parametrize(
        ("name", "damaged"),
        [
            ("inc.conv.weight", torch.zeros(4)),
            ("mtc.encoder.layer.0.channel_attn.key.1.weight", torch.zeros(3, 3)),
            ("mtc.embeddings_2.position_embeddings", torch.zeros(1, 9, 8)),
            ("mtc.embeddings_2.patch_embeddings.weight", torch.zeros(8, 8, 4, 4)),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_contradicting_shapes_name_the_file(self, tmp_path, name, damaged):
        path = tmp_path / "damaged.pth.tar"
        torch.save({"state_dict": uctrans.to_upstream(self.model()) | {name: damaged}}, path)
        for load in (uctrans.load_model, uctrans.load_upstream):
            with pytest.raises(uctrans.ModelFileError, match=r"damaged\.pth\.tar"):
                load(path)

    def test_incomplete_and_foreign_checkpoints(self):
        published = uctrans.to_upstream(self.model())
        without = {key: value for key, value in published.items() if key != "up4.coatt.mlp_x.1.bias"}
        with pytest.raises(uctrans.ModelFileError, match=r"lacks up4\.coatt\.mlp_x\.1\.bias"):
            uctrans.load_upstream(without)
        with pytest.raises(uctrans.ModelFileError, match="holds 1 entries that UCTransNet does not have, first extra"):
            uctrans.load_upstream(published | {"extra": torch.zeros(1)})
        with pytest.raises(uctrans.ModelFileError, match="it is not a UCTransNet checkpoint"):
            uctrans.load_upstream({"conv.weight": torch.zeros(1)})
        with pytest.raises(uctrans.ModelFileError, match="epoch is no ordinary tensor"):
            uctrans.load_upstream({"epoch": 3})

    def test_another_encoder_has_no_published_names(self):
        with pytest.raises(KeyError, match=r"encoder\.nested.* has no published name"):
            uctrans.to_upstream(build("dual_branch_uctransnet"))

    def test_unknown_channel_order(self):
        with pytest.raises(ValueError, match="must be one of rgb, bgr"):
            uctrans.load_upstream({}, channel_order="grb")
        with pytest.raises(ValueError, match="must be one of rgb, bgr"):
            uctrans.to_upstream(self.model(), channel_order="grb")
        with pytest.raises(uctrans.ModelFileError, match="needs three input channels"):
            uctrans.to_upstream(self.model(in_channels=1), channel_order="bgr")
