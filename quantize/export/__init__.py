"""Checkpoints in the formats of other runtimes, each in packages of its own beside the environment that trains."""
