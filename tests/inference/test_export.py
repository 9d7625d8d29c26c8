"""Export: the programs agree with the model, and what cannot be exported is refused."""

import importlib
import json

import pytest
import torch

import uctrans
from uctrans.inference import ExportConfig, ExportError, InferenceError, export
from uctrans.kernels.channel_attention import composed, fewest_tokens_to_correlate, operator

TWO_SCALES = {"base_channels": 8, "image_size": 24, "num_layers": 1, "num_heads": 2, "patch_sizes": (4, 2)}

export_module = importlib.import_module("uctrans.inference.export")


def onnx_run(path, image):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def torch_run(path, image):
    return torch.export.load(path).module()(image)


def assert_agrees(run, path, model, *shape):
    image = torch.rand(*shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model(image)
        torch.testing.assert_close(run(path, image), expected, atol=1e-4 * max(1, expected.abs().max()), rtol=1e-4)


def test_both_formats_with_a_dynamic_batch(uctransnet_folder, tmp_path):
    written = export(ExportConfig(str(uctransnet_folder), str(tmp_path / "out")))
    assert [path.name for path in written] == ["model.pt2", "model.onnx", "export.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx", "model.pt2"]
    model = uctrans.load_model(uctransnet_folder)
    for batch in (1, 5):
        assert_agrees(torch_run, written[0], model, batch, 3, 32, 32)
        assert_agrees(onnx_run, written[1], model, batch, 3, 32, 32)
    description = json.loads(written[2].read_text())
    assert description["input"]["shape"] == ["batch", 3, 32, 32]
    assert description["preprocessing"]["channel_order"] == "rgb"
    assert description["output"]["activation"] == "sigmoid"
    assert description["formats"]["onnx"]["opset"] >= 18
    for name in ("torch", "onnx"):
        checks = description["formats"][name]["checks"]
        assert [check["input"][0] for check in checks] == [1, 3]
        assert all(check["largest_difference"] <= check["allowed"] for check in checks)


def test_dynamic_size_in_torch(uctransnet_folder, tmp_path):
    settings = {"formats": ("torch",), "dynamic": "size"}
    written = export(ExportConfig(str(uctransnet_folder), str(tmp_path), **settings))
    model = uctrans.load_model(uctransnet_folder)
    for height, width in ((32, 32), (48, 80)):
        assert_agrees(torch_run, written[0], model, 2, 3, height, width)
    assert json.loads(written[1].read_text())["input"]["shape"][2:] == ["16 * rows", "16 * columns"]


def two_scales(name, folder):
    """A model that changes the order of its products at 18 tokens of 4 x 4 pixels, its weights large enough to show."""
    options = {"depths": (1, 1), "dilations": 1} if name == "dual_branch_uctransnet" else {}
    model = uctrans.create_model(name, **(TWO_SCALES | options))
    generator = torch.Generator().manual_seed(4)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and "norm" not in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval(), model.save_pretrained(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"), [("uctransnet", (12, 20)), ("dual_branch_uctransnet", (24, 24))], ids=["below", "above"]
)
def test_dynamic_size_on_both_sides_of_the_change_of_order(name, image_size, tmp_path):
    """The model multiplies in one order up to 17 tokens, and in the other from 18 on; the program in one."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, folder = two_scales(name, tmp_path)
    assert fewest_tokens_to_correlate(heads=2, segments=(8, 16), key_channels=24) == 18
    settings = {"dynamic": "size", "image_size": image_size}
    program, onnx, description = export(ExportConfig(str(folder), str(tmp_path / "out"), **settings))
    run = torch.export.load(program).module()
    for height, width in ((8, 8), (8, 32), (8, 36), (40, 36), (80, 100)):  # 4, 16, 18, 90 and 500 tokens
        assert_agrees(lambda _, image: run(image), program, model, 2, 3, height, width)
        assert_agrees(onnx_run, onnx, model, 2, 3, height, width)
    checked = [check["input"] for check in json.loads(description.read_text())["formats"]["onnx"]["checks"]]
    assert checked == [[1, 3, *image_size], [3, 3, *image_size], [1, 3, 8, 12], [1, 3, 16, 20]]


def test_one_order_costs_what_is_documented():
    """The default model at 224 pixels: 4 layers of 196 tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        widths, tokens = (64, 128, 256, 512), torch.empty(1, 196, 960)
        weights = [torch.empty(4, width, width) for width in widths], torch.empty(2, 4, 960, 960)
    gflop = []
    for order in (composed.project_then_attend, composed.correlate_then_attend):
        with FlopCounterMode(display=False) as counter:
            order(tokens, tokens, *weights, 0.0, 1e-5, None)
        gflop.append(4 * counter.get_total_flops() / 1e9)
    assert gflop[1] - gflop[0] == pytest.approx(45, abs=0.5)


@pytest.mark.slow
def test_a_program_with_a_condition_on_the_size_is_not_written(tmp_path, monkeypatch):
    """Without one order for all sizes, the comparison of costs becomes a condition of the program."""
    _, folder = two_scales("uctransnet", tmp_path)
    monkeypatch.setattr(operator, "_is_open", lambda size: False)
    with pytest.raises(
        ExportError, match=r"torch export cannot run input \(1, 3, 16, 20\) .*Guard.* Set dynamic to batch"
    ):
        export(
            ExportConfig(str(folder), str(tmp_path / "out"), formats=("torch",), dynamic="size", image_size=(12, 20))
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_that_cannot_be_traced(use_model, tmp_path):
    class Branching(torch.nn.Module):
        name, in_channels, classes, config, metadata = "branching", 3, 1, {"image_size": 16}, {}

        def forward(self, image):
            return image[:, :1] if image.sum() > 0 else image[:, 1:2]

    use_model(Branching())
    with pytest.raises(ExportError, match=r"cannot be traced \(.*\): nothing was written. Set dynamic to none"):
        export(ExportConfig("model", str(tmp_path / "out"), formats=("torch",)))
    assert list((tmp_path / "out").iterdir()) == []


def test_dynamic_size_in_onnx(unet_folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    settings = {"formats": ("onnx",), "dynamic": "size", "image_size": (32, 48)}
    written = export(ExportConfig(str(unet_folder), str(tmp_path), **settings))
    assert_agrees(onnx_run, written[0], uctrans.load_model(unet_folder), 2, 3, 64, 32)
    (image,) = onnx.load(written[0]).graph.input
    names = [axis.dim_param or axis.dim_value for axis in image.type.tensor_type.shape.dim]
    assert names == ["batch", 3, "height", "width"]


def test_fixed_shape_needs_no_multiple(unet_folder, tmp_path):
    settings = {"formats": ("torch",), "dynamic": "none", "image_size": (21, 35), "batch_size": 2}
    written = export(ExportConfig(str(unet_folder), str(tmp_path), **settings))
    assert_agrees(torch_run, written[0], uctrans.load_model(unet_folder), 2, 3, 21, 35)


def test_a_program_that_differs_is_not_written(unet_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(
        export_module.RUNNERS, "torch", lambda path: lambda image: 1 + uctrans.load_model(unet_folder)(image)
    )
    with pytest.raises(ExportError, match="differs from the model by 1"):
        export(ExportConfig(str(unet_folder), str(tmp_path), formats=("torch",), dynamic="none", image_size=16))
    monkeypatch.setitem(export_module.RUNNERS, "torch", lambda path: lambda image: image)
    with pytest.raises(ExportError, match="gives"):
        export(ExportConfig(str(unet_folder), str(tmp_path), formats=("torch",), dynamic="none", image_size=16))
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_replaced_unasked(unet_folder, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(InferenceError, match=r"model\.onnx.*set overwrite"):
        export(ExportConfig(str(unet_folder), str(tmp_path)))
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ("tflite",)}, "formats must be of torch, onnx"),
        ({"formats": ()}, "formats must be of"),
        ({"dynamic": "all"}, "dynamic must be one of none, batch, size"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": (16, 16, 16)}, "image_size must be"),
        ({"dynamic": "size", "image_size": 40}, "multiples of 16 pixels"),
        ({"dynamic": "size", "image_size": 16}, "from 32 on"),
    ],
)
def test_bad_settings(settings, message, unet_folder, tmp_path):
    with pytest.raises(InferenceError, match=message):
        export(ExportConfig(str(unet_folder), str(tmp_path), **settings))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(unet_folder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "uctrans\[export\]"'):
        export(ExportConfig(str(unet_folder), str(tmp_path), formats=("onnx",), dynamic="none", image_size=16))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model(tmp_path):
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        export(ExportConfig(str(tmp_path / "nowhere"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
