"""The two ways a command ends that are not our failure: the user's input, and the user's stop."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used. Each line says what, where and what to do.

    Args:
        lines: one error a line; all that were found are given at once.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Stopped(Exception):
    """A signal stopped the run after its state was saved.

    Args:
        signal_number: 2 (Ctrl-C) or 15 (SIGTERM); the process exits with 128 + this number.
        resume_command: what continues the run.
    """

    def __init__(self, signal_number: int, resume_command: str) -> None:
        super().__init__(f"stopped by signal {signal_number}; continue with: {resume_command}")
        self.signal_number = signal_number
        self.resume_command = resume_command
