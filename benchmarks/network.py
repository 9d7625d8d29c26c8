"""Time whole networks: training step, inference, peak memory, kernels of a step.

    python -m benchmarks.network --mode training --model uctransnet --batch 4
    python -m benchmarks.network --mode inference --batch 1
    python -m benchmarks.network --mode memory --batch 32 --checkpointing
    python -m benchmarks.network --mode profile --candidates ours
    python -m benchmarks.network --mode launches

Every candidate is checked and then takes turns with the project's own network, ``ours``. On a GPU ``ours`` and the
baselines compute in bfloat16, channels-last, and are captured as CUDA graphs; ``published`` is float32, contiguous and
eager, as the published script runs it. On a CPU all are float32 and eager, and ``ours`` is the composed form. In
inference ``ours`` has its batch norms folded into convolutions, as ``uctrans predict`` runs it; ``unfolded`` has not,
``onnx`` is the engine of that name, and ``session`` its file in a plain session of ONNX Runtime. Training is forward,
published loss, backward and Adam on one batch. ``torch.compile`` runs in its default mode, because tuning takes
minutes. cuDNN measures which convolutions are fastest.
"""

import argparse
import gc
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uctrans
from uctrans.graphs import CapturedForward, CudaRecorder
from uctrans.inference.engines import forward_of
from uctrans.layers import fold_batch_norms
from uctrans.training import TrainConfig, segmentation_loss
from uctrans.training.build import training_forward
from uctrans.training.distributed import Processes
from uctrans.training.loop import train_step
from uctrans.training.losses import EpochTotals
from uctrans.training.optimization import build_optimizer
from uctrans.training.own import NOTHING
from uctrans.training.step_graphs import StepGraphs
from uctrans.weight_casts import keep_weights_cast

from .harness import compared, in_turns, kernels, operator_backend, relative_error
from .launches import BACKENDS, dispatched_operators, operator_table
from .records import DEFAULT_RECORD, append_line, environment, table

MODELS = ("uctransnet", "dual_branch_uctransnet")
OURS = "ours"
ROUNDS = {"cuda": 12, "cpu": 5}
WARM_UP_CALLS = {"cuda": 4, "cpu": 1}  # two plain ones, the one that records, and a replay
CALLS_IN_A_ROW = {"cuda": 3, "cpu": 1}

# A tenth of the published rate, which costs no time: with that, networks of this width part from each other within a
# few steps by rounding alone.
LEARNING_RATE = 1e-4
CHECKED_STEPS = 5
# Relative errors allowed of the first loss and of the later ones, against exact float32 without dropout. On 4 images of
# 96 pixels, on a CPU, bfloat16 reaches 0.07 % and 1.1 %. A compiled candidate is checked with dropout, because it takes
# minutes to compile it twice: dropout alone is 6.8 % there.
LOSS_TOLERANCES = {"without dropout": (0.01, 0.04), "with dropout": (0.03, 0.15)}
# Relative errors allowed of the logits. With 16 base channels, on a CPU, the published operations reach 2.4e-3 in
# bfloat16; float32 on a GPU has TF32 in convolutions.
LOGIT_TOLERANCES = {"bfloat16": 2e-2, "float32": 5e-3}

MEMORY_STEPS = 4  # after the first, which compiles and tunes: a plain one, the one that records, two replays
FIRST_BATCH = 8
SEARCH_PRECISION = 1 / 16  # of the largest batch
SEARCH_SECONDS = 90.0
PROFILED_KERNELS = 20

SMOOTHNESS = 8  # pixels between the random values that the images are interpolated from
FOREGROUND_ABOVE = 0.2  # of the mean of the blobs, which makes masks that can be learned


@dataclass(frozen=True)
class Problem:
    """A network and a batch of square images."""

    model: str
    batch: int
    pixels: int
    base_channels: int
    device: str
    checkpointing: bool = False


