"""How much of the loss that quantisation costs does QAT win back, and with which switches: a line a training.

    python benchmarks/recovery.py --out docs/recovery.jsonl --arm control --seed 0 1 2 --rate 1e-3 2e-3
    python benchmarks/recovery.py --out docs/recovery.jsonl --scheme int8-int4 int3 --arm ptq outside inside --seed 0
    python benchmarks/recovery.py --out docs/recovery.jsonl --summary --split tuning

The 16-bit fine-tune must be at its best first, or QAT "recovers" what better training gives: choose the --rate of
`control` by its loss on the tuning half, and give it to all other arms.

Every training goes through the code that `train` runs; the shipped model is really quantised, saved and reloaded. Lines
that --out holds already are skipped, so that a study can be gathered over many sittings; `--processes 8` shares the
trainings among so many processes on each visible GPU. `control` (the 16-bit fine-tune) is shared by all arms of a seed
and must be there first (as `longer` must for `ptq-longer`); it is trained again where its files are gone, and gives the
same numbers to the bit. Every line scores two halves of the held-out file apart: switches are chosen by `--summary
--split tuning`; `--split heldout` is looked at last.

Losses are nats per answer token. `recovered` is (ptq - final) / (ptq - control); `at equal steps` takes both from the
16-bit fine-tune that trained for as many steps as the arm: `longer` for the arms that go on from the control. `exact`
is the share of answers whose every token is the argmax: what greedy decoding would answer. `gap` is trained minus
shipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Job = tuple[str | None, str, int, float | None]

_DISTILL = {"distill": 0.9, "teacher": "control"}
_AFTER = {"initial": "control", "max_steps": 100}
_LEARNED = {"learned_scales": True}
_FAST = {"learned_scales": True, "scale_learning_rate": 1e-2}
_MSE = {"ranges": "mse"}
_HALF = {"learning_rate": 0.5}
_TWICE = {"learning_rate": 2.0}
ARMS: dict[str, dict[str, Any]] = {
    # The peers' placement and ours; Unsloth's own QAT through its own API.
    "unsloth": {},
    "unsloth-lr2": _TWICE,
    "outside": {"placement": "outside"},
    "outside-lr2": {"placement": "outside", **_TWICE},
    "inside": {},
    # One switch each.
    "start25": {"start": 0.25},
    "start": {"start": 0.5},
    "start75": {"start": 0.75},
    "mse": _MSE,
    "learned": _LEARNED,
    "learned-fast": _FAST,
    "half": _HALF,
    "lr2": _TWICE,
    "distill-self": {"start": 0.5, "distill": 0.9, "teacher": "start"},
    "distill": _DISTILL,
    "after": {"initial": "control"},
    "after100": _AFTER,
    # Together.
    "mse-learned": {**_MSE, **_LEARNED},
    "learned-lr2": {**_LEARNED, **_TWICE},
    "start-learned": {"start": 0.5, **_LEARNED},
    "start-learned-fast": {"start": 0.5, **_FAST},
    "start-distill-learned": {"start": 0.5, **_DISTILL, **_LEARNED},
    "start-learned-lr2": {"start": 0.5, **_LEARNED, **_TWICE},
    "distill-start": {**_DISTILL, "start": 0.25},
    "distill-lr2": {**_DISTILL, **_TWICE},
    "distill-learned": {**_DISTILL, **_LEARNED},
    "distill-mse-learned": {**_DISTILL, **_MSE, **_LEARNED},
    "distill-learned-lr2": {**_DISTILL, **_LEARNED, **_TWICE},
    "after100-half": {**_AFTER, **_HALF},
    "after200-half": {"initial": "control", **_HALF},
    "after100-distill": {**_AFTER, **_DISTILL},
    "after100-distill-half": {**_AFTER, **_DISTILL, **_HALF},
    "after100-learned-half": {**_AFTER, **_LEARNED, **_HALF},
    "after100-distill-learned": {**_AFTER, **_DISTILL, **_LEARNED},
    "after100-distill-learned-half": {**_AFTER, **_DISTILL, **_LEARNED, **_HALF},
}
"""Arm -> settings of `fake_quant`; its `learning_rate` here is a multiple of the 16-bit arm's."""
PLAIN: dict[str, str | None] = {"control": None, "longer": "after100-half", "longer200": "after200-half"}
"""The 16-bit fine-tune, and it as far as that QAT arm trains it: 100 or 200 more steps at half the rate. No scheme."""
PTQ = {"ptq": "control", "hqq": "control", "ptq-longer": "longer", "ptq-longer200": "longer200"}
PTQ |= {"ptq-weights": "control", "ptq-activations": "control"}
"""Quantised after training -> the 16-bit arm that is quantised. The last two round only the weights of it, or only the
activations, and tell where the loss comes from; for schemes whose layers multiply restored weights (int8-int4)."""
SPLITS = ("tuning", "heldout")
GROUPS = {"int8-int4": 32, "int4": 64, "int3": 32, "int2": 32}
"""The group size of the study, which divides SmolLM2's 576. int4 with groups of 32 is the very grid of the GGUF file
that the model comes from: rounding to it undoes most of the fine-tuning (PTQ 1.92 nats, 16 bit 0.60)."""


