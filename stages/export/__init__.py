"""A separate pipeline: the finetuned network for other runtimes, as `python -m stages.export`."""
