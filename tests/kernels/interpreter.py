"""Triton's interpreter as the tests run it: right for bfloat16, as strict with masks in every version, and faster.

The interpreter keeps a bfloat16 number as the 16-bit integer of its bits and computes with these integers: products,
sums and comparisons are wrong, and nothing says so. Here each integer is the field of a structure, which numpy moves
but does not compute with. Products, casts and constants convert as a GPU does, and other arithmetic raises.
"""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BFLOAT16 = np.dtype([("bits_of_bfloat16", np.uint16)])


def widen(handle):
    """Return a handle of bfloat16 as one of float32, and any other as it is."""
    if handle.data.dtype != BFLOAT16:
        return handle
    return TensorHandle((handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32), tl.float32)


def round_to_bfloat16(numbers):
    """Return a handle of the nearest bfloat16 numbers, ties to even."""
    numbers = np.asarray(numbers, np.float32)
    bits = numbers.view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    bits = np.where(np.isnan(numbers), 0x7FC0, bits).astype(np.uint16)
    return TensorHandle(bits.view(BFLOAT16), tl.bfloat16)


def bits(handle):
    """Return a handle of bfloat16, or of pointers to it, as one of 16-bit integers: memory is read and written so."""
    if handle.dtype.scalar.is_ptr():
        return TensorHandle(handle.data, tl.pointer_type(tl.uint16))
    return TensorHandle(handle.data.view(np.uint16), tl.uint16)


def make_right_for_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Change the interpreter until ``patch`` is undone."""
    numpy_dtype, cast, product = interpreter._get_np_dtype, InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def get_np_dtype(dtype):
        return BFLOAT16 if dtype.scalar == tl.bfloat16 else numpy_dtype(dtype)

    def cast_impl(self, source, destination):
        source = widen(source)
        return round_to_bfloat16(source.data) if destination.scalar == tl.bfloat16 else cast(self, source, destination)

    def create_masked_load(self, pointers, mask, other, *options):
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *options)
        loaded = load(self, bits(pointers), mask, None if other is None else bits(other), *options)
        return TensorHandle(loaded.data.view(BFLOAT16), tl.bfloat16)

    def create_masked_store(self, pointers, value, *others):
        if value.data.dtype == BFLOAT16:
            pointers, value = bits(pointers), bits(value)
        return store(self, pointers, value, *others)

    def create_dot(self, left, right, *others):
        return product(self, widen(left), widen(right), *others)

    patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)
    patch.setattr(InterpreterBuilder, "get_bf16", lambda self, number: round_to_bfloat16([number]), raising=False)


def refuse_integers_as_masks(patch: pytest.MonkeyPatch) -> None:
    """Let every version of the interpreter refuse masks that are not boolean, as Triton 3.9 does."""
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)

        def checked(self, *arguments, original=original, place=place):
            if arguments[place].data.dtype != bool:
                raise TypeError(f"mask has unsupported dtype {arguments[place].data.dtype}")
            return original(self, *arguments)

        patch.setattr(InterpreterBuilder, name, checked)


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
