"""What `quantize eval` has measured: samples in the models' tokens, jobs for a fresh process, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.folder_eval.models import Plan
from quantize.folder_eval.sources import MODEL, Model

if TYPE_CHECKING:
    from quantize.evaluate import Sample, Scores
    from quantize.tasks import Row, Settings

Job = dict[str, Any]
_MIB = 1 << 20
_ALL = 2**31


@dataclass(frozen=True)
class Measured:
    """What the models gave, by their ids.

    Attributes:
        memory: MiB of the weights as they were loaded; nothing of a simulation or a run's stored arm.
        rows: results on tasks, of the models that were run on the same samples.
        layers: by name the fields of `quantize.layer_health.LayerHealth`.
        checked: what `quantize.worker_jobs.check_tasks` says.
    """

    scores: Mapping[str, Scores]
    memory: Mapping[str, float | None]
    rows: Mapping[str, Sequence[Row]]
    layers: Mapping[str, Any]
    checked: Mapping[str, Any]


def measure(plan: Plan, settings: Settings | None, work: Path, progress: Any = None) -> Measured:
    """Runs everything, what is quick to refuse first.

    Args:
        settings: of the tasks; None = no tasks.
        work: folder for what is not kept.
        progress: called with (model, done, total).
    """
    folders = _unpacked(plan, work)
    if plan.engine is not None:  # else it would refuse one after the others were measured
        from quantize.serving.engine import check_folders

        fresh = [each for each in (plan.model, *plan.references) if each.stored is None]
        dtypes = {folders[each.id]: each.dtype for each in fresh}
        check_folders(plan.engine, dtypes, trust_remote_code=plan.trust_remote_code)
    samples = _read_samples(plan, folders)
    write_samples(samples, work / "samples.parquet")
    return _measure(plan, folders, settings, work, len(samples), progress)


def _unpacked(plan: Plan, work: Path) -> dict[str, Path]:
    """The folder that each model is loaded from, by its id; packed ones are restored in `work` first."""
    from quantize.packed import is_packed
    from quantize.worker import run_jobs

    folders = {each.id: each.folder for each in (plan.model, *plan.references) if each.stored is None}
    jobs = []
    for key, folder in folders.items():
        if is_packed(folder):
            folders[key] = work / f"{key}.unpacked"
            jobs.append({"kind": "repack", "name": f"unpacking {folder.name}", "source": str(folder),
                         "output": str(folders[key]), "unpack": True})  # fmt: skip
    if jobs:
        run_jobs(jobs, plan.output / "eval.request.json")
    return folders


def _read_samples(plan: Plan, folders: Mapping[str, Path]) -> list[Sample]:
    """The held-out samples in the model's tokens, which must be those of every reference that is measured.

    Raises:
        UserError: no such file, none in it, or tokens that another model's are not.
    """
    from quantize.texts import load_samples

    tokenizers = {key: _tokenizer(folder, plan) for key, folder in folders.items()}
    own = tokenizers.pop(MODEL)
    samples = load_samples(plan.data, own, plan.calibrated + (plan.samples or _ALL))[plan.calibrated :]
    if not samples:
        raise UserError(
            f"--data {plan.data}: a file of that name calibrated {plan.model.name}, and no sample is left after the "
            f"{plan.calibrated} that it took; name other text"
        )
    used = sorted({token for sample in samples for token in sample.input_ids})
    if used[-1] >= len(own):
        raise UserError(f"--data {plan.data}: token {used[-1]} is none of {plan.model.name}'s: made for another model")
    names = {each.id: each.name for each in plan.references}
    for key, tokenizer in tokenizers.items():
        if used[-1] >= len(tokenizer) or tokenizer.convert_ids_to_tokens(used) != own.convert_ids_to_tokens(used):
            raise UserError(
                f"{names[key]} has another vocabulary than {plan.model.name}, so losses per token of the two cannot be "
                "compared; name a model of the same family with --against"
            )
    return samples


def _tokenizer(folder: Path, plan: Plan) -> Any:
    from quantize.convert import load_tokenizer

    try:
        found = load_tokenizer(folder, plan.trust_remote_code)
    except Exception as error:  # transformers raises many kinds; each says that the folder has none that can be read
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no tokenizer that can be loaded ({said[:200]}); copy its files there") from error
    if plan.chat_template:
        found.chat_template = plan.chat_template
    return found


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Writes the parquet file that `quantize.evaluate.read_samples` reads."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: [list(getattr(each, name)) for each in samples] for name in ("input_ids", "loss_mask")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _measure(
    plan: Plan, folders: Mapping[str, Path], settings: Settings | None, work: Path, count: int, progress: Any
) -> Measured:
    from quantize.evaluate import Scores
    from quantize.tasks import load_rows
    from quantize.worker import run_jobs

    fresh = [each for each in (plan.model, *plan.references) if each.stored is None]
    jobs = {f"score {each.id}": _score(each, plan, folders, work) for each in fresh}
    if plan.format is not None:
        jobs["layers"] = _layers(plan, folders, jobs[f"score {MODEL}"])
    if settings is not None:
        told = {"tasks": asdict(settings), "chat_template": plan.chat_template, "engine": plan.engine}
        others = [str(folder) for key, folder in folders.items() if key != MODEL]
        check = {**jobs[f"score {MODEL}"], **told, "kind": "tasks", "name": "tasks", "others": others}
        jobs = {"check": check, **jobs}  # what cannot be run is said before any model runs
        for each in fresh:
            score = {**jobs[f"score {each.id}"], **told, "name": f"{each.name}, tasks"}
            jobs[f"tasks {each.id}"] = score | {"kind": "benchmark", "task_rows": str(work / f"{each.id}.rows.parquet")}
    answers = run_jobs(list(jobs.values()), plan.output / "eval.request.json", progress)
    results = dict(zip(jobs, answers, strict=True))
    scores = {each.id: Scores.load(work / f"{each.id}.parquet") for each in fresh}
    scores |= {each.id: _first(Scores.load(each.stored), count) for each in plan.references if each.stored is not None}
    rows = {each.id: load_rows(work / f"{each.id}.rows.parquet") for each in fresh} if settings is not None else {}
    return Measured(
        scores=scores,
        memory={each.id: results[f"score {each.id}"]["memory_bytes"] / _MIB for each in fresh if not each.simulate},
        rows=rows | (_stored_rows(plan, rows[MODEL]) if rows else {}),
        layers=results.get("layers", {}),
        checked=results.get("check", {}),
    )


def _first(scores: Scores, count: int) -> Scores:
    """Of as many samples as were asked for."""
    return scores.taken(range(count)) if count < len(scores.nll) else replace(scores, kl=None, top1=None)


def _score(model: Model, plan: Plan, folders: Mapping[str, Path], work: Path) -> Job:
    """Held-out losses of one model; of the evaluated one its distance from the first reference that is measured."""
    first = next((each for each in plan.references if each.stored is None), None)
    job: Job = {
        "kind": "evaluate",
        "name": model.name,
        "model": str(folders[model.id]),
        "dtype": model.dtype,
        "data": str(work / "samples.parquet"),
        "batch_size": plan.batch_size,
        "scores": str(work / f"{model.id}.parquet"),
        "simulate": model.simulate,
        "grid": str(model.grid) if model.grid else None,
        "trust_remote_code": plan.trust_remote_code,
    }
    if model.id == MODEL and first is not None:
        job |= {"reference": str(folders[first.id]), "reference_dtype": first.dtype}
    return job


def _layers(plan: Plan, folders: Mapping[str, Path], score: Job) -> Job:
    """Each quantised layer beside its original in the first reference."""
    source = plan.references[0]
    shipped = None if plan.model.simulate else str(folders[MODEL])
    form = {"kind": "measure", "name": "layers", "format": plan.format, "shipped": shipped}
    return {**score, **form, "model": str(folders[source.id]), "dtype": source.dtype, "reference": None}


def _stored_rows(plan: Plan, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Results of a run's arms on the same tasks, where the run ran the same samples of all of them."""
    from quantize.jobs import task_rows_path
    from quantize.tasks import load_rows

    names = list(dict.fromkeys(row.name for row in rows))
    wanted = [(row.name, row.task, row.doc_id, row.doc_hash, row.metric) for row in rows]
    found = {}
    for each in plan.references:
        path = task_rows_path(each.folder, each.id)
        if each.stored is None or not path.is_file() or plan.engine != plan.run_engine:
            continue
        own = [row for name in names for row in load_rows(path) if row.name == name]
        if [(row.name, row.task, row.doc_id, row.doc_hash, row.metric) for row in own] == wanted:
            found[each.id] = own
    return found
