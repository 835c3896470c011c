"""What a sweep leaves and shows: sweep.json, sweep.md and a table of the trials, the best one first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.document import Block, Code, Heading, Paragraph, Table, to_markdown
from quantize.files import write_atomically
from train.sweep_check import Plan

if TYPE_CHECKING:
    from train.sweep_study import Ended

_LONGEST = 160  # characters of an error in a table


def run_name(plan: Plan, number: int) -> str:
    """The folder of a trial's run, under run.root."""
    return f"{plan.sweep.name}-{number:03d}"


def ranked(plan: Plan, ended: Sequence[Ended]) -> list[Ended]:
    """The trials, the best first, those without a value last."""
    sign = 1 if plan.sweep.goal == "minimize" else -1

    def order(each: Ended) -> tuple[bool, float, int]:
        value = each.outcome.value
        return (value is None, 0.0 if value is None else sign * value, each.number)

    return sorted(ended, key=order)


def table(plan: Plan, ended: Sequence[Ended]) -> Table:
    """One row for each trial."""
    names = [each.key for each in plan.sweep.space.varied]
    rows = [
        [f"{each.number}", _value(each), *(_short(each.point[name]) for name in names), _seconds(each), _state(each)]
        for each in ranked(plan, ended)
    ]
    header = ["trial", plan.sweep.metric, *names, "seconds", "state"]
    return Table(header, rows, frozenset(range(len(header) - 1)))


def plain_table(rows: Table) -> str:
    """A table as text, columns set apart by blanks."""
    lines = [list(rows.header), *(list(row) for row in rows.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows.header))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column in rows.numeric else text.ljust(widths[column])

    return "\n".join("  ".join(cell(text, column) for column, text in enumerate(line)).rstrip() for line in lines)


def repeat_command(plan: Plan, each: Ended) -> str:
    """What runs a trial's settings again, as a run of its own."""
    return shlex.join(["train", "--config", plan.config, *plan.words(each.point)])


def compare_command(plan: Plan, ended: Sequence[Ended]) -> str | None:
    """What compares the two best trials in pairs, sample by sample; None where there are not two."""
    best = [each for each in ranked(plan, ended) if each.outcome.value is not None and each.outcome.same_as is None]
    if len(best) < 2:
        return None
    return shlex.join(["quantize", "compare", *(str(plan.root / run_name(plan, each.number)) for each in best[:2])])


def write_results(folder: Path, plan: Plan, ended: Sequence[Ended], command: str) -> None:
    """Writes sweep.json and sweep.md, whole at any time.

    Args:
        command: what runs the sweep, or goes on with it.
    """
    sweep = plan.sweep
    best = next((each for each in ranked(plan, ended) if each.outcome.value is not None), None)
    found: dict[str, Any] = {
        "name": sweep.name,
        "file": str(sweep.path),
        "command": command,
        "method": sweep.method,
        "metric": {"name": sweep.metric, "goal": sweep.goal},
        "n_trials": plan.trials,
        "best": None if best is None else {**_as_json(plan, best), "command": repeat_command(plan, best)},
        "compare": compare_command(plan, ended),
        "trials": [_as_json(plan, each) for each in ended],
    }
    write_atomically(folder / "sweep.json", json.dumps(found, indent=1))
    write_atomically(folder / "sweep.md", to_markdown(list(_blocks(plan, ended, best, command))))


def _blocks(plan: Plan, ended: Sequence[Ended], best: Ended | None, command: str) -> Sequence[Block]:
    sweep = plan.sweep
    goal = "lower is better" if sweep.goal == "minimize" else "higher is better"
    blocks: list[Block] = [
        Heading(f"Sweep {sweep.name}", 1),
        Paragraph(f"{sweep.metric}, {goal}; method {sweep.method}; {len(ended)} of {plan.trials} trials have ended."),
        Code(command),
        Heading("Trials"),
        table(plan, ended),
    ]
    if best is not None:
        blocks += [
            Heading("The best one"),
            Paragraph(
                f"Trial {best.number}, {sweep.metric} {_value(best)}, in {plan.root / run_name(plan, _of(best))}. It "
                "was chosen by the numbers shown, so its own is flattering, the more so the more trials there were. "
                "Whether it differs from the next one is shown by the paired comparison."
            ),
            Code(repeat_command(plan, best)),
        ]
        pair = compare_command(plan, ended)
        blocks += [Code(pair)] if pair else []
    return blocks


def _as_json(plan: Plan, each: Ended) -> dict[str, Any]:
    return {
        "number": each.number,
        "run": str(plan.root / run_name(plan, _of(each))),
        "parameters": each.point,
        **vars(each.outcome),
    }


def _of(each: Ended) -> int:
    """The trial whose run it is."""
    return each.number if each.outcome.same_as is None else each.outcome.same_as


def _value(each: Ended) -> str:
    return "-" if each.outcome.value is None else f"{each.outcome.value:.6g}"


def _seconds(each: Ended) -> str:
    return f"{each.outcome.seconds:.0f}"


def _state(each: Ended) -> str:
    if each.outcome.same_as is not None:
        return f"same values as {each.outcome.same_as}"
    text = each.outcome.state + (f": {each.outcome.error}" if each.outcome.error else "")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
