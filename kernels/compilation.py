"""Compile kernels for a GPU that is not there, just as their launchers would launch them, and say what they use.

Inside :func:`compiling_for` a launch compiles its kernel and runs nothing, so a launcher called on tensors without
data (device ``meta``) yields the very machine code that the GPU would run: the same tile sizes, and the same
specialisation by alignment and by arguments that are 1. What a kernel uses is then read from that code.

Triton must not be interpreting (``TRITON_INTERPRET`` unset when the kernels are imported).
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

MATRIX_INSTRUCTIONS = re.compile(r"\b(?:UTC)?[HIQDO]G?MMA\b|\bv_mfma")
LOCAL_MEMORY_INSTRUCTIONS = re.compile(r"\b(?:LDL|STL)\b")
RESOURCE_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
PRODUCTS = re.compile(r"= tt\.dot(?:_scaled)? .*?: tensor<[0-9x]*x(\w+)> \*")
TENSOR_MEMORY_COLUMNS = 512  # of one Blackwell multiprocessor
LARGEST_GRID = (2**31 - 1, 65535, 65535)
HALF_PRECISION = {"f16", "bf16"}


@dataclass(frozen=True)
class CompiledKernel:
    """What one compiled kernel is and uses; counts are of instructions in its machine code."""

    kernel: str
    architecture: str  # "sm_90", "gfx942"
    constants: dict[str, str]  # compile-time arguments: tile sizes, precision
    folded: dict[str, str]  # other arguments that were compiled in: those that are 1, None or empty
    unaligned: tuple[str, ...]  # pointers and integers that were not compiled as multiples of 16
    warps: int
    stages: int
    grid: tuple[int, ...]
    registers: int  # a thread
    stack: int  # bytes a thread; what the registers spill to
    local_accesses: int  # loads and stores of spilled registers
    shared: int  # bytes a block
    shared_limit: int
    tensor_memory: int  # columns a block, Blackwell only
    products: tuple[str, ...]  # operand type of each tl.dot, from the unoptimised program
    matrix_instructions: dict[str, int]

    def problems(self) -> list[str]:
        """What must not be: a launch the GPU refuses, and on sm_90 spills and products off the matrix units."""
        found = []
        if self.shared > self.shared_limit:
            found.append(f"needs {self.shared} bytes of shared memory, a block may have {self.shared_limit}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"needs {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
        if any(size > largest for size, largest in zip(self.grid, LARGEST_GRID, strict=False)):
            found.append(f"is launched on the grid {self.grid}, larger than {LARGEST_GRID}")
        if self.architecture == "sm_90":
            if self.stack or self.local_accesses:
                found.append(f"spills {self.stack} bytes of stack, {self.local_accesses} accesses")
            # Rows that are read entry by entry leave registers for tiles below the 64 rows of HGMMA only.
            is_scattered = any(re.search(r"(_|\.)ptr$|(^|\.)stride", name) for name in self.unaligned)
            expected = {"HGMMA", "HMMA"} if is_scattered else {"HGMMA"}
            if HALF_PRECISION.intersection(self.products) and not expected.intersection(self.matrix_instructions):
                found.append(f"holds products in half precision and no HGMMA: {self.matrix_instructions}")
        return found


@contextmanager
def compiling_for(family: str, architecture: int | str) -> Iterator[list[CompiledKernel]]:
    """Compile every kernel launched inside, for ``("cuda", 90)`` or ``("hip", "gfx942")``, and launch none.

    Yields:
        A list that each launch inside appends to. Tensors may be on any device, and ``meta`` ones cost no memory;
        like the GPU's own allocations they count as aligned, and views into them as aligned as their offset is.

    Raises:
        RuntimeError: a kernel launched inside does not compile; or Triton is interpreting, and compiles nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from .backend import INTERPRETER_VARIABLE, is_interpreting

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
        except Exception as error:
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
    from .launch import current_architecture

    metadata = binary.metadata
    is_cuda = metadata.target.backend == "cuda"
    registers, stack, code = _disassemble(binary.asm["cubin"]) if is_cuda else _read_assembly(binary.asm["amdgcn"])
    source, parameters = binary.src, binary.src.fn.params
    aligned = {path for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    constants, folded, unaligned = {}, {}, []
    for path, name, type_name in _leaves(source.signature):
        parameter = parameters[path[0]]
        if parameter.is_constexpr:
            constants[name] = str(source.constants[path])
        elif type_name in ("constexpr", ()):
            folded[name] = str(source.constants.get(path, type_name))
        elif path not in aligned and _may_be_aligned(parameter, type_name):
            unaligned.append(name)
    return CompiledKernel(
        kernel=source.fn.fn.__name__,
        architecture=f"sm_{metadata.target.arch}" if is_cuda else metadata.target.arch,
        constants=constants,
        folded=folded,
        unaligned=tuple(unaligned),
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        grid=grid,
        registers=registers,
        stack=stack,
        local_accesses=len(LOCAL_MEMORY_INSTRUCTIONS.findall(code)),
        shared=metadata.shared,
        shared_limit=current_architecture().shared_memory,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        products=tuple(PRODUCTS.findall(binary.asm["ttir"])),
        matrix_instructions=dict(Counter(MATRIX_INSTRUCTIONS.findall(code))),
    )


def _leaves(signature: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], str, Any]]:
    """Path, name and type of every argument, those within tuples one by one; an empty tuple counts as an argument."""

    def walk(path: tuple[int, ...], name: str, type_name: Any) -> Iterator[tuple[tuple[int, ...], str, Any]]:
        if type_name and isinstance(type_name, tuple):
            fields = getattr(type_name, "_fields", None)
            for place, inner in enumerate(type_name):
                yield from walk((*path, place), f"{name}.{fields[place]}" if fields else f"{name}[{place}]", inner)
        else:
            yield path, name, type_name

    for place, (name, type_name) in enumerate(signature.items()):
        yield from walk((place,), name, type_name)


def _may_be_aligned(parameter: Any, type_name: str) -> bool:
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return type_name.startswith("*") or type_name in ("i32", "i64", "u64")


@cache
def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack a thread, and the instructions of an NVIDIA binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = [tuple(map(int, match)) for match in RESOURCE_USAGE.findall(listing)]
    if not usage or "/*0000*/" not in listing:
        raise RuntimeError(f"cannot read the output of {' '.join(command)}:\n{listing[:1000]}")
    return max(registers for registers, _ in usage), max(stack for _, stack in usage), listing


def _read_assembly(assembly: str) -> tuple[int, int, str]:
    """Vector registers a thread, bytes of scratch a thread, and the instructions of an AMD program."""
    counts = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")]
    if None in counts:
        raise RuntimeError(f"no register counts in the assembly:\n{assembly[-1000:]}")
    registers, scratch = (int(match[1]) for match in counts)
    return registers, scratch, assembly
