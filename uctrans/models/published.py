"""Read and write the checkpoints of the authors' code, bit for bit.

The published network keeps one matrix a head and one module a scale; here heads are stacked and scales are packed. So
each entry of our state dict is one published entry, or several that are stacked along a new axis or joined along the
first.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from .uctransnet import UCTransNet, resize_positions
from .weights import ModelFileError, check_state, check_tensors, load_state, read_checkpoint, sketch_of

CHANNEL_ORDERS = ("rgb", "bgr")
FIRST_CONVOLUTION = "inc.conv.weight"


def load_upstream(
    checkpoint: str | Path | dict, *, image_size: int | tuple[int, int] | None = None, channel_order: str = "rgb"
) -> UCTransNet:
    """Build a :class:`UCTransNet` from a published checkpoint; all sizes are inferred from the shapes of its entries.

    Args:
        checkpoint: path of a ``.pth``/``.pth.tar`` file, its loaded contents, or a bare state dict. The prefix
            ``module.`` of DataParallel is removed.
        image_size: size the model is for; ``None`` keeps the (square) size of the checkpoint. For any other size the
            position embeddings are interpolated.
        channel_order: order of the channels that the weights were trained on. The weights published for MoNuSeg and
            GlaS read images as ``bgr``; the first convolution is then mirrored, so that the model takes RGB.

    Returns:
        The model in evaluation mode, in the dtype of the checkpoint. Its logits are the published network's output
        before the sigmoid.

    Raises:
        ModelFileError: the file is missing, corrupt, or not a UCTransNet checkpoint.
        ValueError: ``channel_order`` is neither ``rgb`` nor ``bgr``.
    """
    _check_channel_order(channel_order)
    if isinstance(checkpoint, str | Path):
        model = from_published(read_checkpoint(checkpoint), checkpoint, channel_order)
    else:
        model = from_published(checkpoint, "the given state dict", channel_order)
    return model if image_size is None else resize_positions(model, image_size)


def from_published(checkpoint: object, source: object, channel_order: str = "rgb") -> UCTransNet:
    """Build a :class:`UCTransNet` as :func:`load_upstream` does from loaded contents; errors name ``source``."""
    state = _state_of(checkpoint, source)
    try:
        config = _infer_config(state, source)
        sketch = sketch_of(UCTransNet, config, state, source)
        if channel_order == "bgr":
            state[FIRST_CONVOLUTION] = _reverse_channels(state[FIRST_CONVOLUTION])
        converted = _converted(state, sketch, source)
    except ModelFileError:
        raise
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:  # shapes that contradict each other
        raise ModelFileError(
            f"{source} is damaged or not a UCTransNet checkpoint ({error}): download it again"
        ) from None
    check_state(sketch, converted, source)
    model = UCTransNet(**config).to(state[FIRST_CONVOLUTION].dtype)
    load_state(model, converted, source)
    return model.eval()


def is_upstream(checkpoint: object) -> bool:
    """Return whether ``checkpoint`` is like a published one: a state dict, bare or under ``state_dict``."""
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    return isinstance(checkpoint, dict) and any(
        str(name).removeprefix("module.") == FIRST_CONVOLUTION for name in checkpoint
    )


def to_upstream(model: UCTransNet, *, channel_order: str = "rgb") -> dict[str, Tensor]:
    """Return the state dict of ``model`` under the published names; the inverse of :func:`load_upstream`, bit for bit.

    ``channel_order="bgr"`` mirrors the first convolution, so that the published code can feed it BGR images.

    Raises:
        ValueError: ``channel_order`` is neither ``rgb`` nor ``bgr``.
        ModelFileError: ``channel_order`` is ``bgr`` and the model does not take three channels.
        KeyError: the published network has no such weights, as of a :class:`DualBranchUCTransNet`.
    """
    _check_channel_order(channel_order)
    published = {}
    for name, value in model.state_dict().items():
        entries = zip(_published_names(name, model), _separate(name, value, model), strict=True)
        published |= {entry: piece.contiguous().clone() for entry, piece in entries}
    if channel_order == "bgr":
        published[FIRST_CONVOLUTION] = _reverse_channels(published[FIRST_CONVOLUTION])
    return published


# Our name as a pattern, and the published names: {n} is group n, {n+1} group n counted from 1, {scale} stands for one
# entry a scale, joined along the first axis, and {head} for one entry a head, stacked.
_NAMES = [
    (r"encoder\.stem\.(.+)", "inc.{1}"),
    (r"encoder\.stages\.(\d+)\.convs\.(.+)", "down{1+1}.nConvs.{2}"),
    (r"transformer\.embeddings\.(\d+)\.projection\.(.+)", "mtc.embeddings_{1+1}.patch_embeddings.{2}"),
    (r"transformer\.embeddings\.(\d+)\.position", "mtc.embeddings_{1+1}.position_embeddings"),
    (r"transformer\.layers\.(\d+)\.query_norm\.(.+)", "mtc.encoder.layer.{1}.attn_norm{scale}.{2}"),
    (r"transformer\.layers\.(\d+)\.context_norm\.(.+)", "mtc.encoder.layer.{1}.attn_norm.{2}"),
    (
        r"transformer\.layers\.(\d+)\.attention\.query\.(\d+)",
        "mtc.encoder.layer.{1}.channel_attn.query{2+1}.{head}.weight",
    ),
    (
        r"transformer\.layers\.(\d+)\.attention\.key_value",
        "mtc.encoder.layer.{1}.channel_attn.key.{head}.weight",
        "mtc.encoder.layer.{1}.channel_attn.value.{head}.weight",
    ),
    (
        r"transformer\.layers\.(\d+)\.attention\.output\.(\d+)\.weight",
        "mtc.encoder.layer.{1}.channel_attn.out{2+1}.weight",
    ),
    (r"transformer\.layers\.(\d+)\.mlp_norm\.(.+)", "mtc.encoder.layer.{1}.ffn_norm{scale}.{2}"),
    (r"transformer\.layers\.(\d+)\.mlp\.(\d+)\.expand\.(.+)", "mtc.encoder.layer.{1}.ffn{2+1}.fc1.{3}"),
    (r"transformer\.layers\.(\d+)\.mlp\.(\d+)\.contract\.(.+)", "mtc.encoder.layer.{1}.ffn{2+1}.fc2.{3}"),
    (r"transformer\.norm\.(.+)", "mtc.encoder.encoder_norm{scale}.{1}"),
    (r"transformer\.reconstructions\.(\d+)\.(.+)", "mtc.reconstruct_{1+1}.{2}"),
    (r"decoder\.(\d+)\.gate\.skip\.(.+)", "up{1+1}.coatt.mlp_x.1.{2}"),
    (r"decoder\.(\d+)\.gate\.decoder\.(.+)", "up{1+1}.coatt.mlp_g.1.{2}"),
    (r"decoder\.(\d+)\.convs\.(.+)", "up{1+1}.nConvs.{2}"),
    (r"head\.(.+)", "outc.{1}"),
]


def _published_names(name: str, model: UCTransNet) -> list[str]:
    """Return the published names of one of our entries; the keys of all heads come before their values."""
    for pattern, *templates in _NAMES:
        if match := re.fullmatch(pattern, name):
            return [filled for template in templates for filled in _fill(template, match, model)]
    raise KeyError(f"{name} has no published name; only a UCTransNet with its own encoder has")


def _fill(template: str, match: re.Match[str], model: UCTransNet) -> list[str]:
    """Return the names that a template stands for: one, or one for each scale or head."""

    def group(reference: re.Match[str]) -> str:
        value = match[int(reference[1])]
        return str(int(value) + 1) if reference[2] else value

    name = re.sub(r"\{(\d)(\+1)?\}", group, template)
    if "{scale}" in name:
        return [name.replace("{scale}", str(scale + 1)) for scale in range(len(model.transformer.channels))]
    if "{head}" in name:
        return [name.replace("{head}", str(head)) for head in range(model.config["num_heads"])]
    return [name]


def _join(name: str, pieces: list[Tensor], model: UCTransNet) -> Tensor:
    """Make one of our entries of its published ones."""
    if name.endswith(".position"):
        rows, columns = model.token_grid(model.config["image_size"])
        return rearrange(pieces[0], "one (rows columns) c -> one c rows columns", rows=rows, columns=columns)
    if name.endswith(".key_value"):
        return rearrange(pieces, "(kind head) c s -> kind head c s", kind=2)
    return torch.stack(pieces) if _is_query(name) else torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _separate(name: str, value: Tensor, model: UCTransNet) -> Sequence[Tensor]:
    """Cut one of our entries into its published ones; the inverse of :func:`_join`."""
    if name.endswith(".position"):
        return [rearrange(value, "one c rows columns -> one (rows columns) c")]
    if name.endswith(".key_value"):
        return rearrange(value, "kind head c s -> (kind head) c s").unbind()
    if _is_query(name):
        return value.unbind()
    return value.split(model.transformer.channels) if len(_published_names(name, model)) > 1 else [value]


def _is_query(name: str) -> bool:
    return ".attention.query." in name


def _converted(state: dict[str, Tensor], model: UCTransNet, source: object) -> dict[str, Tensor]:
    """Return the published entries under our names; raise if one is missing or left over."""
    left, converted = dict(state), {}
    for name in model.state_dict():
        published = _published_names(name, model)
        missing = [entry for entry in published if entry not in left]
        if missing:
            raise ModelFileError(
                f"{source} lacks {missing[0]}: it is not a whole UCTransNet checkpoint; download it again"
            )
        converted[name] = _join(name, [left.pop(entry) for entry in published], model)
    if left:
        raise ModelFileError(
            f"{source} holds {len(left)} entries that UCTransNet does not have, first {next(iter(left))}"
        )
    return converted


def _state_of(checkpoint: object, source: object) -> dict[str, Tensor]:
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    check_tensors(checkpoint, source)
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
        raise ModelFileError(f"{source} lacks {error.args[0]}: it is not a UCTransNet checkpoint") from None
    rows = math.isqrt(tokens)
    if rows * rows != tokens:
        raise ModelFileError(
            f"{source} has {tokens} tokens, which is not a square grid: the published network takes square images only"
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
