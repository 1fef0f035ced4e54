"""A separate pipeline: how sensitive each layer is, as `python -m stages.sensitivity`."""
