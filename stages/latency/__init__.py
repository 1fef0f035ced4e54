"""A pipeline of its own: times of layers at several widths, as `python -m stages.latency`."""
