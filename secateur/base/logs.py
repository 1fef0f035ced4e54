"""What libraries log and warn of, where it says nothing to users of Secateur."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def muted(level: int, warn: bool = True) -> Iterator[None]:
    """Without log lines of this level (`logging.INFO`, ...) and below, of any library.

    Without `warn`, there are no Python warnings either.
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
