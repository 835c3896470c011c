"""What `quantize eval` measures and against what: folders, hub ids, and the arms that a run's report has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.folder_eval.sources import (
    FORMAT,
    MODEL,
    REFERENCE,
    Model,
    check_model,
    dtypes,
    find_reference,
    is_quantised,
    name_of,
    plain_dtype,
    quantised_or_simulated,
)
from quantize.record import RECORD, read_record
from quantize.runs import find_run, read_gathered, renew_command
from quantize.serving.engine import engine_words, find_engine

STORED = ("base", "base_quantized", "tuned")
"""Arms of a run whose scores its report has: what it was before, and what it was before quantisation."""
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for; None = the run's own, or the default.

    Attributes:
        source: run directory, name of a run under `root`, a checkpoint's folder or its hub id.
        against: checkpoint to compare with, as `source`.
        data: held-out text (see `quantize.texts`); a run has its own.
        samples: how many of them.
        tasks: as `eval.tasks` names them; `num_fewshot` and `limit` are those of `quantize.tasks.Settings`.
        engine: what runs them, as `eval.engine` names it.
        tolerance: nats a token by which the loss may be above the reference's.
        target: where it will run.
        output: folder of the report.
    """

    source: str
    root: str = "runs"
    against: str | None = None
    data: Path | None = None
    samples: int | None = None
    tasks: Sequence[str] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    engine: str | None = None
    batch_size: int | None = None
    tolerance: float = 0.05
    target: str | None = None
    output: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        title: of the page.
        references: what the model is compared with, the first decides whether it is good enough.
        data: held-out text.
        samples: how many of them; None = all. `calibrated`: how many before them are left out.
        format: what the model is quantised to, where the layers can be held against `references[0]`, its source.
        tasks: settings of the run's tasks; empty = it ran none.
        run_engine: what ran them (`quantize.serving.engine.find_engine`); None = transformers. engine: what runs them
            here.
        notes: for the reader, on what is compared.
    """

    title: str
    model: Model
    references: Sequence[Model]
    data: Path
    samples: int | None
    output: Path
    calibrated: int = 0
    batch_size: int = 8
    format: Mapping[str, Any] | None = None
    tasks: Mapping[str, Any] | None = None
    run_engine: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    notes: Sequence[str] = ()


def make_plan(asked: Asked) -> Plan:
    """Finds everything that is asked for.

    Raises:
        UserError: there is no such run or model, one cannot be measured, or no data is named.
    """
    run = find_run(asked.source, asked.root)
    found = _of_folder(asked) if run is None else _of_run(run, asked)
    return _with_engine(found, asked) if asked.tasks else found


def _with_engine(plan: Plan, asked: Asked) -> Plan:
    """The plan with what runs the tasks; raises UserError where that cannot run the model."""
    own = "transformers" if plan.run_engine is None else "vllm"
    engine = find_engine(asked.engine or own)
    if engine is not None and plan.model.simulate is not None:
        raise UserError(
            f"eval.engine=vllm: {plan.model.name}: vLLM runs no simulation; measure it where it runs, or use "
            "eval.engine=transformers"
        )
    notes = list(plan.notes)
    if plan.run_engine != engine and any(each.stored is not None for each in plan.references):
        here, there = engine_words(engine), engine_words(plan.run_engine)
        notes.append(f"Tasks run in {here} here, in {there} in the run: with its arms they make no pairs.")
    return replace(plan, engine=engine, notes=notes)


def _of_run(run: Path, asked: Asked) -> Plan:
    gathered = read_gathered(run)
    if not (run / "merged" / "config.json").is_file():
        raise UserError(f"{run / 'merged'} is gone; make it anew with: {renew_command(run)}")
    trust = asked.trust_remote_code or bool(gathered["trust_remote_code"])
    own = run / "data" / "eval.parquet"
    on_own = asked.data is None or asked.data.resolve() == own.resolve()
    plain = plain_dtype(gathered["dtype"])
    chosen, shipped = gathered["format"], run / "quantized"
    merged = Model(id=REFERENCE, name="tuned", folder=run / "merged", dtype=plain, computes_in=plain)
    model, notes, algorithms = replace(merged, id=MODEL), list[str](), ()
    if chosen is not None:
        grid = run / "grid" if (run / "grid").is_dir() else None
        algorithms = read_record(shipped).get("algorithms") or ()
        model, notes = quantised_or_simulated("final", shipped, chosen, asked.target, merged, grid, algorithms)
    elif asked.target:
        raise UserError(f"--target {asked.target}: {run} quantises nothing; leave it out")
    references, compares_source = [merged], chosen is not None and not algorithms
    if asked.against is not None:
        references, compares_source = [_against(asked, plain, trust)], False
    elif on_own:
        references, compares_source = _stored(run, gathered, notes, model.name), False
    elif chosen is None:
        references = []
        notes.append("Compared with nothing: this run quantises nothing; name a reference with --against.")
    return Plan(
        title=run.name,
        model=model,
        references=_distinct(model, references),
        data=asked.data or own,
        samples=asked.samples if on_own else asked.samples or 128,
        output=asked.output or run / "evaluation",
        batch_size=asked.batch_size or gathered["batch_size"],
        format=_settings(chosen, model) if compares_source else None,
        tasks=gathered["tasks"],
        run_engine=gathered.get("engine"),
        chat_template=gathered["chat_template"],
        trust_remote_code=trust,
        notes=notes,
    )


def _stored(run: Path, gathered: Mapping[str, Any], notes: list[str], model: str) -> list[Model]:
    """The arms that the run's report has, apart from the one that is measured."""
    from quantize.convert import folder_bytes
    from quantize.evaluate import Scores

    sizes = {"base": gathered["baseline"]["disk_bytes"], "tuned": folder_bytes(run / "merged")}
    found = []
    for arm in (arm for arm in STORED if arm != model):
        path = run / "eval" / f"{arm}.parquet"
        if not path.is_file():
            continue
        try:
            broken = Scores.load(path).broken
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); renew it with: {renew_command(run)}"
            ) from error
        if broken:
            notes.append(f"{arm} is left out: the loss of {broken} held-out samples is NaN or infinite.")
            continue
        place = gathered["trained_on"] if arm != "tuned" else gathered.get("finished") or gathered["trained_on"]
        size = sizes.get(arm)
        found.append(
            Model(
                id=arm, name=arm, folder=run, dtype=None, computes_in=place["dtype"], stored=path,
                disk_mib=None if size is None else size / _MIB,
            )
        )  # fmt: skip
    names = ", ".join(each.name for each in found)
    if found:
        notes.append(f"{names}: scores of the run's report, on the same samples; {model} is measured anew here.")
    return found


