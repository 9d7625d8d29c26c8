"""Where the blocks of a traced network go.

The encoder goes down on the left, the decoder up on the right, and a block is on the level of its map's size. Across a
level, from the last block of the encoder to the first of the decoder, runs its lane. A channel transformer has its
embeddings and reconstructions below the lanes, and its layers below the last of these.
"""

import itertools
import math
from dataclasses import dataclass, field

from .places import (
    GAP,
    JOIN,
    LABELLED_ENTRY,
    PADDING,
    PANEL_TITLE,
    UNDER,
    Item,
    Place,
    group_item,
    height_of,
    single_item,
    starts_of,
    width_of,
)
from .trace import Node, Trace

# The first word of a node's name, and the part of the picture it is in.
PARTS = {
    "image": "encoder",
    "encoder": "encoder",
    "transformer": "transformer",
    "decoder": "decoder",
    "head": "decoder",
    "logits": "decoder",
}
MARGIN = 16
TITLE = 40
LEVEL_GAP = 42  # between levels of the encoder, where lines are labelled
LEAD = 34  # from the transformer's columns to what is beside them
BUS = 16  # from a column of the transformer to its bus, the line all its tokens take
SHORT_LANE = 260  # of a network without a transformer


@dataclass
class Layout:
    """A traced network, sorted and placed.

    Attributes:
        encoder: items of each level, from top to bottom.
        decoder: nodes of each level, from bottom to top.
        embeddings, reconstructions: what reads encoder maps and what makes maps for the decoder, by level.
        bundle: the join of all embeddings, where there are several.
        chain: the layers' nodes, from left to right.
        closing: what follows the layers and comes before the reconstructions, from bottom to top.
        places, panels: of nodes and of groups.
        lanes: their heights, by level.
        trunk, bus, returning_bus: vertical lines through the encoder, from the embeddings, to the reconstructions.
    """

    trace: Trace
    encoder: dict[int, list[Item]] = field(default_factory=dict)
    decoder: dict[int, list[Node]] = field(default_factory=dict)
    embeddings: dict[int, Node] = field(default_factory=dict)
    reconstructions: dict[int, Node] = field(default_factory=dict)
    bundle: Node | None = None
    chain: list[Node] = field(default_factory=list)
    closing: list[Node] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    panels: dict[str, Place] = field(default_factory=dict)
    lanes: dict[int, int] = field(default_factory=dict)
    trunk: int = 0
    bus: int = 0
    returning_bus: int = 0
    width: int = 0
    height: int = 0

    def part_of(self, node: Node) -> str:
        """encoder, transformer or decoder.

        Raises:
            ValueError: it is in none of them.
        """
        word = node.name.partition(".")[0]
        if word not in PARTS:
            raise ValueError(
                f"{self.trace.title} has {node.name!r}, and only blocks of {', '.join(PARTS)} have a place: name its "
                f"module so, or give it a place in {__name__}.PARTS"
            )
        return PARTS[word]

    def level_of(self, node: Node) -> int:
        """How many times its map is smaller than the largest one, as a power of two."""
        finest = max(other.shape[-2] for other in self.trace.nodes.values() if len(other.shape) == 3)
        return round(math.log2(finest / node.shape[-2]))

    def item_of(self, node: Node) -> Item:
        """The item of the encoder that it is in."""
        return next(item for items in self.encoder.values() for item in items if node.name in item.places)


def arrange(trace: Trace) -> Layout:
    """Place everything.

    Raises:
        ValueError: a block is in no part that has a place.
    """
    layout = Layout(trace)
    _sort(layout)
    _place_columns(layout)
    bottom = _place_levels(layout)
    layout.height = bottom + MARGIN
    return layout


def _sort(layout: Layout) -> None:
    parts: dict[str, list[Node]] = {"encoder": [], "transformer": [], "decoder": []}
    for node in layout.trace.nodes.values():
        parts[layout.part_of(node)].append(node)
    for group, members in itertools.groupby(parts["encoder"], key=lambda node: node.group):
        nodes = list(members)
        items = [group_item(nodes, _rows(layout, nodes))] if group else map(single_item, nodes)
        for item in items:
            layout.encoder.setdefault(layout.level_of(layout.trace.nodes[item.output]), []).append(item)
    for node in parts["decoder"]:
        layout.decoder.setdefault(layout.level_of(node), []).append(node)
    read_by_decoder = {edge.source for node in parts["decoder"] for edge in node.inputs}
    between = []
    for node in parts["transformer"]:
        source = layout.trace.nodes[node.inputs[0].source]
        if layout.part_of(source) == "encoder":
            layout.embeddings[layout.level_of(source)] = node
        elif node.name in read_by_decoder:
            layout.reconstructions[layout.level_of(node)] = node
        else:
            between.append(node)
    if between and between[0].is_join:
        layout.bundle, *between = between
    layout.chain = [node for node in between if node.group]
    layout.closing = [node for node in between if not node.group]


def _rows(layout: Layout, nodes: list[Node]) -> list[list[Node]]:
    """The boxes of a group: a row for each level, in the order in which they ran."""
    boxes = sorted((node for node in nodes if not node.is_join), key=layout.level_of)
    return [list(row) for _, row in itertools.groupby(boxes, key=layout.level_of)]


