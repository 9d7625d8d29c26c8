"""A training run: data, network, optimizer, random generators, and how far it is.

``Run.state_dict`` holds everything that decides the rest of the run, so a resumed run ends with the same bits.
"""

import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data import parse_palette
from ..data.find import shorten
from ..data.fingerprints import join_records
from ..extras import import_extra
from ..graphs import CapturedForward, CudaRecorder
from ..layers import set_checkpointing
from ..models.weights import load_state
from .build import (
    build_model,
    build_protocol,
    check_backend_runs,
    check_external,
    check_smallest_batch,
    load_data,
    plain_forward,
    start_from,
    training_forward,
    warn_of_shared_images,
)
from .checkpoint import CheckpointError, load_weights
from .config import TrainConfig
from .distributed import Processes, with_sync_batch_norm
from .losses import EpochTotals
from .optimization import WeightAverage, build_optimizer, fit_to_device, learning_rate, set_learning_rate
from .own import NOTHING, Own
from .parts import check_progress, load_optimizer
from .step_graphs import StepGraphs, obstacle_to_graphs
from .truth import check_truth_of_run, classes_of_masks


class Run:
    """A run before its first epoch, or in the state that ``load_state_dict`` restores.

    Attributes:
        own: Data and functions of the caller.
        id: Random name of the run, the same in all its files and after every resume.
        epoch: Number of complete epochs.
        best_epoch: Epoch with the best validation Dice, 0 if there is none yet.
        best_dice: Validation Dice of the best epoch, nan if there is none yet.
        order: Positions of the training images in the order of the current epoch, int64 (images_per_epoch,) on the
            device; None between two epochs.
        steps_done: Number of steps done in the current epoch.
        totals: Sums of loss and Dice in the current epoch.
        model: The network in training.
        average: Moving average of its weights, or None.
        validated_model: The network that is validated and kept as best: the moving average if there is one.
        forward: Function from images to logits for a training step, in the precision of the configuration.
        validation_forward: The same for validation.
        step_graphs: Recordings of the training step, or None if steps run plainly.
        obstacle_to_graphs: Why steps run plainly, or None if they are recorded.
        start: The weights with which a new run starts, in words.
        remarks: Sentences about images and masks, for the log.
        scored_classes: Classes that the validation Dice is averaged over, or None for all foreground classes.
        images: Record of the images that form the weights, with those of ``init_from``; see
            ``uctrans.data.fingerprints``.
    """

    def __init__(self, config: TrainConfig, group: Processes, own: Own = NOTHING):
        self.config, self.group, self.own = config, group, own
        self.id = uuid.uuid4().hex
        check_backend_runs(config, group.device)
        set_threads_and_determinism(config)
        self.protocol = build_protocol(config, own)
        if self.protocol.keeps_resolution:
            import_extra("monai", "training")  # which the first validation would miss
        self.train_data, self.val_data = load_data(config, self.protocol, group, own)
        self.images = {
            part: dict(zip(data.fingerprints, data.names, strict=True))
            for part, data in (("train", self.train_data), ("val", self.val_data))
        }
        if group.is_main:
            warn_of_shared_images(self.images)
        self.remarks = check_truth_of_run(config, self.train_data, self.val_data)
        height, width = self.protocol.image_size
        is_resized = not self.protocol.keeps_resolution and {*self.train_data.original_sizes} != {(height, width)}
        if is_resized and not config.data:  # one may not expect it of tensors
            self.remarks += (f"images are resized to {height} x {width} pixels, which image_size sets",)
        self.scored_classes = classes_of_masks(self.val_data, config)

        self.epoch_images = self.protocol.epoch(self.train_data).to(group.device)
        torch.manual_seed(config.seed)
        model = build_model(config, self.protocol.image_size)
        # Convolutions read this layout without a conversion; feature maps take it over from the weights.
        self.model = model.to(group.device, memory_format=torch.channels_last)
        self.start = "starting from new weights"
        if config.init_from is not None and not config.resume:
            self.start, images = start_from(self.model, config.init_from)
            self.images = join_records([images, self.images])
        check_external(config, self.protocol.image_size, group.device)
        check_smallest_batch(config, self.protocol, self.images_per_epoch, group.count)
        if config.sync_batch_norm:
            self.model = with_sync_batch_norm(self.model, group.device)
        if config.checkpointing:
            set_checkpointing(self.model)
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay else None
        self.validated_model = self.average.model if self.average else self.model
        self.optimizer = build_optimizer(config, self.model, group.device)

        self.order_generator = torch.Generator(group.device).manual_seed(derived_seed(config.seed, "order", 0))
        self.augment_generator = torch.Generator(group.device)
        self._seed_generators(0)
        self.totals = EpochTotals(group.device, ignores=config.ignore_label is not None)
        self.forward = training_forward(self.model, config, group)
        self.validation_forward = plain_forward(self.validated_model, config)
        self.step_graphs = None
        self.obstacle_to_graphs = obstacle_to_graphs(config, group)
        if self.obstacle_to_graphs is None:
            self.step_graphs = StepGraphs(self.optimizer, CudaRecorder([self.augment_generator]))
            self.validation_forward = CapturedForward(self.validation_forward, CudaRecorder())
        self.epoch = 0
        self.best_epoch, self.best_dice = 0, math.nan
        self.order: torch.Tensor | None = None
        self.steps_done = 0

    @property
    def images_per_epoch(self) -> int:
        """Number of training images in an epoch; each crop counts as an image."""
        return len(self.epoch_images)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last may have fewer images."""
        whole, rest = divmod(self.images_per_epoch, self.config.batch_size * self.group.count)
        return whole + (rest >= self.group.count)

    def images_before(self, step: int) -> int:
        """Return the number of images of all processes in the first ``step`` steps of an epoch."""
        size, count = self.config.batch_size * self.group.count, self.group.count
        return min(step * size, self.images_per_epoch // count * count)

    @property
    def first_best_epoch(self) -> int:
        """First epoch whose weights can become the best."""
        return min(self.config.first_best_epoch, self.config.epochs)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the best epoch is more than ``patience`` epochs ago."""
        return self.best_epoch > 0 and self.epoch - self.best_epoch > self.config.patience

    def begin_epoch(self) -> None:
        """Draw the order of the next epoch, unless the run is in the middle of one."""
        set_learning_rate(self.optimizer, learning_rate(self.config, self.epoch + 1))
        self.model.train()
        if self.order is None:
            self.totals.reset()
            order = torch.randperm(
                self.images_per_epoch, generator=self.order_generator, device=self.order_generator.device
            )
            self.order = self.epoch_images[order]

    def batch(self, step: int, rank: int | None = None) -> torch.Tensor:
        """Return the positions of the images in a step of a process (by default this one), int64 (B,)."""
        size = self.config.batch_size * self.group.count
        together = self.order[step * size : (step + 1) * size]
        share = len(together) // self.group.count
        start = share * (self.group.rank if rank is None else rank)
        return together[start : start + share]

    def end_epoch(self) -> None:
        """Count the epoch as complete."""
        self.epoch += 1
        self.order, self.steps_done = None, 0
        self.group.share_buffers(self.model)

    def take_score(self, dice: float) -> bool:
        """Record the validation Dice of the complete epoch; return whether its weights are now the best."""
        is_best = self.epoch >= self.first_best_epoch and (self.best_epoch == 0 or dice > self.best_dice)
        if is_best:
            self.best_epoch, self.best_dice = self.epoch, dice
        return is_best

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that is saved with the best weights."""
        config = self.config
        return {
            "run_id": self.id,
            "protocol": self.protocol.name,
            "target": config.target,
            "image_size": list(self.protocol.image_size),
            "channel_order": self.protocol.channel_order,
            "intensity_range": None if config.intensity_range is None else list(config.intensity_range),
            "palette": None if config.palette is None else list(parse_palette(config.palette)),
            "ignore_label": config.ignore_label,
            "class_names": None if config.class_names is None else list(config.class_names),
            "best_epoch": self.best_epoch,
            "best_dice": self.best_dice,
            "uctrans_version": __version__,
            "torch_version": str(torch.__version__),
            "images": self.images,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the run as a checkpoint (see ``uctrans.training.checkpoint``); all processes call this together."""
        is_inside_epoch = self.order is not None
        return {
            "train_config": self.config.to_dict(),
            "epoch": self.epoch,
            "model": {
                "name": self.model.name,
                "config": self.model.config,
                "metadata": self.metadata(),
                "state": self.model.state_dict(),
            },
            "ema": self.average.model.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"epoch": self.epoch, "learning_rate": learning_rate(self.config, self.epoch + 1)},
            "best": {"epoch": self.best_epoch, "dice": self.best_dice},
            "generators": self.group.gather(self._generator_states()),
            "sampler": {
                "generator": self.order_generator.get_state(),
                "train_names": list(self.train_data.names),
                "train_digest": self.train_data.digest,
                "train_fingerprints": list(self.train_data.fingerprints),
                "val_names": list(self.val_data.names),
                "val_digest": self.val_data.digest,
                "val_fingerprints": list(self.val_data.fingerprints),
                "order": self.order.cpu() if is_inside_epoch else None,
                "step": self.steps_done,
                "totals": self.group.gather(self.totals.state_dict()) if is_inside_epoch else None,
            },
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Restore the state of a checkpoint; CheckpointError if it does not belong to this run."""
        sampler = state["sampler"]
        self.id = state["model"]["metadata"].get("run_id", self.id)  # earlier versions saved no run_id and no images
        self.images = state["model"]["metadata"].get("images", self.images)
        for part, data in (("train", self.train_data), ("val", self.val_data)):
            source = self.config.data or f"{part}_data"
            if sampler[f"{part}_names"] != list(data.names):
                changed = sorted(set(sampler[f"{part}_names"]) ^ set(data.names))[:5]
                raise CheckpointError(
                    f"{path}: the {part} images are not those the run began with (first: {', '.join(changed)}); "
                    "restore them, or train in another output folder"
                )
            before = sampler.get(f"{part}_fingerprints", data.fingerprints)
            pairs = zip(data.names, before, data.fingerprints, strict=True)
            changed = [name for name, then, now in pairs if then != now]
            if changed or sampler.get(f"{part}_digest", data.digest) != data.digest:
                which = f" ({shorten(changed)})" if changed else ""
                raise CheckpointError(
                    f"{path}: pixels or labels of the {part} images in {source}{which} have changed since "
                    "the run began; restore them, or train in another output folder"
                )
        if "train_digest" not in sampler and state["train_config"]["data"] != self.config.data:
            raise CheckpointError(
                f"{path}: an earlier version wrote it and recorded no pixels to compare with {self.config.data}; "
                f"resume with the data in {state['train_config']['data']}"
            )
        if len(state["generators"]) != self.group.count:
            raise CheckpointError(
                f"{path}: the run had {len(state['generators'])} processes, this one has {self.group.count}; "
                f"start it with torchrun --nproc-per-node {len(state['generators'])}"
            )
        load_weights(self.model, state["model"], path)
        if self.average:
            load_state(self.average.model, state["ema"], path)
        load_optimizer(self.optimizer, state["optimizer"])
        fit_to_device(self.optimizer, self.group.device)
        self.epoch = state["epoch"]
        if state["best"]["epoch"] >= self.first_best_epoch:  # otherwise it was the last epoch of a shorter run
            self.best_epoch, self.best_dice = state["best"]["epoch"], state["best"]["dice"]
        self._load_generator_states(state["generators"][self.group.rank], sampler["generator"])
        check_progress(sampler, len(self.train_data), self.images_per_epoch, self.steps_per_epoch)
        self.steps_done = sampler["step"]
        if sampler["order"] is not None:
            self.order = sampler["order"].to(self.group.device)
            self.totals.load_state_dict(sampler["totals"][self.group.rank])

    def _generator_states(self) -> dict[str, Any]:
        on_cuda = self.group.device.type == "cuda"
        return {
            "device": self.group.device.type,
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.group.device) if on_cuda else None,
            "augment": self.augment_generator.get_state(),
        }

    def _load_generator_states(self, states: dict[str, Any], order_state: torch.Tensor) -> None:
        if states["device"] != self.group.device.type:  # generators of another kind of device have other states
            self._seed_generators(self.epoch)
            self.order_generator.manual_seed(derived_seed(self.config.seed, "order", self.epoch))
            return
        torch.set_rng_state(states["cpu"])
        if states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], self.group.device)
        self.augment_generator.set_state(states["augment"])
        self.order_generator.set_state(order_state)

    def _seed_generators(self, epoch: int) -> None:
        """Seed dropout and augmentation, differently in each process."""
        rank = self.group.rank
        torch.manual_seed(derived_seed(self.config.seed, "dropout", epoch, rank))
        self.augment_generator.manual_seed(derived_seed(self.config.seed, "augment", epoch, rank))


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a different seed for each purpose, so that no two generators draw the same numbers."""
    return int(
        np.random.SeedSequence([seed, *purpose.encode(), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def set_threads_and_determinism(config: TrainConfig) -> None:
    """Set PyTorch's CPU threads and its choice of kernels, for the whole process.

    Unless ``deterministic`` is set, cuDNN times its convolutions on the first batch of each size and keeps the fastest,
    which may differ from run to run.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
