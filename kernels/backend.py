"""Which form of an operator runs: the paper's steps, PyTorch at its fastest, or Triton.

A backend asked for by name runs or raises. One exception: beyond the sizes in an operator's docstring, ``triton`` runs
``composed``.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "composed", "reference")
ENVIRONMENT_VARIABLE = "UCTRANS_BACKEND"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"

# The Triton that each PyTorch for CUDA requires, and so brings. A PyTorch for the CPU brings none.
TRITON_OF_TORCH = {"2.11": "3.6.0", "2.12": "3.7.0", "2.13": "3.7.1"}

# Ampere: the first generation with asynchronous copies and bfloat16, on which the kernels' pipelines rest.
OLDEST_CUDA_CAPABILITY = (8, 0)


def check_backend(backend: str) -> str:
    """Return ``backend`` if it names one of :data:`BACKENDS`; raise ``ValueError`` otherwise."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    return backend


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the backend that runs on ``device``: ``triton``, ``composed`` or ``reference``.

    ``auto`` is replaced by the environment variable ``UCTRANS_BACKEND`` where that is set and not empty; else by
    ``triton`` on a GPU that the kernels run on, and by ``composed`` anywhere else.

    Raises:
        ValueError: the name, or the value of the environment variable, is unknown.
        NotImplementedError: ``triton`` is asked for and cannot run on ``device``; the message says why.
    """
    check_backend(backend)
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        if backend not in BACKENDS:
            raise ValueError(
                f"the environment variable {ENVIRONMENT_VARIABLE} is {backend!r}; "
                f"set it to one of {', '.join(BACKENDS)}"
            )
    if backend == "auto":
        return "triton" if device.type == "cuda" and obstacle_to_triton(device) is None else "composed"
    if backend == "triton" and (obstacle := obstacle_to_triton(device)) is not None:
        raise NotImplementedError(f"{obstacle}; use backend='composed' (the same results) or 'auto'")
    return backend


def choose_form(backend: str, tensor: Tensor, name: str, *, fits: bool = True) -> str:
    """Return the form in which a public function runs: ``triton``, ``composed`` or ``reference``.

    Args:
        backend: backend that was asked for.
        tensor: argument that decides device and dtype.
        name: name of the public function, for errors.
        fits: whether the sizes are within the limits of the kernels; beyond them, ``triton`` is ``composed``.

    Raises:
        ValueError: see :func:`resolve_backend`.
        NotImplementedError: see :func:`resolve_backend`; or ``triton`` was asked for by name, and ``tensor`` is
            float64 or a functional transform or forward-mode gradient is computed. ``auto`` leaves these to
            ``composed``.
    """
    form = resolve_backend(backend, tensor.device)
    if form != "triton":
        return form
    obstacle = None
    if tensor.dtype == torch.float64:
        obstacle = "computes in float32"
    elif is_transforming():
        obstacle = "has no forward-mode gradient, and no torch.func transform (jvp, vmap, grad)"
    if obstacle is not None and backend == "triton":
        raise NotImplementedError(f"the Triton operator of {name} {obstacle}; use backend='composed'")
    if obstacle is not None:
        return "composed"
    return "triton" if fits else "composed"


def must_use_pytorch_operations() -> bool:
    """Return whether a composed form must consist of PyTorch's operations, without gradients written by hand.

    ``torch.compile`` fuses PyTorch's operations; functional transforms and forward-mode gradients support nothing else.
    """
    return torch.compiler.is_compiling() or is_transforming()


def is_transforming() -> bool:
    """Return whether a transform of ``torch.func`` is active, or a level of forward-mode gradients is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_interpreting() -> bool:
    """Return whether Triton runs kernels in Python, on the CPU: ``TRITON_INTERPRET=1``, set before the first use."""
    return os.environ.get(INTERPRETER_VARIABLE) == "1"


def obstacle_to_triton(device: torch.device) -> str | None:
    """Return why the Triton operators cannot run on ``device``, or ``None`` where they can."""
    if find_spec("triton") is None:
        torch_release = ".".join(torch.__version__.split(".")[:2])
        version = TRITON_OF_TORCH.get(torch_release)
        return (
            f"the Triton operators need the package triton, which is not installed: "
            f"pip install triton{f'=={version}' if version else ''} (for PyTorch {torch_release}, on Linux)"
        )
    if is_interpreting():
        return None
    if device.type != "cuda":
        return f"the Triton operators run on a CUDA device, or on the CPU with {INTERPRETER_VARIABLE}=1; got {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CUDA_CAPABILITY:
        capability, oldest = (".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(device), (8, 0)))
        name = torch.cuda.get_device_name(device)
        return f"the Triton operators need CUDA capability {oldest} or newer; {name} has {capability}"
    return None


# What torch.compiler.assume_constant_result sets; that decorator loads the compiler, which takes longer than torch.
obstacle_to_triton._dynamo_marked_constant = True
