"""Benchmarks of the operators and networks; run them with ``make benchmark``."""
