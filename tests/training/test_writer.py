"""The thread that writes checkpoints: copies of the state, the order of writing, and failures."""

import copy
import json
import threading

import pytest
import torch

from uctrans.training import CheckpointError, TrainingError, load_checkpoint, loop, train
from uctrans.training.checkpoint import CheckpointWriter, StateCopy
from uctrans.training.log import read_metrics

PATIENCE = 20  # seconds, after which a test that hangs fails


class Disk:
    """Takes a checkpoint whenever the test allows one."""

    def __init__(self):
        self.written, self.failures = [], {}
        self.begun, self.allowed = threading.Semaphore(0), threading.Semaphore(0)

    def write(self, checkpoint, is_best):
        self.begun.release()
        assert self.allowed.acquire(timeout=PATIENCE)
        epoch = checkpoint["epoch"]
        if epoch in self.failures:
            raise self.failures[epoch]
        self.written.append((epoch, is_best, checkpoint["weights"].tolist()))

    def wait_until_busy(self):
        assert self.begun.acquire(timeout=PATIENCE)

    def allow(self, count):
        self.allowed.release(count)


class Training:
    """Saves weights that say which epoch they are of, and spoils them afterwards."""

    def __init__(self, writer):
        self.writer, self.weights = writer, torch.zeros(2)

    def save(self, epoch, is_best=False):
        self.weights.fill_(epoch)
        self.writer.save({"epoch": epoch, "weights": self.weights}, is_best)
        self.weights.fill_(-1)


def entry(epoch, is_best=False):
    return epoch, is_best, [epoch, epoch]


def test_training_continues_while_its_state_is_written():
    disk = Disk()
    with CheckpointWriter(disk.write) as writer:
        Training(writer).save(1)
        disk.wait_until_busy()
        assert disk.written == []
        disk.allow(1)
        writer.wait()
        assert disk.written == [entry(1)]


@pytest.mark.parametrize("kinds", [(False, False, False), (False, True, True), (True, False, True)])
def test_a_save_replaces_the_waiting_one(kinds):
    disk = Disk()
    with CheckpointWriter(disk.write) as writer:
        training = Training(writer)
        training.save(1, kinds[0])
        disk.wait_until_busy()
        training.save(2, kinds[1])
        training.save(3, kinds[2])
        disk.allow(2)
    assert disk.written == [entry(1, kinds[0]), entry(3, kinds[2])]


def test_a_waiting_best_epoch_is_written_before_an_ordinary_save():
    disk = Disk()
    with CheckpointWriter(disk.write) as writer:
        training = Training(writer)
        training.save(1)
        disk.wait_until_busy()
        training.save(2, is_best=True)
        other = threading.Thread(target=training.save, args=(3,))
        other.start()
        other.join(0.05)
        assert other.is_alive()
        disk.allow(1)
        other.join(PATIENCE)
        assert not other.is_alive()  # 2 is being written, not yet complete
        assert disk.written == [entry(1)]
        disk.allow(2)
    assert disk.written == [entry(1), entry(2, True), entry(3)]


def test_leaving_waits_for_everything():
    disk = Disk()
    with CheckpointWriter(disk.write) as writer:
        training = Training(writer)
        training.save(1)
        disk.wait_until_busy()
        training.save(2)
        threading.Timer(0.05, disk.allow, [2]).start()
    assert disk.written == [entry(1), entry(2)]
    assert not writer._thread.is_alive()


def test_an_error_of_the_training_leaves_after_everything_is_written():
    disk = Disk()
    disk.allow(1)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(disk.write) as writer:
        Training(writer).save(1)
        raise KeyboardInterrupt
    assert disk.written == [entry(1)]


def test_a_failure_is_raised_by_the_next_save_and_what_waited_is_written_all_the_same():
    disk = Disk()
    disk.failures[1] = CheckpointError("last.pt: no space")
    with pytest.raises(CheckpointError, match="no space"), CheckpointWriter(disk.write) as writer:
        training = Training(writer)
        training.save(1)
        disk.wait_until_busy()
        training.save(2, is_best=True)
        disk.allow(1)
        disk.wait_until_busy()  # with 2, so 1 has failed
        disk.allow(1)
        training.save(3)
    assert disk.written == [entry(2, True)]


@pytest.mark.parametrize("error", [CheckpointError("last.pt: no space"), TrainingError("best: read-only")])
def test_a_failure_of_the_last_save_is_raised_at_the_end(error):
    disk = Disk()
    disk.failures[1] = error
    disk.allow(1)
    with pytest.raises(type(error), match=str(error)), CheckpointWriter(disk.write) as writer:
        Training(writer).save(1)


