"""What every kernel uses on every GPU it is compiled for: ``python -m uctrans.kernels.resources`` prints the page.

The page is kept in the repository (``make resources`` writes it), so that a change of code or of compiler shows as a
change of registers, spills, shared memory or matrix instructions. No GPU is needed.
"""

import argparse
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compilation import CompiledKernel, compiling_for

PUBLISHED_WIDTHS = (64, 128, 256, 512)
ODD_WIDTHS = (17, 33, 65)
HEADS = 4
BATCH = 32
EPS = 1e-5
MOMENTUM = 0.1


class Section(NamedTuple):
    """Kernels for one GPU and dtype; products of float32 in tf32 or not."""

    family: str
    architecture: int | str
    dtype: torch.dtype
    is_tf32: bool = False
    is_odd: bool = False  # widths, strides and offsets that are no multiples of 16
    is_brief: bool = False  # the largest shapes only

    @property
    def is_thorough(self) -> bool:
        """Whether to compile for every shape; elsewhere a few stand for all, to take half a minute and not several."""
        return self == THOROUGH_SECTION

    @property
    def name(self) -> str:
        """Such as ``sm_90-float32-tf32``."""
        words = [f"sm_{self.architecture}" if self.family == "cuda" else str(self.architecture)]
        words += [str(self.dtype).removeprefix("torch."), "tf32" * self.is_tf32, "odd" * self.is_odd]
        return "-".join(filter(None, words))


THOROUGH_SECTION = Section("cuda", 90, torch.bfloat16)
SECTIONS = (
    THOROUGH_SECTION,
    Section("cuda", 80, torch.bfloat16),
    Section("cuda", 90, torch.bfloat16, is_odd=True),
    Section("cuda", 90, torch.float16),
    Section("cuda", 90, torch.float32),
    Section("cuda", 90, torch.float32, is_tf32=True),
    Section("cuda", 100, torch.bfloat16),
    Section("hip", "gfx942", torch.bfloat16),
    Section("cuda", 86, torch.bfloat16, is_brief=True),
    *(
        Section(family, architecture, dtype, is_brief=True)
        for family, architecture in (("cuda", 80), ("cuda", 100), ("hip", "gfx942"))
        for dtype in (torch.float16, torch.float32)
    ),
)
COLUMNS = ("kernel", "compile-time arguments", "specialised", "warps", "stages", "registers", "stack", "shared")
COLUMNS += ("products", "matrix instructions")

Launches = Iterator[tuple[str, Callable[[], object]]]


def launches_of(section: Section) -> Launches:
    """What is launched, in words, and a function that launches it; to be called where launches only compile."""
    for operator in OPERATORS:
        yield from operator(section)


def _channel_attention(section: Section) -> Launches:
    from .channel_attention.operator import LONGEST_FUSED, LONGEST_FUSED_FORWARD, longest_fused_forward
    from .channel_attention.triton import backward, forward

    def launch(batch: int, tokens: int, dropout_p: float, widths: tuple[int, ...]) -> None:
        # As the projections write them: heads within tokens.
        def heads_of(channels: int) -> Tensor:
            return _empty(section, batch, tokens, HEADS, channels).transpose(1, 2)

        query, key, value = (heads_of(sum(widths)) for _ in range(3))
        if tokens > longest_fused_forward(query, key, value):
            return
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        output, *saved = forward(query, key, value, widths, dropout_p, EPS, seed)
        if tokens > LONGEST_FUSED:
            return
        backward(_empty(section, *output.shape), query, key, value, *saved, widths, dropout_p)

    widths = _widths(section)
    cases = [(32, 196, 0.1), (1, 225, 0.0), (32, LONGEST_FUSED_FORWARD, 0.1)]
    if section.is_brief:
        cases = [(32, LONGEST_FUSED, 0.1), (32, LONGEST_FUSED_FORWARD, 0.1)]
    elif section.is_thorough:
        cases = itertools.product((1, 32), _token_counts(section.dtype), (0.0, 0.1))
    for batch, tokens, dropout_p in cases:
        words = f"channel attention of {batch} x {tokens} tokens, {widths}, dropout {dropout_p}"
        yield words, functools.partial(launch, batch, tokens, dropout_p, widths)


def _token_counts(dtype: torch.dtype) -> list[int]:
    """The least for each way to cut tokens into tiles."""
    from .channel_attention.operator import LONGEST_FUSED_FORWARD
    from .channel_attention.triton_blocks import Problem, token_tiles

    channels = sum(PUBLISHED_WIDTHS)
    falling = range(LONGEST_FUSED_FORWARD, 0, -1)
    return sorted({token_tiles(Problem(HEADS, tokens, channels, dtype, True)): tokens for tokens in falling}.values())


