"""A traced network as an SVG picture."""

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from .layout import MARGIN, Layout, arrange
from .places import LINE_HEIGHT, PLAIN_WIDTH, Place, label_of
from .routes import Wire, branchings, label_point, wires_of
from .trace import Node, Trace, fold_repeats

INK, QUIET, PAPER = "#1f2933", "#52606d", "#ffffff"
# What a colour means, the colours, and the classes that have them.
ROLES = (
    (
        "convolutions",
        "#dbeafe",
        "#3b6fb6",
        ("ConvNormAct", "ConvNormActPool", "DoubleConv", "DownStage", "DeepestStage", "SkipStage", "Conv2d"),
    ),
    ("dilated convolutions", "#ccefe9", "#1f8a7d", ("DilatedConvNormAct",)),
    ("halves of a small U", "#e3f2d3", "#5c8f2f", ("U2DownBlock", "U2UpBlock")),
    ("maps to tokens, tokens to maps", "#fdf0c4", "#b08a1e", ("PatchEmbedding", "Reconstruct")),
    ("channel transformer", "#e7defa", "#7350b5", ("ChannelAttention", "PackedMlp", "PackedLayerNorm")),
    ("channel gate", "#fddfcb", "#c0622a", ("ChannelGate",)),
)
OTHER = ("other blocks", "#eceff1", "#607d8b")
ENDS = ("image", "logits")
SYMBOLS = {"add": "+", "cat": "C"}
MEANINGS = {"add": "sum", "cat": "concatenation"}
PANEL_FILL, PANEL_LINE = "#f6f8fa", "#c3ccd5"
LEGEND_ROW = 24


