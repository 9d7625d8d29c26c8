"""Switch the backend of all layers of a model."""

from torch import nn

from ..kernels import check_backend


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Switch every layer of ``model`` to ``backend`` (``auto``, ``triton``, ``composed`` or ``reference``).

    All backends share one set of parameters and compute the same function: switching changes the speed, and results by
    rounding only. Whether ``triton`` can run is checked when the model runs, because it depends on the device.

    Returns:
        ``model`` itself.

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
    """Return the modules of ``model``, itself included, whose operators have several implementations."""
    return [module for module in model.modules() if hasattr(module, "backend")]
