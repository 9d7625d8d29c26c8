"""Which implementation of an operator runs: the paper's steps, plain PyTorch at its fastest, or Triton."""

import os

BACKENDS = ("auto", "triton", "composed", "reference")
ENVIRONMENT_VARIABLE = "UCTRANS_BACKEND"


def check_backend(backend: str) -> str:
    """Return ``backend`` if it names one of :data:`BACKENDS`; raise ``ValueError`` otherwise."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    return backend


def resolve_backend(backend: str) -> str:
    """Turn a requested backend into the one that runs.

    ``auto`` is replaced by the environment variable ``UCTRANS_BACKEND`` where that is set, else by ``composed``. A
    backend asked for by name runs or raises; there is no silent fallback.

    Raises:
        ValueError: the name, or the value of the environment variable, is unknown.
        NotImplementedError: ``triton`` is asked for.
    """
    check_backend(backend)
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        if backend not in BACKENDS:
            raise ValueError(
                f"the environment variable {ENVIRONMENT_VARIABLE} is {backend!r}; "
                f"set it to one of {', '.join(BACKENDS)}"
            )
    if backend == "triton":
        raise NotImplementedError(
            "this release has no Triton operators yet; use backend='composed' (the same results) or 'auto'"
        )
    return "composed" if backend == "auto" else backend
