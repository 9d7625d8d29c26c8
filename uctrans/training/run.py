"""A training run: data, network, optimizer, random generators, and how far it is.

``Run.state_dict`` holds everything that decides the rest of the run, so a resumed run ends with the same bits.
"""

import dataclasses
import functools
import inspect
import math
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data import (
    DataError,
    NativeAugmentation,
    NativeImages,
    Protocol,
    SegmentationTensors,
    find_split,
    get_protocol,
    load_native,
    load_tensors,
    parse_palette,
)
from ..data.find import shorten
from ..data.fingerprints import Record, join_records
from ..data.read import Doubts
from ..data.tensors import MASK_TARGET
from ..extras import import_extra
from ..graphs import CapturedForward, CudaRecorder
from ..kernels import resolve_backend
from ..models import ModelFileError, SegmentationModel, list_models, load_model, set_checkpointing
from ..models.base import load_state
from ..models.external import ExternalModel, find_model_class
from ..weight_casts import casting_together
from .checkpoint import CheckpointError, load_weights
from .config import ConfigError, TrainConfig
from .distributed import Processes, with_sync_batch_norm
from .losses import EpochTotals
from .optimization import WeightAverage, build_optimizer, fit_to_device, learning_rate, set_learning_rate
from .step_graphs import StepGraphs, obstacle_to_graphs
from .truth import check_truth_of_run, classes_of_masks

# Options of a network that follow from the run, and what to do instead of giving them.
OPTIONS_OF_THE_RUN = {
    "in_channels": "leave it out, and set in_channels",
    "classes": "leave it out, and set classes",
}


class Run:
    """A run before its first epoch, or in the state that ``load_state_dict`` restores.

    Attributes:
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
        remarks: Sentences about the masks, for the log.
        scored_classes: Classes that the validation Dice is averaged over, or None for all foreground classes.
        images: Record of the images that form the weights, with those of ``init_from``; see
            ``uctrans.data.fingerprints``.
    """

    def __init__(self, config: TrainConfig, group: Processes):
        self.config, self.group = config, group
        self.id = uuid.uuid4().hex
        check_backend_runs(config, group.device)
        set_threads_and_determinism(config)
        self.protocol = build_protocol(config)
        if self.protocol.keeps_resolution:
            import_extra("monai", "training")  # which the first validation would miss
        self.train_data, self.val_data = load_data(config, self.protocol, group)
        self.images = {
            part: dict(zip(data.fingerprints, data.names, strict=True))
            for part, data in (("train", self.train_data), ("val", self.val_data))
        }
        if group.is_main:
            warn_of_shared_images(self.images)
        self.remarks = check_truth_of_run(config, self.train_data, self.val_data)
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
                    f"{path}: pixels or labels of the {part} images in {self.config.data}{which} have changed since "
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
        self.optimizer.load_state_dict(state["optimizer"])
        fit_to_device(self.optimizer, self.group.device)
        self.epoch = state["epoch"]
        if state["best"]["epoch"] >= self.first_best_epoch:  # otherwise it was the last epoch of a shorter run
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


