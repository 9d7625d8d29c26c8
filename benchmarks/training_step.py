"""A training step of a whole network as it is timed: forward, published loss, backward, Adam, on a batch at hand.

Ours is the training step of the project itself (:mod:`uctrans.training`), its loss, its sums of loss and Dice and,
where it is not compiled, its cast of all weights at once included; the others have the loss in plain PyTorch, no sums,
and the casts of autocast. Nothing is augmented. What is captured is warmed up, rehearsed and recorded in one way, that
of the project. The candidate ``published`` has what the published script has: eager float32, TF32 as PyTorch sets it
(in convolutions alone), Adam as PyTorch makes it by default. All others have the fused Adam, and a compiled one has the
loss compiled with the network.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uctrans.graphs import CudaRecorder
from uctrans.training.config import TrainConfig
from uctrans.training.distributed import Processes
from uctrans.training.loop import train_step
from uctrans.training.losses import EpochTotals
from uctrans.training.optimization import build_optimizer
from uctrans.training.run import plain_forward, training_forward
from uctrans.training.step_graphs import StepGraphs

from .network_race import Arena
from .networks import (
    CANDIDATES,
    MODELS,
    NetworkProblem,
    Variant,
    autocast,
    batch,
    compiled,
    in_a_row,
    network,
    without_tf32,
)

# A tenth of the published one: with that, networks of this width part from each other within a few steps by rounding
# alone. It costs no time.
LEARNING_RATE = 1e-4
DICE_SMOOTHING = 1e-5
STEPS_A_SAMPLE = {"cuda": 3, "cpu": 1}
# A few steps from fresh weights, during which the loss falls by four tenths: two plain, then the captured ones.
CHECKED_STEPS = 5
# Of the losses of these steps, against exact float32 without dropout: relative errors allowed of the first, which no
# step came before, and of the others. On 4 images of 96 pixels, on a CPU, bfloat16 reaches 0.07 % and 1.1 %. What is
# compiled runs as it races, with dropout, as to compile it a second time takes minutes: dropout alone is 6.8 % there.
TOLERANCES = {"without dropout": (0.01, 0.04), "with dropout": (0.03, 0.15)}

# Times as fast as these ours should be, by batch.
TARGETS = {
    "published": {4: 8.0, 32: 5.0},
    "compiled": {4: 1.5, 32: 1.25},
    "compiled, own graphs": {4: 1.5, 32: 1.25},
}
GPU_PROBLEMS = [NetworkProblem(model, batch_size) for model in MODELS for batch_size in (4, 32)]


def target(problem: NetworkProblem, candidate: str) -> float | None:
    """How many times as fast as ``candidate`` the project sets out to be, or ``None``."""
    is_claimed = replace(problem, device="cuda") in GPU_PROBLEMS
    return TARGETS.get(candidate, {}).get(problem.batch) if is_claimed else None


@dataclass
class BaselineStep:
    """The plain training step of a baseline on one batch; called and recorded like the project's (``train_step``).

    Attributes:
        loss_of: the network and its loss: images and masks to a scalar.
        data: images and masks.
        optimizer: what the loss is given to.
        generator: random numbers that a capture is told of; nothing is drawn from it, as nothing is augmented.
        problem, variant: the precision, and whether the compiler makes graphs of its own.
        latest: the loss of the latest step.
    """

    loss_of: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    problem: NetworkProblem
    variant: Variant
    latest: Tensor | None = None

    def __call__(self, index: Tensor) -> None:
        """Train on the batch; ``index`` is as long as it."""
        if self.variant.makes_own_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.problem, self.variant):
            loss = self.loss_of(*self.data)
        loss.backward()
        self.optimizer.step()
        self.latest = loss.detach()


class Training:
    """The plain training step of a baseline, as often as it is asked for, on one batch."""

    def __init__(self, problem: NetworkProblem, variant: Variant, dropout: bool = True):
        self.problem, self.variant = problem, variant
        self.model = network(problem, variant, dropout).train()
        self.index = torch.arange(problem.batch, device=problem.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), **self._optimizer_settings())
        self.generator = torch.Generator(problem.device)
        self.step = BaselineStep(
            loss_of=compiled(self._loss_of_batch, variant),
            data=batch(problem, variant),
            optimizer=self.optimizer,
            generator=self.generator,
            problem=problem,
            variant=variant,
        )

    def runner(self) -> Callable[[], None]:
        """What does one step a call, captured anew where the variant is captured."""
        if not self.variant.graphed:
            return lambda: self.step(self.index)
        graphs = StepGraphs(self.optimizer, CudaRecorder([self.generator]))
        return lambda: graphs.run(self.step, self.index)

    def loss(self) -> float:
        """The loss of the latest step."""
        return self.step.latest.item()

    def sampler(self) -> Callable[[], float]:
        """Seconds a step, of steps that follow each other."""
        sample = in_a_row(self.runner(), self.problem.device, STEPS_A_SAMPLE[self.problem.device])
        assert torch.isfinite(torch.tensor(self.loss())), "the loss is not finite"
        return sample

    def check(self) -> dict[str, Any]:
        """Fail unless the losses of the first steps are right."""
        return check_losses(self)

    def _optimizer_settings(self) -> dict[str, Any]:
        if self.variant == CANDIDATES["published"]:
            return {"lr": LEARNING_RATE}
        on_cuda = self.problem.device == "cuda"
        rate = torch.tensor(LEARNING_RATE, device="cuda") if on_cuda else LEARNING_RATE
        return {"lr": rate, "fused": True, "capturable": on_cuda}

    def _loss_of_batch(self, images: Tensor, masks: Tensor) -> Tensor:
        return published_loss(self.model(images), masks)


class ProjectTraining(Training):
    """The project's own training step, in place of the plain one."""

    def __init__(self, problem: NetworkProblem, variant: Variant, dropout: bool = True):
        self.problem, self.variant = problem, variant
        device = torch.device(problem.device)
        self.model = network(problem, variant, dropout).train()
        config = TrainConfig(
            data="unused", output="unused", learning_rate=LEARNING_RATE, amp="bf16", batch_size=problem.batch
        )
        self.totals, self.group = EpochTotals(device), Processes(0, 1, device)
        self.index = torch.arange(problem.batch, device=device)
        as_trained = training_forward(self.model, config, self.group)
        self.optimizer = build_optimizer(config, self.model, device)
        self.generator = torch.Generator(device)
        run = SimpleNamespace(
            forward=as_trained
            if variant.compile_mode is None
            else plain_forward(compiled(self.model, variant), config),
            model=self.model,
            optimizer=self.optimizer,
            average=None,
            train_data=batch(problem, variant),
            protocol=SameBatch(),
            augment_generator=self.generator,
            totals=self.totals,
            group=self.group,
            config=config,
        )
        self.step = partial(train_step, run)

    def loss(self) -> float:
        """The mean loss of the steps since it was last asked for."""
        loss, _ = self.totals.read(self.group)
        self.totals.reset()
        return loss


