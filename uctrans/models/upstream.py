"""The authors' checkpoints, in and out, bit for bit.

The published network keeps one matrix a head and one module a scale; here heads are stacked and scales are packed.
Each of our entries corresponds to one or several published ones: stacked along a new axis, joined along the first, or
taken as they are.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ModelFileError, load_state
from .checkpoint import read_checkpoint
from .uctransnet import UCTransNet

CHANNEL_ORDERS = ("rgb", "bgr")
FIRST_CONVOLUTION = "inc.conv.weight"


@dataclass(frozen=True)
class _Entry:
    """One entry of our state dict and the published entries it is made of."""

    name: str
    published: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    separate: Callable[[Tensor, list[int]], list[Tensor]]


def load_upstream(
    checkpoint: str | Path | dict, *, image_size: int | tuple[int, int] | None = None, channel_order: str = "rgb"
) -> UCTransNet:
    """Build a :class:`UCTransNet` from a published checkpoint; every size is read off the shapes of its entries.

    Args:
        checkpoint: path of a ``.pth``/``.pth.tar`` file, its loaded contents, or a bare state dict. ``module.``
            prefixes of DataParallel are taken off.
        image_size: size the model is for; ``None`` keeps the (square) size of the checkpoint. For any other, the
            position embeddings are interpolated.
        channel_order: order of the channels the weights were trained on. The weights published for MoNuSeg and GlaS
            read images as ``bgr``: the first convolution is then mirrored, and the model takes RGB.

    Returns:
        The model in evaluation mode, in the dtype of the checkpoint. Its logits are the published network's output
        before the sigmoid.

    Raises:
        ModelFileError: the file is missing, corrupt, or no UCTransNet checkpoint.
        ValueError: ``channel_order`` is neither ``rgb`` nor ``bgr``.
    """
    _check_channel_order(channel_order)
    if isinstance(checkpoint, str | Path):
        model = from_published(read_checkpoint(checkpoint), checkpoint, channel_order)
    else:
        model = from_published(checkpoint, "the given state dict", channel_order)
    return model if image_size is None else resize_positions(model, image_size)


def from_published(checkpoint: object, source: object, channel_order: str = "rgb") -> UCTransNet:
    """:func:`load_upstream` of contents that are loaded already; ``source`` is what errors call them."""
    state = _state_of(checkpoint, source)
    try:
        model = UCTransNet(**_infer_config(state, source)).to(state[FIRST_CONVOLUTION].dtype)
        if channel_order == "bgr":
            state[FIRST_CONVOLUTION] = _reverse_channels(state[FIRST_CONVOLUTION])
        converted = _converted(state, model, source)
    except ModelFileError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:  # shapes that contradict each other
        raise ModelFileError(f"{source} is damaged or no UCTransNet checkpoint ({error}): download it again") from None
    load_state(model, converted, source)
    return model.eval()


def is_upstream(checkpoint: object) -> bool:
    """Whether ``checkpoint`` looks like the published network's: a state dict, bare or under ``state_dict``."""
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    return isinstance(checkpoint, dict) and any(
        str(name).removeprefix("module.") == FIRST_CONVOLUTION for name in checkpoint
    )


def to_upstream(model: UCTransNet, *, channel_order: str = "rgb") -> dict[str, Tensor]:
    """The state dict of ``model`` under the published names; the inverse of :func:`load_upstream`, bit for bit.

    ``channel_order="bgr"`` mirrors the first convolution, so that the published code can feed it BGR images.
    """
    _check_channel_order(channel_order)
    state = model.state_dict()
    published = {}
    for entry in _entries(model):
        value = state[entry.name]
        if entry.name.endswith(".position"):
            value = value.flatten(2).transpose(1, 2)
        pieces = entry.separate(value, model.transformer.channels)
        published |= {name: piece.contiguous().clone() for name, piece in zip(entry.published, pieces, strict=True)}
    if channel_order == "bgr":
        published[FIRST_CONVOLUTION] = _reverse_channels(published[FIRST_CONVOLUTION])
    return published


