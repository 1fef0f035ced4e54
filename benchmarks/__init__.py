"""Benchmarks, run by hand as `python -m benchmarks.<name>`; they are not part of the tests."""

import secateur.base.allocator

secateur.base.allocator.tune_process()  # like the stages, before any benchmark imports torch
