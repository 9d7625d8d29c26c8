"""The data and the network of a run, built as its configuration says."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

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
)
from ..data.find import shorten
from ..data.fingerprints import Record
from ..data.pairs import pairs_of
from ..data.read import Doubts
from ..data.tensors import MASK_TARGET
from ..kernels import resolve_backend
from ..models import ModelFileError, SegmentationModel, list_models, load_model
from ..models.external import ExternalModel, find_model_class
from ..weight_casts import casting_together
from .config import ConfigError, TrainConfig
from .distributed import Processes
from .own import NOTHING, Own
from .truth import PARTS

# Options of a network that follow from the run, and what to do instead of giving them.
OPTIONS_OF_THE_RUN = {
    "in_channels": "leave it out, and set in_channels",
    "classes": "leave it out, and set classes",
}


def build_protocol(config: TrainConfig, own: Own = NOTHING) -> Protocol:
    """Return the protocol of the configuration, with its settings and the caller's transform.

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
        "transform": own.checked_transform(config),
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
    config: TrainConfig, protocol: Protocol, group: Processes, own: Own
) -> tuple[SegmentationTensors, SegmentationTensors] | tuple[NativeImages, NativeImages]:
    """Return training and validation images on the device, those of the caller or else of the folder.

    Raises:
        DataError: the folder, one of its files, the folds or the caller's data cannot be used, there are too few
            images, or the processes have different ones.
    """
    if config.data:
        parts = [find_split(config.data, split, config.folds, config.fold) for split in ("train", "val")]
    else:
        parts = [pairs_of(own.train_data, "train_data"), pairs_of(own.val_data, "val_data")]
    for part, samples in zip(PARTS, parts, strict=True):
        if len(samples) < group.count:
            raise DataError(
                f"{config.data or f'{part}_data'}: there are {len(samples)} {PARTS[part]} images for {group.count} "
                "processes; add images, or start fewer processes"
            )
    read = functools.partial(load_native, target=config.target) if protocol.keeps_resolution else load_tensors
    doubts = Doubts()
    settings = {"protocol": protocol, "classes": config.classes, "palette": config.palette, "device": group.device}
    train, val = (read(part, doubts=doubts, **settings) for part in parts)
    if group.is_main:
        doubts.warn()
    if not config.data and len(set(group.gather((train.digest, val.digest)))) > 1:
        raise DataError(
            "train_data, val_data: differ between the processes; give each process all images, in the same order (draw "
            "random splits with a seeded generator)"
        )
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
