"""Mute logs and warnings of libraries where they do not help users of Secateur."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def muted(level: int, warn: bool = True) -> Iterator[None]:
    """Context without log lines of this level (`logging.INFO`, ...) and below, of any library.

    If `warn` is false, Python warnings are suppressed too.
    """
    previous = logging.root.manager.disable
    logging.disable(level)
    try:
        with contextlib.nullcontext() if warn else warnings.catch_warnings():
            if not warn:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