def main() -> int:
    """Runs what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", nargs="+", default=["int8-int4"])
    parser.add_argument("--arm", nargs="+", default=["inside"], help=", ".join([*PLAIN, *PTQ, *ARMS]))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--rate", nargs="+", type=float, default=[None], help="default: train.learning_rate of --config"
    )
    parser.add_argument("--split", choices=SPLITS, default="tuning", help="which half --summary shows")
    parser.add_argument("--config", default=str(Path(__file__).with_name("recovery.yaml")))
    parser.add_argument("--root", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, help="default: ROOT/results.jsonl")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no training is begun")
    parser.add_argument("--processes", type=int, default=0, help="processes on each GPU; 0 = this one only")
    parser.add_argument("--queue", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--summary", action="store_true", help="print the table of --out and stop")
    options, rest = parser.parse_known_args()
    options.out = options.out or options.root / "results.jsonl"
    if options.summary:
        return summarise(options)
    jobs = [
        (None if arm in PLAIN else scheme, arm, seed, rate)
        for rate in options.rate
        for seed in options.seed
        for arm in options.arm
        for scheme in (options.scheme if arm not in PLAIN else options.scheme[:1])
    ]
    if options.processes:
        return share(options, sys.argv[1:])
    study = Study(options, [word for word in rest if word != "--"])
    for job in claimed(jobs, options.queue):
        if time.monotonic() - study.began > options.limit:
            print("time is up", flush=True)
            break
        study.run(*job)
    return 0


def share(options: argparse.Namespace, argv: list[str]) -> int:
    """Runs this command in many processes, each of which takes the next training that none has taken.

    Unsloth must be imported before transformers, and the others' must be free of its patches: it gets its own.
    """
    import torch

    options.root.mkdir(parents=True, exist_ok=True)
    cards = max(1, torch.cuda.device_count())
    own = [arm for arm in options.arm if not is_unsloths(arm)]
    theirs = [arm for arm in options.arm if is_unsloths(arm)]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"}
    running = []
    for kind, arms, count in (("own", own, options.processes * cards), ("unsloth", theirs, cards)):
        if not arms:
            continue
        queue = options.root / f"queue-{kind}-{os.getpid()}"
        queue.write_text("0")
        for index in range(count):
            command = [sys.executable, __file__, *without(argv, "--processes", "--arm")]
            at = command.index("--") if "--" in command else len(command)
            command[at:at] = ["--arm", *arms, "--queue", str(queue)]
            with (options.root / f"{kind}-{os.getpid()}-{index}.log").open("w") as log:
                card = {"CUDA_VISIBLE_DEVICES": str(index % cards)}
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env={**environment, **card}))
    status = max((process.wait() for process in running), default=0)
    for queue in options.root.glob(f"queue-*-{os.getpid()}"):
        queue.unlink()
    return status


def is_unsloths(arm: str) -> bool:
    """Trained by Unsloth's own QAT."""
    return arm.startswith("unsloth")


def without(argv: list[str], *flags: str) -> list[str]:
    """The arguments but for these flags and their values."""
    kept, dropping, passed_on = [], False, False
    for word in argv:
        passed_on |= word == "--"
        if word.startswith("--"):
            dropping = word in flags and not passed_on
        if not dropping:
            kept.append(word)
    return kept


def claimed(jobs: list[Job], queue: Path | None) -> Iterator[Job]:
    """The jobs that this process is to do: all of them, or one at a time from a counter that processes share."""
    if queue is None:
        yield from jobs
        return
    import fcntl

    while True:
        with queue.open("r+") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            index = int(counter.read())
            counter.seek(0)
            counter.write(str(index + 1))
        if index >= len(jobs):
            return
        yield jobs[index]


