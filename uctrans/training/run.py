"""Everything a training run consists of: data, network, optimizer, random generators, and where it has got to.

``Run.state_dict`` holds all that decides what comes next, so that a run continued from it ends with the same bits.
"""

import math
from pathlib import Path
from typing import Any

import torch

from uctrans import __version__
from uctrans.data import parse_palette
from uctrans.graphs import CapturedForward, CudaRecorder
from uctrans.models import set_checkpointing
from uctrans.models.base import load_state
from uctrans.training.build import (
    build_model,
    build_optimizer,
    build_protocol,
    check_backend_runs,
    derived_seed,
    fit_to_device,
    learning_rate,
    load_data,
    set_learning_rate,
    set_threads_and_determinism,
    start_from,
)
from uctrans.training.captured_step import CapturedStep, obstacle_to_capture
from uctrans.training.checkpoint import load_weights
from uctrans.training.config import TrainConfig
from uctrans.training.distributed import Processes, with_sync_batch_norm
from uctrans.training.ema import WeightAverage
from uctrans.training.errors import CheckpointError
from uctrans.training.step import EpochTotals, TrainStep, plain_forward, training_forward


class Run:
    """A run at the start of its first epoch, or where ``load_state_dict`` puts it.

    Attributes:
        epoch: complete epochs.
        best_epoch: the epoch with the best validation Dice so far, 0 while there is none.
        best_dice: its Dice, nan while there is none.
        order: positions of the training images in the order of the present epoch, int64 (images_per_epoch,) on the
            device.
        steps_done: steps of the present epoch that are done.
        model: the network that is trained.
        validated_model: the network that is validated and kept as best: the moving average where there is one.
        validation_forward: how it is called.
        step: trains on one batch.
        obstacle_to_capture: why no CUDA graphs are used, None where they are.
    """

    def __init__(self, config: TrainConfig, group: Processes):
        self.config, self.group = config, group
        check_backend_runs(config, group.device)
        set_threads_and_determinism(config)
        self.protocol = build_protocol(config)
        self.train_data, self.val_data = load_data(config, self.protocol, group)

        torch.manual_seed(config.seed)
        model = build_model(config, self.protocol.image_size)
        # The kernels of convolutions read this layout as it is; features take it over from the weights.
        self.model = model.to(group.device, memory_format=torch.channels_last)
        if config.init_from is not None and not config.resume:
            start_from(self.model, config.init_from)
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
        self.totals = EpochTotals(group.device)
        self.step = TrainStep(
            forward=training_forward(self.model, config, group),
            model=self.model,
            optimizer=self.optimizer,
            average=self.average,
            data=self.train_data,
            protocol=self.protocol,
            generator=self.augment_generator,
            totals=self.totals,
            group=group,
            config=config,
        )
        self.validation_forward = plain_forward(self.validated_model, config)
        self.obstacle_to_capture = obstacle_to_capture(config, group)
        if self.obstacle_to_capture is None:
            self.step = CapturedStep(self.step)
            self.validation_forward = CapturedForward(self.validation_forward, CudaRecorder())
        self.epoch = 0
        self.best_epoch, self.best_dice = 0, math.nan
        self.order: torch.Tensor | None = None
        self.steps_done = 0

    @property
    def images_per_epoch(self) -> int:
        """Training images of an epoch; under a protocol of crops each image counts as often as it is cropped."""
        return len(self.train_data) * self.protocol.crops_per_image

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last may have fewer images."""
        whole, rest = divmod(self.images_per_epoch, self.config.batch_size * self.group.count)
        return whole + (rest >= self.group.count)

    def images_before(self, step: int) -> int:
        """Return how many images all processes together train on in the first steps of an epoch."""
        size, count = self.config.batch_size * self.group.count, self.group.count
        return min(step * size, self.images_per_epoch // count * count)

    @property
    def first_best_epoch(self) -> int:
        """The first epoch whose weights may become the best."""
        return min(self.config.first_best_epoch, self.config.epochs)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the best epoch lies more than ``patience`` epochs back."""
        return self.best_epoch > 0 and self.epoch - self.best_epoch > self.config.patience

    def begin_epoch(self) -> None:
        """Draw the order of the next epoch, unless the run stands in the middle of one."""
        set_learning_rate(self.optimizer, learning_rate(self.config, self.epoch + 1))
        self.model.train()
        if self.order is None:
            self.totals.reset()
            order = torch.randperm(
                self.images_per_epoch, generator=self.order_generator, device=self.order_generator.device
            )
            self.order = order % len(self.train_data)

    def batch(self, step: int, rank: int | None = None) -> torch.Tensor:
        """Return the positions of the images that a process (this one) trains on in a step, int64 (B,)."""
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
        """Note the validation Dice of the epoch just completed; tell whether its weights are now the best."""
        is_best = self.epoch >= self.first_best_epoch and (self.best_epoch == 0 or dice > self.best_dice)
        if is_best:
            self.best_epoch, self.best_dice = self.epoch, dice
        return is_best

    def metadata(self) -> dict[str, Any]:
        """Return what is kept beside the best weights."""
        config = self.config
        return {
            "protocol": self.protocol.name,
            "target": config.target,
            "image_size": list(self.protocol.image_size),
            "channel_order": self.protocol.channel_order,
            "palette": None if config.palette is None else list(parse_palette(config.palette)),
            "class_names": None if config.class_names is None else list(config.class_names),
            "best_epoch": self.best_epoch,
            "best_dice": self.best_dice,
            "uctrans_version": __version__,
            "torch_version": str(torch.__version__),
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
                "val_names": list(self.val_data.names),
                "order": self.order.cpu() if is_inside_epoch else None,
                "step": self.steps_done,
                "totals": self.group.gather(self.totals.state_dict()) if is_inside_epoch else None,
            },
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Continue where a checkpoint was written; CheckpointError where it does not belong to this run."""
        sampler = state["sampler"]
        for part, data in (("train", self.train_data), ("val", self.val_data)):
            if sampler[f"{part}_names"] != list(data.names):
                changed = sorted(set(sampler[f"{part}_names"]) ^ set(data.names))[:5]
                raise CheckpointError(
                    f"{path}: the {part} images are not those the run began with (first: {', '.join(changed)}); "
                    "restore them, or train anew in another output folder"
                )
        if len(state["generators"]) != self.group.count:
            raise CheckpointError(
                f"{path}: the run had {len(state['generators'])} processes, this one has {self.group.count}; "
                f"start it with torchrun --nproc-per-node {len(state['generators'])}"
            )
        load_weights(self.model, state["model"], path)
        if self.average:
            load_state(self.average.model, state["ema"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        fit_to_device(self.optimizer, self.group.device)
        self.epoch = state["epoch"]
        if state["best"]["epoch"] >= self.first_best_epoch:  # otherwise the last epoch of a run that now goes on
            self.best_epoch, self.best_dice = state["best"]["epoch"], state["best"]["dice"]
        self._load_generator_states(state["generators"][self.group.rank], sampler["generator"])
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
        if states["device"] != self.group.device.type:  # states of another kind of device mean nothing here
            self._seed_generators(self.epoch)
            self.order_generator.manual_seed(derived_seed(self.config.seed, "order", self.epoch))
            return
        torch.set_rng_state(states["cpu"])
        if states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], self.group.device)
        self.augment_generator.set_state(states["augment"])
        self.order_generator.set_state(order_state)

    def _seed_generators(self, epoch: int) -> None:
        """Seed dropout and augmentation, which differ from process to process."""
        rank = self.group.rank
        torch.manual_seed(derived_seed(self.config.seed, "dropout", epoch, rank))
        self.augment_generator.manual_seed(derived_seed(self.config.seed, "augment", epoch, rank))
