"""What a fresh process (`quantize.worker`) does: one function for each kind of job, with a dict of plain values as its
request. Large libraries are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize.errors import UserError

_LAYER_BATCHES = 4  # of eval.batch_size samples: a ratio of energies over hundreds of tokens hardly moves


def _load(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model of a job, simulated where the job asks for it, and what of it is quantised (else None)."""
    from quantize.calibrate import Recipe, choose_by
    from quantize.convert import load_plain
    from quantize.grid import load_grid
    from quantize.layers import select_layers
    from quantize.schemes import find_scheme
    from quantize.simulate import simulate_

    device = _device()
    model = load_plain(
        Path(job["model"]), dtype=job.get("dtype"), device=device, trust_remote_code=job.get("trust_remote_code", False)
    )
    simulate = job.get("simulate")
    if not simulate:
        return model, None
    scheme = find_scheme(simulate["scheme"])
    target, group_size = scheme.find_target(simulate["target"]), simulate["group_size"]
    coverage = select_layers(model, scheme, group_size, target, simulate["skip"])
    grid = load_grid(Path(job["grid"]), device) if job.get("grid") else None
    recipe = Recipe.of_job(simulate)
    if recipe.algorithms:
        grid = choose_by(recipe, model, lambda: _tokenizer(job), scheme, target, group_size, coverage)[0].grid
    simulate_(model, scheme, target, group_size, coverage, grid)
    return model, coverage


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Scores one checkpoint, quantised or not, or the simulation of its quantised form.

    Keys: model, dtype, data (parquet), batch_size, scores (parquet to write); optional simulate {scheme, target,
    group_size, skip}, grid (the weights as trained), reference (a checkpoint to measure KL from), trust_remote_code,
    may_overflow (a loss that is no number is a result, too; its scores then hold it), method (what else is measured,
    beside the scores: see `quantize.jobs.Jobs.method`).

    Raises:
        UserError: the loss of a sample is not finite.
    """
    from quantize.convert import memory_bytes
    from quantize.evaluate import evaluate_model, read_samples, texts_of

    model, _ = _load(job)
    reference = None
    if job.get("reference"):
        reference, _ = _load({**job, "model": job["reference"], "dtype": job.get("reference_dtype"), "simulate": None})
    samples = read_samples(Path(job["data"]))
    scores = evaluate_model(model, samples, batch_size=job["batch_size"], reference=reference, progress=progress)
    broken = scores.broken
    if broken and not job.get("may_overflow"):
        raise UserError(
            f"{job['name']}: the loss of {broken} of {len(samples)} held-out samples is NaN or infinite: the model's "
            f"numbers overflow; {job.get('overflow_advice', 'look at its weights')}"
        )
    if job.get("method") is not None and not broken:
        _measure_method(job, model, scores)  # first: that the scores are there says that all is
    scores.save(Path(job["scores"]), texts_of(samples, scores, _tokenizer(job).decode))
    if broken:
        return {"loss": None, "kl": None, "memory_bytes": memory_bytes(model)}
    return {"loss": scores.loss, "kl": scores.kl_per_token, "memory_bytes": memory_bytes(model)}


def _measure_method(job: Mapping[str, Any], model: Any, scores: Any) -> None:
    from quantize.method_rows import preference_rows, reward_rows
    from quantize.task_rows import own_rows_path, save_rows

    data, size, tokenizer = Path(job["data"]), job["batch_size"], _tokenizer(job)
    if "rewards" in job["method"]:
        rows = reward_rows(model, tokenizer, data, job["method"], batch_size=size)
    else:
        rows = preference_rows(model, data, scores, batch_size=size, decode=tokenizer.decode)
    save_rows(rows, own_rows_path(Path(job["scores"])))


def benchmark(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Runs a model on tasks.

    Keys: those of `evaluate` that make the model, tasks (settings of `quantize.tasks`), task_rows (parquet to write);
    optional chat_template, engine (from `quantize.serving.engine`: vLLM runs it, what is simulated quantised for real).
    """
    from quantize.tasks import Settings, load_tasks, run_tasks, save_rows, transformers_lm

    settings, tokenizer = Settings(**job["tasks"]), _tokenizer(job)
    if job.get("engine"):
        from quantize.serving.tasks import served_lm

        tasks = load_tasks(settings)  # first: the server takes a minute to start, and holds the GPU
        with served_lm(job, tokenizer, lambda form: convert(form, lambda done, total: None)) as lm:
            rows = run_tasks(lm, tasks, settings, progress)
    else:
        lm = transformers_lm(_load(job)[0], tokenizer)
        rows = run_tasks(lm, load_tasks(settings), settings, progress)
    save_rows(rows, Path(job["task_rows"]))
    return {}


