"""The steps of a run in `train --dry-run`: what each does, or why it is skipped. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantize.schemes import find_scheme
from train.config import RunConfig


@dataclass(frozen=True)
class Step:
    """One step of the line; `skipped` says why it will not run, None = it runs."""

    name: str
    text: str
    skipped: str | None = None


def steps_of(config: RunConfig, device: str) -> Iterator[Step]:
    """The line, in the order of `train.pipeline`."""
    scheme, qat = config.scheme_name, config.qat
    source = f"random {config.model.architecture} ({config.model.random})" if config.model.random else config.model.id
    work = _work(config)
    yield Step("model", f"{source}, with the {config.model.backend} backend")
    yield Step("data", f"{config.data.train}, {config.data.eval_samples} held-out rows")
    no_tasks = None if config.eval.tasks else "eval.tasks is empty"
    yield Step("tasks", f"load {', '.join(config.eval.tasks)}, with their data", no_tasks)
    cached = " (or an earlier run's scores: same model, data and settings)" if config.eval.baseline_cache else ""
    yield Step("baseline", f"evaluate the untouched model{cached}")
    no_control = (
        "eval.control is false" if not config.eval.control else None if qat else "qat is null: it would be the same run"
    )
    yield Step("control", f"{work}, without QAT", no_control)
    yield Step("prepare QAT", f"{qat}, {_method(config)}", None if qat else "qat is null")
    yield Step("fit", _work(config.for_qat()) if qat else work)
    yield Step("merge", f"in {merged_dtype(config, device)}", None if config.lora else "lora is null: nothing to merge")
    yield Step("evaluate tuned", "loss, accuracy and KL of the unquantised model")
    nothing = "neither qat nor quantize.scheme is set" if scheme is None else None
    yield Step("quantize", f"{scheme} for {_target(config)}", nothing or cannot_run(config, device))
    simulated = ", simulated" if not nothing and cannot_run(config, device) else ""
    yield Step("evaluate final", f"the model as shipped, reloaded from disk{simulated}", nothing)
    batches = config.eval.cost_batches
    not_timed = nothing or (None if batches else "eval.cost_batches is empty") or cannot_run(config, device)
    numbers = ", ".join(map(str, batches))
    yield Step("cost", f"decode for {numbers} sequences at a time, unquantised and as shipped", not_timed)
    yield Step("benchmarks", _benchmarks(config), no_tasks)
    yield Step("report", "metrics.json, report.md, report.html")


def _benchmarks(config: RunConfig) -> str:
    limit = "all samples" if config.eval.limit is None else f"the first {config.eval.limit} samples"
    arms = ["base", *(["control"] if config.eval.control and config.qat else []), "tuned"]
    if config.scheme_name is not None:
        arms += ["base_quantized", *(["ptq"] if "control" in arms else []), "final"]
    engine = ", in vLLM" if config.eval.engine == "vllm" else ""
    return f"{', '.join(config.eval.tasks)}: {limit} of each task, on {len(arms)} arms ({', '.join(arms)}){engine}"


def _work(config: RunConfig) -> str:
    train = config.train
    length = f"{train.max_steps} steps" if train.max_steps > 0 else f"{train.num_train_epochs:g} epoch(s)"
    method = f"LoRA r={config.lora.r}" if config.lora else "full fine-tuning"
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    rows = {"sft": "rows", "dpo": "pairs", "grpo": f"answers ({config.grpo.num_generations} to a prompt)"}[train.method]
    learned = "" if train.method == "sft" else f" by {train.method}"
    return f"{method}{learned}, {length} of {batch} {rows}, learning rate {train.learning_rate:g}"


def _method(config: RunConfig) -> str:
    """What `fake_quant` asks for, in words."""
    asked = config.fake_quant
    words = [f"adapter {asked.placement}"]
    first = f"{asked.starts_at:.0%} of the" if asked.starts_at < 1 else asked.starts_at
    words += [f"unquantised for the first {first} steps"] if asked.starts_at else []
    words += ["on from the control's adapter"] if asked.initial == "control" else []
    words += [f"{asked.ranges} ranges"] if asked.ranges != "minmax" else []
    words += ["learned scales"] if asked.learned_scales else []
    words += [f"{asked.distill:.0%} of the loss from teacher {asked.teacher}"] if asked.distill else []
    return ", ".join(words)


def _target(config: RunConfig) -> str:
    if not config.scheme_name:
        return config.quantize.target or ""
    return " or ".join(target.name for target in find_scheme(config.scheme_name).eligible(config.quantize.target))


def cannot_run(config: RunConfig, device: str) -> str | None:
    """Why no target can run here, as far as can be told without torch."""
    if config.scheme_name is None or device == "cuda":
        return None
    chosen = find_scheme(config.scheme_name).eligible(config.quantize.target)
    if not all(target.needs for target in chosen):
        return None
    needs = ", ".join(need for target in chosen for need in target.needs)
    return f"needs {needs}, and no NVIDIA driver was found; merged/ is written, `quantize convert` finishes elsewhere"


def merged_dtype(config: RunConfig, device: str) -> str:
    """What the merged weights are written in."""
    chosen = config.quantize.dtype
    if chosen != "auto":
        return chosen
    scheme = find_scheme(config.scheme_name) if config.scheme_name else None
    wanted = {target.dtype for target in scheme.eligible(config.quantize.target)} if scheme else set()
    fixed = next(iter(wanted)) if len(wanted) == 1 else None
    return fixed or ("bfloat16" if device == "cuda" else "float32")
