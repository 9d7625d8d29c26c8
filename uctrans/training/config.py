"""The configuration of a training run: one flat dataclass of plain values, to and from YAML."""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.instances import BOUNDARY_CLASSES, BOUNDARY_TARGET
from ..data.read import IGNORED
from ..data.tensors import TARGETS
from ..extras import import_extra
from ..reading import UnreadableError, read_yaml
from ..writing import write_bytes

# A resumed run may change these settings; any other change would make it another run.
CHANGEABLE_ON_RESUME = (
    "output",
    "resume",
    "epochs",
    "patience",
    "device",
    "threads",
    "progress",
    "save_minutes",
    "learning_rate",
    "min_learning_rate",
    "amp",
    "graph",
    "compile",
    "checkpointing",
    "data",  # names and pixels of the images are compared instead
    "folds",  # likewise
    "init_from",  # only read when a run begins
)

RECORDED = {"is_recorded": True}  # metadata of a field that is no setting: no flag shows it

_CHOICES = {
    "optimizer": ("adam", "adamw"),
    "amp": ("no", "bf16"),
    "channel_order": (None, "rgb", "bgr"),
    "target": TARGETS,
}
_AT_LEAST = {
    "base_channels": 1,
    "in_channels": 1,
    "classes": 1,
    "epochs": 1,
    "batch_size": 1,
    "restart_period": 1,
    "warmup_epochs": 0,
    "patience": 1,
    "first_best_epoch": 1,
    "val_every": 1,
    "save_minutes": 0,
    "threads": 1,
    "fold": 0,
    "ignore_label": 0,
    "seed": 0,
    "weight_decay": 0,
    "min_learning_rate": 0,
    "dice_weight": 0,
    "cross_entropy_weight": 0,
    "ema_decay": 0,
}


class ConfigError(ValueError):
    """A setting is unusable; the message names the field and the remedy."""


