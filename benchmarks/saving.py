"""What a best epoch costs the training: its files written in between, as they once were, and written beside it.

    OMP_NUM_THREADS=1 python -m benchmarks.saving

UCTransNet of the published width with Adam's moments, on small images, on the device there is. A sample is the time of
some steps, alone, after files that were written in between, and after a save that goes on beside them. Unless their
number is given, they take twice as long as the files, so that whatever a save takes from them is in the sample. On
Linux, time in which the training was ready to go on and had no core is not counted: it is that of a machine with a core
to spare for writing. Files go into a folder for temporary ones, or into ``--folder``, whose disk may be another.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from uctrans.data import write_demo_dataset
from uctrans.training import TrainConfig
from uctrans.training.checkpoint import write_files
from uctrans.training.distributed import processes
from uctrans.training.loop import open_writer, take_step
from uctrans.training.run import Run

FEWEST_STEPS = 10
TIMES_THE_FILES = 2  # what the steps of a sample take at least
SCHEDULED = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, nanoseconds ready and without one, ...


def measure(config: TrainConfig, rounds: int, steps: int | None = None) -> tuple[dict[str, float], int]:
    """Return medians over ``rounds`` in seconds, and how many steps a sample has: ``steps``, or enough of them.

    The medians are those of the steps alone, of what either way adds to them, and of how long a save holds them up.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as for ``uctrans.training.train``.
    """
    folder = Path(config.output)
    folder.mkdir()
    samples: dict[str, list[float]] = {"steps": [], "written in between": [], "written beside": [], "held up": []}
    with processes(config.device) as group, open_writer(config) as writer:
        run = Run(config, group)
        run.begin_epoch()
        index = run.batch(0)

        def save() -> None:
            writer.save(run.state_dict(), True)
            samples["held up"].append(_now() - started)

        ways = {
            "steps": lambda: None,
            "written in between": lambda: write_files(folder, run.state_dict(), True),
            "written beside": save,
        }
        for number in range(rounds + 1):
            for name, way in ways.items():
                started = _now()
                way()
                _train(lambda: take_step(run, index), steps or FEWEST_STEPS)
                samples[name].append(_now() - started)
                writer.wait()
            if number == 0:  # memory is allocated
                samples = {name: [] for name in samples}
                steps = steps or _enough_steps(ways["written in between"], lambda: take_step(run, index))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name in ("written in between", "written beside"):
        added = [sample - alone for sample, alone in zip(samples[name], samples["steps"], strict=True)]
        medians[name] = statistics.median(added)
    return medians, steps


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__.splitlines()[0])
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a sample (default: twice as long as the files take)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="where the files go")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        config = TrainConfig(
            data=str(write_demo_dataset(Path(folder) / "data")),
            output=str(Path(folder) / "run"),
            base_channels=given.base_channels,
            image_size=given.image_size,
            batch_size=2,
            device=given.device,
        )
        seconds, steps = measure(config, given.rounds, given.steps)
        written = (Path(config.output) / "last.pt").stat().st_size
    print(f"last.pt and best.pt: {written / 1e6:.0f} MB; medians of {given.rounds}, seconds")
    print(f"{steps} steps alone: {seconds['steps']:.2f}")
    print(f"a best epoch that is written in between adds {seconds['written in between']:.2f}")
    print(f"written beside, it adds {seconds['written beside']:.2f}; the next step waits {seconds['held up']:.3f}")


def _now() -> float:
    without_a_core = int(SCHEDULED.read_text().split()[1]) if SCHEDULED.exists() else 0
    return time.perf_counter() - 1e-9 * without_a_core


def _enough_steps(write: Callable[[], None], step: Callable[[], None]) -> int:
    started = _now()
    write()
    written = _now()
    _train(step, FEWEST_STEPS)
    seconds_a_step = (_now() - written) / FEWEST_STEPS
    return max(FEWEST_STEPS, math.ceil(TIMES_THE_FILES * (written - started) / seconds_a_step))


def _train(step: Callable[[], None], count: int) -> None:
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
