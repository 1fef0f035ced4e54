"""The pipeline's steps, one script each, run as `python -m stages.<name>`."""

import secateur as secateur  # sets the thread policy before any stage imports torch
