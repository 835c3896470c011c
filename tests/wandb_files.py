"""What W&B wrote for its server, read back from its own files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


def log_entries(data: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log after W&B's 7 bytes: blocks of 32 KiB; crc (4), length (2), kind (1), content."""
    position, entry = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        entry += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):
            return  # not wholly on disk yet
        if kind in (1, 4):  # whole, or last part
            yield entry
            entry = b""


def wandb_exits(run: Path) -> list[int]:
    """The exit codes of a run's W&B runs, as its server would get them."""
    from wandb.proto import wandb_internal_pb2

    codes = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        records = [wandb_internal_pb2.Record.FromString(data) for data in log_entries(path.read_bytes())]
        codes += [record.exit.exit_code for record in records if record.HasField("exit")]
    return codes
