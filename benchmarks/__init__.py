"""Measurements, run by hand as `python -m benchmarks.<name>`; never timed tests."""

import secateur as secateur  # sets the thread policy before any of them imports torch
