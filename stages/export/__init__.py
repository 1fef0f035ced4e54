"""A pipeline of its own: the finetuned network for other runtimes, as `python -m stages.export`."""
