"""What a best epoch costs: both ways write the files, and what is printed are the seconds measured."""

import pytest

from benchmarks import saving
from uctrans.data import write_demo_dataset
from uctrans.training import TrainConfig


@pytest.fixture
def config(tmp_path):
    data = str(write_demo_dataset(tmp_path / "data"))
    output = str(tmp_path / "run")
    return TrainConfig(data=data, output=output, model="unet", base_channels=2, image_size=32, device="cpu")


def test_only_files_that_are_written_in_between_hold_up_the_training(config, monkeypatch):
    clock, written = [0.0], []
    write_files = saving.write_files

    def write(folder, checkpoint, is_best):
        clock[0] += 5.0
        written.append(is_best)
        write_files(folder, checkpoint, is_best)

    monkeypatch.setattr(saving, "write_files", write)
    monkeypatch.setattr(saving, "_now", lambda: clock[0])
    medians, steps = saving.measure(config, rounds=3, steps=1)
    assert steps == 1
    assert medians == {"steps": 0.0, "written in between": 5.0, "written beside": 0.0, "held up": 0.0}
    assert written == [True] * 4  # the first round is a warm-up


@pytest.mark.parametrize(("seconds_a_step", "steps"), [(0.01, 1000), (3.0, saving.FEWEST_STEPS)])
def test_steps_take_twice_as_long_as_the_files(config, monkeypatch, seconds_a_step, steps):
    """A GPU does ten steps while the first of the files is still open."""
    clock, counts = [0.0], []

    def write(folder, checkpoint, is_best):
        clock[0] += 5.0

    def train(step, count):
        counts.append(count)
        clock[0] += seconds_a_step * count

    monkeypatch.setattr(saving, "write_files", write)
    monkeypatch.setattr(saving, "_train", train)
    monkeypatch.setattr(saving, "_now", lambda: clock[0])
    medians, counted = saving.measure(config, rounds=2)
    assert counted == pytest.approx(steps, abs=1) and counts[-6:] == [counted] * 6
    assert medians["written in between"] == pytest.approx(5.0)


@pytest.mark.parametrize(("scheduled", "now"), [("1000 250000000 3\n", 9.75), (None, 10.0)])
def test_time_without_a_core_is_not_counted(tmp_path, monkeypatch, scheduled, now):
    monkeypatch.setattr(saving, "SCHEDULED", tmp_path / "schedstat")
    monkeypatch.setattr(saving.time, "perf_counter", lambda: 10.0)
    if scheduled:
        (tmp_path / "schedstat").write_text(scheduled)
    assert saving._now() == now
