"""Checkpoint files: their format, whole after every failure to write, and refused when they are not what they claim."""

import errno
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

import uctrans
from uctrans.models import ModelFileError
from uctrans.training import CheckpointError, TrainingError, checkpoint, load_checkpoint, train
from uctrans.training.checkpoint import copy_checkpoint, load_weights, save_checkpoint, write_files
from uctrans.training.log import failures_named
from uctrans.writing import UNFINISHED


def test_checkpoint_has_the_documented_keys(finished):
    checkpoint = load_checkpoint(finished / "last.pt")
    assert checkpoint.keys() == {
        "format", "version", "train_config", "epoch", "model", "ema", "optimizer", "scheduler", "best", "generators",
        "sampler",
    }  # fmt: skip
    assert checkpoint["model"].keys() == {"name", "config", "metadata", "state"}
    assert checkpoint["epoch"] == 2
    assert checkpoint["ema"] is None


def test_load_model_reads_run_folder_and_checkpoints(finished, assert_same):
    state = dict(load_checkpoint(finished / "last.pt")["model"]["state"])
    assert_same(dict(uctrans.load_model(finished / "last.pt").state_dict()), state)
    best = dict(load_checkpoint(finished / "best.pt")["model"]["state"])
    assert_same(dict(uctrans.load_model(finished).state_dict()), best)


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (errno.ENOSPC, "the disk is full", "free space"),
        (errno.EDQUOT, "the quota is used up", "free space or ask for a larger quota"),
        (errno.EFBIG, "a file would be larger than is allowed here", r"raise the limit \(ulimit -f unlimited\)"),
        (errno.EROFS, "the disk is read-only", "make it writable"),
        (errno.EACCES, "permission is missing", "allow reading and writing there"),
        (errno.EPERM, "permission is missing", "allow reading and writing there"),
    ],
)
def test_a_write_that_the_system_refuses_gets_its_cause_and_remedy(number, cause, remedy, tmp_path, monkeypatch):
    def refused(checkpoint, file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "save", refused)
    with pytest.raises(CheckpointError, match=rf"last\.pt: cannot be written \({cause}.*; {remedy}.* with resume"):
        save_checkpoint(tmp_path / "last.pt", {})
    assert list(tmp_path.iterdir()) == []
    message = rf"log: cannot be written \(.*: {cause}\); {remedy}.* with resume"
    with pytest.raises(TrainingError, match=message), failures_named(Path("log")):
        refused(None, None)


def test_full_disk_keeps_the_previous_checkpoint(finished, make_config, monkeypatch):
    before = (finished / "last.pt").read_bytes()

    def half_save(checkpoint, file):
        file.write(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half_save)
    with pytest.raises(
        CheckpointError, match=r"(last|best)\.pt: cannot be written .*free space .* continue with resume"
    ):
        train(make_config(resume=True))
    assert (finished / "last.pt").read_bytes() == before
    assert not list(finished.glob(".*"))
    monkeypatch.undo()
    assert train(make_config(resume=True)).epochs == 3


