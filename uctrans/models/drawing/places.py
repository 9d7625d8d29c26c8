"""Rectangles, and how large the box of a node is; all lengths in pixels."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .trace import Node

GAP = 24  # between boxes
ENTRY = 14  # from the line along the top of boxes to the boxes
LABELLED_ENTRY = 26  # the same with words beside the last part
UNDER = 14  # from boxes to the line along their bottom
PADDING = 10  # in a panel
PANEL_TITLE = 22  # of a panel
JOIN = 20
LINE_HEIGHT = 15
# Widths of a character in DejaVu Sans, the widest of the fonts that are common.
BOLD_WIDTH, PLAIN_WIDTH = 7.6, 6.7


@dataclass(frozen=True)
class Place:
    """A rectangle."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """Its right side."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """Its lower side."""
        return self.y + self.height

    @property
    def centre_x(self) -> int:
        """Half way from left to right."""
        return self.x + self.width // 2

    @property
    def centre_y(self) -> int:
        """Half way down."""
        return self.y + self.height // 2

    def moved(self, x: int, y: int) -> "Place":
        """The same further right and down."""
        return dataclasses.replace(self, x=self.x + x, y=self.y + y)


@dataclass(frozen=True)
class Item:
    """A box, or a group with its boxes, that is placed as one.

    Attributes:
        output: name of the node whose map goes on.
        places: of its nodes, seen from its upper left corner.
        width, height: of all.
        leaves: height at which its map goes on to the right.
        entry: height of the line along which maps come in.
        group: name of the group, or ``None``.
    """

    output: str
    places: dict[str, Place]
    width: int
    height: int
    leaves: int
    entry: int
    group: str | None = None


def label_of(node: Node) -> list[str]:
    """The lines in the box of a node: class, what is special about it, shape of its map. A join has none."""
    if node.is_join:
        return []
    if len(node.shape) == 2:
        tokens, channels = node.shape
        shape = f"{channels} × {tokens} tokens"
    else:
        shape = " × ".join(map(str, node.shape))
    special = [f"× {node.repeats}"] if node.repeats > 1 else []
    special += [f"dilation {node.dilation}"] if node.dilation > 1 else []
    return [node.kind, *([", ".join(special)] if special else []), shape]


def width_of(*nodes: Node) -> int:
    """Of the widest; 0 without any."""
    return max(map(_width, nodes), default=0)


def _width(node: Node) -> int:
    if node.is_join:
        return JOIN
    first, *rest = label_of(node)
    return round(max(len(first) * BOLD_WIDTH, *(len(line) * PLAIN_WIDTH for line in rest))) + 16


def height_of(*nodes: Node) -> int:
    """Of the highest; 0 without any."""
    return max((JOIN if node.is_join else LINE_HEIGHT * len(label_of(node)) + 10 for node in nodes), default=0)


def starts_of(widths: Sequence[int], gap: int) -> list[int]:
    """Where things of these widths begin that stand side by side."""
    return [sum(widths[:index]) + index * gap for index in range(len(widths))]


def single_item(node: Node) -> Item:
    """A node by itself."""
    width, height = width_of(node), height_of(node)
    return Item(node.name, {node.name: Place(0, 0, width, height)}, width, height, height // 2, -ENTRY)


def group_item(nodes: Sequence[Node], rows: Iterable[list[Node]]) -> Item:
    """The nodes of a group: boxes in rows; a join of boxes alone below them, one with what came in at their right."""
    rows = list(rows)
    columns = [[node for node in column if node] for column in itertools.zip_longest(*rows)]
    widths = [width_of(*column) for column in columns]
    lefts = [PADDING + start for start in starts_of(widths, GAP)]
    places, first_row = {}, PANEL_TITLE + ENTRY
    top = first_row
    for row in rows:
        for node, left, width in zip(row, lefts, widths, strict=False):
            places[node.name] = Place(left, top, width, height_of(*row))
        top += height_of(*row) + GAP
    right, bottom = lefts[-1] + widths[-1], top - GAP
    if any(len({edge.shape for edge in node.inputs}) > len({edge.source for edge in node.inputs}) for node in nodes):
        bottom += UNDER  # two maps of one box are read by another one: one of the lines turns below both
    boxes = set(places)
    for join in (node for node in nodes if node.is_join):
        if {edge.source for edge in join.inputs} <= boxes:
            places[join.name] = Place((right + PADDING - JOIN) // 2, bottom + UNDER, JOIN, JOIN)
            bottom += UNDER + JOIN
        else:
            middle = first_row + height_of(*rows[0]) // 2
            places[join.name] = Place(right + GAP, middle - JOIN // 2, JOIN, JOIN)
            right += GAP + JOIN
    output, height = nodes[-1], bottom + PADDING
    is_in_first_row = places[output.name].y < first_row + height_of(*rows[0])
    leaves = places[output.name].centre_y if is_in_first_row else height + ENTRY
    return Item(output.name, places, right + PADDING, height, leaves, PANEL_TITLE, output.group)
