"""Finishes a run on a machine that runs its target: converts, reloads, evaluates, and renews the report.

`gathered.json` keeps what the run measured, so that this needs no training code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.files import write_atomically
from quantize.jobs import MAY_OVERFLOW, ONLY_TRAINED_ON, Job, Jobs, rows_paths, task_rows_path
from quantize.run_report import write_report
from quantize.runs import is_outside, read_gathered
from quantize.schemes import Scheme, Target


def finish_run(folder: Path, *, target: str | None, progress: Any = None) -> dict[str, Any]:
    """Converts the merged weights of a finished training on this machine, reloads, evaluates, and renews the report.

    Raises:
        UserError: the run is not that far, or this machine cannot run the target.
    """
    from quantize.evaluate import Scores
    from quantize.gate import check_gap
    from quantize.hardware import describe_here
    from quantize.schemes import find_scheme
    from quantize.worker import run_jobs, run_timings

    gathered = read_gathered(folder)
    picked = _pick_target(folder, gathered, target)
    chosen = gathered["format"]
    chosen = {**chosen, "target": picked.name, "missing": []}
    jobs = _jobs(folder, gathered, chosen, picked.dtype or gathered["dtype"])
    _check_files(folder, gathered, jobs)
    _check_engine(jobs, find_scheme(chosen["scheme"]), picked)
    _check_tasks(jobs, gathered["task_key"])
    _check_rewards(jobs)
    merged, control = folder / "merged", folder / "control" / "merged" if gathered["control"] else None
    reference, here = control or merged, describe_here(jobs.plain_dtype)
    before = gathered.get("finished", gathered["trained_on"])
    # From the first step on, eval/ holds what was measured here: what goes on after a failure must know.
    write_atomically(folder / "gathered.json", json.dumps({**gathered, "finished": {}}, indent=1))

    def work(name: str, todo: list[Job]) -> list[Any]:
        return run_jobs(todo, folder / "eval" / f"{name}.request.json", progress)

    final_job = jobs.evaluate("final", jobs.shipped, reference=reference)
    shipped, fake, final = work("finish", [
        jobs.convert(merged), jobs.simulate("fake", merged, trained=True, reference=reference), final_job,
    ])  # fmt: skip
    if jobs.inside:
        gap = fake["loss"] - final["loss"]
        check_gap(gap, find_scheme(chosen["scheme"]), picked, lambda: work("compare", [jobs.compare(merged)])[0])
    # What was measured on another machine, or in another dtype, makes no clean pair: its arithmetic differs, too.
    others = [jobs.evaluate("tuned", merged)]
    if control is not None:
        others += [jobs.evaluate("control", control), jobs.simulate("ptq", control, reference=control)]
    again = [job for job in others if here != before or not _is_measured(folder, job, jobs)]
    if again:
        work("arms", again)
    layers = {} if jobs.moves_layers else work("layers", [jobs.layers(merged, simulated=False)])[0]
    costs = run_timings(lambda: work("cost", jobs.cost(merged))) if jobs.cost_batches else []
    if jobs.tasks is not None:
        able = [job for job in (final_job, *again) if not Scores.load(Path(job["scores"])).broken]
        work("tasks", [jobs.benchmark(job, task_rows_path(folder, job["name"])) for job in able])
    gathered |= {
        "format": chosen,
        "dtype": jobs.dtype,
        "shipped": shipped,
        "final": final | {"layers": layers, "fake_loss": fake["loss"]},
        "cost": costs,
        "finished": here,
    }
    return write_report(folder, gathered)[0]


def _is_measured(folder: Path, job: Job, jobs: Jobs) -> bool:
    scores = Path(job["scores"])
    if not scores.is_file():
        return False
    paths = rows_paths(folder, job["name"], tasks=jobs.tasks is not None, own=jobs.method is not None)
    return all(path.is_file() for path in paths)


def _check_files(folder: Path, gathered: Mapping[str, Any], jobs: Jobs) -> None:
    """A run may have been copied here in part: what finishing it reads must be there before the first step."""
    from quantize.evaluate import Scores

    needed = [folder / "merged" / "config.json", jobs.samples, *([Path(jobs.grid)] if jobs.grid else [])]
    needed += [folder / "control" / "merged" / "config.json"] if gathered["control"] else []
    for arm in ONLY_TRAINED_ON:
        scores = jobs.scores(arm)
        needed.append(scores)
        if not (arm in MAY_OVERFLOW and scores.is_file() and Scores.load(scores).broken):  # else it has no rows
            needed += rows_paths(folder, arm, tasks=bool(jobs.tasks), own=jobs.method is not None)
    gone = [str(path.relative_to(folder)) for path in needed if not path.exists()]
    if gone:
        raise UserError(f"{folder} lacks {', '.join(gone)}; copy the whole run directory")


def _check_engine(jobs: Jobs, scheme: Scheme, target: Target) -> None:
    """What ran the tasks of the other arms must be here, and load what ships."""
    if jobs.engine is None:
        return
    from quantize.serving.engine import find_same, refuse_gpu, refuse_unserved

    refuse_unserved(scheme, [target])
    refuse_gpu((scheme, target), jobs.plain_dtype)
    find_same(jobs.engine)


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


def _check_rewards(jobs: Jobs) -> None:
    """Rewards of one's own must be here, and the ones that rated the other arms."""
    asked = jobs.method or {}
    if not asked:
        return
    from quantize.rewards import load_rewards, source_key

    load_rewards(asked["rewards"])
    others = [name for name, key in zip(asked["rewards"], asked["sources"], strict=True) if source_key(name) != key]
    if others:
        raise UserError(
            f"{jobs.run}: the rewards {', '.join(others)} are others here than where the run was made, so what ships "
            "could not be compared: bring the same files"
        )


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
        format={key: value for key, value in chosen.items() if key != "missing"},
        dtype=dtype,
        plain_dtype=dtype,
        batch_size=gathered["batch_size"],
        trust_remote_code=gathered["trust_remote_code"],
        inside=bool(gathered["qat"]) and not is_outside(gathered),
        tasks=gathered["tasks"],
        chat_template=gathered["chat_template"],
        cost_batches=gathered["cost_batches"],
        method=gathered.get("method"),
        engine=gathered.get("engine"),
    )
