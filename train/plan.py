"""`train --dry-run`: the steps, what will be skipped and why, and an estimate of peak memory and disk. Needs no torch.

Rough on purpose: for unsloth's LoRA on Qwen3-1.7B (8 x 1024 tokens, gradient checkpointing) it says 6.2 GiB where 4.3
GiB were measured on one H200.

The formulae (P parameters, L weights of the layers' linears, T trained parameters, N tokens a batch, b bytes a weight):
- weights: P * b; with 4-bit loading 0.56 * L + (P - L) * b
- training state: 16 T for an adapter (weight, gradient and Adam's two moments, in fp32); 3 T b for full fine-tuning
  (gradient and moments); 8-bit optimisers hold 2 bytes in place of the moments
- activations: N * b * (layers * kept + one layer + 4 * hidden), where a layer holds its norms, its linears' inputs and
  its gate: 8 * hidden + 2 * (outputs of its linears); with gradient checkpointing only `hidden` is kept of each
- logits: N * vocabulary * 12 bytes (themselves, fp32 copy, gradient); unsloth computes them for 512 tokens at a time
- fake quantisation: b bytes for each fake-quantised weight that the backward pass needs (all of L; one layer's with
  gradient checkpointing), and three fp32 copies of the largest
- disk: two checkpoints of 12 T bytes (adapter and moments), the adapter 4 T, merged P * bytes of `quantize.dtype`,
  quantised L bytes (int8-int4 holds its int4 in 8 bits, others less) + scales + the rest in 16 bit. A twin
  (`eval.control`) has checkpoints, an adapter and merged weights of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantize.errors import UserError
from quantize.hardware import has_nvidia_driver
from quantize.names import is_kept
from quantize.schemes import find_scheme
from train.config import RunConfig
from train.inputs import check_engine, check_tasks
from train.model_size import Linear, ModelSize, UnknownSize, find_size
from train.plan_steps import Step, cannot_run, merged_dtype, steps_of

_BYTES = {"float32": 4, "bfloat16": 2}
_NF4_BYTES = 0.56  # 4 bits and a share of an absmax per 64 weights
_CHUNK_TOKENS = 512
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a run would do and need. Sizes in bytes.

    Attributes:
        steps: the line, in order.
        memory: peak memory by part, largest model state; empty where the model's size is unknown.
        disk: what the run directory will hold; empty where the model's size is unknown.
        device: "cuda" or "cpu", as far as can be told without torch.
        size: the model's size, None where unknown.
        unknown: what cannot be told, and why.
        obstacles: what would stop the run, one line each.
        notes: what the estimate rests on.
    """

    steps: tuple[Step, ...]
    memory: dict[str, int]
    disk: dict[str, int]
    device: str
    size: ModelSize | None = None
    unknown: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_memory(self) -> int | None:
        """Bytes at the peak, on the device that trains; None = unknown."""
        return sum(self.memory.values()) or None

    @property
    def total_disk(self) -> int | None:
        """Bytes in the run directory; None = unknown."""
        return sum(self.disk.values()) or None


def estimate(config: RunConfig) -> Plan:
    """The plan of a run: nothing is loaded, and of a hub model at most config.json is fetched."""
    device = device_here()
    steps, obstacles = tuple(steps_of(config, device)), (*_missing_files(config), *_task_obstacles(config))
    try:
        size = find_size(config.model)
    except UnknownSize as error:
        return Plan(steps, {}, {}, device, unknown=(f"memory and disk: {error}",), obstacles=obstacles)
    fits_none = tuple(_skip_without_layers(config, size))
    certain = size.named and not config.model.trust_remote_code  # which may run code of the model's own
    return Plan(
        steps,
        _memory(config, size, device),
        _disk(config, size, device),
        device,
        size,
        obstacles=(
            *obstacles,
            *coverage_obstacles(config, size),
            *(_skip_obstacles(fits_none, size) if certain else ()),
        ),
        notes=(*_notes(config, device), *(() if certain else _skip_notes(fits_none))),
    )


def render(plan: Plan, config: RunConfig) -> str:
    """The plan as text for a terminal."""
    steps = ((step.name, f"skipped: {step.skipped}" if step.skipped else step.text) for step in plan.steps)
    lines = ["steps", *(f"  {name:<15} {text}" for name, text in steps)]
    if plan.size is not None:
        million = plan.size.parameters / 1e6
        lines += ["", f"model: {million:,.1f} million parameters, {plan.size.layers} layers (from {plan.size.source})"]
        lines += _table(f"peak memory on {plan.device}, estimated", plan.memory, _free_memory(plan.device))
        lines += _table(f"disk in {config.run.root}, estimated", plan.disk, _free_disk(config.run.root))
        lines += [f"  {note}" for note in plan.notes]
    if plan.unknown:
        lines += ["", "unknown", *(f"  {line}" for line in plan.unknown)]
    return "\n".join(lines)


