"""Switch the implementation that a model's operators use."""

from torch import nn

from ..kernels import check_backend


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Let every layer of ``model`` use ``backend`` (``auto``, ``triton``, ``composed`` or ``reference``); returns it.

    Parameters are shared by all backends, so this changes speed and never results beyond rounding.

    Raises:
        ValueError: the name is unknown.
    """
    check_backend(backend)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model
