"""Checks that concern several settings. Each finds all its problems; nothing is loaded, not even torch or trl."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator

from quantize.algorithms import are_calibrated, check_algorithms
from quantize.errors import UserError
from quantize.schemes import find_scheme
from train.config import LoraConfig, RunConfig, TrainConfig
from train.method_checks import OWN_EXTRA, method_problems
from train.problems import Problem
from train.trl_fields import config_name, enum_values, trl_fields

_OWN_ELSEWHERE = {
    "assistant_only_loss": "data.answers_only",
    "bf16": "model.dtype",
    "chat_template_path": "data.chat_template",
    "completion_only_loss": "data.answers_only",
    "data_seed": "run.seed",
    "eval_packing": "data.packing",
    "fp16": "model.dtype",
    "logging_dir": "run.root and run.name",
    "max_seq_length": "train.max_length",
    "model_init_kwargs": "the `model` section",
    "output_dir": "run.root and run.name",
    "packing": "data.packing",
    "per_device_eval_batch_size": "eval.batch_size",
    "remove_unused_columns": "nothing: the batches carry row numbers for messages",
    "resume_from_checkpoint": "train --resume RUN",
    "run_name": "run.name",
    "seed": "run.seed",
    "trust_remote_code": "model.trust_remote_code",
}
"""Fields of TRL's configs that ongrid sets itself, and the key or option to use."""
_TRACKERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Trackers of transformers' Trainer, and the packages one of which each needs."""


def find_problems(config: RunConfig) -> list[Problem]:
    """Everything in the config that contradicts itself."""
    checks = (
        _scheme, _algorithms, _qat, _four_bit, _adapter, _random, _steps, method_problems, _engine, _tracking, _names,
        _extra, _choices,
    )  # fmt: skip
    return [problem for check in checks for problem in check(config)]


def _scheme(config: RunConfig) -> Iterator[Problem]:
    asked = config.quantize
    if config.qat and asked.scheme and config.qat != asked.scheme:
        text = (
            f"qat={config.qat} trains for another format than quantize.scheme={asked.scheme} ships; "
            "make them equal, or leave quantize.scheme out"
        )
        yield Problem(("qat", "quantize.scheme"), text)
    for key, name in (("qat", config.qat), ("quantize.scheme", asked.scheme)):
        if name is None or (key == "quantize.scheme" and name == config.qat):
            continue
        try:
            scheme = find_scheme(name)
        except UserError as error:
            yield Problem((key,), f"{key}: {error}")
            continue
        try:
            scheme.pick_group_size(asked.group_size, scheme.targets.get(asked.target or ""))
        except UserError as error:
            yield Problem((key, "quantize.group_size"), str(error))
        try:
            targets = scheme.eligible(asked.target)
        except UserError as error:
            yield Problem((key, "quantize.target"), str(error))
            continue
        wanted = {target.dtype for target in targets}
        if asked.dtype != "auto" and None not in wanted and asked.dtype not in wanted:
            text = f"{name} needs quantize.dtype={' or '.join(sorted(filter(None, wanted)))}, not {asked.dtype}"
            yield Problem((key, "quantize.target", "quantize.dtype"), text)
    if config.scheme_name is None:
        given = {"target": asked.target, "group_size": asked.group_size, "skip": asked.skip or None}
        given |= {"algorithm": asked.algorithm or None, "calibration": asked.calibration}
        for key, value in given.items():
            if value is not None:
                text = f"quantize.{key}={value} has no meaning without a scheme; set qat or quantize.scheme"
                yield Problem((f"quantize.{key}",), text)


def _algorithms(config: RunConfig) -> Iterator[Problem]:
    asked = config.quantize
    try:
        ordered = check_algorithms(asked.algorithm)
    except UserError as error:
        yield Problem(("quantize.algorithm",), f"quantize.algorithm: {error}")
        return
    if config.qat is not None and ordered:
        text = (
            f"quantize.algorithm={list(ordered)} would choose other numbers than qat={config.qat} trains, and so throw "
            "the training away; leave one of them out"
        )
        yield Problem(("qat", "quantize.algorithm"), text)
    if asked.calibration and not are_calibrated(ordered):
        text = f"quantize.calibration={asked.calibration}: no algorithm of this run looks at activations; leave it out"
        yield Problem(("quantize.calibration", "quantize.algorithm"), text)


def _qat(config: RunConfig) -> Iterator[Problem]:
    if config.qat is None:
        return
    if config.model.load_in_4bit:
        text = (
            "model.load_in_4bit is not supported together with qat yet: the frozen weights would be rounded twice; "
            "train with model.load_in_4bit=false, or without qat and with quantize.scheme"
        )
        yield Problem(("qat", "model.load_in_4bit"), text)
    inside = config.fake_quant.placement == "inside"
    if config.lora is None:
        if not inside:
            text = "fake_quant.placement=outside has no meaning with lora=null: there is no adapter to leave outside"
            yield Problem(("fake_quant.placement", "lora"), text)
    elif config.lora.use_dora:
        text = "lora.use_dora is not supported together with qat yet; set lora.use_dora=false"
        yield Problem(("qat", "lora.use_dora"), text)
    yield from _recovery(config)