def build_protocol(config: TrainConfig) -> Protocol:
    """Return the protocol of the configuration, with its settings.

    Raises:
        DataError: there is no such protocol, or it does not take these settings.
        ConfigError: the target needs another protocol.
    """
    options = {
        "channel_order": config.channel_order,
        "channels": config.in_channels,
        "intensity_range": config.intensity_range,
        "ignore_label": config.ignore_label,
        "crops_per_image": config.crops_per_image,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if config.augmentation:
        options["augmentation"] = NativeAugmentation.of(config.augmentation)
    protocol = get_protocol(config.protocol, config.image_size, **options)
    if config.target != MASK_TARGET and not protocol.keeps_resolution:
        raise ConfigError(
            f"target: {config.target} is learned at full resolution, and {config.protocol} resizes images; set "
            "protocol to native"
        )
    return protocol


def load_data(
    config: TrainConfig, protocol: Protocol, group: Processes
) -> tuple[SegmentationTensors, SegmentationTensors] | tuple[NativeImages, NativeImages]:
    """Return training and validation images on the device.

    Raises:
        DataError: the folder, one of its files or the folds cannot be used, or there are too few images.
    """
    parts = [find_split(config.data, split, config.folds, config.fold) for split in ("train", "val")]
    for name, samples in zip(("training", "validation"), parts, strict=True):
        if len(samples) < group.count:
            raise DataError(
                f"{config.data}: there are {len(samples)} {name} images for {group.count} processes; "
                "add images, or start fewer processes"
            )
    read = functools.partial(load_native, target=config.target) if protocol.keeps_resolution else load_tensors
    doubts = Doubts()
    settings = {"protocol": protocol, "classes": config.classes, "palette": config.palette, "device": group.device}
    train, val = (read(part, doubts=doubts, **settings) for part in parts)
    if group.is_main:
        doubts.warn()
    return train, val


def warn_of_shared_images(images: Record) -> None:
    """Warn of validation images that are training images too, whatever their names."""
    shared = [f"{name} ({images['train'][key]})" for key, name in images["val"].items() if key in images["train"]]
    if shared:
        warnings.warn(
            f"{len(shared)} validation images are training images too, so the best epoch is chosen by what was "
            f"learned: {shorten(shared)}; take them out of one of both",
            stacklevel=2,
        )


def build_model(config: TrainConfig, image_size: tuple[int, int]) -> SegmentationModel:
    """Return the network of the configuration, with new weights.

    Raises:
        ConfigError: there is no such network, or it does not take these options.
    """
    kind = _model_class(config)
    if issubclass(kind, ExternalModel):
        return _build_external(kind, config)
    options = {
        "in_channels": config.in_channels,
        "classes": config.network_classes,
        "base_channels": config.base_channels,
    }
    own = {"image_size": list(image_size), "backend": config.backend}
    taken = inspect.signature(kind).parameters
    options |= {name: value for name, value in own.items() if name in taken}
    for name, remedy in OPTIONS_OF_THE_RUN.items():
        if (given := config.model_options.get(name, options[name])) != options[name]:
            raise ConfigError(f"model_options: {name} is {given!r}, but that of the run is {options[name]!r}; {remedy}")
    options |= config.model_options
    if unknown := [name for name in options if name not in taken]:
        raise ConfigError(f"model_options: {config.model} has no {unknown[0]}; it takes {', '.join(taken)}")
    try:
        return kind(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"model_options: {config.model} cannot be built from {options} ({error}); change these options"
        ) from error


def _build_external(kind: type[ExternalModel], config: TrainConfig) -> ExternalModel:
    options = dict(config.model_options)
    size_multiple = options.pop("size_multiple", 1)
    try:
        return kind(config.in_channels, config.network_classes, options, size_multiple)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model_options: {error}") from error


def trial_device(config: TrainConfig) -> torch.device:
    """Return where to try a network before a run: on meta nothing is computed, but other packages' may need values."""
    return torch.device("cpu" if issubclass(_model_class(config), ExternalModel) else "meta")


def check_external(config: TrainConfig, image_size: tuple[int, int], device: torch.device) -> None:
    """Raise ConfigError if the network is of another package and cannot train on images of this size."""
    if not issubclass(_model_class(config), ExternalModel):
        return
    try:
        build_model(config, image_size).to(device).check(image_size)  # not the run's, whose batch statistics stay new
    except ValueError as error:
        raise ConfigError(f"model_options: {error}") from error


def check_smallest_batch(config: TrainConfig, protocol: Protocol, images: int, processes: int) -> None:
    """Raise ConfigError if the network cannot train on the smallest batch of an epoch.

    Batch norm needs more than one value a channel, and the deepest map of a small image has one pixel.

    Args:
        config: settings of the run.
        protocol: protocol of the run.
        images: number of images of an epoch.
        processes: number of processes, which share the last batch evenly.
    """
    rest = images % (config.batch_size * processes) // processes
    smallest = rest or config.batch_size
    if smallest > 1 or config.sync_batch_norm:
        return
    height, width = protocol.image_size
    try:
        with trial_device(config):
            model = build_model(dataclasses.replace(config, backend="reference"), (height, width)).train()
            model(torch.empty(1, model.in_channels, height, width))
    except ValueError as error:
        shared = f" of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"batch_size: with {config.batch_size}, the last batch of {images} images{shared} has one image, which at "
            f"{height} x {width} pixels is too small for batch norm ({error}); give a batch_size that leaves two or "
            "more images to the last batch, or a larger image_size"
        ) from error
    except RuntimeError:  # a network that needs values; its first step shows whether it can train
        return


def check_backend_runs(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError if the backend of the network's operators is unknown or cannot run on ``device``."""
    if "backend" not in inspect.signature(_model_class(config)).parameters:
        return
    try:
        resolve_backend(config.model_options.get("backend", config.backend), device)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"backend: {error}") from error


def _model_class(config: TrainConfig) -> type[SegmentationModel]:
    try:
        return find_model_class(config.model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def start_from(model: SegmentationModel, path: str) -> tuple[str, Record]:
    """Load the weights of a trained network into ``model``, see ``SegmentationModel.start_from``.

    Returns:
        What was taken, for the log, and the images that formed it.

    Raises:
        ModelFileError: the file cannot be read, or its network is of another kind or size.
    """
    source = load_model(path, network=[type(model), *list_models()])
    try:
        kept = model.start_from(source)
    except ModelFileError as error:
        raise ModelFileError(f"init_from: {path}: {error}") from error
    taken = f"starting from the weights of {path}"
    if kept:
        counts = [
            f"{getattr(source, name)} {name} there, {getattr(model, name)} here"
            for name in ("classes", "in_channels")
            if getattr(source, name) != getattr(model, name)
        ]
        taken += f", but for {', '.join(kept)}, which are new: {'; '.join(counts)}"
    return taken, source.metadata.get("images", {"train": {}, "val": {}})


def training_forward(model: torch.nn.Module, config: TrainConfig, group: Processes) -> Callable[[torch.Tensor], Any]:
    """Return ``model`` as a training step calls it: for several processes, compiled, or with its weights cast together.

    The compiler arranges casts itself, and several processes exchange the gradients of the uncast parameters.
    """
    forward = group.wrap(model)
    if config.compile:
        forward = torch.compile(forward, dynamic=False)  # the last, smaller batch of an epoch is compiled separately
    elif config.amp == "bf16" and group.count == 1:
        forward = casting_together(model, torch.bfloat16)
    return plain_forward(forward, config)


def plain_forward(forward: Callable[[torch.Tensor], Any], config: TrainConfig) -> Callable[[torch.Tensor], Any]:
    """Return ``forward``, images to logits, in the precision of the configuration: float32 or bfloat16 autocast."""

    def in_precision(images: torch.Tensor) -> torch.Tensor:
        if config.amp == "no":
            return forward(images)
        # Each weight is cast once a step in any case, and cached casts must not outlive the recording of a CUDA graph.
        with torch.autocast(images.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return forward(images)

    return in_precision
