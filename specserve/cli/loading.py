"""Loads libraries and models without garbage collection."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Switch garbage collection off, and exclude what was made meanwhile from later collections.

    Hardly anything that libraries and models make while they are loaded is garbage, but looking for
    it would take a fifth of the time of loading, and as long again when the process exits.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