@dataclass(frozen=True)
class Variant:
    """How a network runs.

    Attributes:
        backend: of its operators.
        half: bfloat16 autocast and channels-last, instead of float32 and contiguous.
        graphed: captured as a CUDA graph, in training the whole step.
        compiled: by ``torch.compile``, in training together with its loss.
        is_project: trained by the project's own step; in inference with its batch norms folded.
        folds: whether the project's batch norms are folded in inference.
        runtime: what runs the network in inference, ``torch``, the engine ``onnx`` or a ``session`` on its file.
    """

    backend: str
    half: bool = True
    graphed: bool = True
    compiled: bool = False
    is_project: bool = False
    folds: bool = True
    runtime: str = "torch"

    def on(self, device: str) -> "Variant":
        """Return this variant as it runs on ``device``: a CPU has no Triton kernels and no graphs."""
        if device == "cuda":
            return self
        backend = operator_backend(device) if self.backend == "triton" else self.backend
        return replace(self, backend=backend, half=False, graphed=False)

    @property
    def dtype(self) -> str:
        """The dtype of most products."""
        return "bfloat16" if self.half else "float32"

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of maps and of the weights of convolutions."""
        return torch.channels_last if self.half or self.is_project else torch.contiguous_format


CANDIDATES = {
    OURS: Variant("triton", is_project=True),
    "published": Variant("reference", half=False, graphed=False),
    "reference": Variant("reference"),
    "composed": Variant("composed"),
    "compiled": Variant("reference", compiled=True),
    "ours compiled": Variant("triton", compiled=True, is_project=True),
}
OF_INFERENCE = {
    "unfolded": Variant("triton", is_project=True, folds=False),
    "onnx": Variant("composed", half=False, graphed=False, is_project=True, runtime="onnx"),
    "session": Variant("composed", half=False, graphed=False, is_project=True, runtime="session"),
}
RACE = ("published", "unfolded", OURS, "ours compiled", "onnx", "session")


def network(problem: Problem, variant: Variant, dropout: bool = True) -> nn.Module:
    """Return the network of a problem, with the same weights for every variant."""
    torch.manual_seed(0)
    options = {} if dropout else {"embedding_dropout": 0.0, "attention_dropout": 0.0}
    sizes = {"base_channels": problem.base_channels, "image_size": problem.pixels}
    model = uctrans.create_model(problem.model, backend=variant.backend, **sizes, **options)
    if problem.checkpointing:
        uctrans.set_checkpointing(model)
    return model.to(problem.device, memory_format=variant.memory_format)


def batch(problem: Problem, variant: Variant) -> tuple[Tensor, Tensor]:
    """Return images 0..1 (B, 3, h, w) and their masks (B, h, w) on the device: smooth random blobs under noise."""
    generator = torch.Generator().manual_seed(1)
    side = -(-problem.pixels // SMOOTHNESS)
    coarse = torch.randn(problem.batch, 3, side, side, generator=generator)
    blobs = F.interpolate(coarse, size=(problem.pixels, problem.pixels), mode="bilinear")
    images = (blobs + torch.randn(blobs.shape, generator=generator)).sigmoid()
    masks = (blobs.mean(1) > FOREGROUND_ABOVE).to(torch.uint8)
    return images.to(problem.device, memory_format=variant.memory_format), masks.to(problem.device)


def autocast(problem: Problem, variant: Variant) -> torch.autocast:
    """Return the precision of a variant; a cache of casts would not outlive the capture of a graph."""
    return torch.autocast(problem.device, torch.bfloat16, enabled=variant.half, cache_enabled=False)


class SameBatch:
    """A protocol under which every training batch is the whole data, as it is."""

    def training_batch(
        self, data: tuple[Tensor, Tensor], index: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return images and masks."""
        return data


