"""Loss and Dice of a training step: one read of the logits, against PyTorch's operations over whole maps.

    python -m pytest benchmarks/test_segmentation_loss.py -m gpu --benchmark-only

On a CPU the composed form is held to being no slower than the published steps.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uctrans.kernels import segmentation_scores, segmentation_sums

from .harness import OPERATOR, Call, Case, Work, comparisons, operator_backend

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # bfloat16 rounds a gradient by up to 4e-3


def loss(
    pixels: int, batch: int, dtype: torch.dtype, classes: int = 1, device: str = "cuda", **options: object
) -> Case:
    """Return the case of logits of square images in channels-last memory, three times standard normal."""

    def draw(generator: torch.Generator) -> Call:
        shape = (batch, classes, pixels, pixels)
        logits = 3 * torch.randn(shape, generator=generator, device=device)
        logits = logits.to(dtype, memory_format=torch.channels_last).requires_grad_()
        labels = torch.randint(max(classes, 2), (batch, pixels, pixels), generator=generator, device=device)
        return Call((logits, labels.to(torch.uint8)), (torch.ones((), device=device),))

    def work(passes: str) -> Work:
        """Count bytes: forward reads logits and masks; backward reads both again and writes the gradient."""
        logits, masks = batch * classes * pixels**2 * dtype.itemsize, batch * pixels**2
        moved = {"forward": logits + masks, "backward": 2 * logits + masks, "both": 3 * logits + 2 * masks}
        return Work(0.0, float(moved[passes]))

    backends = {OPERATOR: operator_backend(device), "reference": "reference", "composed": "composed"}
    return Case(
        name="loss and Dice",
        sizes={"pixels": pixels, "batch": batch, "detail": f"{classes} classes" if classes > 1 else "one class"},
        device=device,
        dtype=dtype,
        candidates={name: on_backend(backend) for name, backend in backends.items()},
        exact=on_backend("reference"),
        draw=draw,
        work=work,
        tolerance=TOLERANCES[dtype],
        **options,
    )


def on_backend(backend: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the published loss and the Dice of each image as a function of logits and masks."""

    def function(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        sums, counts = segmentation_sums(logits, masks, backend=backend)
        return segmentation_scores(sums, counts, masks[0].numel(), backend=backend)

    return function


SIZES = ((32, 2), (224, 4), (224, 32))
ON_CPU = {"device": "cpu", "passes": ("forward", "both")}
ON_GPU = {"compiled": ("reference",)}
CASES = [
    *(loss(side, batch, torch.float32, classes, **ON_CPU) for side, batch in SIZES for classes in (1, 3)),
    *(loss(224, batch, torch.bfloat16, classes, **ON_GPU) for classes in (1, 3) for batch in (4, 32)),
    *(loss(224, batch, torch.float32, **ON_GPU) for batch in (4, 32)),
]


@pytest.mark.parametrize(("case", "passes", "candidate"), comparisons(CASES))
def test_loss_and_dice(compare, case, passes, candidate):
    compare(case, passes, candidate)
