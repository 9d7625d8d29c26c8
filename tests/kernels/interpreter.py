"""Triton's interpreter as the tests run it: right for bfloat16, and faster.

The interpreter keeps a bfloat16 number as the 16-bit integer of its bits and computes with these integers: products,
sums and comparisons are wrong, and nothing says so. Here products, casts and constants convert through float32, as a
GPU does; operations that move numbers are left alone; every other operation on bfloat16 raises.
"""

from functools import wraps

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# Operations that take bfloat16: the first move numbers or look at bits, the last cast by `cast_impl`.
UNGUARDED = {
    *("load", "store", "masked_load", "masked_store", "tensor_pointer_load", "tensor_pointer_store"),
    *("descriptor_load", "descriptor_store", "descriptor_gather", "descriptor_scatter"),
    *("splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "cat", "join", "split", "gather"),
    *("addptr", "select", "bitcast", "fabs"),
    *("fp_ext", "fp_trunc", "fp_to_si", "fp_to_ui", "si_to_fp", "ui_to_fp"),
}


def is_bfloat16(operand):
    """Return whether a handle holds bfloat16, or a type is it; a pointer is not."""
    return getattr(getattr(operand, "dtype", operand), "scalar", None) == tl.bfloat16


def refuse_bfloat16(operation, operands):
    if any(map(is_bfloat16, operands)):
        raise TypeError(f"{operation} of bfloat16 is not interpreted; convert to float32 in the kernel")


def widen(handle):
    """Return a handle of bfloat16 as one of float32, and others as they are."""
    if not is_bfloat16(handle):
        return handle
    bits = torch.from_numpy(np.array(handle.data, order="C"))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def round_to_bfloat16(numbers):
    """Return a handle of the nearest bfloat16 numbers, ties to even."""
    rounded = torch.from_numpy(np.array(numbers, order="C")).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def make_right_for_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Change the interpreter until ``patch`` is undone."""
    cast, product, check = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
        ReduceScanOpInterface.check_tensor,
    )

    def cast_impl(self, source, destination):
        source = widen(source)
        return round_to_bfloat16(source.data) if is_bfloat16(destination) else cast(self, source, destination)

    def create_dot(self, left, right, accumulator, *precision):
        return product(self, widen(left), widen(right), accumulator, *precision)

    def check_tensor(self, operands):
        refuse_bfloat16("reduction", [operand.handle for operand in operands])
        check(self, operands)

    def guarded(operation, function):
        @wraps(function)
        def call(self, *arguments, **options):
            refuse_bfloat16(operation, [*arguments, *options.values()])
            return function(self, *arguments, **options)

        return call

    for name, function in list(vars(InterpreterBuilder).items()):
        operation = name.removeprefix("create_")
        if operation != name and operation not in UNGUARDED:
            patch.setattr(InterpreterBuilder, name, guarded(operation, function))
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "get_bf16", lambda self, number: round_to_bfloat16([number]), raising=False)
    patch.setattr(ReduceScanOpInterface, "check_tensor", check_tensor)


def wrap_once(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter wrap ``triton.language`` once a launch, not again in each call of a device function.

    That is most of its time, and finds everything wrapped already.
    """
    wrap = interpreter._patch_lang

    def wrap_if_new(function):
        modules = [value for value in function.__globals__.values() if value in (tl, tl.core)]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return wrap(function)
        return interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", wrap_if_new)
