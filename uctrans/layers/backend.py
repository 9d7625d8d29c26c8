"""Switch the implementation that a model's operators use."""

from torch import nn

from ..kernels import check_backend


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Let every layer of ``model`` use ``backend`` (``auto``, ``triton``, ``composed`` or ``reference``); returns it.

    Parameters are shared by all backends, so this changes speed and never results beyond rounding. Whether ``triton``
    can run is checked when the model does, for only then is its device known.

    Raises:
        ValueError: the name is unknown, or ``model`` has no layer with a backend.
    """
    check_backend(backend)
    layers = layers_with_backend(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with a backend: give a model that holds layers of uctrans.layers"
        )
    for layer in layers:
        layer.backend = backend
    return model


def layers_with_backend(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model``, itself included, whose operators have several implementations."""
    return [module for module in model.modules() if hasattr(module, "backend")]
