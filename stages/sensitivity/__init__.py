"""A pipeline of its own: how sensitive each layer is, as `python -m stages.sensitivity`."""
