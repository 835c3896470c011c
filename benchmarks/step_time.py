"""What a training step costs, in milliseconds and peak memory: LoRA, ours, Unsloth's own QAT, and PEFT with torchao.

    python benchmarks/step_time.py --shape qwen3-1.7b --arms lora ours/int8-int4 ours/int4 ours/fp8 --out step.jsonl
    python benchmarks/step_time.py --shape tiny --batch 2 --length 64 --arms lora ours/int8-int4 --rounds 2   # on a CPU

Each arm is a process of its own that holds its model (random weights in the true shape, one seed) and waits for its
turn; the arms take turns, a few steps each, so that whatever slows the machine slows all of them. Ratios are of medians
within one run, against the first arm. The peak is what the arm's own process allocates in a step. `kernel_ms` is what
the GPU computes in one step: where it is well below `ms`, the step waits for the CPU, and so would LoRA's.

Arms: `lora` (Unsloth), `ours/SCHEME` (Unsloth with our fake quantisation), `plain/SCHEME` (the same without fused
kernels), `unsloth-qat/SCHEME` (Unsloth's qat_scheme), and with plain PEFT `peft-lora`, `peft-ours/SCHEME` and
`peft-torchao/SCHEME` (torchao's fake quantisers on the frozen layers). `+NAME=VALUE` after an arm sets an environment
variable: `lora+UNSLOTH_BLOCK_COMPILE=0`. A shape with experts trains adapters on them too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "tiny-moe": {
        "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
TORCHAO_NAMES = {"fp8": "fp8-fp8"}


def main() -> int:
    """Starts the arms, lets them take turns, prints one line an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--arms", nargs="+", default=["lora", "ours/int8-int4", "ours/int4", "ours/fp8"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--warmup", type=int, default=4, help="steps before the clock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each arm in a round")
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins after so many from the start")
    parser.add_argument("--profile", type=Path, help="write each arm's time by kernel to this folder")
    parser.add_argument("--out", type=Path, help="append the results here, one JSON line an arm")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(options)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        return _parent(options, Path(scratch))


def _parent(options: argparse.Namespace, scratch: Path) -> int:
    began = time.monotonic()
    folder = scratch / "model"
    subprocess.run([*_again(), "--child", "write", "--folder", str(folder)], check=True)
    arms = [_Arm(name, folder, options) for name in options.arms]
    for arm in arms:
        arm.ready()
    for done in range(options.rounds):
        if done and time.monotonic() - began > options.seconds:
            break
        for arm in arms:
            arm.take_turn()
    lines = [arm.finish() for arm in arms]
    base = next((line for line in lines if "ms" in line), None)
    for line in lines:
        if base is not None and "ms" in line:
            line |= {"x": round(line["ms"] / base["ms"], 3), "x_gib": round(line["gib"] / base["gib"], 3)}
            if "kernel_ms" in line and "kernel_ms" in base:
                line["x_kernel"] = round(line["kernel_ms"] / base["kernel_ms"], 3)
            first = base["losses"]
            line["loss_apart"] = round(max(abs(a - b) for a, b in zip(first, line["losses"], strict=True)), 5)
        print(json.dumps({key: value for key, value in line.items() if key not in ("losses", "all_ms")}), flush=True)
        if options.out is not None:
            with options.out.open("a") as out:
                out.write(json.dumps(line) + "\n")
    return 0 if all("ms" in line for line in lines) else 1


def _again() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]