@dataclass
class TrainConfig:
    """Settings of a training run. The defaults are the published protocol ``uctransnet-224``.

    Args:
        data: Data set folder, in any layout that ``uctrans.data.find_samples`` reads. Empty if ``train`` is given
            train_data and val_data in Python.
        output: Run folder for checkpoints, best weights, metrics and logs.
        model: Network: uctransnet, dual_branch_uctransnet or unet (``uctrans.list_models()``); or package.module:Class
            for any torch network from images to logits, such as monai.networks.nets:AttentionUnet or one in a file of
            the current folder, mynet:MyNet. Such a name imports code, so a config file alone cannot give it.
        base_channels: Channels of the first encoder level; not for package.module:Class.
        in_channels: Channels of the images: 3 for RGB (gray is repeated), 1 for gray, or as many as the files have.
        intensity_range: Lowest and highest value of the image files, which become black and white: 0,4095 for 12 bits
            in files of 16. none takes all that the files can hold. Saved with the weights.
        image_size: Height and width in pixels of what the network sees: images are resized to it, or cropped under the
            protocol native. One number means a square; none takes the size of the protocol.
        classes: 1 for binary masks, otherwise the number of labels including the background.
        target: What the network learns: mask; or boundary, which under the protocol native and with classes 1 means
            background, interior and border of every nucleus, made of the instance maps in instances/ next to masks/.
            Its predicted masks join interior and border, and it separates touching nuclei better.
        class_names: Names of the classes, saved with the weights: background,nucleus.
        backend: Implementation of the network's operators: auto, triton, composed or reference.
        model_options: Further arguments of the network, as a mapping or as JSON. package.module:Class needs all that
            its constructor requires, its numbers of input and output channels too; size_multiple 16 pads images to
            multiples of 16 pixels for it.
        init_from: Weights to start from, as predict takes them: a run folder, nuclei, ... A UCTransNet can start from a
            U-Net.
        protocol: uctransnet-224 resizes images; augmented-224 does so with the augmentation of native; native takes
            random crops at full resolution and validates on whole images in tiles (see
            ``uctrans.data.list_protocols()``).
        crops_per_image: Random crops of each training image in an epoch under the protocol native, or area: as many as
            have the pixels of the image; none takes the 16 of the protocol.
        augmentation: Strengths of the augmentation under the protocols native and augmented-224, as a mapping or as
            JSON: {"rotation": 45, "stain_scale": 0.1}. ``uctrans.data.NativeAugmentation`` lists names, ranges and
            defaults.
        channel_order: Order in which the network sees the colour channels: rgb or bgr; none takes that of the protocol.
        palette: Colours of the classes in colour-coded masks, background first: "#000000,#ff0000".
        ignore_label: Value of the mask files where nobody knows the class, such as 255: these pixels have no loss and
            no score, in training and in evaluate (saved with the weights). In colour-coded masks it is the position of
            a colour of the palette, from 0, which may have one more than there are classes.
        folds: Cross-validation folds: a shipped name or a JSON file; none trains on the train split.
        fold: Number of the fold to train on, from 0.
        epochs: Maximum number of epochs.
        batch_size: Images in a step of each process. The last batch of an epoch may be smaller. Several processes share
            it evenly and leave out the remaining images, fewer than there are processes and different in each epoch.
        optimizer: adam or adamw.
        learning_rate: Learning rate at the start of each cosine period.
        min_learning_rate: Learning rate at the end of each cosine period.
        restart_period: Epochs of a cosine period; none means one period over all epochs. A single cosine schedule needs
            a patience as large as epochs; otherwise early stopping ends the run while the learning rate is still high.
        warmup_epochs: Number of first epochs in which the learning rate rises in equal steps to that of the cosine.
        weight_decay: Weight decay of the optimizer.
        dice_weight: Weight of the Dice loss.
        cross_entropy_weight: Weight of the (binary) cross entropy.
        patience: Epochs without a better validation Dice after which training stops.
        first_best_epoch: First epoch whose weights can become the best (the last epoch if a run is shorter).
        val_every: Epochs from one validation to the next.
        save_minutes: Minimum number of minutes between two checkpoints; 0 saves every epoch that the disk keeps up
            with. The best epochs, the last one and a run that is stopped are always saved.
        amp: bf16 runs the network under bfloat16 autocast, no runs it in float32.
        ema_decay: Decay of the exponential moving average of the weights, which is then validated and saved as the
            best weights; 0 switches it off.
        seed: Seed of initial weights, order of images, augmentation and dropout.
        device: auto, cpu, cuda, cuda:1 or mps.
        threads: Number of CPU threads; none takes PyTorch's default.
        compile: Compile the network with torch.compile, once for each batch size (takes minutes on a CPU).
        graph: Record training step and validation as CUDA graphs where possible (on CUDA, in a single process): the
            same computation without a launch of each kernel by the host.
        checkpointing: Keep fewer maps for the backward pass and recompute the others: less memory, slower, the same
            results. Cannot be combined with compile.
        deterministic: Use deterministic kernels only, so that results repeat bit by bit on a GPU too (slower).
        sync_batch_norm: Compute batch statistics over all processes (CUDA only).
        progress: Show a progress bar and one line for each epoch; log.txt is always written.
        resume: Continue the run in the output folder. The command line takes the other settings from its config.yaml;
            in Python give all of them (``replace(TrainConfig.load_yaml(file), resume=True)``). Only epochs, patience,
            device, threads, progress, save_minutes, learning_rate, min_learning_rate, amp, graph, compile and
            checkpointing may differ from those of the run, and folds and init_from if only their place has changed.
        transform: Name of the transform that ``train`` is given in Python, which records it here.
        loss: Name of the loss that ``train`` is given in Python, which records it here.

    Raises:
        ConfigError: A value has the wrong type or range; the message names the field and the remedy.
    """

    data: str = ""
    output: str = ""
    model: str = "uctransnet"
    base_channels: int = 64
    in_channels: int = 3
    intensity_range: tuple[int, int] | None = None
    image_size: int | tuple[int, int] | None = None
    classes: int = 1
    target: str = "mask"
    class_names: tuple[str, ...] | None = None
    backend: str = "auto"
    model_options: dict[str, Any] | str = field(default_factory=dict)
    init_from: str | None = None
    protocol: str = "uctransnet-224"
    crops_per_image: int | str | None = None
    augmentation: dict[str, Any] | str = field(default_factory=dict)
    channel_order: str | None = None
    palette: str | tuple[Any, ...] | None = None
    ignore_label: int | None = None
    folds: str | None = None
    fold: int | None = None
    epochs: int = 2000
    batch_size: int = 4
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    restart_period: int | None = 10
    warmup_epochs: int = 0
    weight_decay: float = 0.0
    dice_weight: float = 0.5
    cross_entropy_weight: float = 0.5
    patience: int = 50
    first_best_epoch: int = 6
    val_every: int = 1
    save_minutes: float = 2.0
    amp: str = "no"
    ema_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    compile: bool = False
    graph: bool = True
    checkpointing: bool = False
    deterministic: bool = False
    sync_batch_norm: bool = False
    progress: bool = True
    resume: bool = False
    transform: str | None = field(default=None, metadata=RECORDED)
    loss: str | None = field(default=None, metadata=RECORDED)

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            setattr(self, name, _converted(name, getattr(self, name), hint))
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name}: {value!r} is not known; choose one of {', '.join(map(str, choices))}")
        for name, least in _AT_LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}: {value} is too small; give at least {least}")
        if not self.output:
            raise ConfigError("output: is empty; name a folder")
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        if self.image_size is not None and min(sizes) < 1:
            raise ConfigError(f"image_size: {self.image_size} has no pixels; give a positive size such as 224")
        if self.learning_rate <= 0 or self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"learning_rate: {self.learning_rate} must be positive and not below min_learning_rate "
                f"({self.min_learning_rate}); raise it or lower min_learning_rate"
            )
        if self.patience < self.val_every < self.epochs:
            raise ConfigError(
                f"patience: {self.patience} epochs end before the next validation (val_every {self.val_every}); "
                f"give at least {self.val_every}"
            )
        if self.dice_weight + self.cross_entropy_weight <= 0:
            raise ConfigError("dice_weight: is 0 like cross_entropy_weight; give one of them a value")
        if self.ema_decay >= 1:
            raise ConfigError(
                f"ema_decay: {self.ema_decay} would never change the average; give a value below 1 such as 0.999, or 0"
            )
        if self.checkpointing and self.compile:
            raise ConfigError("checkpointing: cannot be combined with compile; switch one of them off")
        if (self.fold is None) != (self.folds is None):
            raise ConfigError("fold: needs folds and folds needs it; give both (--folds monuseg --fold 0) or neither")
        if self.target == BOUNDARY_TARGET and self.classes != 1:
            raise ConfigError(
                f"target: {BOUNDARY_TARGET} makes {BOUNDARY_CLASSES} classes of binary masks itself; set classes to 1"
            )
        if self.ignore_label == 0 and self.classes == 1:
            raise ConfigError("ignore_label: 0 is the background of binary masks; give another value, or set classes")
        if self.ignore_label is not None and self.classes > IGNORED:
            raise ConfigError(
                f"ignore_label: masks of {self.classes} classes leave no label to ignore; set classes to {IGNORED} or "
                "fewer"
            )
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ConfigError(
                f"class_names: has {len(self.class_names)} names for {self.classes} classes; give one for each class"
            )

    @property
    def network_classes(self) -> int:
        """Number of classes of the network's output: those of the masks, or three for the target boundary."""
        return BOUNDARY_CLASSES if self.target == BOUNDARY_TARGET else self.classes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that YAML, JSON and a checkpoint can hold (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "configuration") -> "TrainConfig":
        """Build a configuration from named values; ConfigError names ``source`` if a name is unknown or missing."""
        names = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
                raise ConfigError(f"{name}: there is no such field ({source}); {hint}")
        if "output" not in values:
            raise ConfigError(f"output: is missing ({source}); name a folder")
        return cls(**values)

    def save_yaml(self, path: str | Path) -> None:
        """Write the configuration to a YAML file, atomically; OSError if it cannot be written."""
        text = import_extra("yaml", "training").safe_dump(self.to_dict(), sort_keys=False)
        write_bytes(Path(path), text.encode())

    @classmethod
    def load_yaml(cls, path: str | Path, network: str | None = None) -> "TrainConfig":
        """Read a configuration from a YAML file.

        Args:
            path: the file.
            network: the ``package.module:Class`` that the file may name as ``model``; it may name no other.

        Raises:
            ConfigError: the file holds no configuration, or names a class that ``network`` does not.
        """
        try:
            values = read_yaml(path)
        except (OSError, UnreadableError) as error:
            raise ConfigError(f"{error}; name a file like a run's config.yaml") from error
        model = str(values.get("model"))
        if ":" in model and model != network:
            raise ConfigError(
                f"model: {path} names the class {model}, and no name in a file has code imported; if you trust this "
                f'class, name it yourself: load_yaml(path, network="{model}")'
            )
        return cls.from_dict(values, source=str(path))


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return "field: before -> now" for each field that a resumed run may not change and that differs.

    A field that ``before`` lacks has its default: the run is older than the field.
    """
    before = TrainConfig(output=now["output"]).to_dict() | before
    names = [name for name in now if name not in CHANGEABLE_ON_RESUME]
    return [f"{name}: {before[name]!r} -> {now[name]!r}" for name in names if before[name] != now[name]]


def settings_for_memory(config: TrainConfig) -> str:
    """Return which settings of a run need less memory if they are changed, in words."""
    size = "" if config.image_size is None else f" (now {config.image_size})"
    lower = (
        f"lower batch_size (now {config.batch_size}), image_size{size} or base_channels (now {config.base_channels})"
    )
    if config.checkpointing or config.compile:
        return f"{lower} in a new run"
    return f"set checkpointing, also to continue with resume; or {lower} in a new run"


def _converted(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type of ``hint``; ConfigError names the field if it has another type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is types.NoneType and value is None:
            return None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)  # YAML reads 1e-3 as text
            except ValueError:
                continue
            if math.isfinite(number):
                return number
        if kind is str and isinstance(value, (str, Path)) and dict not in map(typing.get_origin, options):
            return str(value)
        if kind is tuple and isinstance(value, (list, tuple)) and _fits(value, typing.get_args(option)):
            return tuple(tuple(item) if isinstance(item, list) else item for item in value)
        if kind is dict and isinstance(value, str):
            value = _parsed_json(name, value)
        if kind is dict and isinstance(value, dict):
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) if option is not types.NoneType else "none"
                         for option in options)  # fmt: skip
    raise ConfigError(f"{name}: {value!r} is a {type(value).__name__}; give {wanted}")


def _fits(items: list | tuple, kinds: tuple) -> bool:
    """Return whether the items of a sequence have the types of a tuple annotation."""
    if kinds[-1] is not Ellipsis and len(items) != len(kinds):
        return False
    kind = kinds[0]
    return kind is Any or all(isinstance(item, kind) and not isinstance(item, bool) for item in items)


def _parsed_json(name: str, text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name}: {text[:200]!r} is not JSON ({error}); write it like '{{\"num_layers\": 2}}'"
        ) from error