def _place_columns(layout: Layout) -> None:
    """Find all x; the middle is as wide as the transformer's columns and, below them, its layers need."""
    encoder_width = max(item.width for items in layout.encoder.values() for item in items)
    decoder_width = _decoder_width(layout)
    layout.trunk = MARGIN + encoder_width // 2
    middle = SHORT_LANE
    embeddings, reconstructions = width_of(*layout.embeddings.values()), width_of(*layout.reconstructions.values())
    if layout.chain:
        columns = embeddings + reconstructions + 2 * (LEAD + BUS) + width_of(*layout.closing)
        beside = encoder_width - encoder_width // 2 + decoder_width // 2
        middle = max(columns, _chain_width(layout) + 2 * GAP - beside)
    left = MARGIN + encoder_width
    layout.bus = left + LEAD + embeddings + BUS
    layout.returning_bus = left + middle - LEAD - reconstructions - BUS
    layout.width = left + middle + decoder_width + MARGIN


def _decoder_width(layout: Layout) -> int:
    return max(width_of(*nodes) for nodes in layout.decoder.values())


def _chain_width(layout: Layout) -> int:
    return sum(map(width_of, layout.chain)) + (len(layout.chain) - 1) * GAP + 2 * PADDING


def _place_levels(layout: Layout) -> int:
    """Find all y, level by level, so that no column runs into itself; returns the lowest."""
    bottoms = {"encoder": TITLE, "middle": TITLE, "decoder": TITLE}
    for level in range(max(layout.encoder) + 1):
        is_first = level == 0
        above = {"encoder": _encoder_above(layout, level), "middle": 0, "decoder": _decoder_above(layout, level)}
        gaps = {"encoder": 0 if is_first else LEVEL_GAP, "middle": GAP, "decoder": 0 if is_first else GAP}
        lane = max(bottoms[column] + gaps[column] + above[column] for column in bottoms)
        layout.lanes[level] = lane
        bottoms["encoder"] = _place_encoder(layout, level, lane - above["encoder"])
        bottoms["middle"] = _place_ends(layout, level, lane + GAP)
        bottoms["decoder"] = _place_decoder(layout, level, lane)
        if layout.chain and level == max(layout.embeddings):
            bottoms = dict.fromkeys(bottoms, _place_chain(layout, max(bottoms.values()) + GAP))
    return max(*bottoms.values(), lane)


def _encoder_above(layout: Layout, level: int) -> int:
    *before, last = layout.encoder[level]
    return sum(item.height + GAP for item in before) + last.leaves


def _place_encoder(layout: Layout, level: int, top: int) -> int:
    for item in layout.encoder[level]:
        left = layout.trunk - item.width // 2
        layout.places |= {name: place.moved(left, top) for name, place in item.places.items()}
        if item.group:
            layout.panels[item.group] = Place(left, top, item.width, item.height)
        top += item.height + GAP
    return top - GAP


def _place_ends(layout: Layout, level: int, top: int) -> int:
    bottom = top - GAP
    if level in layout.embeddings:
        node, width = layout.embeddings[level], width_of(*layout.embeddings.values())
        layout.places[node.name] = Place(layout.bus - BUS - width, top, width, height_of(node))
        bottom = layout.places[node.name].bottom
    if level in layout.reconstructions:
        node, width = layout.reconstructions[level], width_of(*layout.reconstructions.values())
        layout.places[node.name] = Place(layout.returning_bus + BUS, top, width, height_of(node))
        bottom = layout.places[node.name].bottom
    return bottom


def _decoder_above(layout: Layout, level: int) -> int:
    nodes = layout.decoder.get(level, [])
    return _port(layout, level) + sum(height_of(node) + GAP for node in nodes[1:])


def _port(layout: Layout, level: int) -> int:
    """From the top of the level's first decoder block to the lane; tokens come in below the lane."""
    height = height_of(*layout.decoder.get(level, [])[:1])
    return height // 3 if level in layout.reconstructions else height // 2


def _place_decoder(layout: Layout, level: int, lane: int) -> int:
    width = _decoder_width(layout)
    bottom = lowest = lane - _port(layout, level) + height_of(*layout.decoder.get(level, [])[:1])
    for node in layout.decoder.get(level, []):
        height = height_of(node)
        layout.places[node.name] = Place(layout.width - MARGIN - width, bottom - height, width, height)
        bottom -= height + GAP
    return lowest


def _place_chain(layout: Layout, top: int) -> int:
    """What joins the embeddings and what follows the layers on their buses, the layers below them."""
    bottom = top + max(JOIN, sum(height_of(node) + GAP for node in layout.closing) - GAP)
    if layout.bundle:
        layout.places[layout.bundle.name] = Place(layout.bus - JOIN // 2, bottom - JOIN, JOIN, JOIN)
    rising = bottom
    for node in layout.closing:
        width, height = width_of(node), height_of(node)
        layout.places[node.name] = Place(layout.returning_bus - width // 2, rising - height, width, height)
        rising -= height + GAP
    top, row = bottom + GAP, bottom + GAP + PANEL_TITLE + LABELLED_ENTRY
    height = height_of(*layout.chain)
    # In the middle, as far as the lines to the deepest level and from it leave room.
    chain_width, decoder_width = _chain_width(layout), _decoder_width(layout)
    centred = (layout.bus + layout.returning_bus - chain_width) // 2
    most = layout.width - MARGIN - decoder_width // 2 - GAP - chain_width
    left = PADDING + max(layout.trunk + GAP, min(centred, most))
    starts = starts_of(list(map(width_of, layout.chain)), GAP)
    for node, start in zip(layout.chain, starts, strict=True):
        own = height_of(node)
        layout.places[node.name] = Place(left + start, row + (height - own) // 2, width_of(node), own)
    bottom = row + height + UNDER + PADDING
    for group, members in itertools.groupby(layout.chain, key=lambda node: node.group):
        places = [layout.places[node.name] for node in members]
        x = places[0].x - PADDING
        layout.panels[group] = Place(x, top, places[-1].right + PADDING - x, bottom - top)
    return bottom
