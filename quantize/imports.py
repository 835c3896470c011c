"""Large libraries, imported without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports of torch and transformers: hundreds of thousands of objects, all of which stay.

    The collector would go over them many times while they are made: a sixth of the time that such a process takes to
    start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
