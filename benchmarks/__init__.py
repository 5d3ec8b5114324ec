"""Loopwright beside a raw loop and other trainers, on the same work: `python -m benchmarks`."""