class Training:
    """A training step on one batch, one step a call; ``run`` has what :func:`uctrans.training.loop.train_step` reads.

    The project's own step includes its loss and Dice, its sums and its cast of all weights at once. A baseline has the
    published loss and the casts of autocast.
    """

    def __init__(self, problem: Problem, variant: Variant, dropout: bool = True):
        self.problem, self.variant = problem, variant
        device = torch.device(problem.device)
        model = network(problem, variant, dropout).train()
        config = TrainConfig(
            data="unused",
            output="unused",
            learning_rate=LEARNING_RATE,
            amp="bf16" if variant.half else "no",
            batch_size=problem.batch,
            backend=variant.backend,
            compile=variant.compiled,
        )
        group = Processes(0, 1, device)
        generator = torch.Generator(device)
        self.optimizer = build_optimizer(config, model, device)
        if variant == CANDIDATES["published"]:
            self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.run = SimpleNamespace(
            config=config,
            group=group,
            model=model,
            optimizer=self.optimizer,
            average=None,
            protocol=SameBatch(),
            train_data=batch(problem, variant),
            augment_generator=generator,
            totals=EpochTotals(device),
            forward=training_forward(model, config, group),
            own=NOTHING,
        )
        self.index = torch.arange(problem.batch, device=device)
        self._step = partial(train_step, self.run) if variant.is_project else self._baseline_step
        self._graphs = StepGraphs(self.optimizer, CudaRecorder([generator])) if variant.graphed else None
        self._loss_of_batch = partial(_loss_of_batch, model)
        if variant.compiled:
            self._loss_of_batch = torch.compile(self._loss_of_batch, fullgraph=True, dynamic=False)

    def __call__(self) -> None:
        """Do one step."""
        if self._graphs is None:
            self._step(self.index)
        else:
            self._graphs.run(self._step, self.index)

    def loss(self) -> float:
        """Return the mean loss of the steps since the last call of this."""
        loss, _ = self.run.totals.read(self.run.group)
        self.run.totals.reset()
        return loss

    def check(self) -> dict[str, Any]:
        """Fail unless the losses of the first steps are right; return notes for the record."""
        kind = "with dropout" if self.variant.compiled else "without dropout"
        checked = self if self.variant.compiled else Training(self.problem, self.variant, dropout=False)
        losses = checked.first_losses()
        exact = exact_losses(self.problem)
        errors = [abs(loss / wanted - 1) for loss, wanted in zip(losses, exact, strict=True)]
        first, later = LOSS_TOLERANCES[kind]
        # Written so that a NaN fails.
        assert errors[0] <= first and all(error <= later for error in errors[1:]), (
            f"losses {losses} {kind}, not {exact}: off by {errors}, allowed {first} and then {later}"
        )
        return {"losses": losses, "exact_losses": exact, "losses_checked": kind}

    def first_losses(self) -> list[float]:
        """Do a few steps and return their losses."""
        losses = []
        for _ in range(CHECKED_STEPS):
            self()
            losses.append(self.loss())
        return losses

    def _baseline_step(self, index: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.problem, self.variant):
            loss = self._loss_of_batch(*self.run.train_data)
        loss.backward()
        self.optimizer.step()
        self.run.totals.add(loss.detach(), loss.detach().expand(len(index)))  # no Dice; the sums of a loss alone


