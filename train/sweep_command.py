"""The `command:` of a sweep file: the words that W&B's agent runs, with its macros."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config_messages import shown
from train.sweep_values import Malformed

EXAMPLE = 'command: [train, --config, sft_qwen3.yaml, "${args}"]'
_ARGS = {"${args}": False, "${args_no_equals}": True}
"""The macros that stand for the trial's options, and whether these are two words each."""
_REFUSED = {
    "${args_append_hydra}": "is for Hydra",
    "${args_dict}": "is no option of `train`",
    "${args_json_file}": "is a file that only W&B's agent writes",
    "${args_json}": "is JSON, which `train` does not read as options",
    "${args_no_boolean_flags}": "leaves out what is false, so that the config's own value would hold",
    "${args_no_hyphens}": "leaves out the dashes that options of `train` begin with",
    "${args_override_hydra}": "is for Hydra",
}
_BEFORE = ("${env}", "${interpreter}", "${program}")


@dataclass(frozen=True)
class Command:
    """The words behind `train`.

    Attributes:
        before, after: around those of the trial.
        separate: an option of the trial and its value are two words.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    separate: bool = False

    def words(self, options: Sequence[str]) -> list[str]:
        """All of them, with these options of a trial."""
        words = [word for option in options for word in option.split("=", 1)] if self.separate else options
        return [*self.before, *words, *self.after]


def read_command(found: Any, program: str) -> Command:
    """What is behind `train` in a command.

    Args:
        found: the list in the file.
        program: what `${program}` stands for.

    Raises:
        Malformed: with the reason.
    """
    if not isinstance(found, list) or not found:
        raise Malformed(f"command {'is missing' if found is None else f'is {shown(found)}'}; as {EXAMPLE}")
    words = [_filled(str(word)) for word in found]
    for word in words:
        if word in _REFUSED:
            raise Malformed(f"command: {word} {_REFUSED[word]}; use ${{args}}")
        if "${" in word and word not in (*_ARGS, *_BEFORE):
            raise Malformed(f"command: {word} is no macro of W&B's; use ${{args}}, as a word of its own")
    words = [program if word == "${program}" else word for word in words]
    begin = next((number for number, word in enumerate(words) if Path(word).name == "train"), None)
    if begin is None:
        raise Malformed(f"command does not call `train`; as {EXAMPLE}")
    places = [number for number, word in enumerate(words) if word in _ARGS]
    if len(places) != 1 or places[0] < begin:
        raise Malformed(f"command needs ${{args}} once, behind `train`; as {EXAMPLE}")
    (middle,) = places
    return Command(tuple(words[begin + 1 : middle]), tuple(words[middle + 1 :]), _ARGS[words[middle]])


def _filled(word: str) -> str:
    """A word with W&B's `${envvar:NAME}` filled in, as its agent does it."""
    return re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda found: os.environ.get(found[1], found[1]), word)
