"""The parts of a run, each built from the configuration: data, network, optimizer, learning rate, seeds."""

import functools
import inspect
import math
import os

import numpy as np
import torch

from uctrans.data import (
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
from uctrans.data.native import MASK_TARGET
from uctrans.kernels import resolve_backend
from uctrans.models import SegmentationModel, load_model
from uctrans.models.base import load_state
from uctrans.models.registry import model_class
from uctrans.training.config import TrainConfig
from uctrans.training.distributed import Processes
from uctrans.training.errors import ConfigError

FUSED_DEVICES = ("cpu", "cuda", "mps")


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1: a cosine from the highest towards the lowest, restarting.

    SGDR: stochastic gradient descent with warm restarts (Loshchilov and Hutter, ICLR 2017), equation 5, with all
    periods equal. Over the first ``warmup_epochs`` it is multiplied by shares that rise in equal steps to 1.
    """
    period = config.restart_period or config.epochs
    phase = (epoch - 1) % period / period
    span = config.learning_rate - config.min_learning_rate
    cosine = config.min_learning_rate + span * (1 + math.cos(math.pi * phase)) / 2
    return cosine * min(1.0, epoch / (config.warmup_epochs + 1))


def build_optimizer(config: TrainConfig, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return Adam or AdamW: fused where the device has it, and fit for CUDA graphs on CUDA."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=device.type in FUSED_DEVICES,
        capturable=device.type == "cuda",
    )
    fit_to_device(optimizer, device)
    return optimizer


def fit_to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Choose the implementation for ``device``, also of an optimizer whose state was saved on another kind of device.

    On CUDA the learning rate lies in a tensor there, so that a captured step can be given another one.
    """
    on_cuda = device.type == "cuda"
    for parameters in optimizer.param_groups:
        rate = float(parameters["lr"])
        parameters["lr"] = torch.tensor(rate, device=device) if on_cuda else rate
        parameters["fused"] = device.type in FUSED_DEVICES
        parameters["capturable"] = on_cuda


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameters, in place where it is a tensor."""
    for parameters in optimizer.param_groups:
        if isinstance(parameters["lr"], torch.Tensor):
            parameters["lr"].fill_(value)
        else:
            parameters["lr"] = value


def build_model(config: TrainConfig, image_size: tuple[int, int]) -> SegmentationModel:
    """Return the network that the configuration describes, with fresh weights.

    Raises:
        ConfigError: there is no such network, or it does not take these options.
    """
    kind = _kind(config)
    options = {"in_channels": 3, "classes": config.network_classes, "base_channels": config.base_channels}
    own = {"image_size": list(image_size), "backend": config.backend}
    taken = inspect.signature(kind).parameters
    options |= {name: value for name, value in own.items() if name in taken} | config.model_options
    if unknown := [name for name in options if name not in taken]:
        raise ConfigError(f"model_options: {config.model} has no {unknown[0]}; it takes {', '.join(taken)}")
    try:
        return kind(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model_options: {config.model} cannot be built of {options}: {error}") from error


def check_backend_runs(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError where the backend of the network's operators is unknown, or cannot run on ``device``."""
    if "backend" not in inspect.signature(_kind(config)).parameters:
        return
    try:
        resolve_backend(config.backend, device)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"backend: {error}") from error


def _kind(config: TrainConfig) -> type[SegmentationModel]:
    try:
        return model_class(config.model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def start_from(model: SegmentationModel, path: str) -> None:
    """Give ``model`` the weights of a trained network of the same kind, or a UCTransNet those of a U-Net.

    Raises:
        ConfigError: the network in the file is of another kind.
        ModelFileError: the file cannot be read, or is of another size.
    """
    source = load_model(path)
    if source.name == model.name:
        load_state(model, source.state_dict(), path)
    elif model.can_start_from_unet and source.name == "unet":
        model.load_unet(source)
    else:
        raise ConfigError(
            f"init_from: {path} holds a {source.name}, which cannot start a {model.name}; name another file"
        )


def build_protocol(config: TrainConfig) -> Protocol:
    """Return the protocol that the configuration names, with its settings.

    Raises:
        DataError: there is no such protocol, or it does not take these settings.
        ConfigError: the target needs another protocol.
    """
    options = {"channel_order": config.channel_order, "crops_per_image": config.crops_per_image}
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
        DataError: the folder, a file in it or the folds cannot be used, or there are too few images.
    """
    parts = [find_split(config.data, split, config.folds, config.fold) for split in ("train", "val")]
    for name, samples in zip(("training", "validation"), parts, strict=True):
        if len(samples) < group.count:
            raise DataError(
                f"{config.data}: {len(samples)} {name} images for {group.count} processes; "
                "add images there, or start fewer processes"
            )
    if protocol.keeps_resolution:
        read = functools.partial(load_native, target=config.target)
    else:
        read = functools.partial(load_tensors, protocol=protocol)
    train, val = (read(part, classes=config.classes, palette=config.palette, device=group.device) for part in parts)
    return train, val


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a seed of its own for each purpose, so that no two generators draw the same numbers."""
    return int(
        np.random.SeedSequence([seed, *purpose.encode(), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def set_threads_and_determinism(config: TrainConfig) -> None:
    """Set PyTorch's CPU threads and how it chooses kernels, for the whole process.

    Unless deterministic ones are asked for, cuDNN times its convolutions on the first batch of each size and keeps the
    fastest, which may be another one in the next run.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