class SameBatch:
    """A protocol under which every training batch is the whole data, as it is."""

    def training_batch(
        self, data: tuple[Tensor, Tensor], index: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images and masks."""
        return data


def training(problem: NetworkProblem, variant: Variant, dropout: bool = True) -> Training:
    """``variant`` ready to be trained."""
    return (ProjectTraining if variant.is_project else Training)(problem, variant, dropout)


def published_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """``0.5 Dice + 0.5 BCE`` as the published code has it, of binary masks (B, h, w): a scalar."""
    logits, target = logits.float(), masks.unsqueeze(1).float()
    probability = torch.sigmoid(logits)
    overlap = (probability * target).flatten(1).sum(1)
    area = (probability.square() + target.square()).flatten(1).sum(1)
    dice = 1 - (2 * overlap / 4 + DICE_SMOOTHING) / (area / 4 + DICE_SMOOTHING)  # of halved probabilities and masks
    positive = (target * F.softplus(-logits)).sum() / target.sum()
    negative = ((1 - target) * F.softplus(logits)).sum() / (1 - target).sum()
    return 0.5 * dice.mean() + 0.5 * (0.5 * positive + 0.5 * negative)


def check_losses(work: Training) -> dict[str, Any]:
    """Fail unless the first losses of a variant are right; those losses and their relative errors for the record."""
    kind = "without dropout" if work.variant.compile_mode is None else "with dropout"
    checked = work if kind == "with dropout" else training(work.problem, work.variant, dropout=False)
    run, losses = checked.runner(), []
    for _ in range(CHECKED_STEPS):
        run()
        losses.append(checked.loss())
    exact = exact_losses(work.problem)
    errors = [abs(loss / wanted - 1) for loss, wanted in zip(losses, exact, strict=True)]
    first, later = TOLERANCES[kind]
    # Written so that a NaN fails.
    assert errors[0] <= first and all(error <= later for error in errors[1:]), (
        f"losses {losses} {kind}, not {exact}: off by {errors}, allowed {first} and then {later}"
    )
    return {"losses": losses, "exact_losses": exact, "losses_checked": kind, "largest_loss_error": max(errors)}


@lru_cache(maxsize=1)
def exact_losses(problem: NetworkProblem) -> list[float]:
    """Losses of the first steps of the paper's own operations, in float32 without TF32 and without dropout."""
    exact = Training(problem, Variant("reference", half=False, graphed=False), dropout=False)
    run, losses = exact.runner(), []
    with without_tf32():
        for _ in range(CHECKED_STEPS):
            run()
            losses.append(exact.loss())
    return losses


ARENA = Arena("training step", training)
