"""Compile kernels without a GPU, just as their launchers would launch them, and check the code.

    python -m uctrans.kernels.compilation                   every launch for every target, and what is wrong
    python -m uctrans.kernels.compilation --published PAGE  the published sizes on sm_90: docs/kernel-resources.md

Inside :func:`compiling_for` a launch compiles its kernel and runs nothing, so a launcher called on tensors without
data (device ``meta``) yields the machine code that the GPU would run, with the same tile sizes and the same
specialisation by alignment and by arguments that are 1. Triton must not be interpreting (``TRITON_INTERPRET`` unset).
"""

import argparse
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import JITFunction, driver

from .backend import INTERPRETER_VARIABLE, is_interpreting
from .launch import current_architecture

MATRIX_INSTRUCTIONS = re.compile(r"\b(?:UTC)?[HIQDO]G?MMA\b|\bv_mfma")
LOCAL_MEMORY_INSTRUCTIONS = re.compile(r"\b(?:LDL|STL)\b")
INSTRUCTIONS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;\n]*);")
BRANCHES = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
RESOURCE_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
MATRIX_LAYOUTS = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<\{.*warpsPerCTA = \[(\d+),", re.MULTILINE)
WARP_GROUP_PRODUCTS = re.compile(r"warp_group_dot .*-> tensor<(\d+)x(\d+)x\w+, (#\w+)>")
ROWS_A_WARP = 16  # of the result of a warp group's product
PRODUCTS = re.compile(r"= tt\.dot(?:_scaled)? .*?: tensor<[0-9x]*x(\w+)> \*")
TENSOR_MEMORY_COLUMNS = 512  # of one Blackwell multiprocessor
LARGEST_GRID = (2**31 - 1, 65535, 65535)
HALF_PRECISION = {"f16", "bf16"}

TARGETS = {"sm_80": ("cuda", 80), "sm_90": ("cuda", 90), "sm_100": ("cuda", 100), "gfx942": ("hip", "gfx942")}
PUBLISHED_WIDTHS = (64, 128, 256, 512)
HEADS = 4
EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel and the resources it uses; counts are of instructions in its machine code."""

    kernel: str
    architecture: str  # "sm_90", "gfx942"
    constants: dict[str, str]  # compile-time arguments: tile sizes, precision
    warps: int
    stages: int
    grid: tuple[int, ...]
    registers: int  # a thread
    stack: int  # bytes a thread; what the registers spill to
    local_accesses: int  # loads and stores of spilled registers in loops
    shared: int  # bytes a block
    shared_limit: int
    tensor_memory: int  # columns a block, Blackwell only
    products: tuple[str, ...]  # operand types of tl.dot, from the unoptimised program
    repeated_products: tuple[str, ...]  # results (rows x columns) with rows that several warps compute, Hopper only
    matrix_instructions: dict[str, int]

    def problems(self, has_scattered_rows: bool = False) -> list[str]:
        """Return what is wrong: launches that fail, and on sm_90 spills in loops and wasteful products.

        Rows that are read entry by entry (scattered) leave registers only for tiles below the 64 rows of HGMMA.
        """
        found = []
        if self.shared > self.shared_limit:
            found.append(f"needs {self.shared} bytes of shared memory, a block may have {self.shared_limit}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"needs {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
        if any(size > largest for size, largest in zip(self.grid, LARGEST_GRID, strict=False)):
            found.append(f"is launched on the grid {self.grid}, larger than {LARGEST_GRID}")
        if self.architecture == "sm_90":
            if self.local_accesses:
                found.append(f"spills {self.stack} bytes of stack, {self.local_accesses} accesses in loops")
            if self.repeated_products:
                found.append(f"computes rows of {', '.join(self.repeated_products)} in several of {self.warps} warps")
            expected = {"HGMMA", "HMMA"} if has_scattered_rows else {"HGMMA"}
            if HALF_PRECISION.intersection(self.products) and not expected.intersection(self.matrix_instructions):
                found.append(f"holds products in half precision and no HGMMA: {self.matrix_instructions}")
        return found


@contextmanager
def compiling_for(family: str, architecture: int | str) -> Iterator[list[CompiledKernel]]:
    """Compile every kernel launched inside, for ``("cuda", 90)`` or ``("hip", "gfx942")``, and launch none.

    Yields:
        A list that each launch inside appends to. Tensors on the device ``meta`` count as aligned, like the GPU's own
        allocations, and views into them as aligned as their offset is.

    Raises:
        RuntimeError: a kernel launched inside does not compile; or Triton is interpreting, and compiles nothing.
    """
    if is_interpreting():
        raise RuntimeError(f"kernels are interpreted, not compiled, while {INTERPRETER_VARIABLE}=1")
    target = GPUTarget(family, architecture, 32 if family == "cuda" else 64)
    # Triton keeps what it compiled by device; a device named after its target keeps the targets apart.
    absent_gpu = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: target, get_current_stream=lambda device: 0
    )
    compiled: list[CompiledKernel] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        except (TritonError, RuntimeError) as error:
            raise RuntimeError(f"{self.fn.__name__} does not compile for {family} {architecture}: {error}") from error
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        compiled.append(_describe(binary, tuple(grid(arguments)) if callable(grid) else tuple(grid)))

    driver.set_active(absent_gpu)
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def _describe(binary: Any, grid: tuple[int, ...]) -> CompiledKernel:
    metadata = binary.metadata
    is_cuda = metadata.target.backend == "cuda"
    registers, stack, code = _disassemble(binary.asm["cubin"]) if is_cuda else _read_assembly(binary.asm["amdgcn"])
    source = binary.src
    parameters = enumerate(source.fn.params)
    return CompiledKernel(
        kernel=source.fn.fn.__name__,
        architecture=f"sm_{metadata.target.arch}" if is_cuda else metadata.target.arch,
        constants={it.name: str(source.constants[place,]) for place, it in parameters if it.is_constexpr},
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        grid=grid,
        registers=registers,
        stack=stack,
        local_accesses=_local_accesses_in_loops(code),
        shared=metadata.shared,
        shared_limit=current_architecture().shared_memory,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        products=tuple(sorted(set(PRODUCTS.findall(binary.asm["ttir"])))),
        repeated_products=_repeated_products(binary.asm["ttgir"]),
        matrix_instructions=dict(Counter(MATRIX_INSTRUCTIONS.findall(code))),
    )


def _repeated_products(program: str) -> tuple[str, ...]:
    """Return the results of a warp group's products with fewer rows than all warps along them compute at once."""
    warps = {layout: int(along_rows) for layout, along_rows in MATRIX_LAYOUTS.findall(program)}
    return tuple(
        f"{rows}x{columns}"
        for rows, columns, layout in dict.fromkeys(WARP_GROUP_PRODUCTS.findall(program))
        if ROWS_A_WARP * warps[layout] > int(rows)
    )


@cache
def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Return registers a thread, bytes of stack a thread, and the instructions of an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = RESOURCE_USAGE.search(listing)
    if usage is None or not INSTRUCTIONS.search(listing):
        raise RuntimeError(f"cannot read the output of {' '.join(command)}:\n{listing[:1000]}")
    return int(usage[1]), int(usage[2]), listing


def _local_accesses_in_loops(listing: str) -> int:
    """Count the local loads and stores of an NVIDIA binary between a branch backwards and its target."""
    instructions = [(int(address, 16), instruction) for address, instruction in INSTRUCTIONS.findall(listing)]
    branches = [(address, BRANCHES.search(instruction)) for address, instruction in instructions]
    loops = [(int(branch[1], 16), address) for address, branch in branches if branch]
    accesses = [address for address, instruction in instructions if LOCAL_MEMORY_INSTRUCTIONS.search(instruction)]
    return sum(any(first <= address <= last for first, last in loops) for address in accesses)


def _read_assembly(assembly: str) -> tuple[int, int, str]:
    """Return vector registers a thread, bytes of scratch a thread, and the instructions of an AMD program."""
    names = ("vgpr_count", "private_segment_fixed_size")
    registers, scratch = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
    return registers, scratch, assembly


class Sizes(NamedTuple):
    """The dtype and the sizes of the launches to compile; by default those of the published network for 32 images."""

    dtype: torch.dtype
    batches: Sequence[int] = (32,)
    tokens: Sequence[int] = (196,)
    widths: Sequence[int] = PUBLISHED_WIDTHS
    maps: Sequence[tuple[int, int, int]] = ((64, 224, 16), (128, 112, 8), (256, 56, 4), (512, 28, 2))
    classes: Sequence[int] = (1, 3)
    formats: Sequence[torch.memory_format] = (torch.channels_last,)
    offset: int = 0  # elements of memory before each tensor
    is_tf32: bool = False  # products of float32
    has_variants: bool = True  # launches of the same kernels with other options, too

    def variants(self, *options: Any) -> Sequence[Any]:
        """Return all options, or the first."""
        return options if self.has_variants else options[:1]

    def empty(self, *shape: int) -> Tensor:
        """Return a tensor without data."""
        return torch.empty(math.prod(shape) + self.offset, dtype=self.dtype, device="meta")[self.offset :].view(shape)

    def empty_map(self, batch: int, channels: int, side: int, memory_format: torch.memory_format) -> Tensor:
        """Return a square map (B, C, H, W) without data."""
        if memory_format == torch.channels_last:
            return self.empty(batch, side, side, channels).permute(0, 3, 1, 2)
        return self.empty(batch, channels, side, side)


def odd(dtype: torch.dtype) -> Sizes:
    """Return sizes, strides and offsets that are no multiples of 16."""
    return Sizes(dtype, batches=(3,), tokens=(225,), widths=(17, 33, 65), maps=((17, 42, 6),), offset=1)


def thorough(dtype: torch.dtype) -> Sizes:
    """Return the published sizes with other batches, memory formats and classes, and every way to tile tokens."""
    from .channel_attention.triton import LONGEST_FUSED, token_tiles

    tokens = {token_tiles(count): count for count in range(LONGEST_FUSED, 0, -1)}
    formats = (torch.channels_last, torch.contiguous_format)
    return Sizes(dtype, (1, 4, 32), sorted(tokens.values()), classes=(1, 2, 3, 16, 64), formats=formats)


def _channel_attention(sizes: Sizes) -> None:
    from .channel_attention.triton import LONGEST_FUSED, backward, forward

    launches = list(itertools.product(sizes.batches, (*sizes.tokens, LONGEST_FUSED + 1), sizes.variants(0.1, 0.0)))
    launches += sizes.variants((), (1, LONGEST_FUSED, 0.1))[1:]  # tiles of 64 rows, and all tokens in one
    for batch, tokens, dropout_p in launches:
        # As the projections write them: heads within tokens.
        heads = [sizes.empty(batch, tokens, HEADS, sum(sizes.widths)).transpose(1, 2) for _ in range(3)]
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        output, *saved = forward(*heads, sizes.widths, dropout_p, EPS, seed)
        backward(sizes.empty(*output.shape), *heads, *saved, seed, sizes.widths, dropout_p)


def _packed_linear(sizes: Sizes) -> None:
    from .packed_linear.triton import packed_linear, token_gradient, weight_gradient

    wide = [4 * width for width in sizes.widths]
    projections = sizes.variants(
        (sizes.widths, wide, (), True),  # first layer of the MLP
        (wide, sizes.widths, (), True),  # second layer
        (sizes.widths, sizes.widths, (HEADS,), False),  # queries
        (sizes.widths, sizes.widths, (), False),  # output
    )
    for batch, (in_widths, out_widths, heads, has_biases) in itertools.product(sizes.batches, projections):
        tokens = sizes.empty(batch, sizes.tokens[0], sum(in_widths))
        weights = [sizes.empty(*heads, *pair) for pair in zip(out_widths, in_widths, strict=True)]
        biases = [sizes.empty(*heads, width) for width in out_widths] if has_biases else []
        output = packed_linear(tokens, weights, biases)
        gradient = sizes.empty(*output.shape)
        token_gradient(gradient, weights)
        weight_gradient(gradient, tokens, in_widths, out_widths, has_biases)


def _packed_mlp(sizes: Sizes) -> None:
    from .packed_mlp.triton import forward, hidden_gradient

    for batch, keeps_hidden in itertools.product(sizes.batches, sizes.variants(True, False)):
        tokens = sizes.empty(batch, sizes.tokens[0], sum(sizes.widths))
        residual = torch.empty(tokens.shape, device="meta")  # float32, as in a network under autocast
        expand = [sizes.empty(4 * width, width) for width in sizes.widths]
        contract = [sizes.empty(width, 4 * width) for width in sizes.widths]
        biases = [[sizes.empty(weight.shape[0]) for weight in weights] for weights in (expand, contract)]
        _, hidden, _ = forward(tokens, residual, expand, biases[0], contract, biases[1], keeps_hidden)
        if keeps_hidden:
            hidden_gradient(tokens, contract, hidden)


def _packed_layer_norm(sizes: Sizes) -> None:
    from .packed_layer_norm import triton

    for batch in sizes.batches:
        tokens = sizes.empty(batch, sizes.tokens[0], sum(sizes.widths))
        weight, bias = (torch.empty(sum(sizes.widths), device="meta") for _ in range(2))
        arguments = (tokens, sizes.widths, weight)
        output = triton.packed_layer_norm(*arguments, bias, EPS, sizes.dtype)
        triton.packed_layer_norm_backward(output, *arguments, EPS)
        output, context = triton.cross_layer_norm(*arguments, bias, weight, bias, EPS, sizes.dtype)
        triton.cross_layer_norm_backward(output, context, *arguments, weight, EPS)


def _skip_gate(sizes: Sizes) -> None:
    from .skip_gate.triton import backward, forward

    for batch, (channels, side, patch), memory_format in itertools.product(sizes.batches, sizes.maps, sizes.formats):
        encoder_feature = sizes.empty_map(batch, channels, side, memory_format)
        decoder_feature = sizes.empty_map(batch, channels, side // 2, memory_format)
        tokens = sizes.empty_map(batch, channels, side // patch, memory_format)
        weight, bias = sizes.empty(channels, channels), sizes.empty(channels)
        whole, gate_alone = ((tokens, decoder_feature), (weight, bias)), ((None, None), (None, None))
        for maps, decoder in sizes.variants(whole, gate_alone):
            has_decoder = maps[1] is not None
            output, gate, means = forward(
                encoder_feature, *maps, weight, bias, *decoder, concatenate=has_decoder, dtype=sizes.dtype
            )
            gradient = sizes.empty_map(batch, output.shape[1], side, memory_format)
            decoder_grid = list(decoder_feature.shape[2:]) if has_decoder else []
            backward(gradient, encoder_feature, maps[0], weight, decoder[0], gate, means, decoder_grid)


def _segmentation_loss(sizes: Sizes) -> None:
    from .segmentation_loss import triton, triton_scores

    side = sizes.maps[0][1]
    for batch, classes, memory_format in itertools.product(sizes.batches, sizes.classes, sizes.formats):
        logits = sizes.empty_map(batch, classes, side, memory_format)
        masks = torch.empty(batch, side, side, dtype=torch.uint8, device="meta")
        for ignore_label in sizes.variants(None, 255):
            sums, counts = triton.forward(logits, masks, ignore_label)
        for totals in sizes.variants(torch.empty(3, device="meta"), None):
            _, _, slopes = triton_scores.segmentation_scores(sums, counts, totals, side**2, 0.5, 0.5)
        for ignore_label in sizes.variants(None, 255):
            triton.backward(slopes, logits, masks, ignore_label)


def _batch_norm_relu(sizes: Sizes) -> None:
    from .batch_norm_relu import triton

    for batch, (channels, side, _), memory_format in itertools.product(sizes.batches, sizes.maps, sizes.formats):
        feature = sizes.empty_map(batch, channels, side, memory_format)
        weight, bias, running_mean, running_var = (torch.empty(channels, device="meta") for _ in range(4))
        conv_bias, count = feature.new_empty(channels), torch.empty((), dtype=torch.int64, device="meta")
        for running in sizes.variants((conv_bias, running_mean, running_var, count), (None,) * 4):
            mean, variance = triton.statistics(feature, *running, MOMENTUM, 1)
        for is_of_batch in sizes.variants(True, False):
            norm = (feature, weight, bias, mean, variance, conv_bias, EPS, is_of_batch)
            output = triton.forward(*norm)
            triton.backward(output, *norm)
            output, pooled = triton.forward_and_pool(*norm)
            triton.backward_of_pool(output, pooled, *norm)


OPERATORS = (
    _channel_attention,
    _packed_linear,
    _packed_mlp,
    _packed_layer_norm,
    _skip_gate,
    _segmentation_loss,
    _batch_norm_relu,
)


def compile_launches(target: str, sizes: Sizes) -> tuple[list[CompiledKernel], list[str]]:
    """Compile every launch of ``sizes`` for one of :data:`TARGETS`; return the kernels, and what is wrong with them."""
    torch.backends.cuda.matmul.allow_tf32 = sizes.is_tf32
    kernels, problems = [], []
    for launch in OPERATORS:
        with compiling_for(*TARGETS[target]) as compiled:
            try:
                launch(sizes)
            except RuntimeError as error:  # a kernel that does not compile is one more problem
                problems.append(str(error))
        kernels += compiled
    for kernel in kernels:
        problems += [f"{kernel.kernel} {problem} ({kernel.constants})" for problem in kernel.problems(sizes.offset > 0)]
    return kernels, list(dict.fromkeys(problems))


def _print_every_launch() -> list[str]:
    """Print all binaries for each target and list of sizes, and return what is wrong."""
    problems = []
    for target in TARGETS:
        lists = [*map(Sizes, (torch.bfloat16, torch.float16, torch.float32)), Sizes(torch.float32, is_tf32=True)]
        lists += [thorough(torch.bfloat16), odd(torch.bfloat16)] if target == "sm_90" else []
        for sizes in lists:
            kernels, found = compile_launches(target, sizes)
            print(f"{target}: {sizes}", *sorted(set(map(str, kernels))), sep="\n", end="\n\n", flush=True)
            problems += [f"{target}: {problem}" for problem in found]
    return problems


def _write_page(page: Path) -> list[str]:
    """Replace the columns of this version of Triton on a page, unless something is wrong; return what is wrong."""
    figures: dict[tuple[str, ...], dict[str, Any]] = {}
    problems = []
    for dtype in (torch.bfloat16, torch.float16):
        kernels, found = compile_launches("sm_90", Sizes(dtype))
        problems += found
        for kernel in kernels:
            row = figures.setdefault((kernel.kernel, str(dtype).removeprefix("torch.")), {})
            for use in ("registers", "stack", "shared"):
                column = f"{triton.__version__} {use}"
                row[column] = max(row.get(column, 0), getattr(kernel, use))
    if problems:
        return problems
    kept = _figures_on(page) if page.exists() else {}
    rows = {key: kept.get(key, {}) | figures[key] for key in sorted(figures)}
    columns = sorted({column for row in rows.values() for column in row})
    lines = [("kernel", "dtype", *columns), ["---"] * (2 + len(columns))]
    lines += [(*key, *(row.get(column, "") for column in columns)) for key, row in rows.items()]
    table = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    page.write_text(PAGE.format(table=table), encoding="utf-8")
    return []


def _figures_on(page: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Read the table of a page: rows by kernel and dtype, each with its cells by column."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    (_, _, *columns), _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {(kernel, dtype): dict(zip(columns, cells, strict=True)) for kernel, dtype, *cells in rows}


PAGE = """# Resources of the kernels

For the published sizes (224 pixels, 32 images) on sm_90, compiled without a GPU by the versions of Triton that head the
columns. A row has the largest of all binaries of a kernel and dtype: registers a thread, stack in bytes a thread
(spilled registers, which no kernel accesses in a loop), and shared memory in bytes a block.

    python -m uctrans.kernels.compilation --published docs/kernel-resources.md    # this page, for the installed Triton
    python -m uctrans.kernels.compilation    # prints every binary for sm_80, sm_90, sm_100 and gfx942

{table}
"""


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables, or write the page; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m uctrans.kernels.compilation", description="Compile every kernel.")
    parser.add_argument("--published", type=Path, metavar="PAGE", help="write a page of the published sizes on sm_90")
    page = parser.parse_args(words).published
    problems = _write_page(page) if page else _print_every_launch()
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
