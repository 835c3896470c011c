"""The variables that processes get which measure: those of the user, not those that libraries set while they train.

TRL sets VLLM_LOGGING_LEVEL and MASTER_PORT, unsloth TORCHINDUCTOR_COMPILE_THREADS and more, for their own process. What
is measured after the training must not run otherwise than what was measured before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_kept: list[dict[str, str]] = []
"""What is held, the innermost last."""
_set: dict[str, tuple[str | None, str | None]] = {}
"""Variables that an earlier block changed: to what, from what; None = not set."""


def variables() -> dict[str, str]:
    """What a process that measures gets: what `kept` holds, else those of now without what its blocks left changed."""
    if _kept:
        return dict(_kept[-1])
    found = dict(os.environ)
    for name, (left, before) in _set.items():
        if found.get(name) == left:  # else the user has set it since
            found.pop(name, None)
            found |= {} if before is None else {name: before}
    return found


@contextmanager
def kept() -> Iterator[None]:
    """While held, processes that measure get the variables of its beginning, and afterwards none that changed in it."""
    start, before = variables(), dict(os.environ)
    _kept.append(start)
    try:
        yield
    finally:
        _kept.pop()
        for name in before.keys() | os.environ.keys():
            if before.get(name) != os.environ.get(name):
                _set[name] = (os.environ.get(name), start.get(name))
