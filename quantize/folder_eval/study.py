"""`quantize eval RUN_OR_MODEL`: a model on held-out text and tasks beside a reference, and whether it is good enough.

What is measured is found by `quantize.folder_eval.models`, in words and numbers by `quantize.folder_eval.figures`, on
the page by `quantize.folder_eval.page`; the models run in a fresh process (`quantize.worker`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.document import to_html, to_markdown
from quantize.errors import UserError
from quantize.files import make_folder, refuse_run, write_atomically, writing_to
from quantize.folder_eval.models import Asked, Plan, make_plan
from quantize.folder_eval.sources import MODEL, Model
from quantize.folder_eval.work import Measured, measure
from quantize.serving.engine import engine_words

if TYPE_CHECKING:
    from quantize.tasks import Settings

_VERSION = 1
_MIB = 1 << 20
_OPTIONS = {  # what shared code calls by its name in a training's config -> this command's option
    "eval.tasks": "--tasks",
    "eval.num_fewshot": "--num-fewshot",
    "eval.engine=": "--engine ",
    "quantize.target=": "--target ",
    "quantize.group_size=": "group size ",
}


def evaluate(asked: Asked, command: str = "", progress: Any = None) -> tuple[dict[str, Any], Path]:
    """Measures and writes eval.json, report.md and report.html.

    Args:
        command: what repeats it, for the page.
        progress: called with (model, done, total).

    Returns:
        What eval.json holds, and the folder.

    Raises:
        UserError: there is no such run or model, no data, a task that cannot be run, or a model whose numbers overflow.
    """
    try:
        return _evaluate(asked, command, progress)
    except UserError as error:
        raise UserError(*(_as_options(line) for line in error.lines)) from error


def _evaluate(asked: Asked, command: str, progress: Any) -> tuple[dict[str, Any], Path]:
    _check(asked)
    plan = make_plan(asked)
    settings = _task_settings(asked, plan)
    with _workplace(plan.output) as work:
        measured = measure(plan, settings, work, progress)
        found = _found(plan, asked, measured, settings, command)
        _write(found, plan.output)
    return found, plan.output


def _check(asked: Asked) -> None:
    for option, value in (("--samples", asked.samples), ("--batch-size", asked.batch_size), ("--limit", asked.limit)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: 1 or more")
    if asked.num_fewshot is not None and asked.num_fewshot < 0:
        raise UserError(f"--num-fewshot {asked.num_fewshot}: 0 or more")
    if not 0 <= asked.tolerance < math.inf:
        raise UserError(f"--tolerance {asked.tolerance}: nats per token, 0 or more")
    if asked.data is not None and not asked.data.is_file():  # said before a model is downloaded
        raise UserError(f"--data {asked.data}: there is no such file")
    if asked.output is not None:
        refuse_run(asked.output)
    if asked.engine == "vllm" and not asked.tasks:
        raise UserError("--engine vllm runs tasks, and --tasks names none; name some, or leave it out")
    if asked.tasks:
        from quantize.tasks import check_names, require_lm_eval

        require_lm_eval()
        check_names(asked.tasks)


def _as_options(line: str) -> str:
    for name, option in _OPTIONS.items():
        line = line.replace(name, option)
    return line


def _task_settings(asked: Asked, plan: Plan) -> Settings | None:
    """The tasks as the run ran them, so that its arms' results can be paired; None without tasks."""
    from quantize.tasks import Settings

    if not asked.tasks:
        return None
    own = {**(plan.tasks or {}), "names": list(asked.tasks)}
    own |= {} if asked.limit is None else {"limit": asked.limit}
    own |= {} if asked.num_fewshot is None else {"num_fewshot": asked.num_fewshot}
    return Settings(**own)


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A folder inside `output` for what is not kept; a request's log stays beside it where something of ours fails."""
    made = not output.exists()
    make_folder(output)
    work = output / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    clean = False
    try:
        yield work
        clean = True
    except UserError:
        clean = True
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if clean:
            for path in output.glob("eval.request.*"):
                path.unlink()
        if made and not any(output.iterdir()):
            output.rmdir()


