"""Which modules a fused operator may stand for: those whose call does what their class says, and nothing else.

A fused operator reads the parameters of modules that it does not call. An adapter around a linear map, another
activation, a hook or a parametrisation would have no effect there. Layers therefore fuse plain modules only, and call
all others, on every backend.
"""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling ``module`` does what ``kind`` does and nothing else.

    The module is of no subclass, has no ``forward`` set on itself, and no hook is registered, on it or on all modules.
    Parametrisations make a subclass; pruning and the older weight norm register a hook.
    """
    return (
        type(module) is kind
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def is_plain_linear(module: nn.Module, *, has_bias: bool) -> bool:
    """Return whether ``module`` is a plain ``nn.Linear``, with a bias or without one."""
    return is_plain(module, nn.Linear) and (module.bias is not None) == has_bias


def is_plain_batch_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a plain ``nn.BatchNorm2d`` with parameters, and running statistics of a momentum."""
    # Without momentum, batch norm keeps a cumulative average, whose count a fused operator would read on the host.
    return (
        is_plain(module, nn.BatchNorm2d)
        and module.track_running_stats
        and not any(part is None for part in (module.weight, module.bias, module.running_mean, module.running_var))
        and module.momentum is not None
    )
