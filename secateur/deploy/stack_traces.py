"""Traces of networks without a stack trace for every operation, which take a quarter less time."""

import contextlib
from collections.abc import Iterator

from torch.fx import config


@contextlib.contextmanager
def omitted() -> Iterator[None]:
    """While torch traces or rebuilds a program, its nodes note no lines of code.

    Only torch's own messages could show them. Versions of torch without this switch ignore it.
    """
    previous = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = previous
