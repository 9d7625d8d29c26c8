"""The lines between the blocks of a layout, along its lanes, trunk and buses."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .layout import BUS, Layout
from .places import ENTRY, LABELLED_ENTRY, PANEL_TITLE, UNDER, Place
from .trace import Node

Point = tuple[int, int]


@dataclass(frozen=True)
class Wire:
    """The line from one node to another; ``is_bus`` where it crosses lanes."""

    source: str
    target: str
    points: tuple[Point, ...]
    label: str
    is_bus: bool


def wires_of(layout: Layout) -> list[Wire]:
    """One for each map that a node reads, those that would lie upon each other once."""
    wires: dict[tuple[Point, ...], Wire] = {}
    for node in layout.trace.nodes.values():
        for source, edges in itertools.groupby(node.inputs, key=lambda edge: edge.source):
            for number, edge in enumerate({edge.shape: edge for edge in edges}.values()):
                points = _simplified(_route(layout, layout.trace.nodes[source], node, is_second=number > 0))
                is_bus = node is layout.bundle or node.name in _names(layout.reconstructions)
                wires[points] = Wire(source, node.name, points, ", ".join(edge.via), is_bus)
    return list(wires.values())


def _names(nodes: dict[int, Node]) -> set[str]:
    return {node.name for node in nodes.values()}


def _route(layout: Layout, source: Node, node: Node, is_second: bool) -> list[Point]:
    start, end = layout.places[source.name], layout.places[node.name]
    parts = layout.part_of(source), layout.part_of(node)
    if parts == ("encoder", "encoder"):
        if source.group and source.group == node.group:
            return _within_group(node, start, end, is_second)
        return _down(layout, source, node, start, end)
    if parts == ("encoder", "decoder"):
        leave = _leave(layout, source, start)
        if layout.level_of(source) == layout.level_of(node):
            return [*leave, (end.x, leave[-1][1])]
        return [*leave, (end.centre_x, leave[-1][1]), (end.centre_x, end.bottom)]
    if parts == ("encoder", "transformer"):
        leave = _leave(layout, source, start)
        return [*leave, (end.centre_x, leave[-1][1]), (end.centre_x, end.y)]
    if parts == ("transformer", "transformer"):
        return _within_transformer(layout, source, node, start, end)
    if parts == ("transformer", "decoder"):
        port = end.y + end.height * 2 // 3
        return [(start.right, start.centre_y), (end.x - BUS, start.centre_y), (end.x - BUS, port), (end.x, port)]
    return [(start.centre_x, start.y), (start.centre_x, end.bottom)]


def _within_group(node: Node, start: Place, end: Place, is_second: bool) -> list[Point]:
    are_side_by_side = start.y < end.bottom and end.y < start.bottom
    if is_second:
        return _under(start, end, start.bottom + UNDER)
    if are_side_by_side:
        return [(start.right, end.centre_y), (end.x, end.centre_y)]
    if node.is_join:
        side = end.x if start.centre_x < end.centre_x else end.right
        return [(start.centre_x, start.bottom), (start.centre_x, end.centre_y), (side, end.centre_y)]
    if start.y > end.y:
        return [(start.centre_x, start.y), (start.centre_x, end.bottom)]
    return [(start.centre_x, start.bottom), (start.centre_x, end.y)]


def _under(start: Place, end: Place, depth: int) -> list[Point]:
    return [(start.centre_x, start.bottom), (start.centre_x, depth), (end.centre_x, depth), (end.centre_x, end.bottom)]


def _down(layout: Layout, source: Node, node: Node, start: Place, end: Place) -> list[Point]:
    """From item to item of the encoder, between levels along the trunk."""
    above, below = layout.item_of(source), layout.item_of(node)
    bottom = start.y - above.places[source.name].y + above.height + ENTRY
    entry = end.y - below.places[node.name].y + below.entry
    points = [(start.centre_x, start.bottom)]
    if layout.level_of(source) != layout.level_of(node):
        points += [(start.centre_x, bottom), (layout.trunk, bottom), (layout.trunk, entry)]
    return [*points, (points[-1][0], entry), (end.centre_x, entry), (end.centre_x, end.y)]


def _leave(layout: Layout, source: Node, start: Place) -> list[Point]:
    """From the encoder onto the lane."""
    lane = layout.lanes[layout.level_of(source)]
    if start.y <= lane <= start.bottom:
        return [(start.right, lane)]
    return [(start.centre_x, start.bottom), (start.centre_x, lane)]


def _within_transformer(layout: Layout, source: Node, node: Node, start: Place, end: Place) -> list[Point]:
    row = [layout.places[other.name] for other in layout.chain]
    if node is layout.bundle:
        return [(start.right, start.centre_y), (layout.bus, start.centre_y), (layout.bus, end.y)]
    if node.name in _names(layout.reconstructions):
        bus = layout.returning_bus
        return [(start.centre_x, start.y), (bus, start.y), (bus, end.centre_y), (end.x, end.centre_y)]
    if node in layout.closing:
        turn = (start.y + end.bottom) // 2 if source in layout.closing else layout.panels[source.group].y - ENTRY // 2
        return [(start.centre_x, start.y), (start.centre_x, turn), (end.centre_x, turn), (end.centre_x, end.bottom)]
    if source not in layout.chain:
        entry = min(place.y for place in row) - LABELLED_ENTRY
        down = [(start.centre_x, start.bottom)]
        if source is not layout.bundle:
            down = [(start.right, start.centre_y), (layout.bus, start.centre_y)]
        return [*down, (layout.bus, entry), (end.centre_x, entry), (end.centre_x, end.y)]
    if layout.chain.index(node) == layout.chain.index(source) + 1:
        return [(start.right, end.centre_y), (end.x, end.centre_y)]
    return _under(start, end, max(place.bottom for place in row) + UNDER)


def branchings(wires: list[Wire]) -> set[Point]:
    """Where a line turns off another one from the same block."""
    found = set()
    for wire, other in itertools.permutations(wires, 2):
        if wire.source != other.source:
            continue
        for (turn, after), (start, end) in itertools.product(_turns(wire), itertools.pairwise(other.points)):
            is_on_other = turn != end and _length(start, turn) + _length(turn, end) == _length(start, end)
            if is_on_other and _direction(turn, after) != _direction(turn, end):
                found.add(turn)
    return found


def _turns(wire: Wire) -> Iterator[tuple[Point, Point]]:
    return itertools.pairwise(wire.points[1:])


def _length(start: Point, end: Point) -> int:
    return abs(start[0] - end[0]) + abs(start[1] - end[1])


def _direction(start: Point, end: Point) -> tuple[int, int]:
    return tuple((there > here) - (there < here) for here, there in zip(start, end, strict=True))


def label_point(wire: Wire) -> Point:
    """Right of the last part that goes down far enough: where it ends above a panel, or where it begins."""
    parts = [(start, end) for start, end in itertools.pairwise(wire.points) if end[1] - start[1] > ENTRY]
    (x, y), (_, end_y) = parts[-1]
    return x + 6, y + ENTRY if end_y - y <= LABELLED_ENTRY else end_y - PANEL_TITLE - 6


def _simplified(points: list[Point]) -> tuple[Point, ...]:
    """Without points that repeat or lie on the line between their neighbours."""
    kept: list[Point] = []
    for point in points:
        if kept and kept[-1] == point:
            continue
        if len(kept) > 1 and _direction(kept[-2], kept[-1]) == _direction(kept[-1], point):
            kept.pop()
        kept.append(point)
    return tuple(kept)
