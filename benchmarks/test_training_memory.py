"""Peak memory of a training step, each backend in a process of its own."""

import subprocess
import sys

import pytest

STEP = """
import pathlib, sys, torch, uctrans
backend, base_channels, pixels, batch = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
model = uctrans.set_backend(uctrans.UCTransNet(base_channels=base_channels), backend)
model.to(memory_format=torch.channels_last).train()
image = torch.rand(batch, 3, pixels, pixels)
for _ in range(2):
    model.zero_grad(set_to_none=True)
    model(image).square().mean().backward()
# Not getrusage: its maximum is carried over from the process that started this one.
print(next(line.split()[1] for line in pathlib.Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""
KIB_IN_MIB = 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc, which only Linux has")
@pytest.mark.parametrize(
    ("base_channels", "pixels", "batch"), [(16, 224, 4), (64, 224, 4), (64, 512, 1), (64, 1024, 1)]
)
def test_training_step_needs_no_more_memory_than_the_reference(benchmark, base_channels, pixels, batch):
    benchmark.group = "peak memory of a training step"

    def peak_mib(backend):
        arguments = [backend, str(base_channels), str(pixels), str(batch)]
        output = subprocess.run([sys.executable, "-c", STEP, *arguments], check=True, capture_output=True, text=True)
        return int(output.stdout) / KIB_IN_MIB

    composed = benchmark.pedantic(peak_mib, args=("composed",), rounds=1)
    reference = peak_mib("reference")
    benchmark.extra_info |= {
        "base_channels": base_channels,
        "pixels": pixels,
        "batch": batch,
        "peak_mib": composed,
        "reference_peak_mib": reference,
    }
    assert composed <= reference