class Study:
    """One process of the study: model and data, and a training at a time."""

    def __init__(self, options: argparse.Namespace, overrides: list[str]) -> None:
        self.began = time.monotonic()
        if any(map(is_unsloths, options.arm)):
            os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # the compiler may leave out roundings in between
            import unsloth  # noqa: F401  before transformers
        import transformers

        from train.config_loading import load_config
        from train.models import resolve_model

        transformers.utils.logging.disable_progress_bar()

        self.options = options
        self.config = self.given = load_config(options.config, overrides)
        self.folder = resolve_model(self.config.model, cache=options.root / ".cache", seed=0).folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        self.data: Any = None

    def run(self, scheme: str | None, arm: str, seed: int, rate: float | None) -> None:
        """Trains and measures one arm, unless its line is there, and appends its line."""
        asked = {} if rate is None else {"learning_rate": rate}
        self.config = self.given.model_copy(update={"train": self.given.train.model_copy(update=asked)})
        key = {
            "scheme": scheme,
            "group": None if scheme is None else self._format(scheme)[2],
            "arm": arm,
            "seed": seed,
            "learning_rate": self.config.train.learning_rate,
        }
        done = any(all(row.get(name) == value for name, value in key.items()) for row in read(self.options.out))
        if done and (arm not in PLAIN or self._is_there(arm, seed)):
            return
        if arm != "control":
            self._wait_for("control", seed)
            self._wait_for(PTQ.get(arm, "control"), seed)
        started = time.monotonic()
        try:
            if arm in PLAIN:
                row = self._in_16_bit(arm, seed)
            elif arm in PTQ:
                row = self._after_training(str(scheme), arm, seed)
            else:
                row = self._qat(str(scheme), arm, seed)
        except Exception as error:
            print(json.dumps(key | {"failed": repr(error)[:500]}), flush=True)
            return
        if done:  # a 16-bit arm whose files were gone
            return
        line = json.dumps(key | row | {"seconds": round(time.monotonic() - started, 1)} | self._provenance())
        print(line, flush=True)
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        with self.options.out.open("a") as stream:
            stream.write(line + "\n")

    # ------------------------------------------------------------------ arms

    def _in_16_bit(self, arm: str, seed: int) -> Row:
        home = self._home(arm, seed)
        seconds = 0.0
        if not self._is_there(arm, seed):
            recipe = PLAIN[arm]
            seconds = self._train(self._settings(seed, ARMS[recipe] if recipe else {}), home, None)
        model = self._load(home / "merged")
        return self._scores(model, None) | {"train_seconds": seconds}

    def _after_training(self, name: str, arm: str, seed: int) -> Row:
        from torchao.quantization import quantize_

        from quantize.layers import select_layers
        from quantize.simulate import simulate_

        scheme, target, group = self._format(name)
        model = self._load(self._home(PTQ[arm], seed) / "merged")
        coverage = select_layers(model, scheme, group, target)
        layers = {fqn: model.get_submodule(fqn) for fqn in coverage.layers}
        weights = {fqn: layer.weight for fqn, layer in layers.items()}
        if arm != "hqq":
            simulate_(model, scheme, target, group, coverage)
        else:
            quantize_(model, with_hqq(target.config(group)), filter_fn=lambda module, fqn: fqn in layers)
        for fqn, layer in layers.items():
            if arm == "ptq-weights":
                layer._forward_pre_hooks.clear()
            elif arm == "ptq-activations":
                layer.weight = weights[fqn]
        return self._scores(model, seed) | {"layers": len(coverage.layers)}

    def _qat(self, name: str, arm: str, seed: int) -> Row:
        import torch

        from quantize.convert import quantise_
        from quantize.grid import load_grid
        from quantize.layers import select_layers
        from quantize.simulate import simulate_

        scheme, target, group = self._format(name)
        home = self.options.root / "work" / f"{name}-{arm}-{seed}-{os.getpid()}"
        config = self._settings(seed, ARMS[arm])
        theirs = is_unsloths(arm)
        plan = None if theirs else (scheme, target, group)
        seconds = self._train(config, home, plan, unsloth=(name, group) if theirs else None)
        stored: Row = json.loads((home / "trained.json").read_text())
        grid = load_grid(home / "grid", self.device) if (home / "grid").is_dir() else None
        if theirs:
            return self._in_a_plain_process(home, seed, (scheme, target, group)) | stored | {"train_seconds": seconds}
        trained = self._load(home / "merged")
        coverage = select_layers(trained, scheme, group, target)
        assert len(coverage.layers) == stored["layers"]
        row = dict(stored)
        if grid is not None:
            simulate_(trained, scheme, target, group, coverage, grid)
            row["trained"] = self._scores(trained, None)["loss"]
        del trained
        shipped = self._load(home / "merged")
        quantise_(shipped, scheme, target, group, coverage, grid)
        shipped.save_pretrained(home / "quantized")
        del shipped
        torch.cuda.empty_cache()
        row |= self._scores(self._load(home / "quantized", None), seed)
        row["gap"] = row["trained"] - row["loss"]
        remove_folder(home)
        return row | {"train_seconds": seconds}

    # ------------------------------------------------------------------ parts

    def _is_there(self, arm: str, seed: int) -> bool:
        return (self._home(arm, seed) / "done").is_file()

    def _wait_for(self, arm: str, seed: int) -> None:
        """A 16-bit arm, which another process may be training."""
        limit = 600 if self.options.queue else 0
        while not self._is_there(arm, seed):
            if limit <= 0:
                raise SystemExit(f"seed {seed} has no {arm} yet: run --arm {arm} with this --seed and --rate first")
            time.sleep(2)
            limit -= 2

    def _train(self, config: Any, home: Path, plan: Any, unsloth: Any = None) -> float:
        """Fine-tunes, writes adapter, grid, merged weights and trained.json; seconds of the optimisation."""
        from quantize.grid import save_grid
        from train.backends import pick_backend
        from train.fit import QatPlan, backend_loss, build_learner, fit, save_adapter
        from train.merge import write_merged

        backend = pick_backend("unsloth" if unsloth else config.model.backend)
        control = self._home("control", config.run.seed) / "adapter"
        chosen = QatPlan(scheme=plan[0], target=plan[1], group_size=plan[2], dtype=self.dtype) if plan else None
        start = control if config.fake_quant.initial == "control" else None
        if unsloth:
            learner = unsloth_learner(self.folder, config, backend, *unsloth)
        else:
            learner = build_learner(config, backend, self.folder, chosen, dtype=self.dtype, adapter=start)
        begun = time.monotonic()
        fit(
            learner, config, self.tokenizer, self._data()[0], home / "checkpoints",
            lambda *_: None, lambda: False, teacher=control,
        )  # fmt: skip
        seconds = time.monotonic() - begun
        layers = len(learner.prepared.coverage.layers) if learner.prepared else count_fake_quantised(learner.model)
        steps = config.train.max_steps
        grid = learner.prepared is not None and config.fake_quant.placement == "inside"
        # The loss of a trained grid is measured in the plain graph; without one only the backend's graph has it.
        outside = not grid and (plan or unsloth)
        trained = backend_loss(learner, self._samples(), config.eval.batch_size) if outside else None
        for folder in ("adapter", "grid", "merged"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        save_adapter(learner, home / "adapter")
        if grid:
            save_grid(home / "grid", learner.prepared.grid())
        else:
            (home / "grid").rmdir()
        write_merged(learner, self.folder, home / "merged", dtype=self.dtype, settings=config.model)
        (home / "trained.json").write_text(json.dumps({"trained": trained, "layers": layers, "steps": steps}))
        remove_folder(home / "checkpoints")
        (home / "done").touch()
        return round(seconds, 1)

    def _in_a_plain_process(self, home: Path, seed: int, chosen: Any) -> Row:
        """Converts and scores where unsloth's patches are not."""
        from quantize.evaluate import Scores
        from quantize.worker import run_jobs

        scheme, target, group = chosen
        table = home / "eval.parquet"
        rows = self._data()[1]
        rows.to_parquet(str(table))
        names = {"scheme": scheme.name, "target": target.name, "group_size": group, "skip": []}
        source, output = str(home / "merged"), str(home / "quantized")
        reference = str(self._home("control", seed) / "merged")
        jobs: list[Row] = [
            {"kind": "convert", "name": "convert", "source": source, "output": output, "dtype": self.dtype, **names},
            {"kind": "evaluate", "name": "final", "model": output, "dtype": None, "data": str(table),
             "batch_size": self.config.eval.batch_size, "scores": str(home / "final.parquet"),
             "reference": reference, "reference_dtype": self.dtype},
        ]  # fmt: skip
        run_jobs(jobs, home / "request.json")
        scores = Scores.load(home / "final.parquet")
        trained = json.loads((home / "trained.json").read_text())["trained"]
        remove_folder(home)
        row = by_split(scores)
        return row | {"gap": trained - row["loss"]}

    def _settings(self, seed: int, fake_quant: dict[str, Any]) -> Any:
        """The config of one training. Without a start of its own an arm fake-quantises from the first step."""
        times = fake_quant.get("learning_rate", 1.0)
        rate = {"learning_rate": times * self.config.train.learning_rate}
        asked = self.config.fake_quant.model_copy(update={"start": 0} | fake_quant | rate)
        run = self.config.run.model_copy(update={"seed": seed})
        return self.config.model_copy(update={"fake_quant": asked, "run": run}).for_qat()

    def _format(self, name: str) -> Any:
        from quantize.hardware import pick_target
        from quantize.schemes import find_scheme

        scheme = find_scheme(name)
        return scheme, pick_target(scheme, None)[0], GROUPS.get(name, scheme.group_size)

    def _data(self) -> Any:
        """(training rows, held-out rows), the same for every seed."""
        from train.data import prepare_data

        if self.data is None:
            length = self.config.train.max_length
            prepared = prepare_data(self.config.data, self.tokenizer, max_length=length, seed=0)
            self.data = (prepared.train, prepared.eval)
        return self.data

    def _samples(self) -> Any:
        from quantize.evaluate import Sample

        return [Sample(row["input_ids"], row["loss_mask"]) for row in self._data()[1]]

    def _scores(self, model: Any, seed: int | None) -> Row:
        """Both halves' scores; KL from the control of `seed`, where there is one."""
        from quantize.evaluate import evaluate_model

        control = None if seed is None else self._load(self._home("control", seed) / "merged")
        return by_split(
            evaluate_model(model, self._samples(), batch_size=self.config.eval.batch_size, reference=control)
        )

    def _load(self, folder: Path, dtype: str | None = "own") -> Any:
        from quantize.convert import load_plain

        return load_plain(folder, dtype=self.dtype if dtype == "own" else dtype, device=self.device)

    @property
    def device(self) -> str:
        """Where everything runs."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> str:
        """Weights in training, and what ships."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def _home(self, arm: str, seed: int) -> Path:
        return Path(self.options.root) / "work" / f"{arm}-{self.config.train.learning_rate:g}-{seed}"

    def _provenance(self) -> Row:
        import torch
        import torchao

        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": name, "torch": torch.__version__, "torchao": torchao.__version__}


def by_split(scores: Any) -> Row:
    """{"loss": over all rows, "tuning": {loss, exact, kl}, "heldout": the same}: every other row is the one's."""
    row: Row = {"loss": scores.loss}
    for index, name in enumerate(SPLITS):
        tokens = scores.tokens[index::2].sum()
        row[name] = {
            "loss": float(scores.nll[index::2].sum() / tokens),
            "exact": float(scores.exact[index::2].mean()),
            "kl": None if scores.kl is None else float(scores.kl[index::2].sum() / tokens),
        }
    return row


def unsloth_learner(folder: Path, config: Any, backend: Any, name: str, group: int | None) -> Any:
    """Unsloth's own QAT through its own API, with our layers and group size so that the two can be compared.

    Its names would quantise lm_head and the embedding too (int8-int4), or only the layers that 128 divides (int4).
    """
    import torch
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerRow,
    )
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quantize_.common import KernelPreference
    from unsloth import FastLanguageModel
    from unsloth.models._utils import TorchAOConfig

    from train.backends import initialise_adapters
    from train.fit import Learner

    per_group = PerGroup(group or 32)
    base = {
        "int8-int4": lambda: Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=per_group,
        ),
        "int3": lambda: IntxWeightOnlyConfig(
            weight_dtype=torch.int3,  # type: ignore[attr-defined]
            granularity=per_group,
        ),
        "int4": lambda: Int4WeightOnlyConfig(group_size=group),  # it refuses the tile-packed layout
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), kernel_preference=KernelPreference.TORCH
        ),
    }[name]()

    def chosen(module: Any, fqn: str) -> bool:
        parts = fqn.split(".")
        return (
            isinstance(module, torch.nn.Linear)
            and "lm_head" not in parts
            and not any(part.startswith("lora_") for part in parts)
        )

    seed = config.run.seed
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=config.train.max_length, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=0.0,
        use_gradient_checkpointing=False,
        random_state=seed,
        qat_scheme=TorchAOConfig(qat_scheme=name, base_config_and_filter_fns=[(base, chosen)]),
    )
    initialise_adapters(model, seed)
    assert count_fake_quantised(model) > 0, "unsloth left its qat_scheme out"
    return Learner(model=model, prepared=None, dtype="bfloat16", backend=backend)


