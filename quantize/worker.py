"""A fresh process for everything that must happen in the plain graph.

The training process has unsloth's class-level patches at work, so evaluation of what ships and the conversion itself
run here, where neither unsloth nor the training code is imported. `run_jobs` (parent) writes a request, starts
`python -m quantize.worker REQUEST`, forwards its progress and returns its results.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quantize.errors import UserError
from quantize.imports import uncollected

Progress = Callable[[str, int, int], None]

_LAYER_BATCHES = 4  # of eval.batch_size samples: a ratio of energies over hundreds of tokens hardly moves


def run_jobs(
    jobs: Sequence[Mapping[str, Any]], request: Path, progress: Progress | None = None, *, packages: Path | None = None
) -> list[Any]:
    """Runs jobs in a fresh process, in order, and returns one result a job.

    Args:
        jobs: each a mapping with `kind` (see `main`) and that function's arguments.
        request: where the request is written; the answer lies beside it.
        progress: called with (job's name, done, total).
        packages: a folder of packages that this process alone sees (`quantize.export.environment`).

    Raises:
        UserError: what the worker found wrong with the input.
        RuntimeError: the worker failed; the message ends with its last lines, all of them lie beside the request.
    """
    answer, log = request.with_suffix(".answer.json"), request.with_suffix(".log")
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(list(jobs), indent=1), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    project = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [project, str(packages or ""), environment.get("PYTHONPATH")])
    )
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize.worker", str(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if progress is not None and line.startswith("@progress "):
                    name, done, total = json.loads(line.removeprefix("@progress "))
                    progress(name, done, total)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code == 0:
        return json.loads(answer.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    if code == 2:
        raise UserError(*json.loads(answer.read_text(encoding="utf-8")))
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the evaluation process failed with exit code {code}; its log is {log}:\n{tail}")


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
    may_overflow (a loss that is no number is a result, too; its scores then hold it).

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
    scores.save(Path(job["scores"]), texts_of(samples, scores, _tokenizer(job).decode))
    if broken:
        return {"loss": None, "kl": None, "memory_bytes": memory_bytes(model)}
    return {"loss": scores.loss, "kl": scores.kl_per_token, "memory_bytes": memory_bytes(model)}


def benchmark(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Runs a model on tasks.

    Keys: those of `evaluate` that make the model, tasks (settings of `quantize.tasks`), task_rows (parquet to write);
    optional chat_template.
    """
    from quantize.tasks import Settings, load_tasks, run_tasks, save_rows

    model, _ = _load(job)
    settings = Settings(**job["tasks"])
    save_rows(run_tasks(model, _tokenizer(job), load_tasks(settings), settings, progress), Path(job["task_rows"]))
    return {}


def check_tasks(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Loads the tasks with their data and builds their requests: what cannot run is found before anything is trained.

    Keys: tasks (settings of `quantize.tasks`), model (whose tokenizer they need); optional chat_template,
    trust_remote_code.

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
    return {
        "fingerprint": fingerprint(tasks, settings),
        "samples": {name: count_samples(leaves, settings.limit) for name, leaves in tasks.items()},
        "num_fewshot": few_shot_numbers(tasks),
        "cut": check_runnable(tasks, settings, tokenizer, context),
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
        return _failed(error)


def run_timings(run: Callable[[], list[Any]]) -> list[Any]:
    """The results of cost jobs that `run` has done; a process that died at it is said as a failed job is."""
    try:
        return run()
    except RuntimeError as error:
        return [_failed(error)]


def _failed(error: Exception) -> dict[str, str]:
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


def executorch(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Exports one quantised checkpoint: see `quantize.export.executorch`, whose packages this process must see."""
    from quantize.export.executorch import export

    return export(job, progress)


def repack(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> None:
    """Packs a quantised folder, or unpacks a packed one. Keys: source, output, unpack."""
    from quantize.packed import pack_folder, unpack_folder

    change = unpack_folder if job["unpack"] else pack_folder
    change(Path(job["source"]), Path(job["output"]))
    progress(1, 1)


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: once it is gone, even by SIGKILL, its resumed run writes these files."""
    while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def _leave_out_unused(jobs: Sequence[Mapping[str, Any]]) -> None:
    """A quarter of this process's start are two libraries that transformers imports where they are installed.

    It needs them for assisted decoding and for losses of object detection. lm-eval needs them too: jobs with tasks keep
    them.
    """
    formats = [form for job in jobs for form in (job, job.get("simulate") or {})]
    if not any(job.get("tasks") for job in jobs) and not any((f.get("calibration") or {}).get("task") for f in formats):
        for name in ("sklearn", "scipy"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to the import system: not installed


def _import_libraries() -> None:
    """What every job imports. It stays, so no collection need go over it."""
    with uncollected():
        import transformers.modeling_utils  # noqa: F401

        import quantize.convert  # noqa: F401
    gc.freeze()


def main(argv: Sequence[str]) -> int:
    """Entry of the fresh process: `python -m quantize.worker REQUEST`."""
    import threading

    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Path(argv[0])
    jobs = json.loads(request.read_text(encoding="utf-8"))
    _leave_out_unused(jobs)
    _import_libraries()
    answer = request.with_suffix(".answer.json")
    kinds: dict[str, Callable[..., Any]] = {
        "evaluate": evaluate,
        "convert": convert,
        "repack": repack,
        "compare": compare,
        "measure": measure,
        "cost": cost,
        "sensitivity": sensitivity,
        "tasks": check_tasks,
        "benchmark": benchmark,
        "executorch": executorch,
    }
    results = []
    try:
        for job in jobs:

            def report(done: int, total: int, name: str = job["name"]) -> None:
                print("@progress", json.dumps([name, done, total]), flush=True)

            results.append(kinds[job["kind"]](job, report))
            gc.collect()
    except UserError as error:
        answer.write_text(json.dumps(error.lines), encoding="utf-8")
        return 2
    forbidden = {"unsloth", "unsloth_zoo", "train", "qat"} & set(sys.modules)
    assert not forbidden, f"the plain process imported {forbidden}"
    answer.write_text(json.dumps(results), encoding="utf-8")
    return 0


def _leave(code: int) -> NoReturn:
    """Ends the process as the interpreter does, but for taking all modules apart: half a second and more."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
