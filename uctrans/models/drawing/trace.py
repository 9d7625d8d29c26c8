"""What a network is made of, recorded while it runs: its blocks, their maps, and which block feeds which.

Tensors are on the meta device, so nothing is computed and nothing is in memory. The published sequence of operations
runs (backend ``reference``), so that counts are the same on every machine.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...layers import (
    ChannelAttention,
    ChannelGate,
    ConvNormAct,
    ConvNormActPool,
    DeepestStage,
    DoubleConv,
    DownStage,
    DualBranchDown,
    NestedU,
    PatchEmbedding,
    Reconstruct,
    TransformerLayer,
    U2UpBlock,
    set_backend,
)
from ...layers.backend import layers_with_backend
from ...layers.packed import PackedMlp
from ..registry import create_model
from ..unet import SkipStage

# What is shown as one block, whatever is inside; so is a layer that has weights and no layers inside it.
BLOCKS = (
    *(ConvNormAct, DoubleConv, DownStage, DeepestStage, SkipStage, ChannelGate, U2UpBlock),
    *(PatchEmbedding, ChannelAttention, PackedMlp, Reconstruct),
)
# What is shown with the blocks inside it.
GROUPS = (DualBranchDown, NestedU, TransformerLayer)
# Blocks that return their map, and beside it the pooled one. In a small U there is no place to say so.
POOLING = (ConvNormActPool, DownStage)
# Operations between blocks that are named beside the line.
MAX_POOL = "max-pool"
VIA = {
    "aten::max_pool2d_with_indices": MAX_POOL,
    "aten::native_layer_norm": "layer norm",
    "aten::upsample_nearest2d": "upsample",
}
DEFAULT_SIDE = 224


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: the node that made it, and the operations of ``VIA`` since."""

    source: str
    via: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge(Origin):
    """What a node reads; ``shape`` is without the batch."""

    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Node:
    """A block, or where maps are joined (``kind`` ``add`` or ``cat``), or the ``image`` or ``logits``.

    Attributes:
        name: path of the module in the network; joins, image and logits have names of their own.
        kind: class name of the module.
        module: its class; ``None`` for what is no module. Of equal modules in a row it is the class of each.
        repeats: how many equal modules in a row it is.
        dilation: largest distance between the taps of its convolutions, in pixels.
        shape: of its output, or of the first of them, without the batch.
        inputs: what it reads.
        group: name of the group it is in, or ``None``.
        parameters: their number.
        flop: operations of a forward pass, as PyTorch's FlopCounterMode counts them.
    """

    name: str
    kind: str
    module: type[nn.Module] | None
    repeats: int
    dilation: int
    shape: tuple[int, ...]
    inputs: tuple[Edge, ...]
    group: str | None = None
    parameters: int = 0
    flop: int = 0

    @property
    def is_join(self) -> bool:
        """Whether it is an operation on what several blocks made."""
        return self.module is None and self.name != self.kind


@dataclass(frozen=True)
class Group:
    """A module shown with its blocks; ``parameters`` and ``flop`` are those of none of its blocks.

    ``repeats`` is how many equal ones in a row it stands for.
    """

    name: str
    module: type[nn.Module]
    parameters: int
    flop: int
    repeats: int = 1


@dataclass(frozen=True)
class Trace:
    """A network: nodes and groups by name, in the order in which they ran, and the counts of the whole."""

    title: str
    image: tuple[int, ...]
    nodes: dict[str, Node]
    groups: dict[str, Group]
    parameters: int
    flop: int


