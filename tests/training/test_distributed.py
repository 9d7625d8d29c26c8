"""Two processes under torchrun: the same training as one with twice the batch, stopped and resumed."""

import dataclasses
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import uctrans
from uctrans.models import registry
from uctrans.training import ConfigError, load_checkpoint, train
from uctrans.training.distributed import Processes, locked_by_main, processes, with_sync_batch_norm
from uctrans.training.log import read_metrics
from uctrans.training.signals import ending_with_parent
from uctrans.writing import FolderError, locked

ROOT = Path(uctrans.__file__).parents[1]
PROGRAM = Path(__file__).with_name("distributed_run.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_program(config, folder, *words, is_stopped=False):
    folder.mkdir(exist_ok=True)
    config.save_yaml(folder / "settings.yaml")
    result = subprocess.run(
        [sys.executable, *TORCHRUN, str(PROGRAM), str(folder / "settings.yaml"), str(folder), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode != 0) == is_stopped, result.stderr
    return result


def test_two_processes_are_one_with_twice_the_batch(make_config, tmp_path, even_folder, monkeypatch, assert_same):
    settings = {"data": str(even_folder), "model": "plain", "base_channels": 4, "epochs": 2}
    double = make_config(batch_size=2, output=str(tmp_path / "double" / "run"), progress=True, **settings)
    result = run_program(double, tmp_path / "double")
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    program = runpy.run_path(str(PROGRAM))  # registers the network
    single = make_config(batch_size=4, output=str(tmp_path / "single" / "run"), **settings)
    train(single, transform=program["unchanged"])

    weights = [torch.load(tmp_path / "double" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(*weights)
    alone = load_checkpoint(tmp_path / "single" / "run" / "last.pt")["model"]["state"]
    for name, tensor in alone.items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-6)

    rows = [read_metrics(tmp_path / name / "run" / "metrics.csv") for name in ("double", "single")]
    assert [row["epoch"] for row in rows[0]] == [1, 2]  # only one process wrote
    for both, one in zip(*rows, strict=True):
        assert both["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert both["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
        assert both["val_dice"] == pytest.approx(one["val_dice"], rel=1e-5)
    assert result.stdout.count("epoch 1,") == 1
    assert "2 processes on cpu" in result.stdout
    checkpoint = load_checkpoint(tmp_path / "double" / "run" / "last.pt")
    augment = [states["augment"] for states in checkpoint["generators"]]
    assert len(augment) == 2
    assert not torch.equal(*augment)


@pytest.mark.slow
def test_torchrun_stopped_in_the_middle_of_an_epoch_and_resumed_ends_with_the_same_bits(
    make_config, tmp_path, even_folder, assert_same
):
    settings = {
        "data": str(even_folder),
        "model": "uctransnet",
        "image_size": 32,
        "model_options": {"num_layers": 1, "num_heads": 1},
        "batch_size": 1,
        "ema_decay": 0.9,
        "amp": "bf16",
    }
    straight = make_config(output=str(tmp_path / "straight" / "run"), **settings)
    run_program(straight, tmp_path / "straight")

    stopped = make_config(output=str(tmp_path / "stopped" / "run"), **settings)
    run_program(stopped, tmp_path / "stopped", "6", is_stopped=True)
    folder = Path(stopped.output)
    assert "stopped by SIGTERM after epoch 1 and 2 steps" in (folder / "log.txt").read_text()
    checkpoint = load_checkpoint(folder / "last.pt")
    assert (checkpoint["epoch"], checkpoint["sampler"]["step"]) == (1, 2)
    first, second = checkpoint["sampler"]["totals"]
    assert (first["steps"], second["steps"]) == (2, 2)
    assert first["loss"] != second["loss"]

    run_program(dataclasses.replace(stopped, resume=True), tmp_path / "stopped")
    ends = [load_checkpoint(Path(config.output) / "last.pt") for config in (straight, stopped)]
    rows = [read_metrics(Path(config.output) / "metrics.csv") for config in (straight, stopped)]
    for end in ends:
        del end["train_config"]
    for row in rows[0] + rows[1]:
        del row["seconds"], row["images_per_second"]
    assert_same(*ends)
    assert_same(*rows)


def fork(work):
    """Return the number of a child process that does ``work``."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_process_ends_with_its_parent(is_stuck):
    reader, writer = os.pipe()

    def wait_in_the_block():
        signal.signal(signal.SIGTERM, signal.SIG_IGN if is_stuck else signal.SIG_DFL)
        with ending_with_parent(seconds_to_save=0.2):
            os.write(writer, b"begun")
            time.sleep(60)

    parent = fork(lambda: os.waitpid(fork(wait_in_the_block), 0))
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read(5) == b"begun"
        os.kill(parent, signal.SIGKILL)
        killed = time.monotonic()
        assert pipe.read() == b""  # returns when the process has ended
        assert time.monotonic() - killed < 10
    os.waitpid(parent, 0)


def test_after_the_block_the_parent_is_not_watched():
    with ending_with_parent():
        watching = threading.active_count()
    while threading.active_count() >= watching:
        time.sleep(0.01)


def test_torchrun_that_has_ended_before_its_processes_have_begun_is_named(monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in {**environment, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"torchrun: nothing answers at localhost:{port}"), processes("cpu"):
        pass


def is_running(process):
    """Return whether a thread of a process runs; a zombie that nobody waits for has none."""
    try:
        threads = [file.read_text() for file in Path(f"/proc/{process}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # it ends just now
        return True
    return any(thread.rpartition(")")[2].split()[0] != "Z" for thread in threads)


@pytest.mark.slow
@pytest.mark.parametrize("is_stuck", [False, True])
def test_the_processes_of_a_killed_torchrun_end_and_save(make_config, tmp_path, even_folder, is_stuck):
    config = make_config(data=str(even_folder), batch_size=2, epochs=100_000, first_best_epoch=100_000, save_minutes=60)
    config.save_yaml(tmp_path / "settings.yaml")
    words = [sys.executable, *TORCHRUN, str(PROGRAM), str(tmp_path / "settings.yaml"), str(tmp_path)]
    torchrun = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    folder, deadline = Path(config.output), time.monotonic() + 200
    while not read_metrics(folder / "metrics.csv") and torchrun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    first, second = ranks = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
    if is_stuck:
        os.kill(second, signal.SIGSTOP)
    torchrun.kill()
    torchrun.wait()
    killed = time.monotonic()
    while any(map(is_running, [first] if is_stuck else ranks)) and time.monotonic() < killed + 10:
        time.sleep(0.1)
    print(f"after {time.monotonic() - killed:.1f} s")
    still_running = [is_running(process) for process in ranks]
    for process, runs in zip(ranks, still_running, strict=True):
        if runs:
            os.kill(process, signal.SIGKILL)
    assert still_running == [False, is_stuck]
    if not is_stuck:
        assert "stopped by SIGTERM" in (folder / "log.txt").read_text().splitlines()[-1]
        assert load_checkpoint(folder / "last.pt")["epoch"] >= 1
    with locked(folder):
        pass


def test_without_torchrun_this_is_the_only_process():
    with processes("cpu") as group:
        assert (group.rank, group.count, group.is_main, group.device.type) == (0, 1, True, "cpu")
        value = torch.tensor([2.0])
        assert group.mean_(value) is value
        assert group.sum_(value).item() == 2
        assert group.gather("x") == ["x"]
        assert group.any(True) is True
        assert group.any(False) is False
        model = torch.nn.BatchNorm2d(1)
        assert group.wrap(model) is model
        group.share_buffers(model)
        group.barrier()


def test_a_folder_in_use_stops_all_processes(tmp_path, monkeypatch):
    refused = "output: run is in use by process 7"
    monkeypatch.setattr(Processes, "gather", lambda self, value: [refused, value])
    group = Processes(rank=1, count=2, device=torch.device("cpu"))
    with pytest.raises(FolderError, match=refused), locked_by_main(tmp_path / "run", group):
        pass
    assert not (tmp_path / "run").exists()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with processes("auto") as group:
        assert chosen == [group.device] == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(ConfigError, match=r"device: cuda:2 is not there; .*no more processes than GPUs"),
        processes("auto"),
    ):
        pass


def test_sync_batch_norm_needs_cuda():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    with pytest.raises(ConfigError, match=r"sync_batch_norm: .*CUDA only, not on cpu; switch sync_batch_norm off"):
        with_sync_batch_norm(model, torch.device("cpu"))
    assert isinstance(with_sync_batch_norm(model, torch.device("cuda"))[0], torch.nn.SyncBatchNorm)