def resize_positions(model: UCTransNet, image_size: int | tuple[int, int]) -> UCTransNet:
    """A copy of ``model`` for another image size: position embeddings interpolated (bicubic), all else the same."""
    resized = copy.deepcopy(model)
    resized.config["image_size"] = image_size if isinstance(image_size, int) else list(image_size)
    grid = resized.token_grid(image_size)
    with torch.no_grad():
        for embedding in resized.transformer.embeddings:
            if embedding.position.shape[-2:] != grid:
                position = F.interpolate(embedding.position, size=grid, mode="bicubic", align_corners=False)
                embedding.position = nn.Parameter(position, requires_grad=embedding.position.requires_grad)
    return resized


def _entries(model: UCTransNet) -> Iterator[_Entry]:
    for name in model.state_dict():
        yield _entry(name, len(model.transformer.channels), model.config["num_heads"])


def _entry(name: str, scales: int, heads: int) -> _Entry:
    """Our name -> the published names and how they are joined."""
    for pattern, template in _RENAMED:
        match = re.fullmatch(pattern, name)
        if match:
            return _Entry(name, (_fill(template, match),), _only, lambda value, _: [value])
    for pattern, template in _PACKED:
        match = re.fullmatch(pattern, name)
        if match:
            published = tuple(_fill(template, match).replace("{scale}", str(scale + 1)) for scale in range(scales))
            return _Entry(name, published, torch.cat, lambda value, channels: list(value.split(channels)))
    for pattern, templates in _STACKED:
        match = re.fullmatch(pattern, name)
        if match:
            filled = [_fill(template, match) for template in templates]
            published = tuple(one.replace("{head}", str(head)) for one in filled for head in range(heads))
            lead = (len(templates), heads) if len(templates) > 1 else (heads,)
            return _Entry(
                name,
                published,
                lambda pieces, lead=lead: torch.stack(pieces).unflatten(0, lead),
                lambda value, _: list(value.flatten(0, -3)),
            )
    raise KeyError(f"no published name is known for {name}")


# Our name as a pattern -> the published name; {n} is group n, {n+1} group n counted from 1.
_RENAMED = [
    (r"encoder\.stem\.(.+)", "inc.{1}"),
    (r"encoder\.stages\.(\d+)\.convs\.(.+)", "down{1+1}.nConvs.{2}"),
    (r"transformer\.embeddings\.(\d+)\.projection\.(.+)", "mtc.embeddings_{1+1}.patch_embeddings.{2}"),
    (r"transformer\.embeddings\.(\d+)\.position", "mtc.embeddings_{1+1}.position_embeddings"),
    (r"transformer\.layers\.(\d+)\.context_norm\.(.+)", "mtc.encoder.layer.{1}.attn_norm.{2}"),
    (
        r"transformer\.layers\.(\d+)\.attention\.output\.(\d+)\.weight",
        "mtc.encoder.layer.{1}.channel_attn.out{2+1}.weight",
    ),
    (r"transformer\.layers\.(\d+)\.mlp\.(\d+)\.expand\.(.+)", "mtc.encoder.layer.{1}.ffn{2+1}.fc1.{3}"),
    (r"transformer\.layers\.(\d+)\.mlp\.(\d+)\.contract\.(.+)", "mtc.encoder.layer.{1}.ffn{2+1}.fc2.{3}"),
    (r"transformer\.reconstructions\.(\d+)\.(.+)", "mtc.reconstruct_{1+1}.{2}"),
    (r"decoder\.(\d+)\.gate\.skip\.(.+)", "up{1+1}.coatt.mlp_x.1.{2}"),
    (r"decoder\.(\d+)\.gate\.decoder\.(.+)", "up{1+1}.coatt.mlp_g.1.{2}"),
    (r"decoder\.(\d+)\.convs\.(.+)", "up{1+1}.nConvs.{2}"),
    (r"head\.(.+)", "outc.{1}"),
]
# One published entry a scale, joined along the first axis.
_PACKED = [
    (r"transformer\.layers\.(\d+)\.query_norm\.(.+)", "mtc.encoder.layer.{1}.attn_norm{scale}.{2}"),
    (r"transformer\.layers\.(\d+)\.mlp_norm\.(.+)", "mtc.encoder.layer.{1}.ffn_norm{scale}.{2}"),
    (r"transformer\.norm\.(.+)", "mtc.encoder.encoder_norm{scale}.{1}"),
]
# One published entry a head, stacked; of keys and values, those of the keys first.
_STACKED = [
    (
        r"transformer\.layers\.(\d+)\.attention\.query\.(\d+)",
        ("mtc.encoder.layer.{1}.channel_attn.query{2+1}.{head}.weight",),
    ),
    (
        r"transformer\.layers\.(\d+)\.attention\.key_value",
        (
            "mtc.encoder.layer.{1}.channel_attn.key.{head}.weight",
            "mtc.encoder.layer.{1}.channel_attn.value.{head}.weight",
        ),
    ),
]