def _loss_of_batch(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return segmentation_loss(model(images), masks, backend="reference")


class Inference:
    """A network in evaluation, from images on the device to logits on the device, one batch a call.

    ``ours`` and ``composed`` have their weights cast to bfloat16 once, as ``uctrans predict`` has; the published
    operations are under plain autocast, which casts them in every call. An engine of ONNX Runtime keeps its export in
    the cache of ``uctrans predict``.
    """

    def __init__(self, problem: Problem, variant: Variant):
        self.problem, self.variant = problem, variant
        model = network(problem, variant).eval()
        if variant.is_project and variant.folds:
            model = fold_batch_norms(model)
        if variant.half and variant.backend != "reference":
            keep_weights_cast(model, torch.bfloat16)
        self.images, _ = batch(problem, variant)
        self._network = torch.compile(model, fullgraph=True, dynamic=False) if variant.compiled else model
        if variant.runtime != "torch":
            size, device = tuple(self.images.shape[-2:]), torch.device(problem.device)
            self._network = forward_of("onnx", model, size, device, amp="no")
        if variant.runtime == "session":
            self._network = _plain_session(self._network.program_for(self.images).path)
        self._forward = CapturedForward(self._plain, CudaRecorder()) if variant.graphed else self._plain

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the logits."""
        return self._forward(self.images)

    def check(self) -> dict[str, Any]:
        """Fail unless the logits are those of the published operations in float32; return notes for the record."""
        exact, tolerance = exact_logits(self.problem).double(), LOGIT_TOLERANCES[self.variant.dtype]
        errors = [relative_error(self(), exact) for _ in range(WARM_UP_CALLS[self.problem.device])]
        # Written so that a NaN fails.
        assert all(error <= tolerance for error in errors), f"logits are off by {errors}, allowed {tolerance}"
        return {"relative_error": max(errors)}

    def _plain(self, images: Tensor) -> Tensor:
        with autocast(self.problem, self.variant):
            return self._network(images)


def _plain_session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy(force=True)})[0]).to(images.device)


EXACT = Variant("reference", half=False, graphed=False)


@lru_cache(maxsize=1)
def exact_losses(problem: Problem) -> list[float]:
    """Return the first losses of the published operations, in float32 without TF32 and without dropout."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return Training(problem, EXACT, dropout=False).first_losses()


@lru_cache(maxsize=1)
def exact_logits(problem: Problem) -> Tensor:
    """Return the logits of the published operations, in float32 without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return Inference(problem, EXACT)()


def in_a_row(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Return a sample: seconds a call of several that follow each other, while the host may run ahead of the device."""
    calls = CALLS_IN_A_ROW[device]

    def on_events() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def on_the_clock() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return on_events if device == "cuda" else on_the_clock


def one_by_one(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Return a sample: seconds from a call to its result on the device, the host's part included."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample() -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return sample


def candidate_sample(mode: str, problem: Problem, candidate: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a checked candidate's sample and notes: of one image in inference the latency, else the throughput."""
    variant = (CANDIDATES | OF_INFERENCE)[candidate].on(problem.device)
    work = (Training if mode == "training" else Inference)(problem, variant)
    notes = work.check() | {"dtype": variant.dtype, "backend": variant.backend}
    for _ in range(WARM_UP_CALLS[problem.device]):
        work()
    is_latency = mode == "inference" and problem.batch == 1
    return (one_by_one if is_latency else in_a_row)(work, problem.device), notes


def compare(problem: Problem, candidates: list[str]) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Yield each candidate of training with its notes and samples, timed in turns with ours.

    Ours against itself shows the noise.

    Raises:
        AssertionError: a candidate computes something else.
    """
    ours, _ = candidate_sample("training", problem, OURS)
    for candidate in candidates:
        sample, notes = candidate_sample("training", problem, candidate)
        outcome = in_turns(sample, ours, problem.device, rounds=ROUNDS[problem.device])
        seconds = outcome.pop("seconds")
        yield candidate, notes | outcome | _throughput(problem, outcome), seconds
        del sample
        release()


def race(problem: Problem, candidates: list[str]) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Yield each candidate of inference with its notes and samples; all take turns in every round.

    The order is drawn for each round, because a candidate starts with the caches and the heap that another leaves.

    Raises:
        AssertionError: a candidate computes something else.
    """
    works = {name: candidate_sample("inference", problem, name) for name in dict.fromkeys([OURS, *candidates])}
    samples: dict[str, list[float]] = {name: [] for name in works}
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(ROUNDS[problem.device]):
        shuffle(order)
        for name in order:
            samples[name].append(works[name][0]())
    for name in candidates:
        outcome = compared(samples[name], samples[OURS])
        if "published" in candidates:
            outcome["times_as_fast_as_published"] = 1 / compared(samples[name], samples["published"])["ratio"]
        seconds = outcome.pop("seconds")
        yield name, works[name][1] | outcome | _throughput(problem, outcome), seconds
    del works
    release()


def _throughput(problem: Problem, outcome: dict[str, Any]) -> dict[str, float]:
    return {"images_per_second": problem.batch / outcome["median_seconds"]}


def release() -> None:
    """Give back the memory of what is no longer used, and forget what was compiled."""
    torch.compiler.reset()  # after a few shapes PyTorch would run a function uncompiled
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tune_convolutions() -> None:
    """Let cuDNN measure which convolutions are fastest, as a training does."""
    torch.backends.cudnn.benchmark = True


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function finds in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=tune_convolutions) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(problem: Problem, candidate: str) -> dict[str, int]:
    """Return the peak bytes of training: weights, Adam's state, batch and step; on a CPU those of the process.

    A step takes its memory when it is captured, and a replay takes none, so the peak includes the capture. On a CPU the
    peak is read from /proc, which only Linux has.
    """
    on_gpu = problem.device == "cuda"
    work = Training(problem, CANDIDATES[candidate].on(problem.device))
    work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(MEMORY_STEPS if on_gpu else 1):
        work()
    assert math.isfinite(work.loss()), "the loss is not finite"
    if on_gpu:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"peak_bytes": 1024 * int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))}


def largest_batch(problem: Problem, candidate: str) -> dict[str, int]:
    """Return the largest batch that two plain steps find memory for on a GPU, known to a sixteenth."""
    variant = replace(CANDIDATES[candidate].on(problem.device), graphed=False)

    def fits(size: int) -> bool:
        try:
            work = Training(replace(problem, batch=size), variant)
            work(), work()
            return math.isfinite(work.loss())
        except torch.OutOfMemoryError:
            return False

    def fits_into_free_memory(size: int) -> bool:
        answer = fits(size)
        release()  # after the call, whose error holds on to what it had made
        return answer

    return {"largest_batch": largest(fits_into_free_memory, time.monotonic() + SEARCH_SECONDS)}


def largest(fits: Callable[[int], bool], deadline: float) -> int:
    """Return the largest size found to fit until a time of ``time.monotonic``, 0 if none: by doubling, then halving."""
    fitting, too_large, size = 0, None, FIRST_BATCH
    while time.monotonic() < deadline:
        if fits(size):
            fitting = size
        else:
            too_large = size
        if too_large is None:
            size = 2 * fitting
        elif too_large - fitting <= max(1, math.floor(SEARCH_PRECISION * fitting)):
            break
        else:
            size = (fitting + too_large) // 2
    return fitting