def draw(trace: Trace) -> str:
    """The picture of ``trace``, as the text of an SVG file: opaque, so that it can be read on any background."""
    trace = fold_repeats(trace)
    layout = arrange(trace)
    legend, legend_height = _legend(trace, layout)
    height = layout.height + legend_height
    _, rows, columns = trace.image
    counts = (
        f"{trace.parameters / 1e6:.2f} M parameters, {trace.flop / 1e9:.1f} GFLOP for an image of {rows} × {columns}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{layout.width}" height="{height}" '
        f'viewBox="0 0 {layout.width} {height}" role="img" '
        'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="11">',
        f"<title>{escape(trace.title)}: {counts}</title>",
        f'<rect width="{layout.width}" height="{height}" rx="6" fill="{PAPER}"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 10}" fill="{INK}"><tspan font-size="15" font-weight="bold">'
        f'{escape(trace.title)}</tspan><tspan dx="10" fill="{QUIET}">{counts}</tspan></text>',
        *_panels(trace, layout),
        *_lines(wires_of(layout)),
        *(line for name, place in layout.places.items() for line in _node(trace.nodes[name], place)),
        *legend,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _panels(trace: Trace, layout: Layout) -> Iterator[str]:
    for name, place in layout.panels.items():
        group = trace.groups[name]
        repeats = f" × {group.repeats}" if group.repeats > 1 else ""
        yield (
            f'<g class="group" id={quoteattr(name)}>{_rectangle(place, PANEL_FILL, PANEL_LINE)}'
            f"{_text(place.x + 8, place.y + 14, f'{group.module.__name__}{repeats}', QUIET, 'start', bold=True)}</g>"
        )


def _node(node: Node, place: Place) -> Iterator[str]:
    kind = "join" if node.kind in SYMBOLS else "end" if node.kind in ENDS else "block"
    yield f'<g class="{kind}" id={quoteattr(node.name)}><title>{escape(_description(node))}</title>'
    if kind == "join":
        yield from _symbol(node.kind, place.centre_x, place.centre_y)
    else:
        _, fill, stroke = (None, PAPER, PANEL_LINE) if kind == "end" else _role(node.kind)
        yield _rectangle(place, fill, stroke)
        lines = label_of(node)
        top = place.centre_y - LINE_HEIGHT * len(lines) // 2
        for number, line in enumerate(lines):
            y = top + LINE_HEIGHT * number + 11
            yield _text(place.centre_x, y, line, QUIET if number else INK, "middle", bold=number == 0)
    yield "</g>"


def _description(node: Node) -> str:
    shapes = [" × ".join(map(str, shape)) for shape in [*(edge.shape for edge in node.inputs), node.shape]]
    words = f"{node.name}: {', '.join(shapes[:-1])} → {shapes[-1]}" if node.inputs else f"{node.name}: {shapes[-1]}"
    return f"{words}; {node.parameters:,} parameters; {node.flop / 1e9:.2f} GFLOP" if node.module else words


def _lines(wires: list[Wire]) -> Iterator[str]:
    """Lanes first, then what crosses them, on a rim that shows that they do not meet.

    Lines that share a part are one path, as a part that is drawn twice looks thicker.
    """
    buses = _path([wire for wire in wires if wire.is_bus])
    yield _stroke(_path([wire for wire in wires if not wire.is_bus]), QUIET, 1.3)
    yield _stroke(buses, PAPER, 6)
    yield _stroke(buses, QUIET, 1.3)
    for wire in wires:
        yield _arrow(wire)
    for x, y in sorted(branchings(wires)):
        yield f'<circle cx="{x}" cy="{y}" r="2.6" fill="{QUIET}"/>'
    labels = {(label_point(wire), wire.label) for wire in wires if wire.label}
    yield from (_text(x, y, words, QUIET) for (x, y), words in sorted(labels))


def _path(wires: list[Wire]) -> str:
    return " ".join(f"{'L' if number else 'M'}{x} {y}" for wire in wires for number, (x, y) in enumerate(wire.points))


def _stroke(path: str, colour: str, width: float) -> str:
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _arrow(wire: Wire) -> str:
    """The head of the arrow; it says which nodes the line connects."""
    (before_x, before_y), (x, y) = wire.points[-2:]
    ahead_x, ahead_y = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
    back_x, back_y = x - 8 * ahead_x, y - 8 * ahead_y
    side_x, side_y = 4 * ahead_y, 4 * ahead_x
    triangle = f"M{x} {y} L{back_x + side_x} {back_y + side_y} L{back_x - side_x} {back_y - side_y} Z"
    ends = f"data-from={quoteattr(wire.source)} data-to={quoteattr(wire.target)}"
    return f'<path class="arrow" {ends} d="{triangle}" fill="{QUIET}"/>'


def _role(kind: str) -> tuple[str, str, str]:
    return next(((words, fill, stroke) for words, fill, stroke, kinds in ROLES if kind in kinds), OTHER)


def _legend(trace: Trace, layout: Layout) -> tuple[list[str], int]:
    kinds = [node.kind for node in trace.nodes.values()]
    roles = list(dict.fromkeys(_role(node.kind) for node in trace.nodes.values() if node.module))
    x, y, lines = MARGIN, layout.height + LEGEND_ROW // 2, []

    def advance(words: str) -> tuple[int, int]:
        nonlocal x, y
        width = 34 + round(PLAIN_WIDTH * len(words))
        if x + width > layout.width - MARGIN:
            x, y = MARGIN, y + LEGEND_ROW
        place, x = (x, y), x + width
        return place

    for words, fill, stroke in roles:
        left, top = advance(words)
        lines += [_rectangle(Place(left, top - 6, 14, 12), fill, stroke, 2), _text(left + 20, top + 4, words, QUIET)]
    for kind in (kind for kind in SYMBOLS if kind in kinds):
        left, top = advance(MEANINGS[kind])
        lines += [*_symbol(kind, left + 7, top), _text(left + 20, top + 4, MEANINGS[kind], QUIET)]
    words = "in a block: its class, and the channels × height × width of its output"
    left, top = advance(words)
    lines.append(_text(left, top + 4, words, QUIET))
    return lines, top + LEGEND_ROW - layout.height


def _rectangle(place: Place, fill: str, stroke: str, radius: int = 4) -> str:
    return (
        f'<rect x="{place.x}" y="{place.y}" width="{place.width}" height="{place.height}" rx="{radius}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def _symbol(kind: str, x: int, y: int) -> list[str]:
    return [
        f'<circle cx="{x}" cy="{y}" r="9" fill="{PAPER}" stroke="{QUIET}"/>',
        _text(x, y + 4, SYMBOLS[kind], INK, "middle", bold=True),
    ]


def _text(x: int, y: int, words: str, colour: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