def _held_out(asked: Asked) -> str:
    """The held-out rows of the run whose weights a folder was converted from, as a hint."""
    made_from = str(read_record(Path(asked.source).expanduser()).get("source") or "")
    rows = Path(made_from).parent / "data" / "eval.parquet"
    return f"; the run that it was made from has {rows}" if made_from and rows.is_file() else ""


def _of_folder(asked: Asked) -> Plan:
    from quantize.sources import find_source

    if asked.data is None and (Path(asked.source).expanduser().is_dir() or asked.source.count("/") == 1):
        text = f"--data: name held-out text to measure {asked.source} on, a .jsonl, .txt or .parquet file"
        raise UserError(f"{text}{_held_out(asked)}")
    folder = find_source(asked.source, asked.root, trust_remote_code=asked.trust_remote_code)
    assert asked.data is not None, "find_source raises for what is neither a folder nor a hub id"
    settings = check_model(folder, trust_remote_code=asked.trust_remote_code)
    record = read_record(folder)
    chosen = {key: record.get(key) for key in FORMAT} if record.get("scheme") and record.get("target") else None
    plain = plain_dtype(settings.get("dtype") if is_quantised(settings) else None)
    name, notes = name_of(asked.source, folder), list[str]()
    source, gone = _recorded_source(record, asked, plain)
    model = Model(id=MODEL, name=name, folder=folder, **dtypes(settings, plain))
    if chosen is not None:
        chosen["skip"] = chosen["skip"] or []
        algorithms = record.get("algorithms") or ()
        model, more = quantised_or_simulated(name, folder, chosen, asked.target, source or gone, None, algorithms)
        notes += more
    elif asked.target:
        raise UserError(f"--target {asked.target}: {folder} has no {RECORD} that says its format; leave it out")
    reference = source if asked.against is None else _against(asked, plain, asked.trust_remote_code)
    if reference is None:
        notes.append(f"Compared with nothing: {gone}; name the model that it was made from with --against.")
    keeps_inputs = chosen is not None and not record.get("algorithms") and reference is not None and reference is source
    calibrated = _calibrated(record, asked.data)
    if calibrated:
        notes.append(f"The first {calibrated} samples are left out: a file called {asked.data.name} calibrated {name}.")
    return Plan(
        title=name,
        model=model,
        references=_distinct(model, [reference] if reference is not None else []),
        data=asked.data,
        samples=asked.samples or 128,
        calibrated=calibrated,
        tasks=_left_out(record),
        output=asked.output or Path(f"{name.rsplit('/', 1)[-1]}-eval"),
        batch_size=asked.batch_size or 8,
        format=_settings(chosen, model) if keeps_inputs else None,
        trust_remote_code=asked.trust_remote_code,
        notes=notes,
    )


def _settings(chosen: Mapping[str, Any] | None, model: Model) -> dict[str, Any] | None:
    """The format as the worker takes it."""
    form = model.simulate or chosen
    return {key: form[key] for key in FORMAT} if form is not None else None


def _recorded_source(record: Mapping[str, Any], asked: Asked, plain: str) -> tuple[Model | None, str]:
    """The model that a conversion was made from, or why there is none."""
    named, trust = str(record.get("source") or ""), asked.trust_remote_code
    if not named:
        return None, f"no source is recorded (no {RECORD} that names one)"
    try:
        return find_reference(named, asked.root, plain, revision=record.get("revision"), trust_remote_code=trust), ""
    except UserError as error:
        return None, f"its source as {RECORD} has it cannot be taken ({error})"


def _against(asked: Asked, plain: str, trust: bool) -> Model:
    assert asked.against is not None
    try:
        return find_reference(asked.against, asked.root, plain, trust_remote_code=trust)
    except UserError as error:
        raise UserError(*(f"--against: {line}" for line in error.lines)) from error


def _calibrated(record: Mapping[str, Any], data: Path) -> int:
    """How many samples at the beginning of a file chose the model's numbers, whose losses would flatter it.

    The record has the calibration file's name, not its place: another file of that name loses them, too.
    """
    found = record.get("calibration") or {}
    return int(found["samples"]) + int(found["left_out"]) if found.get("data") == data.name else 0


def _left_out(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of tasks without the samples that chose the model's numbers."""
    found = record.get("calibration") or {}
    return {"left_out": {found["task"]: int(found["asked"])}} if found.get("task") else {}


def _distinct(model: Model, references: Sequence[Model]) -> list[Model]:
    """The references, one that is called as the model by its path."""
    found = []
    for each in references:
        name = each.name if each.name != model.name else str(each.folder)
        found.append(replace(each, name=name if name != model.name else f"{name} (reference)"))
    return found
