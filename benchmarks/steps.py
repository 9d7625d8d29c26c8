"""A training step and a forward pass of every candidate, each of which checks its own results."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

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

from .candidates import CANDIDATES, Problem, Variant, autocast, batch, network
from .harness import relative_error

WARM_UP_CALLS = {"cuda": 4, "cpu": 1}  # two plain ones, the one that records, and a replay

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
