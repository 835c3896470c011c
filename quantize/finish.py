"""metrics.json and the report of a run directory, from what its steps measured.

`gathered.json` keeps the measurements, so that `quantize convert RUN` can finish a run on another machine and write the
same files without the training code.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.jobs import Job, Jobs, task_rows_path
from quantize.metrics import build_metrics
from quantize.schemes import Target

if TYPE_CHECKING:
    from quantize.evaluate import Scores
    from quantize.tasks import Row

_ARMS = ("base", "base_quantized", "control", "ptq", "tuned", "final")
_MIB = 1 << 20
GATHERED_VERSION = 3
"""Of the form of gathered.json and of the files under eval/."""


def write_report(folder: Path, gathered: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Writes metrics.json, report.md and report.html.

    Args:
        folder: run directory with eval/<arm>.parquet.
        gathered: measurements by step; see `train.stages.Stages.report`.

    Returns:
        The metrics and the text of report.md.
    """
    from quantize.plots import draw_plots
    from quantize.report import ReportContext, render_html, render_markdown
    from quantize.samples import worst_samples

    chosen, final = gathered["format"], gathered["final"]
    arms, tasks = _read_arms(folder, gathered)
    simulated = bool(chosen and not gathered["shipped"])
    metrics = build_metrics(
        arms=arms,
        why=_reasons(gathered),
        train_ship_gap=_train_ship_gap(gathered),
        backend_gap=_backend_gap(gathered),
        reference=("control" if gathered["control"] else "tuned") if final else None,
        size=_sizes(folder, gathered),
        coverage=_coverage(gathered),
        scheme=chosen["scheme"] if chosen else None,
        target=chosen["target"] if chosen else None,
        simulated=simulated,
        missing=chosen["missing"] if chosen and simulated else (),
        finish_command=_finish_command(folder, chosen["target"]) if simulated else None,
        task_rows=tasks,
        layers=final.get("layers"),
        cost=[] if _failed_costs(gathered) else gathered["cost"],
    )
    losses = {arm: [(step, loss) for step, loss in points] for arm, points in gathered["losses"].items()}
    context = ReportContext(
        run=gathered["run"],
        command=gathered["command"],
        model=gathered["model"],
        data=gathered["data"],
        recipe=gathered["recipe"],
        versions=gathered["versions"],
        device=gathered["device"],
        seconds=gathered["seconds"],
        losses=losses,
        worst=worst_samples(folder / "eval", arms, tasks),
        plots=draw_plots(metrics, losses),
    )
    (folder / "plots").mkdir(exist_ok=True)
    for plot in context.plots:
        (folder / "plots" / f"{plot.name}.png").write_bytes(plot.png)
    text = render_markdown(metrics, context)
    write_atomically(folder / "gathered.json", json.dumps(gathered, indent=1))
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False))
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.html", render_html(metrics, context))
    return metrics, text


def _read_arms(folder: Path, gathered: Mapping[str, Any]) -> tuple[dict[str, Scores], dict[str, list[Row]]]:
    """Every arm's scores, and its results on tasks. Raises UserError with the file that cannot be read."""
    from quantize.evaluate import Scores
    from quantize.tasks import load_rows

    wanted = set(_ARMS) if gathered["control"] else set(_ARMS) - {"control", "ptq"}
    wanted -= set() if gathered["format"] else {"base_quantized", "ptq", "final"}
    arms: dict[str, Scores] = {}
    tasks: dict[str, list[Row]] = {}
    for name in (name for name in _ARMS if name in wanted):
        path = folder / "eval" / f"{name}.parquet"
        try:
            arms[name] = Scores.load(path)
            if gathered["tasks"]:
                path = task_rows_path(folder, name)
                tasks[name] = load_rows(path)
        except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's are ValueErrors
            said = str(error).splitlines()[0]
            advice = "" if isinstance(error, FileNotFoundError) else "remove it"
            if advice and name.startswith("base"):
                advice += ", and the folder .cache/baseline beside the run that it was copied from"
            advice += ", then: " if advice else ""
            raise UserError(f"{path} cannot be read ({said}); {advice}train --resume {folder}") from error
    return arms, tasks


