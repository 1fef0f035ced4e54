"""Measurements, run by hand as `python -m benchmarks.<name>`; never timed tests."""

import secateur.base.allocator

secateur.base.allocator.tune_process()  # as the stages do, before any benchmark imports torch
