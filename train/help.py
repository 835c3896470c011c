"""What `train --help` shows: the config's keys and the command's own options."""

from __future__ import annotations

from train.config import RunConfig


class HelpLine(RunConfig):
    """RunConfig and the options that are no config keys."""

    config: str | None = None
    """A YAML file or config.resolved.json: a path, or the name of a packaged config."""
    resume: str | None = None
    """Continue this run (a path, or a name under run.root) in place of --config."""
    sweep: str | None = None
    """Run the trials of a W&B sweep file here (a path, or the name of a packaged one), in place of --config."""
    trials: int | None = None
    """How many trials of --sweep; null = run_cap of the file, or the whole grid."""
    dry_run: bool = False
    """Print the resolved config, the steps, what will be skipped, and the memory and disk needed; run nothing."""
    debug: bool = False
    """Show the traceback of an error."""
    version: bool = False
    """Print the version."""
