"""The state of the GPU as nvidia-smi tells it, and the wait until it is cool again."""

import os
import subprocess
import time
from collections.abc import Callable

import torch

FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}
COOL_MARGIN = 10  # degrees above the rest that count as rest
POLL_SECONDS = 1.0

State = dict[str, float]


def gpu_state() -> State | None:
    """Clocks, temperature and power of the first visible GPU; ``None`` where nvidia-smi does not tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", f"--id={first}"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    state = {}
    for name, value in zip(FIELDS.values(), output.strip().split(","), strict=False):
        try:
            state[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return state or None


def cool_down(rest: State | None, seconds: float, read: Callable[[], State | None] = gpu_state) -> State | None:
    """Wait until the GPU is within ``COOL_MARGIN`` of its temperature at ``rest``, so many seconds at most.

    Returns the state then. Where the temperature is not known there is nothing to wait for.
    """
    deadline = time.monotonic() + seconds
    state = read()
    while rest and state and "celsius" in rest and "celsius" in state:
        left = deadline - time.monotonic()
        if state["celsius"] <= rest["celsius"] + COOL_MARGIN or left <= 0:
            break
        time.sleep(min(POLL_SECONDS, left))
        state = read()
    return state


def gpu_answers() -> bool:
    """Whether the GPU still works. True where there is none.

    After an illegal access nothing does in this process, and after a failed capture of a graph no random number may be
    drawn.
    """
    if not torch.cuda.is_available():
        return True
    try:
        return torch.ones(2, device="cuda").sum().item() == 2 and torch.rand(1, device="cuda").item() < 1
    except RuntimeError:
        return False


def in_words(state: State | None) -> str:
    """Such as ``1980 MHz, 45 °C``."""
    if not state:
        return "not known"
    words = [f"{state['sm_mhz']:.0f} MHz"] if "sm_mhz" in state else []
    return ", ".join([*words, *([f"{state['celsius']:.0f} °C"] if "celsius" in state else [])])
