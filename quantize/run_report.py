"""metrics.json and the report of a run directory, from what its steps measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.algorithms import ALGORITHMS
from quantize.errors import UserError
from quantize.files import write_atomically
from quantize.jobs import MAY_OVERFLOW, ONLY_TRAINED_ON, rows_paths
from quantize.metrics import ARMS, COMPARISONS, build_metrics
from quantize.runs import finish_command, is_outside, renew_command
from quantize.serving.engine import engine_words

if TYPE_CHECKING:
    from quantize.evaluate import Scores
    from quantize.tasks import Row

_MIB = 1 << 20


def write_report(folder: Path, gathered: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Writes metrics.json, report.md, report.html and the model card of what ships.

    Args:
        folder: run directory with eval/<arm>.parquet.
        gathered: measurements by step; see `train.stages.Stages.report`.

    Returns:
        The metrics and the text of report.md.
    """
    from quantize.pareto import nominal_mib
    from quantize.plots import draw_plots
    from quantize.release.card import write_run_card
    from quantize.report import ReportContext, render_html, render_markdown
    from quantize.samples import worst_samples

    chosen, final = gathered["format"], gathered["final"]
    arms, tasks = _read_arms(folder, gathered)
    overflown = _take_overflown(gathered, arms, tasks)
    simulated = bool(chosen and not gathered["shipped"])
    trained_on = gathered["trained_on"]
    finished = gathered.get("finished") or trained_on
    metrics = build_metrics(
        arms=arms,
        why=_reasons(gathered) | overflown,
        train_ship_gap=_train_ship_gap(gathered),
        backend_gap=_backend_gap(gathered),
        reference=("control" if gathered["control"] else "tuned") if final else None,
        size=_sizes(folder, gathered),
        coverage=_coverage(gathered),
        scheme=chosen["scheme"] if chosen else None,
        target=chosen["target"] if chosen else None,
        dtype=gathered["dtype"],
        simulated=simulated,
        missing=chosen["missing"] if chosen and simulated else (),
        finish_command=finish_command(folder, chosen["target"]) if simulated else None,
        task_rows=tasks,
        layers=final.get("layers"),
        cost=[] if _failed_costs(gathered) else gathered["cost"],
        elsewhere=None if finished == trained_on else {"arms": ONLY_TRAINED_ON, **trained_on},
    )
    losses = {arm: [(step, loss) for step, loss in points] for arm, points in gathered["losses"].items()}
    context = ReportContext(
        run=gathered["run"],
        command=gathered["command"],
        model=gathered["model"],
        data=gathered["data"],
        recipe=gathered["recipe"],
        task_settings=_task_settings(gathered),
        few_shot=gathered.get("task_fewshot", {}),
        cut=gathered.get("task_cut", {}),
        versions=_versions(gathered),
        device="; trained on ".join(dict.fromkeys([finished["device"], trained_on["device"]])),
        seconds=gathered["seconds"],
        losses=losses,
        choice=_choice(gathered),
        worst=worst_samples(folder / "eval", arms, tasks),
        plots=draw_plots(metrics, losses, nominal_mib(gathered, metrics["size"]["tuned_mib"])),
    )
    (folder / "plots").mkdir(exist_ok=True)
    for plot in context.plots:
        (folder / "plots" / f"{plot.name}.png").write_bytes(plot.png)
    text = render_markdown(metrics, context)
    write_atomically(folder / "gathered.json", json.dumps(gathered, indent=1))
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False))
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.html", render_html(metrics, context))
    write_run_card(folder, metrics, gathered)
    return metrics, text


def _read_arms(folder: Path, gathered: Mapping[str, Any]) -> tuple[dict[str, Scores], dict[str, list[Row]]]:
    """Every arm's scores, and its results on tasks. Raises UserError with the file that cannot be read."""
    from quantize.evaluate import Scores
    from quantize.task_rows import load_rows

    wanted = set(ARMS) if gathered["control"] else set(ARMS) - {"control", "ptq"}
    wanted -= set() if gathered["format"] else {"base_quantized", "ptq", "final"}
    arms: dict[str, Scores] = {}
    tasks: dict[str, list[Row]] = {}
    for name in (name for name in ARMS if name in wanted):
        path = folder / "eval" / f"{name}.parquet"
        try:
            arms[name] = Scores.load(path)
            own = gathered.get("method") is not None
            if (gathered["tasks"] or own) and not (name in MAY_OVERFLOW and arms[name].broken):
                tasks[name] = []
                for path in rows_paths(folder, name, tasks=bool(gathered["tasks"]), own=own):
                    tasks[name] += load_rows(path)
        except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's are ValueErrors
            said = str(error).splitlines()[0]
            advice = "" if isinstance(error, FileNotFoundError) else "remove it"
            if advice and name.startswith("base"):
                advice += ", and the folder .cache/baseline beside the run that it was copied from"
            advice += ", then: " if advice else ""
            raise UserError(f"{path} cannot be read ({said}); {advice}{renew_command(folder)}") from error
    return arms, tasks