def finish_run(folder: Path, *, target: str | None, progress: Any = None) -> dict[str, Any]:
    """Converts the merged weights of a finished training on this machine, reloads, evaluates, and renews the report.

    Raises:
        UserError: the run is not that far, or this machine cannot run the target.
    """
    from quantize.gate import check_gap
    from quantize.schemes import find_scheme
    from quantize.worker import run_jobs, run_timings

    gathered = read_gathered(folder)
    picked = _pick_target(folder, gathered, target)
    chosen = gathered["format"]
    chosen = {**chosen, "target": picked.name, "missing": []}
    jobs = _jobs(folder, gathered, chosen, picked.dtype or gathered["dtype"])
    _check_tasks(jobs, gathered["task_key"])
    if jobs.grid is not None and not Path(jobs.grid).is_dir():
        raise UserError(f"{folder} lacks grid/, the weights as they were trained; copy the whole run directory")
    merged, reference = folder / "merged", folder / ("control/merged" if gathered["control"] else "merged")

    def work(name: str, todo: list[Job]) -> list[Any]:
        return run_jobs(todo, folder / "eval" / f"{name}.request.json", progress)

    final_job = jobs.evaluate("final", jobs.shipped, reference=reference)
    shipped, fake, final = work("finish", [
        jobs.convert(merged), jobs.simulate("fake", merged, trained=True, reference=reference), final_job,
    ])  # fmt: skip
    if jobs.inside:
        gap = fake["loss"] - final["loss"]
        check_gap(gap, find_scheme(chosen["scheme"]), picked, lambda: work("compare", [jobs.compare(merged)])[0])
    (layers,) = work("layers", [jobs.layers(merged, simulated=False)])
    costs = run_timings(lambda: work("cost", jobs.cost(merged))) if jobs.cost_batches else []
    if jobs.tasks is not None:
        work("tasks", [jobs.benchmark(final_job, task_rows_path(folder, "final"))])
    gathered |= {
        "format": chosen,
        "dtype": jobs.dtype,
        "shipped": shipped,
        "final": final | {"layers": layers},
        "cost": costs,
    }
    gathered["arms"]["fake"] = fake
    return write_report(folder, gathered)[0]


def _pick_target(folder: Path, gathered: Mapping[str, Any], asked: str | None) -> Target:
    """Where it will run: what is asked for, else what the run was for; with the numbers that were trained."""
    from quantize.hardware import pick_target
    from quantize.schemes import find_scheme

    chosen = gathered["format"]
    if chosen is None:
        raise UserError(
            f"{folder} was trained without a scheme; use: quantize convert {folder / 'merged'} --scheme NAME"
        )
    scheme = find_scheme(chosen["scheme"])
    picked, missing = pick_target(scheme, asked or chosen["target"])
    if missing:
        raise UserError(f"--target {picked.name}: this machine lacks {'; '.join(missing)}")
    trained = scheme.find_target(chosen["target"])
    if gathered["qat"] and trained.numbers() is not picked.numbers():
        raise UserError(
            f"the run was trained for {trained.name}, whose numbers differ from {picked.name}'s: train for that target"
        )
    scheme.pick_group_size(chosen["group_size"], picked)  # its kernel may offer fewer
    return picked


def _jobs(folder: Path, gathered: Mapping[str, Any], chosen: Mapping[str, Any], dtype: str) -> Jobs:
    return Jobs(
        run=folder,
        format={key: chosen[key] for key in ("scheme", "target", "group_size", "skip")},
        dtype=dtype,
        plain_dtype=dtype,
        batch_size=gathered["batch_size"],
        trust_remote_code=gathered["trust_remote_code"],
        inside=bool(gathered["qat"]) and not _outside(gathered),
        tasks=gathered["tasks"],
        chat_template=gathered["chat_template"],
        cost_batches=gathered["cost_batches"],
    )


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
    gathered: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if gathered.get("version") != GATHERED_VERSION:
        raise UserError(f"{folder} was made by another version of ongrid; renew it first with: train --resume {folder}")
    return gathered


