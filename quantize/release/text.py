"""A written card as text: what is blank in it, and the repository that its code loads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from quantize.errors import UserError

_FENCE = re.compile(r"^(`{3,})")
_TO_FILL = re.compile(
    r"\bto be (filled|done|added|measured)\b|\bTBD\b|\bTODO\b|more information needed|\{\{|\blorem ipsum\b",
    re.IGNORECASE,
)
_NO_VALUE = re.compile(r"(?<![\w.])(None(?! of\b)|nan|NaN|null|inf)(?![\w.])")
_MODEL_ID = re.compile(r'^model_id = "(.+)"$', re.MULTILINE)


def check_repository(name: str) -> None:
    """Raises UserError where it can be no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"--repo {name} can be no repository: it is OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from error


def find_blanks(text: str) -> list[str]:
    """What a reader would find missing: placeholders, empty cells, values that are none, headings of nothing."""
    found: list[str] = []
    heading, filled = "", True
    for number, line in _prose(text):
        where = f"line {number}"
        if line.startswith("#"):
            if not filled and _level(line) <= _level(heading):
                found.append(f"nothing under {heading.lstrip('# ')!r}")
            heading, filled = line, False
            continue
        filled = filled or bool(line.strip())
        if to_fill := _TO_FILL.search(line):
            found.append(f"{where}: {to_fill.group()!r}")
        if no_value := _NO_VALUE.search(line):
            found.append(f"{where}: a value is {no_value.group()}")
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found += [f"{where}: an empty cell"] * any(cell in ("", "-", "?") for cell in cells)
        elif line.startswith("|") and "---" not in line:
            found.append(f"{where}: an empty row")
    if not filled:
        found.append(f"nothing under {heading.lstrip('# ')!r}")
    return found


def export_code(name: str) -> str:
    """The commands that export a release, a folder or a repository of the hub, to ExecuTorch."""
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = name if local else f"./{name.rsplit('/', 1)[-1]}"
    download = "" if local else f"hf download {name} --local-dir {folder}\n"
    return f"{download}quantize export {shlex.quote(folder)} --to executorch"


def with_repository(text: str, repository: str) -> str:
    """The card with `repository` in place of the name that its code loads; text around the code stays as it is."""
    named = _MODEL_ID.search(text)
    if named is None:
        return text
    text = text.replace(export_code(named.group(1)), export_code(repository))
    word = re.compile(rf"(?<![^\s\"'])({re.escape(named.group(1))})(?![^\s\"'])")
    lines, fence = [], ""
    for line in text.split("\n"):
        opening = _FENCE.match(line)
        if opening and not fence:
            fence = opening.group(1)
        elif fence and line.strip() == fence:
            fence = ""
        lines.append(word.sub(lambda _: repository, line) if fence else line)
    return "\n".join(lines)


def _level(heading: str) -> int:
    return len(heading) - len(heading.lstrip("#"))


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of what is neither front matter nor code; a block of code counts as one line of text."""
    fence, front = "", text.startswith("---\n")
    for number, line in enumerate(text.split("\n"), 1):
        if front:
            front = not (number > 1 and line == "---")
            continue
        opening = _FENCE.match(line)
        if fence:
            if line.strip() == fence:
                fence = ""
            continue
        if opening:
            fence = opening.group(1)
            yield number, "code"
            continue
        yield number, line