def test_file_size_limit_keeps_the_previous_checkpoint(finished, make_config):
    before = (finished / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(CheckpointError, match=r"\.pt: cannot be written .*ulimit -f unlimited") as raised:
            train(make_config(resume=True))
        assert "no space" not in str(raised.value)
        assert "free space" not in str(raised.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (finished / "last.pt").read_bytes() == before
    assert load_checkpoint(finished / "last.pt")["epoch"] == 2


def test_best_weights_that_cannot_be_written_are_named(make_config, monkeypatch):
    def full(folder, saved):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_model", full)
    with pytest.raises(TrainingError, match=r"best.*No space left.*resume"):
        train(make_config())


def test_half_a_file_of_a_killed_process_is_cleared_away(finished):
    (finished / "best" / f"{UNFINISHED}1.safetensors").write_bytes(b"half")
    write_files(finished, load_checkpoint(finished / "best.pt"), is_best=True)
    assert sorted(path.name for path in (finished / "best").iterdir()) == ["config.json", "model.safetensors"]


def test_copy_gives_a_second_name_that_outlives_the_first(tmp_path, monkeypatch):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    copy_checkpoint(source, target)
    source.unlink()
    assert target.read_bytes() == b"new"

    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    copy_checkpoint(target, source)
    assert source.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_checkpoint_is_named(finished, keep):
    path = finished / "last.pt"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"last\.pt.*take another checkpoint"):
        load_checkpoint(path)


def test_noise_is_no_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickled_objects_are_not_loaded(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    if writer == "torch":
        torch.save({"format": "uctrans-checkpoint", "model": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "is not a checkpoint"),
        ({"state_dict": {}}, "is not a checkpoint"),
        ({"format": "uctrans-checkpoint", "version": 2}, "format version 2"),
        ({"format": "uctrans-checkpoint", "version": 1, "model": None}, "lacks train_config"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "last.pt")


def test_weights_of_another_model_or_size_are_refused(finished):
    saved = load_checkpoint(finished / "last.pt")["model"]
    with pytest.raises(CheckpointError, match=r"last\.pt: holds another unet \(base_channels: 2 in the file, 4 here\)"):
        load_weights(uctrans.UNet(base_channels=4), saved, "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt: holds a unet, not a uctransnet; set model to unet"):
        load_weights(uctrans.UCTransNet(base_channels=2, image_size=16), saved, "last.pt")
    with pytest.raises(ModelFileError, match=r"last\.pt"):
        load_weights(uctrans.UNet(base_channels=2), {**saved, "state": {}}, "last.pt")


def test_foreign_checkpoint_in_a_run_folder_is_refused(finished, make_config, make_run):
    known = load_checkpoint(finished / "last.pt")
    foreign = make_run(base_channels=4).state_dict()
    foreign["model"]["metadata"]["run_id"] = known["model"]["metadata"]["run_id"]
    save_checkpoint(finished / "last.pt", foreign | {key: known[key] for key in ("train_config", "best")})
    with pytest.raises(CheckpointError, match=r"last\.pt: holds another unet"):
        train(make_config(resume=True))


DAMAGED = [
    ("epoch", "2"),
    ("epoch", -1),
    ("train_config", None),
    ("optimizer", None),
    ("optimizer", {}),
    ("optimizer.param_groups", "groups"),
    ("optimizer.param_groups.0.betas", ("0.9", "0.99")),
    ("optimizer.param_groups.0.params", [0]),
    ("optimizer.state.0", {}),
    ("optimizer.state.0.exp_avg", torch.zeros(3)),
    ("optimizer.state.0.step", "3"),
    ("optimizer.state.x", {}),
    ("scheduler", 4),
    ("best", []),
    ("best.dice", "high"),
    ("best.epoch", None),
    ("generators", {}),
    ("generators", [None]),
    ("generators.0.cpu", torch.zeros(3, dtype=torch.uint8)),
    ("generators.0.augment", "state"),
    ("sampler", None),
    ("sampler.generator", torch.zeros(4)),
    ("sampler.train_names", 3),
    ("sampler.train_fingerprints", ["a"]),
    ("sampler.order", torch.arange(7) + 1),
    ("sampler.order", torch.zeros(7)),
    ("sampler.step", -1),
    ("sampler.step", 1),
    ("sampler.step", 1.5),
    ("ema", "none"),
    ("model.metadata.images", ["a.png"]),
    ("model.state", {"head.weight": 1}),
    ("model.config", [1]),
]


@pytest.mark.parametrize(("part", "value"), DAMAGED, ids=lambda value: value if isinstance(value, str) else "")
def test_damaged_parts_are_refused(part, value, finished, make_config):
    checkpoint = torch.load(finished / "last.pt", weights_only=True)
    *outer, last = [int(key) if key.isdecimal() else key for key in part.split(".")]
    inner = checkpoint
    for key in outer:
        inner = inner[key]
    inner[last] = value
    torch.save(checkpoint, finished / "last.pt")
    config = make_config(resume=True)
    with pytest.raises((CheckpointError, ModelFileError), match=r"last\.pt"):
        train(config)


def test_a_flipped_bit_is_noticed(finished, make_config):
    content = bytearray((finished / "last.pt").read_bytes())
    weight = load_checkpoint(finished / "last.pt")["model"]["state"]["head.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    (finished / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt .*the checksum of its record .* is wrong.*best\.pt"):
        train(make_config(resume=True))