def count_fake_quantised(model: Any) -> int:
    """Layers that torchao's own QAT replaced."""
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    return sum(isinstance(module, FakeQuantizedLinear) for module in model.modules())


def with_hqq(config: Any) -> Any:
    """The same torchao config with HQQ choosing the numbers. Raises ValueError where torchao has none."""
    if hasattr(config, "int4_choose_qparams_algorithm"):
        return type(config)(
            group_size=config.group_size,
            int4_packing_format=config.int4_packing_format,
            int4_choose_qparams_algorithm="hqq",
        )
    if hasattr(config, "intx_choose_qparams_algorithm"):
        config.intx_choose_qparams_algorithm = "hqq_scale_only"
        return config
    raise ValueError(f"torchao has no HQQ for {type(config).__name__}")


def remove_folder(folder: Path) -> None:
    """Deletes a folder that may be gone already."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def read(path: Path) -> list[Row]:
    """The lines of a study so far."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that another process is writing
            rows.append(json.loads(line))
    return rows


def summarise(options: argparse.Namespace) -> int:
    """Prints mean and standard error over the seeds, each arm against control and ptq of its own seed and rate."""
    rows = [row | row[options.split] for row in read(options.out)]
    rates = sorted({row["learning_rate"] for row in rows} if options.rate == [None] else options.rate)
    for rate in rates:
        print(f"Learning rate {rate:g}\n")
        summarise_rate([row for row in rows if row["learning_rate"] == rate])
        print()
    return 0