def _recovery(config: RunConfig) -> Iterator[Problem]:
    """Switches of `fake_quant` that need another setting."""
    asked = config.fake_quant
    from_control = [
        key
        for key, wanted in (("initial", asked.initial == "control"), ("teacher", asked.teacher == "control"))
        if wanted and (key == "initial" or asked.distill > 0)
    ]
    for key in from_control:
        if not config.eval.control:
            text = f"fake_quant.{key}=control needs the fine-tune without QAT; set eval.control=true"
            yield Problem((f"fake_quant.{key}", "eval.control"), text)
        if config.lora is None:
            text = f"fake_quant.{key}=control takes the control's adapter, and with lora=null there is none; set `lora`"
            yield Problem((f"fake_quant.{key}", "lora"), text)
    if asked.distill > 0:
        if config.lora is None and "teacher" not in from_control:
            text = (
                "fake_quant.distill with lora=null would need a second copy of the model as its teacher; set `lora`, "
                "or fake_quant.distill=0"
            )
            yield Problem(("fake_quant.distill", "lora"), text)
        if asked.teacher == "start" and asked.starts_at == 0 and asked.initial == "base":
            text = (
                "fake_quant.teacher=start with fake_quant.start=0 is the untouched model, which has not learned the "
                "task; set fake_quant.start (0.5, say), teacher=control with eval.control=true, or teacher=base"
            )
            yield Problem(("fake_quant.teacher", "fake_quant.start", "fake_quant.distill"), text)
        if config.data.packing:
            text = "fake_quant.distill does not read packed rows yet; set data.packing=false"
            yield Problem(("fake_quant.distill", "data.packing"), text)
    if asked.placement == "outside" and (asked.learned_scales or asked.ranges != "minmax"):
        text = (
            "fake_quant.placement=outside ships other weights than it trains, so ranges of its own cannot ship; "
            "set placement=inside, or ranges=minmax and learned_scales=false"
        )
        yield Problem(("fake_quant.placement", "fake_quant.learned_scales", "fake_quant.ranges"), text)


def _four_bit(config: RunConfig) -> Iterator[Problem]:
    if config.model.load_in_4bit and config.lora is None:
        text = "model.load_in_4bit cannot be fully fine-tuned (4-bit weights have no gradient); set `lora`"
        yield Problem(("model.load_in_4bit", "lora"), text)