def test_a_failure_does_not_hide_the_error_that_ends_the_training():
    disk = Disk()
    disk.failures[1] = CheckpointError("last.pt: no space")
    disk.allow(1)
    with pytest.raises(TrainingError, match="not finite") as raised, CheckpointWriter(disk.write) as writer:
        Training(writer).save(1)
        raise TrainingError("the loss is not finite")
    assert raised.value.__notes__ == ["also: last.pt: no space"]


def test_a_copy_has_all_of_the_state_and_none_of_its_memory(assert_same):
    model = torch.nn.BatchNorm2d(2)
    state = {
        "model": model.state_dict(),
        "optimizer": {"groups": [{"betas": (0.9, 0.99), "lr": torch.tensor(0.1)}], 0: torch.ones(2, 3, 4, 5)},
        "order": None,
    }
    state["optimizer"][0] = state["optimizer"][0].to(memory_format=torch.channels_last)
    expected = copy.deepcopy(state)
    copied = StateCopy().take(state)
    with torch.no_grad():
        for tensor in (*state["model"].values(), state["optimizer"][0], state["optimizer"]["groups"][0]["lr"]):
            tensor.fill_(7)
    state["optimizer"]["groups"].append("later")
    assert_same(copied, expected)
    assert copied["optimizer"][0].is_contiguous(memory_format=torch.channels_last)
    assert copied["model"]._metadata == expected["model"]._metadata


@pytest.mark.parametrize(("is_slow", "copies"), [(False, 1), (True, 2)])
def test_two_copies_are_all_the_memory_that_saves_take(is_slow, copies):
    disk, kept = Disk(), []

    def write(checkpoint, is_best):
        disk.write(checkpoint, is_best)
        kept.append(checkpoint["weights"])

    with CheckpointWriter(write) as writer:
        training = Training(writer)
        for epoch in range(0, 8, 2):
            training.save(epoch)
            disk.wait_until_busy()
            if is_slow:
                training.save(epoch + 1)
                disk.allow(1)
                disk.wait_until_busy()
            disk.allow(1)
            writer.wait()
    assert len(kept) == (8 if is_slow else 4)
    assert len({tensor.data_ptr() for tensor in kept}) == copies


def test_memory_of_a_copy_is_used_again_where_it_fits():
    memory = StateCopy()
    first = memory.take({"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": None})
    again = memory.take({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(1)})
    assert again["a"].data_ptr() == first["a"].data_ptr()
    assert [tensor.tolist() for tensor in again.values()] == [[1] * 3, [1] * 4, [1]]


def test_a_slow_disk_holds_up_no_best_epoch_and_changes_nothing_in_the_end(
    make_config, monkeypatch, tmp_path, assert_same
):
    scores, write_files, written = [0.1, 0.2, 0.3, 0.2, 0.4, 0.1], loop.write_files, []
    has_trained_four = threading.Event()

    def validate(run):
        if run.epoch == 4:
            has_trained_four.set()
        return 0.5, scores[run.epoch - 1]

    def write_slowly(folder, checkpoint, is_best):
        if checkpoint["epoch"] == 1:
            assert has_trained_four.wait(PATIENCE)
        written.append(checkpoint["epoch"])
        write_files(folder, checkpoint, is_best)

    monkeypatch.setattr(loop, "validate_epoch", validate)
    settings = {"epochs": 6, "ema_decay": 0.9, "save_minutes": 0}
    train(make_config(output=str(tmp_path / "fast"), **settings))
    has_trained_four.clear()
    monkeypatch.setattr(loop, "write_files", write_slowly)
    train(make_config(output=str(tmp_path / "slow"), **settings))
    assert written[:3] == [0, 1, 3]  # 3 was better than 2, which waited
    assert written[-2:] == [5, 6]
    folders = [tmp_path / name for name in ("fast", "slow")]
    for name in ("last.pt", "best.pt"):
        checkpoints = [load_checkpoint(folder / name) for folder in folders]
        for checkpoint in checkpoints:
            del checkpoint["train_config"]
        assert_same(*checkpoints)
    assert len({(folder / "best" / "model.safetensors").read_bytes() for folder in folders}) == 1
    assert_same(*[json.loads((folder / "best" / "config.json").read_text()) for folder in folders])
    assert len(read_metrics(tmp_path / "slow" / "metrics.csv")) == 6


@pytest.mark.gpu
def test_on_a_gpu_a_copy_is_what_the_state_was_when_it_was_taken():
    weights = torch.zeros(1 << 24, device="cuda")
    memory = StateCopy()
    for value in range(4):
        weights.fill_(value)
        copied = memory.take({"weights": weights})
        weights.fill_(-1)
        assert copied["weights"].is_pinned()
        assert copied["weights"].unique().tolist() == [value]
