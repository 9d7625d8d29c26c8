"""Export: the programs agree with the model, and what cannot be exported is refused."""

import itertools
import json
import resource
import sys

import pytest
import torch

import uctrans
from uctrans.inference import ExportConfig, ExportError, InferenceError, export
from uctrans.kernels.channel_attention import composed, fewest_tokens_to_correlate
from uctrans.writing import UNFINISHED, FolderError, locked

TWO_SCALES = {"base_channels": 8, "image_size": 24, "num_layers": 1, "num_heads": 2, "patch_sizes": (4, 2)}
AXES = ["batch", 3, "height", "width"]


def torch_run(path):
    return torch.export.load(path).module()


def onnx_run(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def assert_agrees(run, model, *shape):
    image = torch.rand(*shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model(image)
        torch.testing.assert_close(run(image), expected, atol=1e-4 * max(1, expected.abs().max()), rtol=1e-4)


def test_both_formats_with_a_dynamic_batch(uctransnet_folder, tmp_path):
    written = export(ExportConfig(str(uctransnet_folder), str(tmp_path / "out")))
    assert [path.name for path in written] == ["model.pt2", "model.onnx", "export.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx", "model.pt2"]
    model = uctrans.load_model(uctransnet_folder)
    for run in (torch_run(written[0]), onnx_run(written[1])):
        for batch in (1, 5):
            assert_agrees(run, model, batch, 3, 32, 32)
    description = json.loads(written[2].read_text())
    assert description["input"]["shape"] == ["batch", 3, 32, 32]
    assert description["preprocessing"]["channel_order"] == "rgb"
    assert description["output"]["activation"] == "sigmoid"
    assert description["formats"]["onnx"]["opset"] >= 18
    for name in ("torch", "onnx"):
        checks = description["formats"][name]["checks"]
        assert [check["input"][0] for check in checks] == [1, 3]
        assert all(check["largest_difference"] <= check["allowed"] for check in checks)


def test_a_dynamic_size(uctransnet_folder, tmp_path):
    settings = {"formats": ("torch",), "dynamic": "size", "image_size": (32, 48)}
    written = export(ExportConfig(str(uctransnet_folder), str(tmp_path), **settings))
    model, run = uctrans.load_model(uctransnet_folder), torch_run(written[0])
    for height, width in ((32, 48), (48, 80), (64, 32)):
        assert_agrees(run, model, 2, 3, height, width)
    assert json.loads(written[1].read_text())["input"]["shape"][2:] == ["4 * rows", "4 * columns"]


def test_fixed_shape_needs_no_multiple(unet_folder, tmp_path):
    settings = {"formats": ("torch",), "dynamic": "none", "image_size": (21, 35), "batch_size": 2}
    written = export(ExportConfig(str(unet_folder), str(tmp_path), **settings))
    assert_agrees(torch_run(written[0]), uctrans.load_model(unet_folder), 2, 3, 21, 35)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"), [("uctransnet", (12, 20)), ("dual_branch_uctransnet", (24, 24))], ids=["below", "above"]
)
def test_dynamic_size_on_both_sides_of_the_change_of_order(name, image_size, tmp_path):
    """The model multiplies in one order up to 17 tokens, and in the other from 18 on; the program in one."""
    assert fewest_tokens_to_correlate(heads=2, segments=(8, 16), key_channels=24) == 18
    options = {"depths": (1, 1), "dilations": 1} if name == "dual_branch_uctransnet" else {}
    model = uctrans.create_model(name, **(TWO_SCALES | options)).eval()
    generator = torch.Generator().manual_seed(4)
    for key, value in model.state_dict().items():  # large enough to show a difference
        if value.is_floating_point() and "norm" not in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    folder = model.save_pretrained(tmp_path / "model")
    settings = {"dynamic": "size", "image_size": image_size}
    program, onnx, description = export(ExportConfig(str(folder), str(tmp_path / "out"), **settings))
    for run in (torch_run(program), onnx_run(onnx)):
        for height, width in ((8, 8), (8, 32), (8, 36), (40, 36), (80, 100)):  # 4, 16, 18, 90 and 500 tokens
            assert_agrees(run, model, 2, 3, height, width)
    (image,) = pytest.importorskip("onnx").load(onnx).graph.input
    assert [axis.dim_param or axis.dim_value for axis in image.type.tensor_type.shape.dim] == AXES
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


def test_the_description_has_channels_and_range(use_model, tmp_path):
    model = use_model(Stub(lambda image, call: image[:, :1]))
    model.in_channels, model.metadata = 5, {"intensity_range": [0, 4095]}
    export(ExportConfig("model", str(tmp_path), formats=("torch",), dynamic="none"))
    description = json.loads((tmp_path / "export.json").read_text())
    assert description["input"]["shape"] == [1, 5, 64, 64]
    assert description["preprocessing"]["intensity_range"] == [0, 4095]
    assert description["preprocessing"]["channel_order"] == "as in the files"
    assert "highest - lowest" in description["preprocessing"]["scale"]


class Stub(torch.nn.Module):
    """A model without weights: ``compute`` of the image and the number of earlier calls."""

    name, in_channels, classes, config, metadata = "stub", 3, 1, {"image_size": 64}, {}

    def __init__(self, compute):
        super().__init__()
        self.compute, self.calls = compute, itertools.count()

    def forward(self, image):
        return self.compute(image, next(self.calls))


@pytest.mark.parametrize(
    ("compute", "dynamic", "message"),
    [
        (
            lambda image, call: image[:, :1] if image.sum() > 0 else image[:, 1:2],
            "batch",
            r"cannot be traced \(.*\); nothing was written, set dynamic to none",
        ),
        (
            lambda image, call: image[:, :1] * (2 if image.shape[2] * image.shape[3] > 2000 else 1),
            "size",
            r"torch export cannot run input \(1, 3, 32, 48\) .*; nothing was written, set dynamic to batch",
        ),
        (lambda image, call: image[:, :1] + call, "none", "torch export differs by 1 on input"),
        (lambda image, call: image[:, : 1 + min(call, 1)], "none", r"gives the shape \(1, 1, 64, 64\) instead of"),
    ],
    ids=["branch on values", "branch on sizes", "other values", "other shapes"],
)
def test_a_program_that_is_not_the_model_is_not_written(compute, dynamic, message, use_model, tmp_path):
    use_model(Stub(compute))
    with pytest.raises(ExportError, match=message):
        export(ExportConfig("model", str(tmp_path / "out"), formats=("torch",), dynamic=dynamic))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_and_keeps_the_former_export(unet_folder, tmp_path):
    config = ExportConfig(str(unet_folder), str(tmp_path), ("torch",), "none", image_size=16, overwrite=True)
    (tmp_path / "model.pt2").write_bytes(b"former")
    (tmp_path / "export.json").write_bytes(b"former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        ["model.pt2", "export.json"], b"former"
    )


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_no_description_of_another_program(use_model, is_killed_at, tmp_path):
    config = ExportConfig("model", str(tmp_path), ("torch",), "none", image_size=16, overwrite=True)

    def export_times(factor):
        model = use_model(Stub(lambda image, call: factor * image[:, :1]))
        model.metadata = {"factor": factor}
        export(config)

    export_times(1)
    for number in itertools.count():
        if not is_killed_at(number, lambda: export_times(2)):
            break
        if (tmp_path / "export.json").exists():
            factor = json.loads((tmp_path / "export.json").read_text())["model"]["metadata"]["factor"]
            assert torch_run(tmp_path / "model.pt2")(torch.ones(1, 3, 16, 16)).mean() == factor
        export_times(1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]
    assert number > 3


def test_replacing_an_export_removes_the_programs_of_the_former_and_of_killed_processes(unet_folder, tmp_path):
    for name in ("model.onnx", "export.json", f"{UNFINISHED}killed.onnx"):
        (tmp_path / name).write_bytes(b"of another model")
    (tmp_path / ".export-abc" / "inner").mkdir(parents=True)  # as earlier versions left it
    export(ExportConfig(str(unet_folder), str(tmp_path), ("torch",), "none", image_size=16, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]


def test_an_export_is_not_replaced_unasked(unet_folder, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(InferenceError, match=r"model\.onnx.*set overwrite"):
        export(ExportConfig(str(unet_folder), str(tmp_path)))
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ("tflite",)}, "formats: 'tflite' is not known; choose one of torch, onnx"),
        ({"formats": ()}, "formats: there is none; choose from torch, onnx"),
        ({"dynamic": "all"}, "dynamic: 'all' is not known; choose one of none, batch, size"),
        ({"batch_size": 0}, "batch_size: 0 is too small"),
        ({"image_size": 0}, "image_size: got 0; give one or two"),
        ({"image_size": (16, 16, 16)}, "image_size: got .*; give one or two"),
        ({"dynamic": "size", "image_size": 40}, "image_size: 40x40 .*multiples of 16 pixels"),
        ({"dynamic": "size", "image_size": 16}, "image_size: 16x16 .*from 32 on"),
    ],
)
def test_bad_settings(settings, message, unet_folder, tmp_path):
    with pytest.raises(InferenceError, match=message):
        export(ExportConfig(str(unet_folder), str(tmp_path), **settings))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(unet_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "uctrans\[export\]"'):
        export(ExportConfig(str(unet_folder), str(tmp_path), formats=("onnx",), dynamic="none", image_size=16))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model(tmp_path):
    with pytest.raises(uctrans.ModelFileError, match="nowhere"):
        export(ExportConfig(str(tmp_path / "nowhere"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(unet_folder, tmp_path):
    with locked(tmp_path), pytest.raises(FolderError, match="is in use by process"):
        export(ExportConfig(str(unet_folder), str(tmp_path), formats=("torch",), dynamic="none", image_size=16))
    assert list(tmp_path.iterdir()) == []
