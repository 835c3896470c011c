"""The steps of the line. Each is skipped when this run directory already holds its result for the same inputs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.finish import GATHERED_VERSION, copy_atomically
from quantize.gate import check_gap
from quantize.jobs import Job, Jobs, task_rows_path
from quantize.numerics import VERSION
from quantize.schemes import find_scheme
from train.events import Event, Sinks
from train.stage_log import Format, StageLog, Tuned, fingerprint_of

if TYPE_CHECKING:
    from train.backends import Backend
    from train.config import RunConfig
    from train.data import Prepared
    from train.fit import QatPlan
    from train.models import LocalModel
    from train.rundir import RunDir
    from train.signals import StopRequest


class Stages:
    """The steps of one run. Their order is in `pipeline.py`; state lives in the run directory."""

    def __init__(self, config: RunConfig, directory: RunDir, events: Sinks, stop: StopRequest) -> None:
        self.config, self.directory, self.events, self.stop = config, directory, events, stop
        self.log = StageLog(directory, events)
        self.format: Format | None = None
        self.dtype = self.merged_dtype = "float32"
        self.jobs: Jobs
        self.model_key = self.data_key = self.task_key = ""

    # ------------------------------------------------------------------ preparation

    def begin(self, argv: list[str]) -> None:
        """Provenance, the format, and the dtypes."""
        import torch

        from quantize.hardware import pick_target
        from train.data import template_text
        from train.versions import provenance

        config = self.config
        self.events.emit(
            Event("run_started", {"path": str(self.directory.path), "config": config.model_dump(mode="json")})
        )
        self.directory.update_manifest(argv=argv, seed=config.run.seed, **provenance())
        cuda = torch.cuda.is_available()
        by_device = "bfloat16" if cuda else "float32"
        self.dtype = by_device if config.model.dtype == "auto" else config.model.dtype
        if config.scheme_name is not None:
            scheme = find_scheme(config.scheme_name)
            target, missing = pick_target(scheme, config.quantize.target)
            group_size = scheme.pick_group_size(config.quantize.group_size, target)
            self.format = Format(scheme, target, group_size, tuple(config.quantize.skip), tuple(missing))
        wanted = self.format.target.dtype if self.format and self.format.target.dtype else by_device
        self.merged_dtype = wanted if config.quantize.dtype == "auto" else config.quantize.dtype
        self.jobs = Jobs(
            run=self.directory.path,
            format=None if self.format is None else self.format.job(),
            dtype=self.merged_dtype,
            plain_dtype=self._plain_dtype,
            batch_size=config.eval.batch_size,
            trust_remote_code=config.model.trust_remote_code,
            inside=config.qat is not None and config.fake_quant.placement == "inside",
            tasks=config.eval.task_settings(config.run.seed),
            chat_template=template_text(config.data.chat_template),
            cost_batches=config.eval.cost_batches,
        )

    def backend(self) -> Backend:
        """Imports the backend, first of all that touches transformers."""
        from train.backends import pick_backend

        backend = pick_backend(self.config.model.backend)
        import transformers

        transformers.utils.logging.disable_progress_bar()  # one bar at a time: the console's
        return backend

    def model(self) -> LocalModel:
        """The model as a local folder."""
        from train.models import resolve_model

        found = resolve_model(self.config.model, cache=self.cache, seed=self.config.run.seed)
        self.model_key = found.fingerprint
        self.directory.update_manifest(model_fingerprint=found.fingerprint)
        self._check_shape(found.folder)
        self.directory.check_disk(3 * sum(path.stat().st_size for path in found.folder.glob("*.safetensors")))
        return found

    def _check_shape(self, folder: Path) -> None:
        """Refuses, before any training, a format that reaches too little of the model, and adapters that do not fit."""
        from quantize.convert import inspect_model
        from train.refusals import refuse_low_coverage, refuse_misplaced_adapters

        shape = inspect_model(folder, trust_remote_code=self.config.model.trust_remote_code)
        if self.config.qat is not None and self.format is not None:
            coverage = self.format.select(shape)
            refuse_low_coverage(coverage, self.format.scheme, self.config.fake_quant.min_coverage)
        if self.config.lora is not None:
            refuse_misplaced_adapters(shape, self.config)

    @property
    def cache(self) -> Path:
        """Shared by the runs of one root: converted models, baselines."""
        return Path(self.config.run.root) / ".cache"

    def tokenizer(self, folder: Path) -> Any:
        """The model's tokenizer, with the configured chat template."""
        from transformers import AutoTokenizer

        trust = self.config.model.trust_remote_code
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)

    def data(self, model: LocalModel) -> Prepared:
        """Tokenised, split and fingerprinted data; one mask-coloured example is shown."""
        from train.data import load_prepared, prepare_data, save_prepared

        config = self.config
        key = fingerprint_of(self.model_key, config.data.model_dump(), config.train.max_length, config.run.seed)
        folder = self.directory.path / "data"

        def work() -> dict[str, Any]:
            prepared = prepare_data(
                config.data, self.tokenizer(model.folder), max_length=config.train.max_length, seed=config.run.seed
            )
            save_prepared(prepared, folder)
            return {"fingerprint": prepared.fingerprint, "statistics": prepared.statistics}

        result = self.log.run("data", key, work, makes=[self.jobs.samples])
        prepared = load_prepared(folder)
        self.data_key = result["fingerprint"]
        self.directory.update_manifest(data_fingerprint=self.data_key, data=result["statistics"])
        self.events.emit(Event("message", {"text": prepared.example, "title": "one training example", "markup": True}))
        return prepared

    # ------------------------------------------------------------------ evaluation

    def tasks(self, model: LocalModel) -> dict[str, Any]:
        """Loads the benchmarks, so that one that cannot be loaded ends the run before anything is trained."""
        if self.jobs.tasks is None:
            return {}
        from quantize.tasks import definition_key

        job = self.jobs.check_tasks(model.folder)
        key = fingerprint_of(self.model_key, job, definition_key(self.config.eval.tasks))
        found = self.log.run("tasks", key, lambda: self.log.jobs("tasks", [job])[0])
        self.task_key = found["fingerprint"]
        return found

    def baseline(self, model: LocalModel, data: Prepared) -> dict[str, Any]:
        """The model before fine-tuning, and quantised as it is; kept across runs."""
        manifest = self.directory.read_json("manifest.json")
        computed_by = [
            manifest["device"],
            *(manifest["packages"][name] for name in ("torch", "torchao", "transformers")),
        ]
        settings = [self.merged_dtype, self._plain_dtype, self.config.eval.batch_size, computed_by, VERSION]
        key = fingerprint_of(self.model_key, self.data_key, self._format_key(), settings, "parquet")
        store = self.cache / "baseline" / key
        jobs = [self.jobs.evaluate("base", model.folder, folder=store)]
        if self.format is not None:
            jobs.append(self.jobs.simulate("base_quantized", model.folder, folder=store))

        def work() -> dict[str, Any]:
            kept = [store / "result.json", *(Path(job["scores"]) for job in jobs)]
            if not (self.config.eval.baseline_cache and all(path.is_file() for path in kept)):
                results = self.log.jobs("baseline", jobs)
                memory = {job["name"]: result["memory_bytes"] for job, result in zip(jobs, results, strict=True)}
                (store / "result.json").write_text(json.dumps({"memory_bytes": memory}), encoding="utf-8")
            for job in jobs:
                copy_atomically(Path(job["scores"]), self.jobs.scores(job["name"]))
            stored: dict[str, Any] = json.loads((store / "result.json").read_text(encoding="utf-8"))
            return stored | {"disk_bytes": _weights_bytes(model.folder)}

        result = self.log.run("baseline", key, work, makes=[self.jobs.scores(job["name"]) for job in jobs])
        for job in jobs:
            self._benchmark(job, key, store / self.task_key)
        return result

    def arms(self, data: Prepared, control: Tuned | None, tuned: Tuned) -> dict[str, Any]:
        """control, ptq (the control quantised), tuned, and this run's merged weights fake-quantised."""
        computed = [self._plain_dtype, self.format is not None and self.format.simulated]
        key = fingerprint_of(self.data_key, self._format_key(), computed, control and control.result, tuned.result)

        jobs = [self.jobs.evaluate("tuned", tuned.merged)]
        if self.format is not None:
            # Its KL divergence stands in for that of the shipped model only where that one cannot run.
            reference = (control or tuned).merged if self.format.simulated else None
            jobs.append(self.jobs.simulate("fake", tuned.merged, trained=True, reference=reference))
        if control is not None:
            jobs.append(self.jobs.evaluate("control", control.merged))
            if self.format is not None:
                jobs.append(self.jobs.simulate("ptq", control.merged, reference=control.merged))

        def work() -> dict[str, Any]:
            results = self.log.jobs("arms", jobs)
            return {job["name"]: result for job, result in zip(jobs, results, strict=True)}

        return self.log.run("arms", key, work, makes=[Path(job["scores"]) for job in jobs])

    # ------------------------------------------------------------------ fine-tuning

    def control(self, backend: Backend, model: LocalModel, data: Prepared) -> Tuned | None:
        """The twin fine-tuned without QAT, where `eval.control` asks for it and this run has QAT."""
        if not self.config.eval.control or self.config.qat is None:
            return None
        return self._tune("control", backend, model, data, None)

    def tuned(self, backend: Backend, model: LocalModel, data: Prepared, control: Tuned | None) -> Tuned:
        """This run's fine-tuning, with QAT where the config asks for it."""
        return self._tune("tuned", backend, model, data, self._plan(), control)

    def _plan(self) -> QatPlan | None:
        from train.fit import QatPlan

        if self.config.qat is None or self.format is None:
            return None
        chosen = self.format
        return QatPlan(
            scheme=chosen.scheme,
            target=chosen.target,
            group_size=chosen.group_size,
            skip=chosen.skip,
            dtype=self.merged_dtype,
        )

    def _tune(
        self,
        arm: str,
        backend: Backend,
        model: LocalModel,
        data: Prepared,
        plan: QatPlan | None,
        control: Tuned | None = None,
    ) -> Tuned:
        from train.tuning import Tuning

        config = self.config.for_qat() if plan else self.config
        training = [config.lora and config.lora.model_dump(), config.train.model_dump(), config.data.packing]
        key = fingerprint_of(self.model_key, self.data_key, training, config.run.seed, self.dtype, self.merged_dtype)
        key = fingerprint_of(key, config.model.backend, plan and [self._format_key(), config.fake_quant.model_dump()])
        if control is not None and "control" in (config.fake_quant.initial, config.fake_quant.teacher):
            key = fingerprint_of(key, control.result)
        tuning = Tuning(
            arm=arm,
            config=config,
            backend=backend,
            model=model,
            data=data,
            plan=plan,
            directory=self.directory,
            key=key,
            dtype=self.dtype,
            merged_dtype=self.merged_dtype,
        )

        def train() -> dict[str, Any]:
            return tuning.train(self.tokenizer(model.folder), self._step(arm), self.stop)

        trained = self.log.run(f"fit-{arm}", key, train, makes=[tuning.adapter])
        folders = [tuning.merged, *([self.directory.path / "grid"] if plan and self.jobs.inside else [])]
        result = self.log.run(f"merge-{arm}", key, lambda: tuning.merge(self.jobs.samples) | trained, makes=folders)
        tuning.free()
        return Tuned(tuning.merged, result)

    # ------------------------------------------------------------------ shipping

    def quantise(self, tuned: Tuned) -> dict[str, Any]:
        """Real quantisation of the merged weights, in a fresh process; not where this machine cannot run the target."""
        if self.format is None or self.format.simulated:
            return {}
        key = fingerprint_of(self.data_key, self._format_key(), tuned.result, self.merged_dtype)
        jobs = [self.jobs.convert(tuned.merged)]
        return self.log.run("quantise", key, lambda: self.log.jobs("quantise", jobs)[0], makes=[self.jobs.shipped])

    def final(
        self, data: Prepared, arms: dict[str, Any], control: Tuned | None, tuned: Tuned, shipped: dict[str, Any]
    ) -> dict[str, Any]:
        """What ships, reloaded from disk in a fresh process, and the proof that it is what was trained."""
        if self.format is None:
            return {}
        upstream = [tuned.result, shipped, control and control.result]
        key = fingerprint_of(self.data_key, self._format_key(), *upstream)

        def work() -> dict[str, Any]:
            layers = self.jobs.layers(tuned.merged, simulated=not shipped)
            if not shipped:
                copy_atomically(self.jobs.scores("fake"), self.jobs.scores("final"))
                return {**arms["fake"], "layers": self.log.jobs("layers", [layers])[0]}
            job = self.jobs.evaluate("final", self.jobs.shipped, reference=(control or tuned).merged)
            scored, measured = self.log.jobs("final", [job, layers])
            if self.jobs.inside and self.format is not None:
                gap = arms["fake"]["loss"] - scored["loss"]
                check_gap(gap, self.format.scheme, self.format.target, lambda: self._worst_layers(tuned))
            return {**scored, "layers": measured}

        return self.log.run("final", key, work, makes=[self.jobs.scores("final")])

    def cost(self, tuned: Tuned, shipped: dict[str, Any]) -> dict[str, Any]:
        """What 16 bit and what ships cost to run here, one after the other in one process."""
        batches = self.config.eval.cost_batches
        if not shipped or not batches:
            return {}
        key = fingerprint_of(tuned.result, shipped, batches)
        return self.log.run("cost", key, lambda: {"measured": self.log.jobs("cost", self.jobs.cost(tuned.merged))})

    def benchmarks(self, control: Tuned | None, tuned: Tuned, shipped: dict[str, Any]) -> None:
        """The tasks on every arm that was trained, each a step of its own: it may take hours."""
        upstream = [self._format_key(), self._plain_dtype]
        jobs = [(self.jobs.evaluate("tuned", tuned.merged), tuned.result)]
        if control is not None:
            jobs.append((self.jobs.evaluate("control", control.merged), control.result))
            if self.format is not None:
                jobs.append((self.jobs.simulate("ptq", control.merged), control.result))
        if self.format is not None and shipped:
            jobs.append((self.jobs.evaluate("final", self.jobs.shipped), shipped))
        elif self.format is not None:
            jobs.append((self.jobs.simulate("final", tuned.merged, trained=True), tuned.result))
        for job, made in jobs:
            self._benchmark(job, fingerprint_of(upstream, tuned.result, made))

    def _benchmark(self, job: Job, key: str, store: Path | None = None) -> None:
        """Runs the tasks on one arm; results in `store` are shared by the runs of one root."""
        if not self.task_key:
            return
        rows = task_rows_path(self.directory.path, job["name"])
        kept = rows if store is None else store / rows.name

        def work() -> dict[str, Any]:
            if store is None or not (self.config.eval.baseline_cache and kept.is_file()):
                self.log.jobs(f"tasks-{job['name']}", [self.jobs.benchmark(job, kept)])
            if store is not None:
                copy_atomically(kept, rows)
            return {}

        self.log.run(f"tasks-{job['name']}", fingerprint_of(key, self.task_key), work, makes=[rows])

    def report(
        self,
        baseline: dict[str, Any],
        control: Tuned | None,
        arms: dict[str, Any],
        tuned: Tuned,
        shipped: dict[str, Any],
        final: dict[str, Any],
        cost: dict[str, Any],
    ) -> tuple[dict[str, Any], str]:
        """metrics.json, report.md, report.html."""
        from quantize.finish import write_report

        manifest = self.directory.read_json("manifest.json")
        chosen = self.format
        gathered = {
            "run": self.directory.path.name,
            "command": shlex.join(["train", *manifest["argv"]]),
            "model": self.config.model.id
            if self.config.model.random is None
            else f"random {self.config.model.architecture}",
            "data": self.config.data.train,
            "recipe": self.config.model_dump(mode="json", include={"qat", "lora", "fake_quant", "train", "quantize"}),
            "versions": manifest["packages"],
            "device": str(manifest["device"]),
            "losses": {arm: self.directory.training_losses(arm) for arm in ("tuned", "control")},
            "seconds": {name: entry["seconds"] for name, entry in manifest["stages"].items() if "seconds" in entry},
            "format": None if chosen is None else {**chosen.job(), "missing": list(chosen.missing)},
            "qat": self.config.qat,
            "control": control is not None,
            "control_asked": self.config.eval.control,
            "dtype": self.merged_dtype,
            "trust_remote_code": self.config.model.trust_remote_code,
            "batch_size": self.config.eval.batch_size,
            **self.jobs.task_settings(),
            "version": GATHERED_VERSION,
            "task_key": self.task_key,
            "cost_batches": self.config.eval.cost_batches,
            "baseline": baseline,
            "arms": arms,
            "tuned": tuned.result,
            "shipped": shipped,
            "final": final,
            "cost": cost.get("measured", []),
        }
        metrics, text = write_report(self.directory.path, gathered)
        self.events.emit(Event("metrics", metrics))
        self.events.emit(
            Event("report", {"metrics": metrics, "text": text, "path": str(self.directory.path / "report.md")})
        )
        return metrics, text

    # ------------------------------------------------------------------ helpers

    def _worst_layers(self, tuned: Tuned) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = self.log.jobs("compare", [self.jobs.compare(tuned.merged)])[0]
        return found

    def _step(self, arm: str) -> Callable[[int, int, dict[str, float]], None]:
        def report(step: int, total: int, numbers: dict[str, float]) -> None:
            self.events.emit(Event("step", {"arm": arm, "step": step, **numbers}))
            data = {"stage": f"fit-{arm}", "done": step, "total": total, "text": f"loss {numbers['loss']:.4f}"}
            self.events.emit(Event("progress", data))

        return report

    @property
    def _plain_dtype(self) -> str:
        """What the plain graph computes in: the dtype that ships.

        Where the target cannot run, and training is in fp32 as on a CPU, where bf16 arithmetic is emulated and slow,
        the simulation holds the bf16 weights in fp32.
        """
        simulated = self.format is not None and self.format.simulated
        return "float32" if simulated and self.dtype == "float32" else self.merged_dtype

    def _format_key(self) -> Any:
        return None if self.format is None else self.format.job()


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