def profile(problem: Problem, candidate: str) -> dict[str, Any]:
    """Return the seconds of a training step, what it launches on a GPU (on a CPU: calls), and the longest of these."""
    work = Training(problem, CANDIDATES[candidate].on(problem.device))
    for _ in range(WARM_UP_CALLS[problem.device]):
        work()
    sample = in_a_row(work, problem.device)
    seconds = statistics.median(sample() for _ in range(ROUNDS[problem.device]))
    found = kernels(work, problem.device)
    return {
        "median_seconds": seconds,
        "launches": sum(entry["calls"] for entry in found),
        "kernel_seconds": sum(entry["seconds"] for entry in found),
        "kernels": found[:PROFILED_KERNELS],
    }


def profile_table(notes: dict[str, Any]) -> str:
    """Return the longest kernels of a profile in Markdown."""
    busy = notes["kernel_seconds"]
    rows = [f"{1e3 * notes['median_seconds']:.2f} ms a step; {notes['launches']} launches, {1e3 * busy:.2f} ms in all"]
    rows += ["", "| share | ms | launches | kernel |", "| ---: | ---: | ---: | --- |"]
    for entry in notes["kernels"]:
        name = entry["kernel"].replace("|", "\\|")
        rows.append(f"| {entry['seconds'] / busy:.1%} | {1e3 * entry['seconds']:.3f} | {entry['calls']} | `{name}` |")
    return "\n".join(rows)


def parsed(words: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = ("training", "inference", "memory", "profile", "launches")
    parser.add_argument("--mode", default="training", choices=modes)
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--candidates", type=_names, help="separated by commas (default: those of the mode)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in training")
    parser.add_argument("--largest", action="store_true", help="with --mode memory: search the largest batch instead")
    parser.add_argument("--record", type=Path, default=DEFAULT_RECORD, help="JSON lines (default: %(default)s)")
    given = parser.parse_args(words)
    if given.candidates is None:
        given.candidates = list(RACE if (given.mode, given.device) == ("inference", "cpu") else CANDIDATES)
    if given.mode != "inference" and (alien := [name for name in given.candidates if name in OF_INFERENCE]):
        parser.error(f"--candidates: {alien[0]} takes part in --mode inference only")
    if given.largest and given.device != "cuda":
        parser.error("--largest: fills the memory of a GPU; run it with --device cuda")
    return given


def _names(text: str) -> list[str]:
    names = text.split(",")
    known = CANDIDATES | OF_INFERENCE
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; choose of {', '.join(known)}")
    return names


def measurements(given: argparse.Namespace, problem: Problem) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Yield what a command line asks for: each candidate with its notes and samples."""
    if given.mode in ("training", "inference"):
        yield from (race if given.mode == "inference" else compare)(problem, given.candidates)
        return
    if given.mode == "profile":
        measure = partial(profile, problem)
    else:
        measure = partial(in_own_process, largest_batch if given.largest else peak_memory, problem)
    for candidate in given.candidates:
        yield candidate, measure(candidate), []


def _outcome(info: dict[str, Any]) -> str:
    if "times_as_fast_as_published" in info:
        return f"{info['times_as_fast_as_published']:.2f} times as fast as published"
    return str(info.get("largest_batch", "measured"))


def main(words: list[str] | None = None) -> int:
    """Measure, append to the record and print a table."""
    given = parsed(words)
    problem = Problem(given.model, given.batch, given.pixels, given.base_channels, given.device, given.checkpointing)
    if given.mode == "launches":
        sizes = {"batch": given.batch, "pixels": given.pixels, "base_channels": given.base_channels}
        print(operator_table({backend: dispatched_operators(given.model, backend, **sizes) for backend in BACKENDS}))
        return 0
    tune_convolutions()
    append_line(given.record, {"environment": environment()})
    lines = []
    for candidate, notes, seconds in measurements(given, problem):
        sizes = "-".join(str(value) for value in asdict(problem).values())
        name = f"{given.mode}-{sizes}-{candidate}"
        lines.append(
            {
                "test": f"{name}-largest" if given.largest else name,
                "group": given.mode,
                "info": asdict(problem) | {"candidate": candidate} | notes,
                "seconds": seconds,
            }
        )
        append_line(given.record, lines[-1])
        print(f"{candidate}: {_outcome(lines[-1]['info'])}", flush=True)
        if given.mode == "profile":
            print(profile_table(notes))
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
