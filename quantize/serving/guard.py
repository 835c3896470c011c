"""Ends a server whose starter is gone: a process that is killed outright ends nothing itself, and its engine would hold
the GPU. `python guard.py GROUP` waits until its stdin ends, which the starter holds open, then ends that process group.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_SECONDS = 20.0


def main(group: int) -> None:
    """Waits, then ends the group: SIGTERM, and SIGKILL for what does not go."""
    while os.read(0, 1):
        pass
    try:
        os.killpg(group, signal.SIGTERM)
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