def check_tasks(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Loads the tasks with their data and builds their requests: what cannot run is found before anything is trained.

    Keys: tasks (settings of `quantize.tasks`), model (whose tokenizer they need); optional chat_template, engine,
    trust_remote_code, others (further models that the engine will run them on).

    Returns:
        fingerprint of all that decides their results; by reported name samples, num_fewshot (that was used, which for
        some tasks is not what was asked for) and cut (samples whose prompts are longer than the model's context; names
        that have none are left out).

    Raises:
        UserError: a task cannot be loaded, or a request of it cannot be built or does not fit the model's context.
    """
    from quantize.task_checks import check_runnable, context_length
    from quantize.tasks import Settings, count_samples, few_shot_numbers, fingerprint, load_tasks

    settings, tokenizer = Settings(**job["tasks"]), _tokenizer(job)
    if settings.chat_template and not tokenizer.chat_template:
        raise UserError("eval.chat_template: this model's tokenizer has no chat template; set data.chat_template")
    tasks = load_tasks(settings)
    trust = job.get("trust_remote_code", False)
    context = context_length(Path(job["model"]), tokenizer, trust_remote_code=trust)
    leaves = [task for group in tasks.values() for task in group.values()]
    if job.get("engine") and any(task.OUTPUT_TYPE == "generate_until" for task in leaves):
        from quantize.serving.tasks import refuse_decoding

        for folder in (job["model"], *job.get("others", ())):
            refuse_decoding(Path(folder), trust_remote_code=trust)
    return {
        "fingerprint": fingerprint(tasks, settings),
        "samples": {name: count_samples(leaves, settings.limit) for name, leaves in tasks.items()},
        "num_fewshot": few_shot_numbers(tasks),
        "cut": check_runnable(tasks, settings, tokenizer, context, served=bool(job.get("engine"))),
    }


def measure(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Each quantised layer beside its 16-bit original, on batches of short and long samples.

    Keys: model (16 bit), dtype, data, batch_size, format {scheme, target, group_size, skip}, and the quantised form:
    shipped (a checkpoint), or else the simulation, with grid; optional trust_remote_code.
    """
    from dataclasses import asdict

    from quantize.evaluate import batches, read_samples
    from quantize.layer_health import measure_layers
    from quantize.layers import select_layers
    from quantize.schemes import find_scheme

    reference, _ = _load({**job, "simulate": None})
    shipped = {"model": job["shipped"], "dtype": None} if job.get("shipped") else {"simulate": job["format"]}
    quantised, _ = _load({**job, **shipped})
    chosen = job["format"]
    scheme = find_scheme(chosen["scheme"])
    target = scheme.find_target(chosen["target"])
    layers = select_layers(reference, scheme, chosen["group_size"], target, chosen["skip"]).layers
    device = _device()
    every = list(batches(read_samples(Path(job["data"])), job["batch_size"]))  # the shortest texts first
    chosen_batches = every[:: max(1, len(every) // _LAYER_BATCHES)]
    inputs = [
        {"input_ids": ids.to(device), "attention_mask": attention.to(device)} for _, ids, attention, _ in chosen_batches
    ]
    found = measure_layers(reference, quantised, list(layers), inputs)
    return {name: asdict(health) for name, health in found.items()}


def cost(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What a checkpoint costs to run here. Keys: model, dtype, batches, compiled; optional trust_remote_code.

    Returns:
        that of `quantize.cost.measure_cost`, or {"failed": why}: no timing is worth a finished run.
    """
    import traceback

    from quantize.cost import measure_cost

    try:
        model, _ = _load({**job, "simulate": None})
        return measure_cost(model, job["batches"], compiled=job["compiled"])
    except Exception as error:  # out of memory at a large batch, an architecture that cannot be captured
        traceback.print_exc()  # into the log
        return failure(error)


def failure(error: Exception) -> dict[str, str]:
    """What a cost job gives that did not end."""
    text = str(error).splitlines()
    return {"failed": ": ".join([type(error).__name__, *text[:1]])}


def sensitivity(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Which layers a format hurts.

    Keys: those of `evaluate` that make the simulation; data (see `quantize.texts`), samples, batch_size, ways, growth.
    """
    from quantize.schemes import find_scheme
    from quantize.sensitivity import scan_model
    from quantize.texts import load_samples

    samples = load_samples(Path(job["data"]), _tokenizer(job), job["samples"])
    model, _ = _load({**job, "simulate": None})
    quantised, coverage = _load(job)
    chosen = job["simulate"]
    return scan_model(
        model,
        quantised,
        find_scheme(chosen["scheme"]),
        chosen["group_size"],
        coverage,
        samples,
        ways=job["ways"],
        growth=job["growth"],
        batch_size=job["batch_size"],
        progress=progress,
    )


def _tokenizer(job: Mapping[str, Any]) -> Any:
    from quantize.convert import load_tokenizer

    tokenizer = load_tokenizer(Path(job["model"]), job.get("trust_remote_code", False))
    if job.get("chat_template"):
        tokenizer.chat_template = job["chat_template"]
    return tokenizer


def compare(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> list[tuple[str, float]]:
    """Which layers of a shipped checkpoint differ most from their simulation, on the first batch.

    Keys: those of `evaluate` that make the simulation, and shipped (the quantised checkpoint).
    """
    from quantize.evaluate import batches, read_samples
    from quantize.gate import layer_differences, weight_differences
    from quantize.layers import embedding_name
    from quantize.schemes import find_scheme

    trained, coverage = _load(job)
    shipped, _ = _load({**job, "model": job["shipped"], "dtype": None, "simulate": None})
    _, ids, attention, _ = next(batches(read_samples(Path(job["data"])), job["batch_size"]))
    device = _device()
    inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device)}
    layers = list(coverage.layers)
    if find_scheme(job["simulate"]["scheme"]).embedding is not None:
        layers.append(embedding_name(trained))
    found = layer_differences(trained, shipped, layers, inputs) + weight_differences(trained, shipped, layers)
    return sorted(found, key=lambda item: -item[1])


def convert(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Converts one checkpoint.

    Keys: source, output, scheme, target, group_size, skip, dtype; optional grid (the weights as trained),
    algorithms and calibration (`quantize.calibrate.Recipe.of_job`), named, revision, trust_remote_code, max_shard_size.

    Returns:
        coverage; notes (what the algorithms did), calibration (what they looked at).
    """
    from quantize.calibrate import Recipe
    from quantize.convert import convert_checkpoint
    from quantize.record import read_record
    from quantize.schemes import find_scheme
    from quantize.storage import SHARD_SIZE

    scheme = find_scheme(job["scheme"])
    coverage = convert_checkpoint(
        Path(job["source"]),
        Path(job["output"]),
        scheme,
        scheme.find_target(job["target"]),
        group_size=job["group_size"],
        skip=job["skip"],
        dtype=job["dtype"],
        device=_device(),
        trust_remote_code=job.get("trust_remote_code", False),
        grid=Path(job["grid"]) if job.get("grid") else None,
        recipe=Recipe.of_job(job),
        named=job.get("named"),
        revision=job.get("revision"),
        max_shard_size=job.get("max_shard_size") or SHARD_SIZE,
        progress=progress,
    )
    progress(1, 1)
    record = read_record(Path(job["output"]))
    return {"coverage": coverage.as_dict()} | {key: record[key] for key in ("notes", "calibration") if record[key]}


def _elsewhere(module: str, name: str, job: Mapping[str, Any], progress: Callable[[int, int], None]) -> Any:
    """A job whose body is a function of a module of its own."""
    return getattr(import_module(module), name)(job, progress)


def repack(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> None:
    """Packs a quantised folder, or unpacks a packed one. Keys: source, output, unpack."""
    from quantize.packed import pack_folder, unpack_folder

    change = unpack_folder if job["unpack"] else pack_folder
    change(Path(job["source"]), Path(job["output"]))
    progress(1, 1)


KINDS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "evaluate": evaluate,
        "convert": convert,
        "repack": repack,
        "compare": compare,
        "measure": measure,
        "cost": cost,
        "sensitivity": sensitivity,
        "tasks": check_tasks,
        "benchmark": benchmark,
        "executorch": partial(_elsewhere, "quantize.export.executorch", "export"),
        "greedy": partial(_elsewhere, "quantize.serving.agreement", "by_transformers"),
    }
)
"""Kind of job -> what does it, given the job and progress(done, total)."""
