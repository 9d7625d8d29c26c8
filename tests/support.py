"""The pages, and a stand-in for CUDA graphs on a CPU, as strict as they are: a recording freezes decisions of Python.

A recording notes every operator that reaches the CPU, with the tensors it was given. A replay runs these operators
again and writes their results into the tensors that the recording returned. A learning rate that is a Python number, a
batch that is counted on the host, or a tensor that is replaced therefore shows as it would on a GPU.
"""

import contextlib
import re
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uctrans.graphs import CaptureError, Recording
from uctrans.layers import checkpointing

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("kernels/**/README.md"),
        *ROOT.glob("uctrans/models/pretrained/*/README.md"),
    )
}
READS_A_VALUE = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal")


def blocks(language, page=None):
    """Return the code blocks of a page, or of all of them."""
    texts = PAGES.values() if page is None else [PAGES[page]]
    return [
        block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


class HostRecorder:
    """Take the place of ``CudaRecorder``, and count its calls.

    ``free`` bytes are free on the device that it stands for, and a recording takes ``size_of(result)`` of them.
    """

    def __init__(self, generators=(), *, free=1 << 40, size_of=lambda result: 0):
        self.generators, self.free, self.size_of = generators, free, size_of
        self.warm_ups = self.rehearsals = self.recordings = self.replays = self.pools = 0

    def begin_pool(self):
        self.pools += 1

    def free_memory(self):
        return self.free

    def warm_up(self, work):
        self.warm_ups += 1
        return work()

    def rehearse(self, work):
        self.rehearsals += 1
        with _Notes():
            return work()

    def record(self, work):
        """Record the work, which also does it, so the first replay does nothing."""
        self.recordings += 1
        with _Notes() as notes, mock.patch.object(checkpointing, "is_recording", return_value=True):
            result = work()
        is_done = True

        def replay():
            nonlocal is_done
            self.replays += 1
            if not is_done:
                notes.replay()
            is_done = False
            return result

        return Recording(replay, self.size_of(result))


class _Notes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function.name() in READS_A_VALUE:
            raise CaptureError(f"operation not permitted when recording: {function.name()}")
        results = function(*arguments, **options)
        if not _only_views(function):
            self.calls.append((function, arguments, options, results, torch.is_inference_mode_enabled()))
        return results

    @torch.no_grad()
    def replay(self):
        for function, arguments, options, results, is_inference in self.calls:
            mode = torch.inference_mode() if is_inference else contextlib.nullcontext()
            with mode, torch._C._AutoDispatchBelowAutograd():
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


def _only_views(function):
    aliases = [result.alias_info for result in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
