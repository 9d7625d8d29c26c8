"""The parts of ``python -m benchmarks.gpu_evidence``, and what runs, watches and records them."""
