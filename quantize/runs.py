"""Run directories as `quantize` finds them: what a run measured, and which command measures it anew."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import read_mapping

GATHERED_VERSION = 5
"""Of the form of gathered.json and of the files under eval/."""


def find_run(name: str, root: str) -> Path | None:
    """The run directory of that path, or of that name under `root`; None where there is none."""
    paths = Path(name).expanduser(), Path(root).expanduser() / name
    found = (path for path in paths if (path / "manifest.json").is_file())
    return next(found, None)


def read_gathered(folder: Path) -> dict[str, Any]:
    """What a run measured. Raises UserError where it is not that far, or was made by another version."""
    path = folder / "gathered.json"
    if not path.is_file():
        raise UserError(f"{folder} has no finished training yet; continue it with: train --resume {folder}")
    try:
        gathered = read_mapping(path)
    except UserError as error:
        raise UserError(f"{error}; renew it with: train --resume {folder}") from error
    if gathered.get("version") != GATHERED_VERSION:
        raise UserError(f"{folder} was made by another version of ongrid; renew it first with: train --resume {folder}")
    return gathered


def refuse_finished(folder: Path) -> None:
    """Raises UserError where `finish_run` went on with that run: training's steps would undo what it measured."""
    if _is_taken_up(folder):
        command = renew_command(folder)
        raise UserError(
            f"{folder} was taken up by `quantize convert`; measure it anew where its target runs: {command}"
        )


def renew_command(folder: Path) -> str:
    """What measures a run anew: the command that made its report last."""
    if _is_taken_up(folder):
        return finish_command(folder, read_mapping(folder / "gathered.json")["format"]["target"])
    return f"train --resume {folder}"


def _is_taken_up(folder: Path) -> bool:
    """Whether `finish_run` went on with that run; a damaged file says no, as resuming writes it again."""
    try:
        gathered = read_mapping(folder / "gathered.json")
    except UserError:
        return False
    return gathered.get("version") == GATHERED_VERSION and "finished" in gathered


def finish_command(folder: Path, target: str) -> str:
    return f"quantize convert {shlex.quote(str(folder))} --target {target}"


def is_outside(gathered: Mapping[str, Any]) -> bool:
    """The adapter was trained outside the fake quantiser: no merged weight computes the function that was trained."""
    return bool(gathered["qat"]) and gathered["recipe"]["fake_quant"]["placement"] == "outside"