def _fill(template: str, match: re.Match[str]) -> str:
    def group(reference: re.Match[str]) -> str:
        value = match[int(reference[1])]
        return str(int(value) + 1) if reference[2] else value

    return re.sub(r"\{(\d)(\+1)?\}", group, template)


def _only(pieces: list[Tensor]) -> Tensor:
    return pieces[0]


def _converted(state: dict[str, Tensor], model: UCTransNet, source: object) -> dict[str, Tensor]:
    """The published entries under our names, all of them used."""
    left, converted = dict(state), {}
    for entry in _entries(model):
        missing = [name for name in entry.published if name not in left]
        if missing:
            raise ModelFileError(f"{source} lacks {missing[0]}: it is no whole UCTransNet checkpoint")
        value = entry.join([left.pop(name) for name in entry.published])
        if entry.name.endswith(".position"):
            grid = model.token_grid(model.config["image_size"])
            value = value.transpose(1, 2).unflatten(2, grid).contiguous()
        converted[entry.name] = value
    if left:
        raise ModelFileError(f"{source} holds {len(left)} entries that UCTransNet has not, first {next(iter(left))}")
    return converted


def _state_of(checkpoint: object, source: object) -> dict[str, Tensor]:
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    if not isinstance(checkpoint, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in checkpoint.items()
    ):
        raise ModelFileError(f"{source} holds no state dict: give the authors' .pth.tar file or its 'state_dict'")
    return {name.removeprefix("module."): value for name, value in checkpoint.items()}


def _check_channel_order(channel_order: str) -> None:
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order must be one of {', '.join(CHANNEL_ORDERS)}; got {channel_order!r}")


def _infer_config(state: dict[str, Tensor], source: object) -> dict[str, object]:
    try:
        in_channels = state[FIRST_CONVOLUTION].shape[1]
        scales = _count(state, r"mtc\.embeddings_(\d+)\.position_embeddings")
        patches = [state[f"mtc.embeddings_{scale + 1}.patch_embeddings.weight"] for scale in range(scales)]
        tokens = state["mtc.embeddings_1.position_embeddings"].shape[1]
        hidden, width = state["mtc.encoder.layer.0.ffn1.fc1.weight"].shape
        classes = state["outc.weight"].shape[0]
    except KeyError as error:
        raise ModelFileError(f"{source} lacks {error.args[0]}: it is no UCTransNet checkpoint") from None
    rows = math.isqrt(tokens)
    if rows * rows != tokens:
        raise ModelFileError(
            f"{source} has {tokens} tokens, no square grid: the published network is for square images"
        )
    widths = [weight.shape[0] for weight in patches]
    doubled = [widths[0] * 2**scale for scale in range(scales)]
    return {
        "in_channels": in_channels,
        "classes": classes,
        "image_size": rows * patches[0].shape[-1],
        "base_channels": widths[0] if widths == doubled else widths,
        "num_layers": _count(state, r"mtc\.encoder\.layer\.(\d+)\.attn_norm\.weight"),
        "num_heads": _count(state, r"mtc\.encoder\.layer\.0\.channel_attn\.key\.(\d+)\.weight"),
        "patch_sizes": [weight.shape[-1] for weight in patches],
        "mlp_ratio": hidden // width,
    }


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def _reverse_channels(weight: Tensor) -> Tensor:
    if weight.shape[1] != 3:
        raise ModelFileError(
            f"channel_order='bgr' needs three input channels; the first convolution has {weight.shape[1]}"
        )
    return weight.flip(1).contiguous()