def _found(plan: Plan, asked: Asked, measured: Measured, settings: Settings | None, command: str) -> dict[str, Any]:
    """What eval.json holds."""
    from quantize.folder_eval.figures import difference, good_enough, tasks_found, verdict
    from quantize.hardware import describe_here

    own, keys = measured.scores[MODEL], [each.id for each in plan.references]
    pairs = {}
    for each in plan.references:
        near = own if each.stored is None else replace(own, kl=None, top1=None)
        pairs[each.id] = difference(near, measured.scores[each.id], asked.tolerance)
    here = describe_here(plan.model.computes_in)
    nothing: dict[str, Any] = {"tasks": {}, "tasks_mean": {}, "why": {}}
    tasks = tasks_found(measured.rows, keys) if measured.rows else nothing
    found: dict[str, Any] = {
        "version": _VERSION,
        "title": plan.title,
        "command": command,
        "data": str(plan.data),
        "n_samples": len(own.nll),
        "n_tokens": int(own.tokens.sum()),
        "tolerance": asked.tolerance,
        "models": {each.id: _entry(each, measured) for each in (plan.model, *plan.references)},
        "differences": pairs,
        "format": dict(plan.format) if plan.format is not None else None,
        "tasks": tasks["tasks"],
        "tasks_mean": tasks["tasks_mean"],
        "task_settings": _told(settings, plan) if settings is not None else None,
        "task_notes": _task_notes(plan, measured, tasks),
        "layers": dict(measured.layers),
        "device": here["device"],
        "packages": here["packages"],
        "notes": list(plan.notes),
    }
    found["good_enough"] = good_enough(found)
    found["verdict"] = verdict(found)
    return found


def _told(settings: Settings, plan: Plan) -> dict[str, Any]:
    """How the tasks were run, with what ran them where it is not the transformers of the packages."""
    found = asdict(settings)
    return found | ({"engine": engine_words(plan.engine)} if plan.engine is not None else {})


def _entry(model: Model, measured: Measured) -> dict[str, Any]:
    """One model of eval.json."""
    from quantize.folder_eval.figures import absolute

    return {
        "name": model.name,
        "folder": str(model.folder),
        "simulated": model.simulate is not None,
        **absolute(measured.scores[model.id]),
        "disk_mib": _disk_mib(model),
        "memory_mib": measured.memory.get(model.id),
        "computes_in": model.computes_in,
    }


def _disk_mib(model: Model) -> float | None:
    """MiB of the weights' files; None of what is simulated, or of an arm of which no file is kept."""
    from quantize.convert import folder_bytes

    if model.simulate is not None or model.stored is not None:
        return model.disk_mib
    return folder_bytes(model.folder) / _MIB


def _task_notes(plan: Plan, measured: Measured, tasks: Mapping[str, Any]) -> dict[str, str]:
    """By task or model, what the table does not show."""
    if not measured.rows:
        return {}
    notes = {key.removeprefix("tasks."): text for key, text in tasks["why"].items() if key != "tasks_mean"}
    cut = measured.checked.get("cut") or {}
    notes |= {name: f"{number} prompts were longer than the model's context and lost their beginning"
              for name, number in cut.items() if name in tasks["tasks"]}  # fmt: skip
    gone = [each.name for each in plan.references if each.id not in measured.rows]
    return notes | dict.fromkeys(gone, "the run has no results on the same samples of all of these tasks")


def _write(found: Mapping[str, Any], output: Path) -> None:
    from quantize.folder_eval.page import page

    blocks = list(page(found))
    with writing_to(output):
        write_atomically(output / "eval.json", json.dumps(found, indent=1, allow_nan=False))
        write_atomically(output / "report.md", to_markdown(blocks))
        write_atomically(output / "report.html", to_html(f"evaluation of {found['title']}", blocks))
