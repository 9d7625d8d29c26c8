"""Saving and loading models: folders, checkpoints, the hub and its model card, and files that cannot be used."""

import errno
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import uctrans
from tests.models.support import NAMES, build, randomised
from uctrans.models.base import CARD_FILE
from uctrans.models.weights import CONFIG_FILE, DIGEST, WEIGHTS_FILE


def change_config(folder, **changes):
    """Change entries of config.json; None removes one."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def hub():
    return pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")


@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    def test_save_and_load(self, name, tmp_path):
        model = randomised(build(name, classes=2))
        model.metadata = {"protocol": "uctransnet-224", "best_dice": 0.5}
        model.save_pretrained(tmp_path / "model")
        image = torch.rand(1, 3, 32, 32)
        for loaded in (uctrans.load_model(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model").eval()):
            assert loaded.config == model.config
            assert loaded.metadata == model.metadata
            assert torch.equal(loaded(image), model(image))
        assert {path.name for path in (tmp_path / "model").iterdir()} - {CARD_FILE} == {CONFIG_FILE, WEIGHTS_FILE}

    def test_parameters_of_16_bits(self, name, tmp_path):
        model = randomised(build(name))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(1e6)  # beyond float16
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
        sizes = [(tmp_path / folder / WEIGHTS_FILE).stat().st_size for folder in ("half", "whole")]
        assert sizes[0] < 0.7 * sizes[1]
        loaded = uctrans.load_model(tmp_path / "half")
        parameters = dict(model.named_parameters())
        for key, value in loaded.state_dict().items():
            before = model.state_dict()[key]
            assert value.dtype == before.dtype, key
            assert torch.equal(value, before.half().float() if key in parameters else before), key

    def test_run_folder_and_checkpoint(self, name, tmp_path):
        model = randomised(build(name))
        model.save_pretrained(tmp_path / "run" / "best")
        saved = {"name": name, "config": model.config, "metadata": {"epoch": 3}, "state": model.state_dict()}
        torch.save(
            {"format": "uctrans-checkpoint", "version": 1, "model": saved, "ema": None}, tmp_path / "run" / "last.pt"
        )
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(uctrans.load_model(tmp_path / "run")(image), model(image))
        loaded = uctrans.load_model(tmp_path / "run" / "last.pt")
        assert torch.equal(loaded(image), model(image))
        assert loaded.metadata == {"epoch": 3}

    def test_averaged_weights_are_preferred(self, name, tmp_path):
        model, averaged = build(name), randomised(build(name))
        saved = {"name": name, "config": model.config, "metadata": {}, "state": model.state_dict()}
        torch.save(
            {"format": "uctrans-checkpoint", "version": 1, "model": saved, "ema": averaged.state_dict()},
            tmp_path / "best.pt",
        )
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(uctrans.load_model(tmp_path / "best.pt")(image), averaged(image))

    def test_full_disk_keeps_the_former_weights(self, name, tmp_path, monkeypatch):
        model = randomised(build(name))
        model.save_pretrained(tmp_path)
        before = (tmp_path / WEIGHTS_FILE).read_bytes()

        def half_written(path, contents):
            with path.open("wb") as file:
                file.write(contents[: len(contents) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", half_written)
        with pytest.raises(OSError, match="No space left"):
            build(name).save_pretrained(tmp_path)
        assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} - {CARD_FILE} == {CONFIG_FILE, WEIGHTS_FILE}

    def test_hub_mixin_reads_what_we_write(self, name, tmp_path, hub):
        model = randomised(build(name))
        model.save_pretrained(tmp_path)

        class OnHub(hub.PyTorchModelHubMixin, type(model)):
            pass

        loaded = OnHub.from_pretrained(tmp_path)
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(loaded.eval()(image), model(image))


@pytest.mark.parametrize("has_card", [False, True], ids=["no card there", "card there"])
def test_push_to_hub_uploads_all_files_and_keeps_a_card(has_card, monkeypatch, hub):
    uploaded = {}

    def upload_folder(repo_id, folder_path, commit_message):
        uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}
        uploaded["metadata"] = json.loads((Path(folder_path) / CONFIG_FILE).read_text())["metadata"]
        return "address of the commit"

    monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "file_exists", lambda repository, name: has_card and name == CARD_FILE)
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    model = build("unet")
    model.metadata = {"images": {"train": {"0123456789abcdef": "Jane Doe"}, "val": {}}, "best_dice": 0.5}
    assert model.push_to_hub("someone/something") == "address of the commit"
    nameless = {"images": {"train": {"0123456789abcdef": ""}, "val": {}}, "best_dice": 0.5}
    assert (uploaded.pop("metadata"), model.metadata["images"]["train"]) == (nameless, {"0123456789abcdef": "Jane Doe"})
    card = set() if has_card else {CARD_FILE}
    assert uploaded == {"someone/something": {CONFIG_FILE, WEIGHTS_FILE} | card}


class TestFromTheHub:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path, hub):
        """The repositories that the hub is asked for; it has a U-Net under every name."""
        asked = []
        stored = build("unet").save_pretrained(tmp_path / "stored")

        def snapshot_download(repository, revision, allow_patterns):
            asked.append((repository, revision, sorted(allow_patterns)))
            return str(stored)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        (tmp_path / "here" / "runs").mkdir(parents=True)
        (tmp_path / "here" / "model.pt").touch()
        monkeypatch.chdir(tmp_path / "here")
        return asked

    def test_only_the_files_of_a_model_are_asked_for(self, asked):
        assert uctrans.UNet.from_pretrained("owner/my.unet-1", revision="v2").name == "unet"
        assert asked == [("owner/my.unet-1", "v2", [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])]

    @pytest.mark.parametrize(
        "source",
        [
            "runs/frist", "first", "./first", "../first/best", "~/first", "/first", "runs/first/best", "model.pt",
            "model.pt/best", ".hidden/first", "first/", "owner/name/", "owner/na me", "owner//name", "C:\\first/best",
            "", "owner/größe", "owner/name\n", Path("owner/name"),
        ],
    )  # fmt: skip
    def test_a_folder_that_is_not_there_never_asks_the_hub(self, source, asked):
        with pytest.raises(uctrans.ModelFileError):
            uctrans.UNet.from_pretrained(source)
        assert asked == []


class TestModelCard:
    def test_it_says_what_the_model_is_and_what_training_recorded(self, tmp_path, hub):
        model = build("dual_branch_uctransnet", classes=3)
        model.metadata = {"protocol": "native", "best_dice": 0.75, "palette": None, "images": {"train": {"0": "Jane"}}}
        card = hub.ModelCard.load(model.save_pretrained(tmp_path) / CARD_FILE)
        assert card.data.library_name == "uctrans"
        assert card.data.pipeline_tag == "image-segmentation"
        assert {"uctrans", "dual-branch-uctransnet"} <= set(card.data.tags)
        for line in ("# dual_branch_uctransnet", "- classes: `3`", "- protocol: `native`", "- best dice: `0.75`"):
            assert line in card.text.splitlines()
        assert "palette" not in card.text
        assert "Jane" not in card.text

    def test_it_is_never_overwritten(self, tmp_path, hub):
        build("unet").save_pretrained(tmp_path)
        (tmp_path / CARD_FILE).write_text("edited")
        build("unet").save_pretrained(tmp_path)
        assert (tmp_path / CARD_FILE).read_text() == "edited"

    def test_without_the_hub_there_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        build("unet").save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
        with pytest.raises(ImportError, match=r"uctrans\[hub\]"):
            build("unet").push_to_hub("someone/something")


def test_parameters_that_another_type_cannot_hold_are_refused(tmp_path):
    model = build("unet")
    with pytest.raises(ValueError, match=r"dtype: torch\.int8 is not a floating-point type"):
        model.save_pretrained(tmp_path, dtype=torch.int8)
    with torch.no_grad():
        model.head.bias.fill_(1e5)
    with pytest.raises(ValueError, match=r"head\.bias is not finite in torch\.float16; save it in torch\.float32"):
        model.save_pretrained(tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert uctrans.load_model(tmp_path).head.bias.item() == 99840  # the bfloat16 next to 1e5


OTHER_KINDS = {  # content and message by name
    "a.png": (b"\x89PNG\r\n", "a PNG image: give a folder that save_pretrained wrote"),
    "a.jpg": (b"\xff\xd8\xff\xe0", "a JPEG image"),
    "a.tif": (b"MM\0*", "a TIFF image"),
    "a.h5": (b"\x89HDF\r\n", "an HDF5 file"),
    "a.npy": (b"\x93NUMPY", "a NumPy array"),
    "a.onnx": (b"\x08\x08", "an ONNX network: run it with uctrans predict or evaluate"),
    "a.pt": (b"version https://git-lfs\r\noid 1", 'text that begins "version https://git-lfs": download'),
    "a.pkl": (pickle.dumps(Path(), 2), "not a checkpoint, or a pickle of more than tensors and plain values, whose"),
    "a.bin": (b"\0\xaa\xbb", "not a checkpoint, or a pickle of more"),
    "a.csv": (b"", "truncated or not a checkpoint"),
}


class TestUnusableFiles:
    def saved(self, folder):
        build("unet").save_pretrained(folder)
        return folder

    def test_nothing_there(self, tmp_path):
        with pytest.raises(uctrans.ModelFileError, match="missing does not exist: give a run folder"):
            uctrans.load_model(tmp_path / "missing")
        with pytest.raises(uctrans.ModelFileError, match=r"has no config\.json"):
            uctrans.load_model(tmp_path)

    def test_a_name_that_is_not_utf8_is_shown_escaped(self, tmp_path):
        with pytest.raises(uctrans.ModelFileError, match=r"caf\\udce9: is not UTF-8; rename"):
            uctrans.load_model(tmp_path / os.fsdecode(b"caf\xe9"))

    def test_model_one_folder_further_down(self, tmp_path):
        self.saved(tmp_path / "run" / "best")
        (tmp_path / "data").mkdir()
        with pytest.raises(uctrans.ModelFileError, match=r"has no config\.json; did you mean .*/run\?"):
            uctrans.load_model(tmp_path)
        self.saved(tmp_path / "model")
        with pytest.raises(uctrans.ModelFileError, match=r"did you mean .*/model or .*/run\?"):
            uctrans.load_model(tmp_path)

    def test_run_without_best_weights(self, tmp_path):
        (tmp_path / "last.pt").touch()
        with pytest.raises(uctrans.ModelFileError, match=r"without best weights yet: use .*last\.pt"):
            uctrans.load_model(tmp_path)

    def test_config_that_is_no_json(self, tmp_path):
        (self.saved(tmp_path) / CONFIG_FILE).write_text("{")
        with pytest.raises(uctrans.ModelFileError, match=r"config\.json: is not JSON"):
            uctrans.load_model(tmp_path)

    def test_config_of_an_unknown_model_or_option(self, tmp_path):
        path = self.saved(tmp_path) / CONFIG_FILE
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"name": "nunet"}))
        with pytest.raises(uctrans.ModelFileError, match=r"config\.json: unknown model 'nunet'"):
            uctrans.load_model(tmp_path)
        path.write_text(json.dumps(config | {"depth": 3}))
        with pytest.raises(uctrans.ModelFileError, match=r"config\.json.*depth"):
            uctrans.load_model(tmp_path)
        path.write_text(json.dumps({"base_channels": 4}))
        with pytest.raises(uctrans.ModelFileError, match="does not name a model"):
            uctrans.load_model(tmp_path)

    def test_weights_missing_truncated_or_of_another_size(self, tmp_path):
        weights = self.saved(tmp_path) / WEIGHTS_FILE
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(uctrans.ModelFileError, match="not a whole safetensors file"):
            uctrans.load_model(tmp_path)
        weights.unlink()
        with pytest.raises(uctrans.ModelFileError, match="does not exist: copy the weights"):
            uctrans.load_model(tmp_path)
        build("unet", base_channels=8).save_pretrained(tmp_path / "wide")
        weights.write_bytes((tmp_path / "wide" / WEIGHTS_FILE).read_bytes())
        with pytest.raises(uctrans.ModelFileError, match=r"is not the file that config\.json was written with"):
            uctrans.load_model(tmp_path)
        change_config(tmp_path, **{DIGEST: None})
        with pytest.raises(uctrans.ModelFileError, match="of another shape"):
            uctrans.load_model(tmp_path)

    def test_class_and_file_disagree(self, tmp_path):
        with pytest.raises(uctrans.ModelFileError, match="describes a 'unet', not a 'uctransnet'"):
            uctrans.UCTransNet.from_pretrained(self.saved(tmp_path))

    def test_checkpoint_truncated_foreign_or_executable(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save({"weights": torch.zeros(3)}, path)
        with pytest.raises(uctrans.ModelFileError, match=r"neither .* a state dict of 1 tensors \(weights\): build"):
            uctrans.load_model(path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(uctrans.ModelFileError, match="truncated or not a checkpoint"):
            uctrans.load_model(path)
        torch.save({"format": "uctrans-checkpoint", "model": {"name": "unet"}}, path)
        with pytest.raises(uctrans.ModelFileError, match="lacks the entry 'config'"):
            uctrans.load_model(path)
        torch.save(nn.Linear(2, 2), path)
        with pytest.raises(uctrans.ModelFileError, match="never executed here"):
            uctrans.load_model(path)

    @pytest.mark.parametrize("name", OTHER_KINDS)
    def test_another_kind_of_file(self, name, tmp_path):
        content, message = OTHER_KINDS[name]
        (tmp_path / name).write_bytes(content)
        with pytest.raises(uctrans.ModelFileError, match=f"{name} is {message}"):
            uctrans.load_model(tmp_path / name)

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ("a/models/model.json", r"a program of torch\.export, which has no configuration: give the model"),
            ("a/constants.pkl", "a TorchScript program"),
            ("array.npy", r"a zip archive of array\.npy: give a folder"),
            ("a/data.pkl", "truncated or not a checkpoint"),
        ],
    )
    def test_another_kind_of_archive(self, record, message, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr(record, "")
        with pytest.raises(uctrans.ModelFileError, match=f"is {message}"):
            uctrans.load_model(tmp_path / "a.pt")

    def test_what_another_file_holds(self, tmp_path):
        path = tmp_path / "model.ckpt"
        state = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
        first = (
            r"7 tensors{} \(0\.weight, 0\.bias, 1\.weight, 1\.bias and 3 more\): build its network and call load_state"
        )
        for content, message in (
            (state, "a state dict of " + first.format("")),
            ({"epoch": 3, "state_dict": state}, "a state dict of " + first.format(" under 'state_dict'")),
            ({"epoch": 3, "loss": 0.5}, "a dict with the keys epoch, loss; save the state dict of a network"),
            ({}, "an empty dict; save the state dict of a network"),
            ([1, 2], "a list; save the state dict of a network"),
            (
                nn.Linear(2, 2),
                r"a pickle of objects of torch\.nn\.modules\.linear\.Linear, whose code is never executed",
            ),
        ):
            torch.save(content, path)
            with pytest.raises(uctrans.ModelFileError, match=message):
                uctrans.load_model(path)
        weights = self.saved(tmp_path / "saved") / WEIGHTS_FILE
        with pytest.raises(uctrans.ModelFileError, match="holds weights alone: give its folder"):
            uctrans.load_model(weights)