def _table(title: str, parts: dict[str, int], free: int | None) -> list[str]:
    total = sum(parts.values())
    short = "   <- more than is free" if free is not None and total > free else ""
    rows = [f"  {name:<32} {_mib(value):>12}" for name, value in parts.items() if value]
    here = f" ({_mib(free).strip()} free)" if free is not None else ""
    return ["", title, *rows, f"  {'total':<32} {_mib(total):>12}{here}{short}"]


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB" if count < 10 * 1024 * _MIB else f"{count / _MIB / 1024:,.1f} GiB"


def _tokens(config: RunConfig) -> int:
    """Tokens of a batch: dpo has two answers a row, grpo's rows are a prompt and an answer of its own."""
    rows, length = config.train.per_device_train_batch_size, config.train.max_length
    if config.train.method == "grpo":
        length += config.grpo.max_completion_length
    return rows * length * (2 if config.train.method == "dpo" else 1)


def _memory(config: RunConfig, size: ModelSize, device: str) -> dict[str, int]:
    width = _train_bytes(config, device)
    trained, tokens = _trained(config, size), _tokens(config)
    rest = size.parameters - size.linear_weights
    weights = size.parameters * width
    if config.model.load_in_4bit:
        weights = int(size.linear_weights * _NF4_BYTES) + rest * width
    moments = 2 if "8bit" in config.train.optim else 8 if config.lora else 2 * width  # Adam's two
    state = trained * ((8 if config.lora else width) + moments)
    layer = 8 * size.hidden + 2 * sum(linear.outputs * linear.count for linear in size.linears) // size.layers
    checkpointing = config.train.gradient_checkpointing
    kept = size.layers * (size.hidden if checkpointing else layer) + layer + 4 * size.hidden
    # TRL's kernel for dpo and grpo takes the answers' logits in tiles; on a CPU they are whole.
    tiled = config.train.method != "sft" and device == "cuda"
    whole_logits = not tiled and (config.model.backend == "peft" or (config.qat and config.fake_quant.distill > 0))
    parts = {
        "weights": weights,
        "adapter, gradients, optimiser" if config.lora else "gradients, optimiser": state,
        "activations": tokens * width * kept,
        "logits": (tokens if whole_logits else min(tokens, _CHUNK_TOKENS)) * size.vocabulary * 12,
    }
    if config.qat:
        largest = max(linear.inputs * linear.outputs for linear in (*size.linears, *size.experts))
        held = size.quantised_weights // (size.layers if checkpointing else 1)
        parts["fake-quantised copies"] = held * width + 3 * 4 * largest
    return parts


