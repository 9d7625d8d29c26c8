"""What every kernel uses on every GPU it is compiled for: ``python -m uctrans.kernels.resources`` prints the page.

The page is kept in the repository (``make resources`` writes it), so that a change of code or of compiler shows as a
change of registers, spills, shared memory or matrix instructions. No GPU is needed.
"""

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compilation import CompiledKernel, compiling_for

PUBLISHED_WIDTHS = (64, 128, 256, 512)
HEADS = 4
SEED = 1


class Section(NamedTuple):
    """Kernels for one GPU and dtype; products of float32 in tf32 or not."""

    family: str
    architecture: int | str
    dtype: torch.dtype
    is_tf32: bool = False
    is_odd: bool = False  # widths, strides and offsets that are no multiples of 16

    @property
    def name(self) -> str:
        """Such as ``sm_90-float32-tf32``."""
        words = [f"sm_{self.architecture}" if self.family == "cuda" else str(self.architecture)]
        words += [str(self.dtype).removeprefix("torch."), "tf32" * self.is_tf32, "odd" * self.is_odd]
        return "-".join(filter(None, words))


SECTIONS = (
    Section("cuda", 80, torch.bfloat16),
    Section("cuda", 90, torch.bfloat16),
    Section("cuda", 90, torch.bfloat16, is_odd=True),
    Section("cuda", 90, torch.float16),
    Section("cuda", 90, torch.float32),
    Section("cuda", 90, torch.float32, is_tf32=True),
    Section("cuda", 100, torch.bfloat16),
    Section("hip", "gfx942", torch.bfloat16),
)
COLUMNS = ("kernel", "compile-time arguments", "specialised", "warps", "stages", "registers", "stack", "shared")
COLUMNS += ("products", "matrix instructions")

Launches = Iterator[tuple[str, Callable[[], object]]]


def launches_of(section: Section) -> Launches:
    """What is launched, in words, and a function that launches it; to be called where launches only compile."""
    for operator in OPERATORS:
        yield from operator(section)


OPERATORS = ()


def compile_section(section: Section) -> dict[str, Any]:
    """Compile every launch of ``section``: its table, what is wrong with it, and which kernels were launched."""
    torch.backends.cuda.matmul.allow_tf32 = section.is_tf32
    problems: list[str] = []
    kernels: dict[str, CompiledKernel] = {}
    for words, launch in launches_of(section):
        with compiling_for(section.family, section.architecture) as compiled:
            try:
                launch()
            except Exception as error:  # what fails to compile is one more problem, not the end of the report
                problems.append(f"{words}: {type(error).__name__}: {error}")
        for kernel in compiled:
            problems += [f"{words}: {kernel.kernel} {_constants(kernel)} {problem}" for problem in kernel.problems()]
            kernels[_row(kernel)] = kernel
    return {
        "name": section.name,
        "table": "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *sorted(kernels)]),
        "problems": list(dict.fromkeys(problems)),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels.values()],
        "never_launched": sorted(_written_kernels() - {kernel.kernel for kernel in kernels.values()}),
    }


def _written_kernels() -> set[str]:
    """Names of the kernels in the ``triton*.py`` files of this package; functions that only kernels call do not count."""
    from triton.runtime.jit import JITFunction

    names = set()
    for path in Path(__file__).parent.rglob("triton*.py"):
        module = importlib.import_module(f".{path.parent.name}.{path.stem}", __package__)
        functions = [value for value in vars(module).values() if isinstance(value, JITFunction)]
        names |= {function.fn.__name__ for function in functions if function.fn.__name__.endswith("_kernel")}
    return names


def _row(kernel: CompiledKernel) -> str:
    specialised = [f"{name}=1" for name in kernel.ones] + [f"{name} unaligned" for name in kernel.unaligned]
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

    parts = [PREFACE.format(version=triton.__version__)]
    parts += [f"## {report['name']}\n\n{report['table']}\n" for report in reports]
    return "\n".join(parts)


PREFACE = """# What the kernels use

Written by `make resources` with triton {version}; not to be edited. A row is one kernel compiled, as its launcher
launches it, for one GPU, dtype and shape; rows that say the same are one. Registers are a thread's, the stack what
spills, in bytes a thread, shared memory in bytes a block. Products are the `tl.dot` of the program by the type of
their operands, matrix instructions those of the machine code; loops count once in both. Pointers and integers are
multiples of 16 unless said otherwise. Tests hold sm_90 to no stack, and to HGMMA where a product is in half precision.
"""


def main(words: list[str] | None = None) -> int:
    """Write the page, or one section of it as JSON; 1 where something is wrong with a kernel."""
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
    if arguments.output:
        arguments.output.write_text(page(reports))
    else:
        print(page(reports), end="")
    problems = [f"{report['name']}: {problem}" for report in reports for problem in report["problems"]]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
