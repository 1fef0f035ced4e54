"""The stages of the pipeline, one script each, run as `python -m stages.<name>`."""

import secateur.base.allocator

secateur.base.allocator.tune_process()  # before any stage imports torch
secateur.base.allocator.pause_collection()  # until the stage has imported what it needs
