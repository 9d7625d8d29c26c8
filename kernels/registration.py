"""How an operator is made known to torch: dispatch to CPU and CUDA, shapes without data, gradients, autocast.

Operators are functional (they write none of their inputs), so that ``torch.compile`` may put them into CUDA graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "uctrans"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define_operator(
    name: str, schema: str, *, implementations: dict[str, Callable[..., Any]], fake: Callable[..., Any]
) -> None:
    """Define ``uctrans::name`` with one implementation a dispatch key (``CPU``, ``CUDA``) and its fake.

    Args:
        name: name of the operator.
        schema: arguments and results, as in ``(Tensor query, float eps) -> Tensor``.
        implementations: what runs, by dispatch key.
        fake: returns empty tensors of the shapes, dtypes and strides that the implementations return.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, implementation in implementations.items():
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def define_gradient(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``uctrans::name`` a backward; see ``torch.library.register_autograd``."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def refuse_double_backward(name: str, public_name: str) -> None:
    """Let a gradient of ``uctrans::name``, itself the backward of ``public_name``, raise ``NotImplementedError``."""

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"the Triton operator of {public_name} has no second derivative; "
            f"use backend='composed' for gradients of gradients"
        )

    define_gradient(name, lambda ctx, inputs, output: None, backward)


def cast_under_autocast(name: str, left_alone: Sequence[int] = ()) -> None:
    """Under autocast, hand ``uctrans::name`` its floating-point tensors in autocast's dtype (float64 stays).

    The arguments at the positions ``left_alone`` keep theirs.
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
