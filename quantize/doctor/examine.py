"""All sections together, the verdict, and the page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize.doctor import abilities, child, machine, packages, tools
from quantize.doctor.findings import Finding, Section, look, pip

Ask = Callable[..., dict[str, Any]]
_TRAIN, _FORMATS, _IMPORTS = "Train", "Run: the formats", "Imports"


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        sections: in the page's order.
        faults: why nothing can be trained and shipped here; empty where something can.
        verdict: one line.
    """

    sections: tuple[Section, ...]
    faults: tuple[str, ...]
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """For --json; `format` changes when keys do."""
        return {
            "format": 1,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "can_train_and_ship": not self.faults,
            "verdict": self.verdict,
            "faults": list(self.faults),
            "sections": [section.as_json() for section in self.sections],
        }


def examine(root: Path, *, imports: bool = False, ask: Ask = child.ask) -> Examination:
    """Looks at everything; nothing that is broken ends it.

    Args:
        root: where runs go.
        imports: also imports the slow packages, each in a process of its own.
        ask: starts such a process.
    """
    gpus = machine.find_gpus()
    answers = ask("torch")
    from quantize.export.environment import packages_folder

    parts: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("This machine", lambda: machine.describe_machine(root, gpus)),
        ("Packages", lambda: look("packages", lambda: _packages(answers, gpus))),
        (_TRAIN, lambda: look("training", lambda: abilities.describe_training(answers))),
        (_FORMATS, lambda: look("formats", lambda: abilities.describe_running(answers))),
        ("Export", lambda: look("export", lambda: abilities.describe_exports(packages_folder(), gpu=bool(gpus)))),
        ("Tools", lambda: look("tools", tools.describe_tools)),
    ]
    if imports:
        parts.insert(2, (_IMPORTS, lambda: look("imports", lambda: _imports(ask))))
    sections = tuple(Section(title, tuple(probe())) for title, probe in parts)
    faults = tuple(_faults(sections, answers))
    return Examination(sections, faults, _verdict(sections, faults))


def _packages(answers: Mapping[str, Any], gpus: list[machine.Gpu]) -> Iterator[Finding]:
    yield from packages.describe_packages(answers, gpus)
    yield from packages.describe_optional(answers)


def _imports(ask: Ask) -> Iterator[Finding]:
    """Each package in a process of its own, two at a time: some take half a minute."""
    known = {name.partition(".")[0] for name in child.IMPORTS}
    installed = {name for name in known if packages.version_of({"mslk": "mslk-cuda"}.get(name, name))}
    names = [name for name in child.IMPORTS if name.partition(".")[0] in installed]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: ask("import", name), names))
    for name, answer in zip(names, answers, strict=True):
        seconds = f"{answer.get('seconds', 0):.1f} s"
        if "imported" in answer:
            yield Finding(name, "yes", f"imported in {seconds}")
        else:
            package = name.partition(".")[0]
            remedy = "train --config tiny.yaml --qat int8-int4 --model.backend=peft" if package == "unsloth" else ""
            command = remedy or pip({"mslk": "mslk-cuda"}.get(package, package), options="--force-reinstall")
            text = f"does not import ({seconds}): {answer.get('failed', 'no message')}"
            yield Finding(name, "broken", text, command)


def _faults(sections: tuple[Section, ...], answers: Mapping[str, Any]) -> Iterator[str]:
    """What has to work for anything to be trained and shipped."""
    missing = [need.text for need in packages.core() if need.found is None]
    if missing:
        yield f"not installed: {', '.join(missing)}; install with: {pip(*missing)}"
    elif "torch" not in answers:
        yield f"torch cannot be imported: {answers.get('failed', 'no message')}"
    elif "torchao" not in answers:
        yield f"torchao cannot be imported: {answers.get('failed', 'no message')}"
    core = {"transformers.modeling_utils", "peft", "trl.trainer.sft_trainer"}
    for section in sections:
        for finding in section.findings:
            if section.title == _IMPORTS and finding.name in core and finding.state == "broken":
                yield f"{finding.name} {finding.text}"
            if finding.name == "Python" and finding.state == "broken":
                yield f"Python {finding.text}"


def _verdict(sections: tuple[Section, ...], faults: tuple[str, ...]) -> str:
    if faults:
        return "nothing can be trained and shipped here"
    states = {section.title: {each.name: each.state for each in section.findings} for section in sections}
    backends = [name for name in ("unsloth", "peft") if states[_TRAIN].get(f"backend {name}") == "yes"]
    runs = list(states[_FORMATS].values()).count("yes")
    simulated = list(states[_FORMATS].values()).count("simulated")
    broken = sum(each.state == "broken" for section in sections for each in section.findings)
    said = f"trains with {' or '.join(backends)}; {runs} formats run here, {simulated} are simulated"
    return f"{said}; {broken} thing(s) above are broken" if broken else said


# ---- the page --------------------------------------------------------------------------------------------------------

_WORDS = {"fact": "", "yes": "yes", "simulated": "simulated", "no": "no", "broken": "BROKEN", "unknown": "unknown"}


def page(found: Examination, width: int) -> Iterator[str]:
    """The lines of the page; a command is never broken, so that it can be copied whole.

    Args:
        width: of the terminal, in characters.
    """
    for section in found.sections:
        yield section.title
        broad = max((len(each.name) for each in section.findings), default=0)
        for each in section.findings:
            start = f"  {each.name:{broad}}  {_WORDS[each.state]:9}  "
            yield from textwrap.wrap(
                each.text, width, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
            if each.command:
                yield f"{' ' * len(start)}$ {each.command}"
        yield ""
    yield f"Verdict: {found.verdict}"
