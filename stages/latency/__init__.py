"""A separate pipeline: times of layers at several widths, as `python -m stages.latency`."""
