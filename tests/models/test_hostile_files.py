"""Files that are damaged, of another kind, or made to do harm: an error that names the file, and no memory taken."""

import itertools
import json
import multiprocessing
import os
import resource
import struct
import threading
import zipfile

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import uctrans
from tests.models.support import build
from uctrans.models.weights import CONFIG_FILE, DIGEST, WEIGHTS_FILE, sketch_of
from uctrans.writing import UNFINISHED


def refused(match):
    return pytest.raises(uctrans.ModelFileError, match=match)


@pytest.fixture
def folder(tmp_path):
    model = build("uctransnet", num_layers=1, patch_sizes=(4, 2))
    model.metadata = {"protocol": "uctransnet-224", "image_size": [32, 32], "images": {"train": {}, "val": {}}}
    return model.save_pretrained(tmp_path / "model")


def change(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_weights(folder, state):
    """Write other weights, of which config.json has no digest, as in folders of earlier versions."""
    safetensors.torch.save_file(state, folder / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config.pop(DIGEST, None)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def checkpoint_of(folder, **changes):
    """Write the model of a folder as the checkpoint of a run, with other entries; return its path."""
    model = uctrans.load_model(folder)
    saved = {"name": model.name, "config": model.config, "metadata": model.metadata, "state": model.state_dict()}
    saved |= {key: value for key, value in changes.items() if key in saved}
    outer = {"format": "uctrans-checkpoint", "version": 1, "model": saved, "ema": None}
    path = folder / "last.pt"
    torch.save(outer | {key: value for key, value in changes.items() if key not in saved}, path)
    return path


HUGE = [
    {"base_channels": 100_000},
    {"base_channels": 10**30},
    {"num_layers": 10**6},
    {"num_heads": 10**6},
    {"image_size": 10**6},
    {"image_size": [16, 10**9]},
    {"classes": 10**9},
    {"in_channels": 10**9},
    {"mlp_ratio": 10**8},
    {"patch_sizes": [2**power for power in range(60, -1, -1)]},
]


@pytest.mark.parametrize("changes", HUGE, ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_sizes_beyond_the_weights_take_no_memory(kind, changes, folder):
    if kind == "folder":
        path = folder
        change(folder, **changes)
    else:
        path = checkpoint_of(folder, config=uctrans.load_model(folder).config | changes)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(r"(config\.json|last\.pt) "):
        uctrans.load_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200 * 1024  # KiB


@pytest.mark.parametrize(
    "changes",
    [
        {"base_channels": "4"},
        {"base_channels": float("nan")},
        {"num_layers": None},
        {"patch_sizes": {"4": 2}},
        {"image_size": [[32, 32]]},
        {"classes": True},
        {"backend": ["auto"]},
        {"mlp_dropout": "0"},
        {"attention_dropout": float("nan")},
        {"name": 3},
        {"metadata": []},
        {"metadata": "none"},
    ],
    ids=str,
)
def test_arguments_of_another_type(changes, folder):
    change(folder, **changes)
    with refused(r"config\.json"):
        uctrans.load_model(folder)


METADATA = [
    {"protocol": 3},
    {"protocol": ["uctransnet-224"]},
    {"image_size": "32"},
    {"image_size": float("nan")},
    {"image_size": [32, float("inf")]},
    {"image_size": [10**6, 10**6]},
    {"image_size": [32]},
    {"image_size": True},
    {"channel_order": 1},
    {"intensity_range": [0]},
    {"intensity_range": [0, float("nan")]},
    {"palette": {"#000000": 1}},
    {"palette": [1, 2]},
    {"class_names": "nucleus"},
    {"class_names": ["\ud800"]},
    {"ignore_label": "255"},
    {"target": {}},
    {"best_dice": "0.5"},
    {"best_epoch": 1.5},
    {"images": ["a.png"]},
    {"images": {"train": {}}},
    {"images": {"train": ["a"], "val": []}},
    {"images": {"train": {"0": 1}, "val": {}}},
]


@pytest.mark.parametrize("metadata", METADATA, ids=str)
def test_malformed_metadata(metadata, folder):
    (name,) = metadata
    change(folder, metadata=metadata)
    with refused(rf"config\.json: metadata: {name} is .*, not .*: restore the file"):
        uctrans.load_model(folder)


def test_malformed_metadata_of_a_checkpoint(folder):
    with refused(r"last\.pt: metadata: image_size is '32'"):
        uctrans.load_model(checkpoint_of(folder, metadata={"image_size": "32"}))


def test_entries_that_nothing_uses_may_be_anything(folder):
    change(folder, metadata={"notes": [{"scanner": None}], "best_dice": float("nan"), "palette": None})
    assert uctrans.load_model(folder).metadata["notes"] == [{"scanner": None}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"name": "unet", "name": "unet"}', "has the key 'name' twice"),
        ('{"name": "unët"}'.encode("latin-1"), "is not JSON"),
        (b'{"name": "unet", "base_channels": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"{" + b" " * (1 << 26) + b"}", "is larger than"),
        (b"null", "does not name a model"),
    ],
    ids=["deep", "twice", "not UTF-8", "digits", "large", "null"],
)
def test_json_that_is_no_configuration(text, message, folder):
    (folder / CONFIG_FILE).write_bytes(text)
    with refused(rf"config\.json.*{message}"):
        uctrans.load_model(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, "last.pt"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_pipe_or_device_in_place_of_a_file(name, make, folder):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with refused(rf"{name}: is a (named pipe|device), not a file"):
        uctrans.load_model(folder / name if name == "last.pt" else folder)


class TestSafetensors:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_floating_point_numbers_are_taken(self, dtype, folder):
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        write_weights(folder, {key: value.to(dtype) for key, value in state.items()})
        assert uctrans.load_model(folder).head.weight.dtype == torch.float32

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str
    )
    def test_other_numbers_are_no_weights(self, dtype, folder):
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        write_weights(folder, state | {"head.weight": state["head.weight"].to(dtype)})
        with refused(r"entries 1 of another type \(first: head\.weight\)"):
            uctrans.load_model(folder)

    def test_further_tensors_are_named(self, folder):
        write_weights(folder, safetensors.torch.load_file(folder / WEIGHTS_FILE) | {"extra": torch.zeros(1 << 20)})
        with refused(r"entries 1 unknown \(first: extra\)"):
            uctrans.load_model(folder)

    @pytest.mark.parametrize(
        "header",
        [
            {"head.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}},
            {"head.bias": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}},
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            {"head.bias": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}},
            {"head.bias": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        ],
        ids=["shape", "beyond the file", "overlap", "type", "negative"],
    )
    def test_a_header_that_lies(self, header, folder):
        text = json.dumps(header).encode()
        write_weights(folder, {"a": torch.zeros(1)})
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with refused(r"model\.safetensors is not a whole safetensors file"):
            uctrans.load_model(folder)


class TestDigest:
    def test_a_flipped_bit(self, folder):
        content = bytearray((folder / WEIGHTS_FILE).read_bytes())
        content[-100] ^= 1
        (folder / WEIGHTS_FILE).write_bytes(content)
        with refused(r"model\.safetensors is not the file that config\.json was written with: it is damaged"):
            uctrans.load_model(folder)

    def test_a_process_that_is_killed_while_it_saves(self, folder, is_killed_at):
        config, weights = ((folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
        other = build("uctransnet", num_layers=1, patch_sizes=(4, 2))
        other.metadata = {"best_dice": 0.75}
        torch.nn.init.zeros_(other.head.bias)
        outcomes = []
        for number in itertools.count():
            (folder / CONFIG_FILE).write_bytes(config)
            (folder / WEIGHTS_FILE).write_bytes(weights)
            if not is_killed_at(number, lambda: other.save_pretrained(folder)):
                break
            try:
                loaded = uctrans.load_model(folder)
                outcomes.append("new" if "best_dice" in loaded.metadata else "old")
                assert (outcomes[-1] == "new") == (not loaded.head.bias.any())
            except uctrans.ModelFileError as error:
                assert "a process was stopped between the two" in str(error)
                outcomes.append("refused")
        assert set(outcomes) == {"old", "refused", "new"}
        assert uctrans.load_model(folder).metadata == {"best_dice": 0.75}
        assert not list(folder.glob(f"{UNFINISHED}*"))

    def test_a_model_that_is_replaced_while_it_is_read(self, folder, monkeypatch):
        other = build("uctransnet", num_layers=1, patch_sizes=(4, 2))
        other.metadata = {"best_dice": 0.75}
        load, calls = safetensors.torch.load_file, []

        def replaced(path):
            calls.append(path)
            if len(calls) == 1:
                other.save_pretrained(folder)
            return load(path)

        monkeypatch.setattr(safetensors.torch, "load_file", replaced)
        loaded = uctrans.load_model(folder)
        assert len(calls) == 2
        assert loaded.metadata == {"best_dice": 0.75}

    def test_folders_without_one_load(self, folder):
        write_weights(folder, safetensors.torch.load_file(folder / WEIGHTS_FILE))
        assert uctrans.load_model(folder).name == "uctransnet"


class TestCheckpoint:
    def test_a_flipped_bit(self, folder):
        path = checkpoint_of(folder)
        with zipfile.ZipFile(path) as archive:
            weight = max((archive.read(name) for name in archive.namelist() if "/data/" in name), key=len)
        content = bytearray(path.read_bytes())
        content[content.index(weight) + len(weight) // 2] ^= 1
        path.write_bytes(content)
        with refused(r"last\.pt is truncated or not a checkpoint \(the checksum of its record .*data/\d+ is wrong\)"):
            uctrans.load_model(path)

    def test_compressed_records(self, folder):
        path, compressed = checkpoint_of(folder), folder / "compressed.pt"
        with (
            zipfile.ZipFile(path) as archive,
            zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for record in archive.infolist():
                target.writestr(record.filename, archive.read(record))
        with refused("its records are compressed"):
            uctrans.load_model(compressed)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": 2}, "has format version 2, this uctrans reads 1: use the uctrans that wrote it"),
            ({"model": None}, "has no model"),
            ({"name": ["unet"]}, "lacks the entry 'name'"),
            ({"config": 4}, "lacks the entry 'config'"),
            ({"config": {1: 2}}, "does not configure a 'uctransnet'"),
            ({"state": [1, 2]}, "lacks the entry 'state'"),
            ({"state": {"head.weight": 3}}, "head.weight is no ordinary tensor"),
            ({"state": {3: torch.zeros(1)}}, "in place of a state dict"),
            ({"state": {"a": torch.zeros(3).to_sparse()}}, "a is no ordinary tensor"),
            ({"state": {"a": torch.empty(1 << 40, device="meta")}}, "a is no ordinary tensor"),
            ({"state": {"a": torch.zeros(1).expand(1 << 40)}}, "few values that stand for many"),
            ({"ema": "none"}, "holds a str in place of a state dict"),
            ({"ema": {}}, "missing"),
        ],
        ids=str,
    )
    def test_parts_of_another_kind(self, changes, message, folder):
        with refused(rf"last\.pt.*{message}"):
            uctrans.load_model(checkpoint_of(folder, **changes))

    def test_lists_that_hold_one_another(self, folder):
        bomb = []
        for _ in range(50):
            bomb = [bomb, bomb]
        with refused("its values stand for too many"):
            uctrans.load_model(checkpoint_of(folder, config={"base_channels": bomb}))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
    def test_published_weights_of_another_type(self, dtype, folder):
        published = uctrans.to_upstream(uctrans.load_model(folder))
        with refused("of another type"):
            uctrans.load_upstream({key: value.to(dtype) for key, value in published.items()})

    def test_published_weights_that_stand_for_more(self, folder):
        published = uctrans.to_upstream(uctrans.load_model(folder))
        wide = {
            key: torch.zeros(()).expand([10_000 * side for side in value.shape]) for key, value in published.items()
        }
        torch.save(wide, folder / "wide.pth.tar")
        with refused("few values that stand for many"):
            uctrans.load_model(folder / "wide.pth.tar")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["head.weight", "encoder.stem.norm.running_var"])
def test_weights_that_are_not_finite_are_named(name, value, folder):
    state = uctrans.load_model(folder).state_dict()
    state[name].view(-1)[0] = value
    write_weights(folder, state)
    checkpoint = folder / "last.pt"
    torch.save(
        {"format": "uctrans-checkpoint", "model": uctrans.UCTransNet.from_pretrained(folder)._saved()}, checkpoint
    )
    for path in (folder, checkpoint):
        with refused(rf"{path.name}: {name} has values that are not finite"):
            uctrans.load_model(path)


def replace_for_ever(folder, stop):
    model = uctrans.load_model(folder)
    while not stop.is_set():
        model.metadata = {"best_epoch": model.metadata.get("best_epoch", 0) + 1}
        with torch.no_grad():
            model.head.bias.fill_(model.metadata["best_epoch"])
        model.save_pretrained(folder)


@pytest.mark.slow
def test_loading_while_another_process_replaces_the_model(folder):
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=replace_for_ever, args=(folder, stop))
    process.start()
    try:
        seen = set()
        while len(seen) < 20:
            try:
                model = uctrans.load_model(folder)
            except uctrans.ModelFileError as error:
                assert "was written with" in str(error)  # replaced twice in the time of one reading
                continue
            if epoch := model.metadata.get("best_epoch"):
                assert model.head.bias[0].item() == epoch
                seen.add(epoch)
    finally:
        stop.set()
        process.join()


class Refuse(TorchDispatchMode):
    """Let operators fail that draw normal numbers."""

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        assert "normal" not in str(function)
        return function(*args, **(kwargs or {}))


def test_a_sketch_draws_no_normal_numbers(folder):
    """PyTorch loads hundreds of modules for those of a tensor on the meta device, which takes two seconds."""
    model = uctrans.load_model(folder)
    with Refuse():
        sketch = sketch_of(type(model), model.config, model.state_dict(), folder)
    assert sketch.head.weight.is_meta


def test_other_threads_may_build_networks(folder):
    """Only the weights that the loading thread registers are counted."""
    stop = threading.Event()

    def build_for_ever():
        while not stop.is_set():
            torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(500)])

    thread = threading.Thread(target=build_for_ever)
    thread.start()
    try:
        for _ in range(3):
            uctrans.load_model(folder)
    finally:
        stop.set()
        thread.join()