def _take_overflown(
    gathered: Mapping[str, Any], arms: dict[str, Scores], tasks: dict[str, list[Row]]
) -> dict[str, str]:
    """Takes out the arms that need no numbers and have none, on held-out samples or on tasks; returns why, by key."""
    why: dict[str, str] = {}
    for arm in (arm for arm in MAY_OVERFLOW if arm in arms):
        overflows = f"quantised to {gathered['format']['scheme']} its numbers overflow"
        broken = arms[arm].broken
        if broken:
            why[arm] = f"{overflows}: the loss of {broken} held-out samples is NaN or infinite"
            del arms[arm]
            tasks.pop(arm, None)
            continue
        failed = {row.name for row in tasks.get(arm, ()) if row.metric and not math.isfinite(_value(row))}
        if failed:
            reason = f"{overflows} on {', '.join(sorted(failed))}"
            pairs = [f"comparisons.{a}_vs_{b}" for a, b in COMPARISONS if arm in (a, b)]
            parts = ("tasks_mean", *(f"tasks.{name}" for name in dict.fromkeys(row.name for row in tasks[arm])))
            why |= {f"{part}.{key}": reason for part in parts for key in (arm, *pairs)}
            del tasks[arm]
    return why


def _value(row: Row) -> float:
    return math.nan if row.value is None else row.value


def _task_settings(gathered: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks' settings, and what ran them where it is not the transformers of the run's packages."""
    engine, tasks = gathered.get("engine"), gathered["tasks"] or {}
    return dict(tasks) | ({"engine": engine_words(engine)} if engine else {})


def _versions(gathered: Mapping[str, Any]) -> dict[str, str]:
    """Packages of the training, and those of the finishing that differ."""
    found: dict[str, str] = dict(gathered["versions"])
    packages = (gathered.get("finished") or {}).get("packages", {})
    others = {name: version for name, version in packages.items() if found.get(name, version) != version}
    served = (gathered.get("engine") or {}).get("packages", {})
    found |= {name if name == "vllm" else f"{name}, beside vLLM": version for name, version in served.items()}
    return found | {f"{name}, where it was finished": version for name, version in others.items()}


def _train_ship_gap(gathered: Mapping[str, Any]) -> float | None:
    """Loss of what was trained minus loss of what ships."""
    fake = gathered["arms"].get("fake")
    if fake is None or not gathered["qat"]:
        return None
    # A run that was finished by `finish_run` was simulated once more there, in the arithmetic that it ships in.
    simulated = gathered["final"].get("fake_loss", fake["loss"])
    trained = gathered["tuned"]["backend_loss"] if is_outside(gathered) else simulated
    return float(trained - gathered["final"]["loss"])


def _backend_gap(gathered: Mapping[str, Any]) -> float | None:
    if is_outside(gathered):
        return None
    plain = gathered["arms"].get("fake" if gathered["qat"] else "tuned")
    return float(gathered["tuned"]["backend_loss"] - plain["loss"]) if plain else None


def _coverage(gathered: Mapping[str, Any]) -> dict[str, Any]:
    found = gathered["shipped"].get("coverage") or gathered["tuned"].get("coverage")
    keys = ("quantized_fraction", "share_of_all_weights", "skipped")
    return {} if found is None else {key: found[key] for key in keys}


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


def _choice(gathered: Mapping[str, Any]) -> list[str]:
    """What chose the numbers that ship, where an algorithm did."""
    names, shipped = (gathered["format"] or {}).get("algorithms"), gathered["shipped"]
    if not names:
        return []
    data = shipped.get("calibration")
    seen = f", calibrated on {data['samples']} samples of {data['data']} ({data['tokens']:,} tokens)" if data else ""
    return [f"numbers chosen by {', '.join(names)}{seen}", *shipped.get("notes", ())]


def _reasons(gathered: Mapping[str, Any]) -> dict[str, str]:
    why: dict[str, str] = {}
    if gathered["format"] is None:
        nothing = "nothing is quantised: neither qat nor quantize.scheme is set"
        why |= dict.fromkeys(("base_quantized", "ptq", "final"), nothing)
    if not gathered["control"]:
        reason = "this run has no QAT, so tuned is the control" if not gathered["qat"] else "eval.control is false"
        why |= {"control": reason}
        why.setdefault("ptq", reason)
    if is_outside(gathered):
        why["backend_gap"] = "fake_quant.placement=outside: the plain graph of the merged weights is another function"
    if not gathered["qat"]:
        why["train_ship_gap"] = "this run has no QAT"
    if not gathered["cost_batches"]:
        why["cost"] = "eval.cost_batches is empty"
    if failed := _failed_costs(gathered):
        why["cost"] = f"the timing failed ({failed[0]}); eval/cost.request.log has the whole of it"
    moving = [name for name in (gathered["format"] or {}).get("algorithms", ()) if ALGORITHMS[name].kind != "rounds"]
    if moving:
        why["sqnr"] = f"{', '.join(moving)} changed the layers before quantising them, so no pair compares"
    if gathered["format"] and not gathered["shipped"]:
        missing = "; ".join(gathered["format"]["missing"])
        why |= dict.fromkeys(("size.final_mib", "size.bits_per_weight"), f"this machine lacks {missing}")
    return why