class _Arm:
    """One process with one model, which answers each line of its input with a line of JSON."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.name, *settings = name.split("+")
        self.label, self.options = name, options
        self.times: list[float] = []
        self.losses: list[float] = []
        self.line: dict[str, Any] = {"arm": name, "shape": options.shape, "batch": options.batch}
        self.line |= {"length": options.length, "rank": options.rank, "checkpointing": options.checkpointing}
        environment = os.environ | dict(setting.split("=", 1) for setting in settings)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open for as long as the process
        self.process = subprocess.Popen(
            [*_again(), "--child", self.name, "--folder", str(folder)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def _ask(self, question: str) -> dict[str, Any] | None:
        if "error" in self.line:
            return None
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for answer in self.process.stdout:  # what libraries print comes between
            if answer.startswith('{"answer"'):
                found: dict[str, Any] = json.loads(answer)["answer"]
                return found
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        self.line["error"] = lines[-1][:300] if lines else f"exit {self.process.wait()}"
        print(f"{self.label}:", *lines[-25:], sep="\n  ", file=sys.stderr, flush=True)
        return None

    def ready(self) -> None:
        self._keep(self._ask(f"steps {self.options.warmup}"), timed=False)

    def take_turn(self) -> None:
        self._keep(self._ask(f"steps {self.options.steps}"), timed=True)

    def _keep(self, answer: dict[str, Any] | None, *, timed: bool) -> None:
        if answer is None:
            return
        self.losses += answer["losses"]
        self.line |= {key: value for key, value in answer.items() if key not in ("losses", "ms")}
        if timed:
            self.times += answer["ms"]

    def finish(self) -> dict[str, Any]:
        self.line |= self._ask("profile") or {}
        if self.times and "error" not in self.line:
            self.line |= {"ms": round(statistics.median(self.times), 2), "first": self.losses[0]}
            self.line |= {"last": self.losses[-1], "losses": self.losses, "all_ms": self.times}
        self.process.kill()
        return self.line


# ---------------------------------------------------------------------- in an arm's process


def _child(options: argparse.Namespace) -> int:
    if options.child == "write":
        return _write_model(options)
    step = _build(options)
    import torch

    cuda = torch.cuda.is_available()
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "profile":
            print(json.dumps({"answer": _profile(step, options)}), flush=True)
            continue
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times, losses = [], []
        calls: dict[str, Any] = {}
        for _ in range(int(rest[0])):
            milliseconds, loss, calls = step()
            times.append(milliseconds)
            losses.append(loss)
        gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 1.0
        answer = {"ms": times, "losses": losses, "gib": round(gib, 3), **calls}
        answer["device"] = torch.cuda.get_device_name() if cuda else "cpu"
        print(json.dumps({"answer": answer}), flush=True)
    return 0


def _write_model(options: argparse.Namespace) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.models import byte_tokenizer

    tokenizer = byte_tokenizer()
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    kind = "qwen3_moe" if "num_local_experts" in shape else "qwen3"
    config = AutoConfig.for_model(kind, max_position_embeddings=40960, rope_theta=1e6, **shape, **tokens)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    return 0


def _build(options: argparse.Namespace) -> Any:
    """Loads the arm's model; returns a function that does one step: (milliseconds, loss, what ran)."""
    kind, _, scheme = options.child.partition("/")
    from train.backends import initialise_adapters, pick_backend

    backend = pick_backend("peft" if kind.startswith("peft") else "unsloth")
    import torch

    from qat.prepare import prepare_qat
    from quantize.experts import MATRICES
    from train.config import LoraConfig, ModelConfig

    cuda = torch.cuda.is_available()
    dtype = "bfloat16" if cuda else "float32"
    model = backend.load(
        Path(options.folder), ModelConfig(id=options.folder), dtype=dtype, max_length=options.length, full=False
    )
    experts = list(MATRICES) if "num_local_experts" in SHAPES[options.shape] else None
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_parameters=experts)
    if kind == "unsloth-qat":
        model = _unsloth_own(model, lora, scheme, options)
    else:
        model = backend.add_lora(model, lora, seed=0, gradient_checkpointing=options.checkpointing)
    initialise_adapters(model, 0)
    prepared = None
    if kind in ("ours", "plain", "peft-ours"):
        name, _, target = scheme.partition("@")
        prepared = prepare_qat(model, name, target=target or None, dtype=getattr(torch, dtype), fused=kind != "plain")
    elif kind == "peft-torchao":
        _torchao_fake_quantisers(model, scheme)
    model.train()
    if kind in ("lora", "ours", "plain", "unsloth-qat") and hasattr(model, "for_training"):
        model.for_training(options.checkpointing)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(adapters, lr=1e-4, fused=cuda)
    device = "cuda" if cuda else "cpu"
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    batches = [
        torch.randint(0, vocabulary, (options.batch, options.length), generator=generator).to(device) for _ in range(4)
    ]
    names = tuple(prepared.layers) if prepared is not None else ()
    done = 0

    def step() -> tuple[float, float, dict[str, Any]]:
        nonlocal done
        ids = batches[done % len(batches)]
        done += 1
        with backend.computing(names, dtype=dtype), torch.autocast(device, torch.bfloat16, enabled=cuda):
            clock = _Clock(cuda)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            milliseconds = clock.stop()
        ran: dict[str, Any] = {}
        if prepared is not None:
            ran = {"layers": len(names), "silent": len(prepared.silent()), "calls": sum(prepared.calls.values()) / done}
        return milliseconds, float(loss.detach()), ran

    return step


class _Clock:
    def __init__(self, cuda: bool) -> None:
        import torch

        self.cuda, self.torch = cuda, torch
        if cuda:
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
            self.events[0].record()
        self.began = time.perf_counter()

    def stop(self) -> float:
        if not self.cuda:
            return 1000 * (time.perf_counter() - self.began)
        self.events[1].record()
        self.torch.cuda.synchronize()
        return float(self.events[0].elapsed_time(self.events[1]))


def _unsloth_own(model: Any, lora: Any, scheme: str, options: argparse.Namespace) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=0, random_state=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if options.checkpointing else False,
        qat_scheme=TORCHAO_NAMES.get(scheme, scheme),
    )  # fmt: skip


def _torchao_fake_quantisers(model: Any, scheme: str) -> None:
    """torchao's own QAT on the frozen layers under the adapters, as its documentation has it for PEFT."""
    import torch
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerRow,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    configs: dict[str, Any] = {
        "int8-int4": lambda: Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=PerGroup(32),
        ),
        "int4": lambda: Int4WeightOnlyConfig(group_size=128),
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }
    quantize_(
        model,
        QATConfig(configs[scheme](), step="prepare"),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name.endswith("base_layer"),
    )


def _profile(step: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What the GPU's kernels take in one step, without the waits for the CPU and without copies to and from it."""
    import torch

    if not torch.cuda.is_available():
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
        (options.profile / f"{options.child.replace('/', '-')}.txt").write_text(str(table))
    kernels = [
        event.time_range.elapsed_us()
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip
    return {"kernel_ms": round(sum(kernels) / 1000, 2)}


if __name__ == "__main__":
    sys.exit(main())