def _check_tasks(jobs: Jobs, key: str) -> None:
    """The tasks must be on this machine what they were where the other arms ran, or no pair can be made."""
    from quantize.worker import run_jobs

    if jobs.tasks is None:
        return
    (found,) = run_jobs([jobs.check_tasks(jobs.run / "merged")], jobs.run / "eval" / "tasks.request.json")
    if found["fingerprint"] != key:
        raise UserError(
            f"{jobs.run}: the tasks {', '.join(jobs.tasks['names'])} are others here than where the run was made "
            "(their files, their data or lm-eval's version), so what ships could not be compared: bring the same ones"
        )


def copy_atomically(source: Path, target: Path) -> None:
    """Copies a file so that a reader sees the old or the new one, never a part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _finish_command(folder: Path, target: str) -> str:
    return f"quantize convert {shlex.quote(str(folder))} --target {target}"


def _train_ship_gap(gathered: Mapping[str, Any]) -> float | None:
    """Loss of what was trained minus loss of what ships."""
    fake = gathered["arms"].get("fake")
    if fake is None or not gathered["qat"]:
        return None
    trained = gathered["tuned"]["backend_loss"] if _outside(gathered) else fake["loss"]
    return float(trained - gathered["final"]["loss"])


def _outside(gathered: Mapping[str, Any]) -> bool:
    """The adapter was trained outside the fake quantiser: no merged weight computes the function that was trained."""
    return bool(gathered["qat"]) and gathered["recipe"]["fake_quant"]["placement"] == "outside"


def _backend_gap(gathered: Mapping[str, Any]) -> float | None:
    if _outside(gathered):
        return None
    plain = gathered["arms"].get("fake" if gathered["qat"] else "tuned")
    return float(gathered["tuned"]["backend_loss"] - plain["loss"]) if plain else None


def _coverage(gathered: Mapping[str, Any]) -> dict[str, Any]:
    found = gathered["shipped"].get("coverage") or gathered["tuned"].get("coverage")
    return {} if found is None else {key: found[key] for key in ("quantized_fraction", "skipped")}


def _sizes(folder: Path, gathered: Mapping[str, Any]) -> dict[str, Any]:
    from quantize.convert import folder_bytes

    sizes: dict[str, Any] = {
        "base_mib": gathered["baseline"]["disk_bytes"] / _MIB,
        "tuned_mib": folder_bytes(folder / "merged") / _MIB,
    }
    if gathered["shipped"]:
        sizes["final_mib"] = folder_bytes(folder / "quantized") / _MIB
        sizes["memory_mib"] = gathered["final"]["memory_bytes"] / _MIB
        sizes["bits_per_weight"] = 8 * folder_bytes(folder / "quantized") / count_weights(folder / "merged")
    return sizes


def count_weights(folder: Path) -> int:
    """Number of weights in a checkpoint, from the headers of its safetensors."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118  safe_open is no mapping
                size = 1
                for length in stored.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _failed_costs(gathered: Mapping[str, Any]) -> list[str]:
    return [measured["failed"] for measured in gathered["cost"] if "failed" in measured]


def _reasons(gathered: Mapping[str, Any]) -> dict[str, str]:
    why: dict[str, str] = {}
    if gathered["format"] is None:
        nothing = "nothing is quantised: neither qat nor quantize.scheme is set"
        why |= dict.fromkeys(("base_quantized", "ptq", "final"), nothing)
    if not gathered["control"]:
        reason = "this run has no QAT, so tuned is the control" if not gathered["qat"] else "eval.control is false"
        why |= {"control": reason}
        why.setdefault("ptq", reason)
    if _outside(gathered):
        why["backend_gap"] = "fake_quant.placement=outside: the plain graph of the merged weights is another function"
    if not gathered["qat"]:
        why["train_ship_gap"] = "this run has no QAT"
    if not gathered["cost_batches"]:
        why["cost"] = "eval.cost_batches is empty"
    if failed := _failed_costs(gathered):
        why["cost"] = f"the timing failed ({failed[0]}); eval/cost.request.log has the whole of it"
    if gathered["format"] and not gathered["shipped"]:
        missing = "; ".join(gathered["format"]["missing"])
        why |= dict.fromkeys(("size.final_mib", "size.bits_per_weight"), f"this machine lacks {missing}")
    return why