def _disk(config: RunConfig, size: ModelSize, device: str) -> dict[str, int]:
    trained, twins = _trained(config, size), 2 if config.eval.control and config.qat else 1
    merged = size.parameters * _BYTES[merged_dtype(config, device)]
    adapter = trained * 4 if config.lora else 0
    state = trained * (12 if config.lora else 3 * _train_bytes(config, device))
    parts = {"checkpoints (two are kept)": 2 * state * twins, "adapter": adapter * twins, "merged": merged * twins}
    if config.scheme_name and not cannot_run(config, device):
        group = config.quantize.group_size or find_scheme(config.scheme_name).group_size
        scales = size.quantised_weights * 4 // group if group else 0
        rest = (size.parameters - size.quantised_weights) * _BYTES[merged_dtype(config, device)]
        wide = sum(_kept(config, line) * line.weights // line.count for line in size.linears)
        rest += wide * (_BYTES[merged_dtype(config, device)] - 1)
        parts["quantized (at most)"] = size.quantised_weights + scales + rest
    return parts


def _notes(config: RunConfig, device: str) -> Iterator[str]:
    yield f"for {device} (found without torch), weights in {_train_dtype(config, device)}; formulae in train/plan.py"
    modules = config.lora.target_modules if config.lora else "all-linear"
    if isinstance(modules, str) and modules != "all-linear":
        yield f"lora.target_modules={modules!r} is a pattern: counted as if it took all linears"


def _missing_files(config: RunConfig) -> Iterator[str]:
    for key, name in (("train", config.data.train), ("eval", config.data.eval)):
        if name and name.endswith((".json", ".jsonl", ".csv", ".parquet")) and not Path(name).is_file():
            yield f"data.{key}: there is no file {name}"


def _task_obstacles(config: RunConfig) -> Iterator[str]:
    """Benchmarks that lm-eval does not know, whose data is not looked at, and what their engine lacks here."""
    for check in (lambda: check_tasks(config.eval), lambda: check_engine(config)):
        try:
            check()
        except UserError as error:
            yield from error.lines


def coverage_obstacles(config: RunConfig, size: ModelSize) -> Iterator[str]:
    """A group size that does not divide in_features leaves that layer in 16 bit."""
    if config.scheme_name is None:
        return
    scheme = find_scheme(config.scheme_name)
    group = config.quantize.group_size or scheme.group_size or 1
    wanted = [line for line in size.linears if _kept(config, line) < line.count]
    matrices = {matrix: f"model.layers.0.mlp.experts.{matrix.name}" for matrix in size.experts}
    wanted += [matrix for matrix, name in matrices.items() if not is_kept(name, config.quantize.skip)]
    left_out = {line.inputs: line.name for line in wanted if line.inputs % group}
    share = sum(line.weights for line in wanted if line.inputs % group == 0) / max(sum(w.weights for w in wanted), 1)
    if wanted and share < (config.fake_quant.min_coverage if config.qat else 1e-9):
        layers = ", ".join(f"{name}: {inputs}" for inputs, name in left_out.items())
        targets = scheme.eligible(config.quantize.target)
        offered = sorted({n for target in targets for n in scheme.offered_group_sizes(target)})
        fitting = [str(n) for n in offered if all(line.inputs % n == 0 for line in wanted)]
        advice = f"use {' or '.join(fitting)}"
        if not fitting:
            advice = f"no group size of {scheme.name} divides them all: choose another scheme"
            advice += ", or lower fake_quant.min_coverage" if config.qat else ""
        yield (
            f"quantize.group_size={group} reaches {share:.0%} of the linear weights: group size {group} does not "
            f"divide the in_features of {layers}; {advice}"
        )


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
_PREFIXES = ("model", "model.language_model", "language_model.model")  # of a text model, and inside a multimodal one


def _layer_names(linear: Linear, prefix: str = "model") -> list[str]:
    """Names of a kind's layers, as most models have them."""
    part = "self_attn" if linear.name in _ATTENTION else "mlp"
    return [f"{prefix}.layers.{number}.{part}.{linear.name}" for number in range(linear.count)]


def _kept(config: RunConfig, linear: Linear) -> int:
    """How many of a kind's layers `quantize.skip` keeps in 16 bit."""
    return sum(is_kept(name, config.quantize.skip) for name in _layer_names(linear))


def _skip_without_layers(config: RunConfig, size: ModelSize) -> list[str]:
    """Entries of `quantize.skip` that fit no layer of those that the model is thought to have."""
    if not {line.name for line in size.linears} - set(_ATTENTION):
        return []  # what experts and their routers are called is not known here
    names = [name for line in size.linears for prefix in _PREFIXES for name in _layer_names(line, prefix)]
    return [each for each in config.quantize.skip if not any(is_kept(name, [each]) for name in [*names, "lm_head"])]


def _skip_obstacles(entries: Sequence[str], size: ModelSize) -> Iterator[str]:
    """`select_layers` refuses them after the model is loaded."""
    if entries:
        kinds = [line.name for line in size.linears]
        yield (
            f"quantize.skip: {', '.join(map(repr, entries))} fits no linear layer, as {size.source} tells: they end in "
            f"{', '.join(kinds)}, the first is {_layer_names(size.linears[0])[0]}"
        )


def _skip_notes(entries: Sequence[str]) -> Iterator[str]:
    """The layers of many models have other names (fc1, attn_qkv, vision_tower), which a config does not tell."""
    if entries:
        yield (
            f"quantize.skip: {', '.join(map(repr, entries))} fits none of the layers that a Llama would have; if this "
            "model has none either, train says so before it starts"
        )


def _trained(config: RunConfig, size: ModelSize) -> int:
    """T: an adapter has R * (I + O) parameters for each linear that it takes."""
    if config.lora is None:
        return size.parameters
    modules = config.lora.target_modules
    taken = [
        line for line in size.linears if isinstance(modules, str) or line.name in {m.split(".")[-1] for m in modules}
    ]
    leaves = {name.split(".")[-1] for name in config.lora.target_parameters or ()}
    taken += [matrix for matrix in size.experts if matrix.name in leaves]
    return config.lora.r * sum((linear.inputs + linear.outputs) * linear.count for linear in taken)


def _train_dtype(config: RunConfig, device: str) -> str:
    return ("bfloat16" if device == "cuda" else "float32") if config.model.dtype == "auto" else config.model.dtype


def _train_bytes(config: RunConfig, device: str) -> int:
    return _BYTES[_train_dtype(config, device)]


def device_here() -> str:
    """ "cuda" or "cpu", as far as can be told without torch."""
    return "cuda" if has_nvidia_driver() else "cpu"


def _free_memory(device: str) -> int | None:
    if device == "cuda":
        return None  # the driver would have to be asked
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_disk(root: str) -> int | None:
    folder = Path(root).expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free if os.access(folder, os.R_OK) else None