def _random(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.random and not model.architecture:
        text = f"model.random={model.random} needs model.architecture (qwen3, phi3, smollm3, gemma3_text, llama)"
        yield Problem(("model.random", "model.architecture"), text)
    if model.random == "full" and not model.shape:
        text = (
            "model.random=full needs model.shape, as --model.shape.hidden_size=2048 --model.shape.num_hidden_layers=28"
        )
        yield Problem(("model.random", "model.shape"), text)
    if model.shape and not model.random:
        text = "model.shape is read only with model.random; set model.random=full, or leave the shape out"
        yield Problem(("model.shape", "model.random"), text)
    if model.id == "random" and not model.random:
        text = "model.id=random needs model.random=tiny or full; else give a hub id, a folder or a .gguf file"
        yield Problem(("model.id", "model.random"), text)


def _steps(config: RunConfig) -> Iterator[Problem]:
    start, steps, warmup = config.fake_quant.starts_at, config.train.max_steps, config.train.warmup_steps
    qat_steps = config.for_qat().train.max_steps
    if steps == 0:
        text = "train.max_steps=0 trains nothing; use -1 for whole epochs, or `quantize convert MODEL` to quantise only"
        yield Problem(("train.max_steps",), text)
    if isinstance(start, float) and start >= 1:
        text = f"fake_quant.start={start} is no fraction below 1; write {start:.0f} for a step"
        yield Problem(("fake_quant.start",), text)
    elif config.qat and isinstance(start, int) and 0 < qat_steps <= start:
        key = "fake_quant.max_steps" if config.fake_quant.max_steps else "train.max_steps"
        text = f"fake_quant.start={start} is never reached: {key}={qat_steps}"
        yield Problem(("fake_quant.start", key, "qat"), text)
    for key, count in (("train.max_steps", steps), ("fake_quant.max_steps", qat_steps if config.qat else steps)):
        if 0 < count < warmup:
            text = f"train.warmup_steps={warmup} is more than {key}={count}"
            yield Problem(("train.warmup_steps", key), text)
            break


def _engine(config: RunConfig) -> Iterator[Problem]:
    asked = config.eval
    if asked.engine == "transformers":
        return
    if not asked.tasks:
        text = f"eval.engine={asked.engine} runs the tasks, and eval.tasks names none; name some, or leave it out"
        yield Problem(("eval.engine", "eval.tasks"), text)
    if asked.task_batch_size is not None:
        text = f"eval.task_batch_size={asked.task_batch_size}: vLLM chooses its own batches; leave it out"
        yield Problem(("eval.task_batch_size", "eval.engine"), text)


def _tracking(config: RunConfig) -> Iterator[Problem]:
    asked = config.train.report_to
    reports = [asked] if isinstance(asked, str) else asked
    for name in reports:
        packages = _TRACKERS.get(name)
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            text = f"train.report_to={name}: {packages[0]} is not installed; pip install {packages[0]}, or leave it out"
            yield Problem(("train.report_to",), text)
        elif packages is None and name not in ("none", "all"):
            near = difflib.get_close_matches(name, _TRACKERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            text = f"train.report_to={name} is no tracker of transformers; {hint}choose from {', '.join(_TRACKERS)}"
            yield Problem(("train.report_to",), text)
    if config.track.wandb != "off" and not {"wandb", "all"}.isdisjoint(reports):
        text = "train.report_to names wandb beside track.wandb: two W&B runs; take wandb out of train.report_to"
        yield Problem(("train.report_to", "track.wandb"), text)


def _adapter(config: RunConfig) -> Iterator[Problem]:
    if config.lora and config.lora.use_dora:
        if config.model.backend == "unsloth":
            text = "lora.use_dora: unsloth trains without the magnitudes of DoRA; set model.backend=peft"
            yield Problem(("lora.use_dora", "model.backend"), text)
        if config.model.load_in_4bit:
            text = "lora.use_dora is not merged into weights that were loaded in 4 bit; leave one of the two out"
            yield Problem(("lora.use_dora", "model.load_in_4bit"), text)
    if config.lora and config.lora.target_parameters:
        yield from _expert_adapters(config, config.lora)
    modules = config.lora.target_modules if config.lora else "all-linear"
    if isinstance(modules, str) and modules != "all-linear" and modules.isidentifier():
        text = (
            f"lora.target_modules={modules} is read as a pattern for whole names and fits none; "
            f"write ['{modules}'], or .*{modules}"
        )
        yield Problem(("lora.target_modules",), text)
    elif isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            yield Problem(("lora.target_modules",), f"lora.target_modules={modules} is no regular expression: {error}")


def _expert_adapters(config: RunConfig, lora: LoraConfig) -> Iterator[Problem]:
    """What peft's adapters on parameters lack."""
    if lora.lora_dropout:
        text = f"lora.lora_dropout={lora.lora_dropout} has no place in adapters on experts; set lora.lora_dropout=0"
        yield Problem(("lora.target_parameters", "lora.lora_dropout"), text)
    if lora.use_dora:
        text = "lora.use_dora is not offered by peft for adapters on experts; set lora.use_dora=false"
        yield Problem(("lora.target_parameters", "lora.use_dora"), text)
    if config.model.load_in_4bit:
        text = "adapters on experts are not merged into a model that was loaded in 4 bit; set model.load_in_4bit=false"
        yield Problem(("lora.target_parameters", "model.load_in_4bit"), text)


def _names(config: RunConfig) -> Iterator[Problem]:
    name = config.run.name
    if name is not None and (not name.strip() or "/" in name or "\\" in name or name in (".", "..")):
        yield Problem(
            ("run.name",), f"run.name={name!r} is no folder name; a path to the folder of all runs is run.root"
        )
    for key in ("id", "architecture"):
        value = getattr(config.model, key)
        if value is not None and not value.strip():
            yield Problem((f"model.{key}",), f"model.{key} is empty")
    if not config.data.train.strip():
        yield Problem(("data.train",), "data.train is empty; give a hub id or a file")


def _extra(config: RunConfig) -> Iterator[Problem]:
    known: frozenset[str] | None = None
    elsewhere = _OWN_ELSEWHERE | OWN_EXTRA.get(config.train.method, {})
    for name in config.train.extra:
        key = f"train.extra.{name}"
        if name in TrainConfig.model_fields:
            yield Problem((key,), f"{key} has a key of its own; use train.{name}")
            continue
        if name in elsewhere:
            yield Problem((key,), f"{key} is set by ongrid; use {elsewhere[name]}")
            continue
        known = known if known is not None else trl_fields(config.train.method)
        if known and name not in known:
            near = difflib.get_close_matches(name, known - {"extra"}, n=1)
            where = "train" if near and near[0] in TrainConfig.model_fields else "train.extra"
            hint = f"; did you mean {where}.{near[0]}?" if near else ""
            yield Problem((key,), f"{key} is no field of trl's {config_name(config.train.method)}{hint}")


def _choices(config: RunConfig) -> Iterator[Problem]:
    """The names that transformers would refuse only once the model is loaded."""
    for name, enum in (("lr_scheduler_type", "SchedulerType"), ("optim", "OptimizerNames")):
        value: str = getattr(config.train, name)
        if value == getattr(TrainConfig.model_fields[name], "default", None):
            continue
        known = enum_values(enum)
        if known and value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield Problem((f"train.{name}",), f"train.{name}={value} is unknown; {hint}choose from {', '.join(known)}")
