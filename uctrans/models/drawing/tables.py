"""Tables of the blocks of traced networks, and the page that holds them."""

import re
from collections.abc import Iterable

from torch import nn

from .trace import Group, Node, Trace

COLUMNS = ("block", "class", "computes", "from", "parameters", "GFLOP")
UNET, STUDY, CCT, CCA = "U-Net", "[modified network](design.md#models)", "[CCT](#cct)", "[CCA](#cca)"
# What each class computes, in the letters of docs/models.md, and where that is from.
EQUATIONS = {
    "ConvNormAct": (r"c(x) = \mathrm{relu}(\mathrm{BN}(W * x + b))", UNET),
    "DilatedConvNormAct": (r"c_\delta(x) = \mathrm{relu}(\mathrm{BN}(W *_\delta x + b))", STUDY),
    "DoubleConv": (r"c(c(x))", UNET),
    "ConvNormActPool": (r"c(x) = \mathrm{relu}(\mathrm{BN}(W * x + b)), \quad \mathrm{pool}(c(x))", UNET),
    "DownStage": (r"e_i = c(c(x)), \quad \mathrm{pool}(e_i)", UNET),
    "DeepestStage": (r"c(c(x))", UNET),
    "SkipStage": (r"c(c([e_i, \mathrm{up}(d)]))", UNET),
    "Conv2d": (r"W x + b", UNET),
    "PatchEmbedding": (r"T_i = \mathrm{patches}(e_i)\, W_i + b_i + P_i", f"{CCT}, patch embedding"),
    "TransformerLayer": (
        r"T'_i = T_i + A_i W_{O_i}",
        f"{CCT}, residual of the attention; the weights are those of the norms before the attention",
    ),
    "ChannelAttention": (
        r"A_i^\top = \frac{1}{H} \sum_h \mathrm{softmax}\left(\psi\left(Q_{ih}^\top K_h / \sqrt{C_\Sigma}\right)\right)"
        r" V_h^\top",
        f"{CCT}, attention, equations 1 to 3",
    ),
    "PackedMlp": (
        r"T'_i + F_i(\overline{T'_i}), \quad F_i(x) = \mathrm{GELU}(x W_{1i} + b_{1i})\, W_{2i} + b_{2i}",
        f"{CCT}, MLP and its residual",
    ),
    "PackedLayerNorm": (r"\overline{T_i}", f"{CCT}, norms"),
    "Reconstruct": (r"r_i = \mathrm{relu}(\mathrm{BN}(W_i\, \mathrm{up}(T_i) + b_i))", f"{CCT}, reconstruction"),
    "ChannelGate": (
        r"[\mathrm{relu}(x_i \odot s_i), \mathrm{up}(d)], \quad x_i = e_i + r_i, \quad"
        r" s_i = \sigma\left(\tfrac12 (L_x g(x_i) + L_d g(d))\right)",
        CCA,
    ),
    "DualBranchDown": (r"[c(c(p)), c_\delta(c_\delta(p))], \quad p = \mathrm{pool}(x)", STUDY),
    "NestedU": (r"x + U(x)", "U²-Net, residual U-block"),
    "U2DownBlock": (r"s = c(c(x)), \quad \mathrm{pool}(s)", STUDY),
    "U2UpBlock": (r"c(c([s, \mathrm{up}_W(x)]))", STUDY),
}


def table(trace: Trace) -> str:
    """The blocks of ``trace`` as a Markdown table: a row for those that differ only by their numbers, and the sum.

    Raises:
        ValueError: a class has no equation.
    """
    rows: dict[tuple[str, type[nn.Module]], list[Node | Group]] = {}
    for node in trace.nodes.values():
        if node.group:
            group = trace.groups[node.group]
            members = rows.setdefault((_pattern(group.name), group.module), [])
            if group not in members:
                members.append(group)
        if node.module:
            rows.setdefault((_pattern(node.name), node.module), []).append(node)
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_row(trace, pattern, module, members) for (pattern, module), members in rows.items()]
    total = f"**{trace.flop / 1e9:.2f}**"
    return "\n".join([*lines, _line(["**all**", "", "", "", f"**{trace.parameters:,}**", total])])


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _row(trace: Trace, pattern: str, module: type[nn.Module], members: list[Node | Group]) -> str:
    parameters, flop = (sum(getattr(member, count) for member in members) for count in ("parameters", "flop"))
    times = f" × {len(members)}" if len(members) > 1 else ""
    repeats = f"{members[0].repeats} × " if members[0].repeats > 1 else ""
    equation, source = _equation(module)
    share = flop / trace.flop
    gflop = f"{flop / 1e9:.2f} ({f'{share:.0%}' if share >= 0.005 else '< 1%'})" if flop else ""
    count = f"{parameters:,}" if parameters else ""
    return _line([f"`{pattern}`{times}", f"{repeats}{_link(module)}", f"$`{equation}`$", source, count, gflop])


def _equation(module: type[nn.Module]) -> tuple[str, str]:
    if module.__name__ not in EQUATIONS:
        raise ValueError(f"{module.__name__} has no equation: add what it computes to EQUATIONS in {__name__}")
    return EQUATIONS[module.__name__]


def _link(module: type[nn.Module]) -> str:
    """To its file from docs/, where it is one of this package."""
    if module.__module__.partition(".")[0] != __package__.partition(".")[0]:
        return f"`{module.__name__}`"
    return f"[{module.__name__}](../{module.__module__.replace('.', '/')}.py)"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_tables(page: str, traces: dict[str, Trace]) -> str:
    """``page`` with the table of each model between ``<!-- blocks:NAME -->`` and ``<!-- /blocks:NAME -->``.

    Raises:
        ValueError: a model has no such place in the page, or more than one.
    """
    for name, trace in traces.items():
        start, end = f"<!-- blocks:{name} -->\n", f"<!-- /blocks:{name} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has no one place for the table of {name}: give it {start.strip()} and {end}")
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{table(trace)}\n\n{end}{rest.partition(end)[2]}"
    return page
