"""Loss and Dice of a step as they are timed: in one read of the logits, or operation by operation over whole maps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uctrans.training.losses import loss_and_dice

from . import timing
from .candidates import OPERATOR, compiled, operator_backend
from .gate import relative_error
from .roofline import Work
from .selection import Entrant
from .timing import Call

LOSS_CANDIDATES = (OPERATOR, "plain compiled", "plain", "composed")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a gradient in bfloat16 is rounded by up to 4e-3


@dataclass(frozen=True)
class LossProblem:
    """One workload: logits (batch, classes, pixels, pixels) of a network in channels-last memory."""

    pixels: int
    batch: int
    dtype: torch.dtype
    classes: int = 1
    device: str = "cuda"

    def work(self, passes: str) -> Work:
        """Forward reads logits and masks; backward reads both again and writes the gradient."""
        logits = self.batch * self.classes * self.pixels**2 * self.dtype.itemsize
        masks = self.batch * self.pixels**2
        reads = {"forward": logits + masks, "backward": 2 * logits + masks, "both": 3 * logits + 2 * masks}
        return Work(0.0, float(reads[passes]))

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        return {
            "pixels": self.pixels,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "classes": self.classes,
            "detail": f"{self.classes} classes" if self.classes > 1 else "one class",
            "device": self.device,
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.pixels}px-B{self.batch}-{self.classes}"


def plain_loss_and_dice(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the published protocol and the Dice of each image, an operation of PyTorch for each step."""
    counts = (masks > 0).sum(dtype=torch.float32)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    classes = logits.shape[1]
    if classes == 1:
        target = masks.unsqueeze(1).to(exact.dtype)
        probability = torch.sigmoid(exact)
        positive = (target * F.softplus(-exact)).sum() / (counts + 1e-12)
        negative = ((1 - target) * F.softplus(exact)).sum() / (masks.numel() - counts + 1e-12)
        cross_entropy = 0.5 * positive + 0.5 * negative
        predicted, actual = logits > 0, masks.unsqueeze(1) > 0
    else:
        labels = torch.arange(classes, device=masks.device).view(1, -1, 1, 1)
        target = (masks.unsqueeze(1) == labels).to(exact.dtype)
        log_probability = torch.log_softmax(exact, dim=1)
        probability = log_probability.exp()
        cross_entropy = -(target * log_probability).sum() / masks.numel()
        predicted, actual = logits.argmax(1, keepdim=True) == labels[:, 1:], masks.unsqueeze(1) == labels[:, 1:]
    overlap = (probability * target).flatten(2).sum(2) * 0.25
    area = (probability.square().flatten(2).sum(2) + target.square().flatten(2).sum(2)) * 0.25
    dice_loss = (1 - (2 * overlap + 1e-5) / (area + 1e-5)).mean()
    hits = (predicted & actual).flatten(2).sum(2, dtype=torch.float32)
    areas = predicted.flatten(2).sum(2, dtype=torch.float32) + actual.flatten(2).sum(2, dtype=torch.float32)
    dice = torch.where(areas > 0, 2 * hits / areas.clamp(min=1), torch.ones_like(areas)).mean(1)
    return 0.5 * dice_loss + 0.5 * cross_entropy, dice


def loss_entrant(problem: LossProblem, candidate: str, passes: str, count: int) -> Entrant:
    """``candidate`` ready to be timed: loss, Dice and gradient were compared with the plain steps in float64."""
    function = _function(problem, candidate)
    calls = loss_calls(problem, count)
    scores: list[Tensor] = []

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        value, dice = function(logits, masks)
        scores[:] = [dice]
        return value

    error = _error(loss, scores, calls[0])
    assert error <= TOLERANCES[problem.dtype], f"{candidate} is off by {error}, allowed {TOLERANCES[problem.dtype]}"
    return Entrant(loss, calls, timing.sampler(loss, passes, calls), {"relative_error": error})


def loss_calls(problem: LossProblem, count: int) -> list[Call]:
    """So many calls, each with logits and masks of its own: three times standard normal, and random labels."""
    generator = torch.Generator(problem.device).manual_seed(1)
    shape = (problem.batch, problem.classes, problem.pixels, problem.pixels)
    calls = []
    for _ in range(count):
        logits = 3 * torch.randn(shape, generator=generator, device=problem.device)
        logits = logits.to(problem.dtype, memory_format=torch.channels_last).requires_grad_()
        masks = torch.randint(
            0, max(problem.classes, 2), (shape[0], *shape[2:]), generator=generator, device=problem.device
        )
        calls.append(Call((logits, masks.to(torch.uint8)), (logits,), torch.ones((), device=problem.device)))
    return calls


def _function(problem: LossProblem, candidate: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if candidate.startswith("plain"):
        is_compiled = candidate.endswith(" compiled")
        return compiled(plain_loss_and_dice, problem.device) if is_compiled else plain_loss_and_dice
    backend = operator_backend(problem.device) if candidate == OPERATOR else candidate

    def function(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_dice(logits, masks, backend=backend)

    return function


def _error(loss: Callable[[Tensor, Tensor], Tensor], scores: list[Tensor], call: Call) -> float:
    """The largest relative error of loss, gradient and Dice."""
    results = [*timing.run_pass(loss, "both", call), *scores]
    logits, masks = call.arguments
    exact = logits.detach().double().requires_grad_()
    value, dice = plain_loss_and_dice(exact, masks)
    expected = [value.detach(), *torch.autograd.grad(value, exact), dice]
    return max(relative_error(result, wanted) for result, wanted in zip(results, expected, strict=True))