def _packed_linear(section: Section) -> Launches:
    from .packed_linear.triton import packed_linear, token_gradient, weight_gradient

    def launch(batch: int, in_widths: Sequence[int], out_widths: Sequence[int], heads: int, has_biases: bool) -> None:
        lead = (heads,) if heads else ()
        tokens = _empty(section, batch, 196, sum(in_widths))
        pairs = list(zip(in_widths, out_widths, strict=True))
        weights = [_empty(section, *lead, out_width, in_width) for in_width, out_width in pairs]
        biases = [_empty(section, *lead, out_width) for out_width in out_widths] if has_biases else []
        output = packed_linear(tokens, weights, biases)
        gradient = _empty(section, *output.shape)
        token_gradient(gradient, weights)
        weight_gradient(gradient, tokens, in_widths, out_widths, has_biases)

    widths = _widths(section)
    wide = [4 * width for width in widths]
    maps = {
        "queries": (widths, widths, HEADS, False),
        "output": (widths, widths, 0, False),
        "first layer of the MLP": (widths, wide, 0, True),
        "second layer of the MLP": (wide, widths, 0, True),
    }
    cases = [(4, "queries"), (1, "first layer of the MLP"), (32, "first layer of the MLP")]
    if section.is_brief:
        cases = [(32, "queries"), (32, "first layer of the MLP")]
    elif section.is_thorough:
        cases = itertools.product((1, 4, 32), maps)
    for batch, name in cases:
        yield f"packed linear, {name}, batch {batch}", functools.partial(launch, batch, *maps[name])


def _packed_mlp(section: Section) -> Launches:
    from .packed_mlp.triton import forward, hidden_gradient

    def launch(batch: int, widths: Sequence[int], keeps_hidden: bool) -> None:
        tokens = _empty(section, batch, 196, sum(widths))
        # The residual of a network under autocast is float32.
        residual = torch.empty(tokens.shape, device="meta")
        expand = [_empty(section, 4 * width, width) for width in widths]
        contract = [_empty(section, width, 4 * width) for width in widths]
        biases = [[_empty(section, weight.shape[0]) for weight in weights] for weights in (expand, contract)]
        _, hidden, _ = forward(tokens, residual, expand, biases[0], contract, biases[1], keeps_hidden)
        if keeps_hidden:
            hidden_gradient(tokens, contract, hidden)

    batches = (1, 4, 32) if section.is_thorough else (32,)
    for batch, keeps_hidden in itertools.product(batches, (True, False)):
        words = f"packed MLP, batch {batch}, hidden layer {'kept' if keeps_hidden else 'not kept'}"
        yield words, functools.partial(launch, batch, _widths(section), keeps_hidden)


def _packed_layer_norm(section: Section) -> Launches:
    from .packed_layer_norm import triton

    def launch(widths: Sequence[int]) -> None:
        tokens = _empty(section, 4, 196, sum(widths))
        weight, bias = (torch.empty(sum(widths), device="meta") for _ in range(2))
        arguments = (tokens, widths, weight)
        output = triton.packed_layer_norm(*arguments, bias, EPS, section.dtype)
        triton.packed_layer_norm_backward(output, *arguments, EPS)
        output, context = triton.cross_layer_norm(*arguments, bias, weight, bias, EPS, section.dtype)
        triton.cross_layer_norm_backward(output, context, *arguments, weight, EPS)

    for widths in [_widths(section)] + [[4 * width for width in PUBLISHED_WIDTHS]] * section.is_thorough:
        yield f"packed layer norm of {widths}", functools.partial(launch, widths)


