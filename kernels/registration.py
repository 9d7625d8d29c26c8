"""Registration of an operator with torch: its launcher, shapes without data, gradient, and autocast.

Operators do not modify their inputs, so that ``torch.compile`` may put them into CUDA graphs. The exception is the
update of running statistics: they are buffers, which a graph may write.
They run Triton kernels on CUDA, and on the CPU in Triton's interpreter; the public functions choose PyTorch elsewhere.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import INTERPRETER_VARIABLE, is_interpreting

NAMESPACE = "uctrans"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
VMAP_KEYS = ("FuncTorchBatched", "Batched")  # of torch.func, and of torch.autograd.grad(is_grads_batched=True)
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_operator(
    name: str, schema: str, *, launcher: str, backward_of: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``uctrans::name``; use as a decorator of its fake.

    The fake takes the operator's arguments and returns empty tensors of the shapes, dtypes and strides that the
    launcher returns. A call launches on the device of its first tensor. Backward may meet forward-mode gradients and
    batches of gradients that the public function could not foresee: tangents, which torch would lose, are refused, and
    so are batches where an argument or result is a list; torch loops over other batches.

    Args:
        name: name of the operator.
        schema: arguments and results, as in ``(Tensor query, float eps) -> Tensor``.
        launcher: ``package.module:function``, imported at the first call because it needs the package triton.
        backward_of: public function whose gradient this operator computes. It has no gradient of its own: asking for
            one raises ``NotImplementedError``.
    """
    module, _, function = launcher.partition(":")

    function_name = backward_of or name

    def launch(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"the Triton operator of {function_name} has no forward-mode gradient; use backend='composed'"
            )
        first_tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device_of(first_tensor):
            return getattr(import_module(module), function)(*arguments)

    def interpret(*arguments: Any) -> Any:
        if not is_interpreting():
            raise NotImplementedError(
                f"{NAMESPACE}::{name} runs on a CUDA device, or on the CPU with {INTERPRETER_VARIABLE}=1; "
                f"use backend='composed' (the same results)"
            )
        return launch(*arguments)

    def refuse_batch(*arguments: Any) -> Any:
        raise NotImplementedError(
            f"the Triton operator of {function_name} takes no batch of gradients (vmap); use backend='composed'"
        )

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"the Triton operator of {backward_of} has no second derivative; "
            f"use backend='composed' for gradients of gradients"
        )

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, launch, "CUDA")
        LIBRARY.impl(name, interpret, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        if "Tensor[]" in schema:
            for key in VMAP_KEYS:
                LIBRARY.impl(name, refuse_batch, key)
        if backward_of is not None:
            register_gradient(name, lambda ctx, inputs, output: None, refuse)
        return fake

    return register


def register_gradient(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``uctrans::name`` a backward; see ``torch.library.register_autograd``."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def cast_under_autocast(name: str, left_alone: Sequence[int] = ()) -> None:
    """Cast the floating-point arguments of ``uctrans::name`` to autocast's dtype, except float64.

    Args:
        name: name of the operator.
        left_alone: positions of arguments that keep their dtype.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name)
    for device_type, key in AUTOCAST_KEYS.items():
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*arguments: Any, device_type: str = device_type, excluded: Any = excluded) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(
                    *(
                        argument if place in left_alone else _cast(argument, device_type, dtype)
                        for place, argument in enumerate(arguments)
                    )
                )

        LIBRARY.impl(name, cast_and_call, key)


def _cast(argument: Any, device_type: str, dtype: torch.dtype) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_cast(item, device_type, dtype) for item in argument)
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    if argument.device.type != device_type or argument.dtype == torch.float64:
        return argument
    return argument.to(dtype)