def summarise_rate(rows: list[Row]) -> None:
    """One table."""
    losses = {(row["scheme"], row["arm"], row["seed"]): row["loss"] for row in rows}
    titles = ["loss", "exact match", "KL", "trained - shipped", "recovered", "at equal steps", "training s"]
    print("| scheme | arm | seeds | " + " | ".join(titles) + " |")
    print("| --- | --- | ---: |" + " ---: |" * len(titles))
    for scheme, arm in dict.fromkeys((row["scheme"], row["arm"]) for row in sorted(rows, key=order)):
        own = [row for row in rows if (row["scheme"], row["arm"]) == (scheme, arm)]
        shares = list(recovered(own, losses, "ptq", "control"))
        equal = list(recovered(own, losses, *baseline(arm)))
        gaps = [abs(row["gap"]) for row in own if row.get("gap") is not None]
        cells = [
            scheme or "16 bit", arm, str(len(own)), spread([row["loss"] for row in own], 4),
            spread([100 * row["exact"] for row in own], 1) + "%",
            spread([row["kl"] for row in own if row.get("kl") is not None], 4),
            f"{max(gaps):.5f}" if gaps else "-",
            *(spread([100 * share for share in values], 1) + "%" if values else "-" for values in (shares, equal)),
            spread([row["train_seconds"] for row in own if row.get("train_seconds")], 0),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def order(row: Row) -> tuple[str, int, str]:
    """Schemes together, the arms without QAT first."""
    return row["scheme"] or "", [*PLAIN, *PTQ, *ARMS].index(row["arm"]), row["arm"]


def baseline(arm: str) -> tuple[str, str]:
    """The arms to measure `recovered` from, (quantised, 16 bit), that trained for as many steps as `arm` in all."""
    settings = ARMS.get(arm, {})
    plain = PTQ.get(arm, "control")
    if settings.get("initial") == "control":
        plain = "longer" if "max_steps" in settings else "longer200"
    return next(quantised for quantised, of in PTQ.items() if of == plain), plain  # the first of it is plain PTQ


def recovered(rows: list[Row], losses: dict[Any, float], quantised: str, plain: str) -> Iterator[float]:
    """(quantised - final) / (quantised - plain) of each seed that has all three."""
    for row in rows:
        ptq, control = losses.get((row["scheme"], quantised, row["seed"])), losses.get((None, plain, row["seed"]))
        if ptq is not None and control is not None and row["arm"] not in (*PLAIN, "ptq"):
            yield (ptq - row["loss"]) / (ptq - control)


def spread(values: list[float], digits: int) -> str:
    """Mean and standard error."""
    if not values:
        return "-"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


if __name__ == "__main__":
    sys.exit(main())