def _skip_gate(section: Section) -> Launches:
    from .skip_gate import triton

    def launch(pixels: int, channels: int, patch: int, memory_format: torch.memory_format) -> None:
        def empty_map(width: int, side: int) -> Tensor:
            if memory_format == torch.channels_last:
                return _empty(section, BATCH, side, side, width).permute(0, 3, 1, 2)
            return _empty(section, BATCH, width, side, side)

        encoder_feature, decoder_feature = empty_map(channels, pixels), empty_map(channels, pixels // 2)
        tokens = empty_map(channels, pixels // patch)
        weight, bias = _empty(section, channels, channels), _empty(section, channels)
        for is_whole in (True, False):
            weights = (weight, bias, weight, bias) if is_whole else (weight, bias, None, None)
            maps = (encoder_feature, tokens, decoder_feature) if is_whole else (encoder_feature, None, None)
            output, gate, means = triton.forward(*maps, *weights, is_whole, section.dtype)
            saved = (*maps[:2], weights[0], weights[2], gate, means)
            triton.backward(empty_map(*output.shape[1:3]), *saved, *maps, *weights)

    scales = [(224 >> scale, width, 16 >> scale) for scale, width in enumerate(PUBLISHED_WIDTHS)]
    cases = list(itertools.product(scales, (torch.channels_last, torch.contiguous_format)))
    if section.is_odd:
        cases = [((42, ODD_WIDTHS[0], 6), memory_format) for _, memory_format in cases[:2]]
    elif not section.is_thorough:
        cases = cases[:1] if section.is_brief else [cases[0], cases[-1]]
    for (pixels, channels, patch), memory_format in cases:
        words = f"skip path of {channels} x {pixels} x {pixels}, {memory_format}"
        yield words, functools.partial(launch, pixels, channels, patch, memory_format)


def _segmentation_sums(section: Section) -> Launches:
    from .segmentation_loss import triton, triton_scores

    def launch(batch: int, classes: int, pixels: int, memory_format: torch.memory_format) -> None:
        if memory_format == torch.channels_last:
            logits = _empty(section, batch, pixels, pixels, classes).permute(0, 3, 1, 2)
        else:
            logits = _empty(section, batch, classes, pixels, pixels)
        masks = torch.empty(batch, pixels, pixels, dtype=torch.uint8, device="meta")
        sums, counts = triton.forward(logits, masks)
        for totals in (None, torch.empty(3, device="meta")):
            _, _, slopes = triton_scores.segmentation_scores(sums, counts, totals, pixels**2, 0.5, 0.5)
        triton.backward(slopes, logits, masks)

    cases = list(itertools.product((4, 32), (1, 2, 3, 16, 64), (224,), (torch.channels_last, torch.contiguous_format)))
    if section.is_odd:
        cases = [(3, classes, 225, torch.contiguous_format) for classes in (1, 3)]
    elif not section.is_thorough:
        cases = [(32, classes, 224, torch.channels_last) for classes in (1, 3)]
    for batch, classes, pixels, memory_format in cases:
        words = f"sums of {batch} x {classes} x {pixels} x {pixels}, {memory_format}"
        yield words, functools.partial(launch, batch, classes, pixels, memory_format)


def _batch_norm_relu(section: Section) -> Launches:
    from .batch_norm_relu import triton
    from .batch_norm_relu_pool import triton as triton_pool

    def launch(batch: int, channels: int, pixels: int, memory_format: torch.memory_format) -> None:
        if memory_format == torch.channels_last:
            feature = _empty(section, batch, pixels, pixels, channels).permute(0, 3, 1, 2)
        else:
            feature = _empty(section, batch, channels, pixels, pixels)
        weight, bias, running_mean, running_var = (torch.empty(channels, device="meta") for _ in range(4))
        for running in ((running_mean, running_var), (None, None)):
            output, mean, variance, _ = triton.forward(feature, weight, bias, *running, MOMENTUM, EPS)
        saved = (feature, weight, bias, mean, variance, EPS)
        _, pooled = triton_pool.apply(*saved)
        for is_of_batch in (True, False):
            triton.backward(output, *saved, is_of_batch)
            triton_pool.backward(output, pooled, *saved, is_of_batch)

    scales = [(width, 224 >> scale) for scale, width in enumerate(PUBLISHED_WIDTHS)]
    cases = list(itertools.product((4, BATCH), scales, (torch.channels_last, torch.contiguous_format)))
    if section.is_odd:
        cases = [(3, (ODD_WIDTHS[0], 45), memory_format) for _, _, memory_format in cases[:2]]
    elif not section.is_thorough:
        cases = cases[-2:-1] if section.is_brief else [cases[0], cases[-1]]
    else:
        cases.append((BATCH, (40, 24), torch.channels_last))  # channels that are a multiple of 8 and not of 16
    for batch, (channels, pixels), memory_format in cases:
        words = f"batch norm of {batch} x {channels} x {pixels} x {pixels}, {memory_format}"
        yield words, functools.partial(launch, batch, channels, pixels, memory_format)


def _widths(section: Section) -> tuple[int, ...]:
    return ODD_WIDTHS if section.is_odd else PUBLISHED_WIDTHS


def _empty(section: Section, *shape: int) -> Tensor:
    """A tensor without data; in an odd section it starts one element into its memory."""
    size = math.prod(shape) + section.is_odd
    return torch.empty(size, dtype=section.dtype, device="meta")[int(section.is_odd) :].view(shape)


OPERATORS = (
    _channel_attention,
    _packed_linear,
    _packed_mlp,
    _packed_layer_norm,
    _skip_gate,
    _segmentation_sums,
    _batch_norm_relu,
)


def compile_section(section: Section) -> dict[str, Any]:
    """Compile every launch of ``section``: its table, what is wrong with it, and which kernels it never launched."""
    torch.backends.cuda.matmul.allow_tf32 = section.is_tf32
    problems: dict[str, str] = {}
    names, rows = set(), set()
    for words, launch in launches_of(section):
        with compiling_for(section.family, section.architecture) as compiled:
            try:
                launch()
            except Exception as error:  # what fails to compile is one more problem, not the end of the report
                problems.setdefault(f"{type(error).__name__}: {error}", words)
        for kernel in compiled:
            names.add(kernel.kernel)
            rows.add(_row(kernel))
            for problem in kernel.problems():
                problems.setdefault(f"{kernel.kernel} {problem} ({_constants(kernel)})", words)
    return {
        "name": section.name,
        "table": "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *sorted(rows)]),
        "problems": [f"{problem}, first met in {words}" for problem, words in problems.items()],
        "never_launched": sorted(_written_kernels() - names),
    }


def _written_kernels() -> set[str]:
    """Names of all functions of this package that Triton compiles, less those that another of them calls."""
    from triton.runtime.jit import JITFunction

    package = Path(__file__).parent
    functions, called = set(), set()
    for path in package.rglob("*.py"):
        if re.search(r"^@triton\.jit", path.read_text(), re.MULTILINE):
            name = ".".join([__package__, *path.relative_to(package).with_suffix("").parts])
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, JITFunction):
                    functions.add(value.fn.__name__)
                    called.update(value.fn.__code__.co_names)
    return functions - called


def _row(kernel: CompiledKernel) -> str:
    specialised = [f"{name}={value}" for name, value in kernel.folded.items()]
    specialised += [f"odd: {' '.join(kernel.unaligned)}"] if kernel.unaligned else []
    products = {operand: kernel.products.count(operand) for operand in kernel.products}
    return _line(
        [
            kernel.kernel,
            _constants(kernel),
            ", ".join(specialised),
            *(kernel.warps, kernel.stages, kernel.registers, kernel.stack, kernel.shared),
            _counts(products),
            _counts(kernel.matrix_instructions),
        ]
    )


def _constants(kernel: CompiledKernel) -> str:
    return ", ".join(f"{name}={value}".replace(" ", "") for name, value in kernel.constants.items())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def page(reports: Iterable[dict[str, Any]]) -> str:
    """The page of all sections."""
    import triton

    parts = [PREFACE.format(version=triton.__version__, fingerprint=fingerprint())]
    parts += [f"## {report['name']}\n\n{report['table']}\n" for report in reports]
    return "\n".join(parts)


def fingerprint() -> str:
    """A text that changes with what the page rests on: the lines of the kernels, their launchers and this module."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    files = [package / f"{name}.py" for name in ("resources", "compilation", "launch")]
    for path in [*files, *sorted(package.glob("*/triton*.py"))]:
        lines = map(str.rstrip, path.read_text(encoding="utf-8").splitlines())
        code = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
        digest.update(f"{path.relative_to(package).as_posix()}\n{code}\n".encode())
    return digest.hexdigest()[:16]


PREFACE = """# What the kernels use

Written by `make resources` with triton {version} of the sources {fingerprint}; not to be edited. A row
is one kernel compiled, as its launcher launches it, for one GPU, dtype and shape; rows that say the same are one.
Registers are a thread's, the stack what spills, in bytes a thread, shared memory in bytes a block. Products are the
`tl.dot` of the program by the type of their operands, matrix instructions those of the machine code; loops count once
in both. Pointers and integers are multiples of 16 unless said otherwise. The page is written only where no kernel on
sm_90 has a stack, and every product in half precision is HGMMA there.
"""


def main(words: list[str] | None = None) -> int:
    """Write the page, or one section of it as JSON; 1, and no file, where something is wrong with a kernel."""
    parser = argparse.ArgumentParser(prog="python -m uctrans.kernels.resources", description=__doc__)
    parser.add_argument("--section", choices=[section.name for section in SECTIONS], help="as JSON, to standard output")
    parser.add_argument("--output", type=Path, help="write the page there instead of to standard output")
    arguments = parser.parse_args(words)
    if arguments.section:
        (section,) = (section for section in SECTIONS if section.name == arguments.section)
        print(json.dumps(compile_section(section)))
        return 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        reports = list(pool.map(compile_section, SECTIONS))
    problems = [f"{report['name']}: {problem}" for report in reports for problem in report["problems"]]
    print("\n".join(problems), file=sys.stderr)
    if arguments.output is None:
        print(page(reports), end="")
    elif not problems:  # the page says of its sources that they are sound
        arguments.output.write_text(page(reports), encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
