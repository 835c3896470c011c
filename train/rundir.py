"""A run's directory and manifest: the only writer of run files, each written atomically."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import read_mapping, write_atomically
from quantize.storage import sync_folder


def default_name(config_name: str, resolved: dict[str, Any]) -> str:
    """<date-time>_<config>_<hash of the settings>."""
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]
    return f"{datetime.now():%Y%m%d-%H%M%S}_{config_name}_{digest}"


def _is_beginning(folder: Path) -> bool:
    """Whether a folder is empty, or holds what a run killed in its first moment leaves; nothing of the user's."""
    names = {file.name for file in folder.iterdir()} - {".lock", ".manifest.json.tmp"}
    if not names:
        return True
    try:
        ours = json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == {"stages": {}}
    except (OSError, ValueError):
        return False
    return ours and names <= {"manifest.json", "config.yaml", ".config.yaml.tmp", ".config.resolved.json.tmp"}


class RunDir:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: str, name: str, config_yaml: str, resolved: dict[str, Any]) -> RunDir:
        """Makes a run directory, or opens the one that the same settings made.

        Raises:
            UserError: the folder belongs to another run or to no run, or cannot be written.
        """
        path = Path(root).expanduser() / name
        settings = path / "config.resolved.json"
        if settings.is_file():
            if read_mapping(settings) != resolved:
                raise UserError(
                    f"run.name: {path} holds another run; choose another run.name, or: {cls(path).resume_command}"
                )
            return cls(path)
        if path.exists() and not (path.is_dir() and _is_beginning(path)):
            raise UserError(f"run.name: {path} exists and is no run; choose another run.name or run.root")
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run.write_json("manifest.json", {"stages": {}})  # first: `_is_beginning` knows a run by it
            run.write_text("config.yaml", config_yaml)
            run.write_json("config.resolved.json", resolved)
        except OSError as error:
            raise UserError(
                f"run.root: {path} cannot be written ({error.strerror}); choose another run.root"
            ) from error
        return run

    @classmethod
    def open(cls, run: str, root: str) -> RunDir:
        """A run by path or by name under `root`. Raises UserError with near names."""
        for path in (Path(run).expanduser(), Path(root).expanduser() / run):
            if (path / "config.resolved.json").is_file():
                return cls(path)
        names = [path.parent.name for path in Path(root).expanduser().glob("*/config.resolved.json")]
        near = difflib.get_close_matches(run, names, n=3, cutoff=0.3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--resume {run}: no such run, neither as a path nor under {root}{hint}")

    @property
    def resume_command(self) -> str:
        """What continues this run."""
        return f"train --resume {shlex.quote(str(self.path))}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process out of this run. Raises UserError where one is at work."""
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.path} is in use by another process; wait for it, or stop it") from error
            yield

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file; NaN and infinity are refused."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False))

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the run. Raises UserError where it is damaged."""
        return read_mapping(self.path / name)

    @contextmanager
    def commit_folder(self, final: Path) -> Iterator[Path]:
        """A folder of this directory that appears as `final` only when it is whole and on disk."""
        assert final.is_relative_to(self.path), f"{final} is no part of {self.path}"
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            sync_folder(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def check_disk(self, needed: int) -> None:
        """Raises UserError when less than `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            gib = 1 << 30
            raise UserError(
                f"run.root: {self.path} has {free / gib:.1f} GiB free, this run needs about {needed / gib:.1f} GiB; "
                "free some or choose another run.root"
            )

    def update_manifest(self, **values: Any) -> None:
        """Sets top-level values of manifest.json."""
        self.write_json("manifest.json", {**self.read_json("manifest.json"), **values})

    def stage_done(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        """The result of a finished stage with this fingerprint, else None."""
        entry = self.read_json("manifest.json")["stages"].get(name, {})
        if entry.get("status") == "done" and entry["fingerprint"] == fingerprint:
            return dict(entry["result"])
        return None

    def stage_start(self, name: str, fingerprint: str) -> None:
        """Notes that a stage is under way."""
        self._set_stage(name, {"status": "running", "fingerprint": fingerprint})

    def stage_finish(self, name: str, fingerprint: str, seconds: float, result: dict[str, Any]) -> None:
        """Notes that a stage is done, and its result."""
        entry = {"status": "done", "fingerprint": fingerprint, "seconds": round(seconds, 3), "result": result}
        self._set_stage(name, entry)

    def _set_stage(self, name: str, entry: dict[str, Any]) -> None:
        stages = self.read_json("manifest.json")["stages"]
        self.update_manifest(stages={**stages, name: entry})

    def training_losses(self, arm: str) -> list[tuple[int, float]]:
        """(step, loss) of an arm's training, from events.jsonl; a step that was repeated counts once, the last time."""
        losses: dict[int, float] = {}
        path = self.path / "events.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                if '"kind": "step"' not in line:
                    continue
                try:
                    event = json.loads(line)
                except ValueError:  # a line that a kill cut short
                    continue
                if event.get("arm") == arm:
                    losses[int(event["step"])] = float(event["loss"])
        return sorted(losses.items())