def trace_model(name: str, **options: Any) -> Trace:
    """Run ``create_model(name, **options)`` on one image of its ``image_size``, 224 pixels where it has none.

    Raises:
        ValueError, TypeError: as for :func:`uctrans.create_model`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where there is one

    with torch.device("meta"):
        model = create_model(name, **options).eval()
        side = model.config.get("image_size", DEFAULT_SIDE)
        height, width = [side] * 2 if isinstance(side, int) else side
        image = torch.empty(1, model.in_channels, height, width)
    if layers_with_backend(model):
        set_backend(model, "reference")
    recorder = _Recorder(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, recorder:
        recorder.start(image)
        recorder.end(model(image))
    flops = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    root = type(model).__name__
    nodes = {
        node.name: dataclasses.replace(node, flop=flops.get(f"{root}.{node.name}", 0))
        for node in recorder.nodes.values()
    }
    groups = {}
    for path, module in recorder.groups.items():
        inside = [node for node in nodes.values() if node.group == path]
        groups[path] = Group(
            path,
            type(module),
            _count(module) - sum(node.parameters for node in inside),
            flops.get(f"{root}.{path}", 0) - sum(node.flop for node in inside),
        )
    return Trace(root, (model.in_channels, height, width), nodes, groups, _count(model), counter.get_total_flops())


class _Recorder(TorchDispatchMode):
    """Follows tensors from block to block through every operation between them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.nodes: dict[str, Node] = {}
        self.groups = {path: module for path, module in model.named_modules() if isinstance(module, GROUPS)}
        self._running: list[str] = []  # groups, the innermost last
        self._is_in_block = False
        self._origins: dict[int, Origin] = {}
        self._tensors: list[Tensor] = []  # kept, so that no other tensor gets the id of one that is gone
        self._inputs: tuple[Edge, ...] = ()
        for path, module in self.groups.items():
            module.register_forward_pre_hook(lambda module, inputs, path=path: self._running.append(path))
            module.register_forward_hook(lambda module, inputs, output: self._leave_group())
        for path, module in _blocks(model):
            module.register_forward_pre_hook(lambda module, *inputs: self._enter(inputs), with_kwargs=True)
            module.register_forward_hook(lambda module, inputs, output, path=path: self._leave(path, module, output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._is_in_block:
            self._follow(func.name(), (args, kwargs), output)
        return output

    def start(self, image: Tensor) -> None:
        self._add(Node("image", "image", None, 1, 1, _shape(image), ()), image)

    def end(self, logits: Tensor) -> None:
        self._add(Node("logits", "logits", None, 1, 1, _shape(logits), self._edges(logits)), logits)

    def _follow(self, operation: str, inputs: Any, output: Any) -> None:
        edges = self._edges(inputs)
        if not edges:
            return
        sources = list(dict.fromkeys(edge.source for edge in edges))
        if len(sources) == 1:
            via = [step for edge in edges for step in edge.via]
            if operation in VIA:
                via.append(VIA[operation])
            self._mark(output, Origin(sources[0], tuple(dict.fromkeys(via))))
            return
        kind = re.split(r"::|\.", operation)[1]
        group = self._running[-1] if self._running else None
        place = group or sources[-1].partition(".")[0]
        name = f"{place}.{kind}"
        while name in self.nodes:
            name += "+"
        self._add(Node(name, kind, None, 1, 1, _shape(_tensors(output)[0]), edges, group), output)

    def _enter(self, inputs: Any) -> None:
        self._is_in_block, self._inputs = True, self._edges(inputs)

    def _leave(self, path: str, module: nn.Module, output: Any) -> None:
        self._is_in_block = False
        each = module[0] if type(module) is nn.Sequential else module
        dilations = [part.dilation[0] for part in module.modules() if isinstance(part, nn.Conv2d)]
        node = Node(
            path,
            type(each).__name__,
            type(each),
            1 if each is module else len(module),
            max(dilations, default=1),
            _shape(_tensors(output)[0]),
            self._inputs,
            self._running[-1] if self._running else None,
            _count(module),
        )
        self._add(node, output)
        if type(module) in POOLING:
            self._mark(output[1], Origin(path, (MAX_POOL,)))

    def _leave_group(self) -> None:
        self._running.pop()

    def _add(self, node: Node, output: Any) -> None:
        self.nodes[node.name] = node
        self._mark(output, Origin(node.name))

    def _mark(self, output: Any, origin: Origin) -> None:
        for tensor in _tensors(output):
            self._tensors.append(tensor)
            self._origins[id(tensor)] = origin

    def _edges(self, inputs: Any) -> tuple[Edge, ...]:
        known = [tensor for tensor in _tensors(inputs) if id(tensor) in self._origins]
        return tuple(Edge(**vars(self._origins[id(tensor)]), shape=_shape(tensor)) for tensor in known)


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, BLOCKS) or _is_chain_of_equals(child) or _is_leaf(child):
            yield child_path, child
        else:
            yield from _blocks(child, child_path)


def _is_chain_of_equals(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and len({type(part) for part in module}) == 1


def _is_leaf(module: nn.Module) -> bool:
    return not list(module.children()) and bool(list(module.parameters()))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[1:])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fold_repeats(trace: Trace) -> Trace:
    """``trace`` with groups that are equal and follow on each other, as the layers of a transformer, shown once."""
    inside = {path: [node for node in trace.nodes.values() if node.group == path] for path in trace.groups}
    groups: dict[str, Group] = {}
    renamed: dict[str, str] = {}
    for path, group in trace.groups.items():
        last = next(reversed(groups.values()), None)
        if last is not None and _signature(last, inside[last.name]) == _signature(group, inside[path]):
            groups[last.name] = dataclasses.replace(last, repeats=last.repeats + 1)
            renamed |= {node.name: first.name for node, first in zip(inside[path], inside[last.name], strict=True)}
        else:
            groups[path] = group
    nodes = {
        name: dataclasses.replace(node, inputs=tuple(_renamed(edge, renamed) for edge in node.inputs))
        for name, node in trace.nodes.items()
        if name not in renamed
    }
    return dataclasses.replace(trace, nodes=nodes, groups=groups)


def _renamed(edge: Edge, names: dict[str, str]) -> Edge:
    return dataclasses.replace(edge, source=names.get(edge.source, edge.source))


def _signature(group: Group, nodes: list[Node]) -> tuple[Any, ...]:
    return group.module, [(node.kind, node.shape, node.parameters) for node in nodes]
