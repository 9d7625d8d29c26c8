"""A network and a batch for the benchmarks of whole networks, and the ways to run them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uctrans

from .harness import operator_backend

MODELS = ("uctransnet", "dual_branch_uctransnet")
OURS = "ours"

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
