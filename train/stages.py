"""The steps of the line. Each is skipped when this run directory already holds its result for the same inputs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.algorithms import are_calibrated, check_algorithms
from quantize.errors import UserError
from quantize.imports import uncollected
from quantize.jobs import Jobs
from quantize.runs import GATHERED_VERSION
from quantize.schemes import find_scheme
from quantize.task_files import task_name
from train.config import EvalConfig
from train.events import Event, Sinks
from train.method_settings import measured_by_method, method_settings
from train.stage_log import Format, StageLog, Tuned, file_fingerprint, fingerprint_of

if TYPE_CHECKING:
    from quantize.ready import ReadyProcess
    from train.backends import Backend
    from train.config import RunConfig
    from train.data import Prepared
    from train.fit import QatPlan
    from train.models import LocalModel
    from train.rundir import RunDir
    from train.signals import StopRequest


class Stages:
    """The steps of one run. Their order is in `pipeline.py`; state lives in the run directory."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDir,
        events: Sinks,
        stop: StopRequest,
        ready: ReadyProcess | None = None,
    ) -> None:
        self.config, self.directory, self.events, self.stop = config, directory, events, stop
        self.log = StageLog(directory, events, ready)
        self.format: Format | None = None
        self.dtype = self.merged_dtype = "float32"
        self.jobs: Jobs
        self.model_key = self.data_key = ""

    # ------------------------------------------------------------------ preparation

    def begin(self, argv: list[str]) -> None:
        """Provenance, the format, and the dtypes."""
        import torch

        from quantize.algorithms.choose import check_fit
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
            check_fit(config.quantize.algorithm, scheme, target)
            self.format = Format(
                scheme, target, group_size, tuple(config.quantize.skip), tuple(missing), self._choice()
            )
        wanted = self.format.target.dtype if self.format and self.format.target.dtype else by_device
        self.merged_dtype = wanted if config.quantize.dtype == "auto" else config.quantize.dtype
        self.jobs = Jobs(
            run=self.directory.path,
            format=None if self.format is None else self.format.job(),
            dtype=self.merged_dtype,
            plain_dtype=self.plain_dtype,
            batch_size=config.eval.batch_size,
            trust_remote_code=config.model.trust_remote_code,
            inside=config.qat is not None and config.fake_quant.placement == "inside",
            tasks=self._task_settings(),
            chat_template=template_text(config.data.chat_template),
            cost_batches=config.eval.cost_batches,
            method=measured_by_method(config),
            simulated=self.format is not None and self.format.simulated,
            engine=self._engine(),
        )

    def _engine(self) -> dict[str, Any] | None:
        """What runs the tasks; refused where it would not load what ships."""
        asked, chosen = self.config.eval, self.format
        if asked.engine == "transformers" or not asked.tasks:
            return None
        from quantize.serving.engine import find_engine, refuse_gpu, refuse_unserved

        if chosen is not None:
            refuse_unserved(chosen.scheme, [chosen.target])
            if chosen.missing:
                raise UserError(
                    f"eval.engine=vllm: what ships cannot be run here: this machine lacks {'; '.join(chosen.missing)}; "
                    "set eval.engine=transformers, which simulates it, or train where it runs"
                )
        refuse_gpu(None if chosen is None else (chosen.scheme, chosen.target), self.plain_dtype)
        return find_engine(asked.engine)

    def _task_settings(self) -> dict[str, Any] | None:
        """The evaluation's tasks, without the samples that calibrate."""
        settings, asked = self.config.eval.task_settings(self.config.run.seed), self.config.quantize
        calibrates = task_name(asked.calibration)
        if settings is None or calibrates is None:
            return settings
        return settings | {"left_out": {calibrates: asked.calibration_samples}}

    def _choice(self) -> dict[str, Any]:
        """What chooses the numbers of this run's format, for its jobs."""
        asked = self.config.quantize
        ordered = check_algorithms(asked.algorithm)
        if not ordered:
            return {}
        if not are_calibrated(ordered):
            return {"algorithms": list(ordered)}
        if calibrates := task_name(asked.calibration):
            return {
                "algorithms": list(ordered),
                "calibration": {"task": calibrates, "samples": asked.calibration_samples},
            }
        # The run's own files by their names in its directory, which may be moved.
        named = str(Path(asked.calibration).expanduser().resolve()) if asked.calibration else "data/train.parquet"
        samples = {"data": named, "samples": asked.calibration_samples, "held_out": "data/eval.parquet"}
        return {"algorithms": list(ordered), "calibration": samples}

    def backend(self) -> Backend:
        """Imports the backend, first of all that touches transformers."""
        from train.backends import pick_backend

        with uncollected():
            backend = pick_backend(self.config.model.backend)
            import datasets
            import transformers

        transformers.utils.logging.disable_progress_bar()  # one bar at a time: the console's
        datasets.disable_progress_bars()
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
        if self.format is not None:
            least = self.config.fake_quant.min_coverage if self.config.qat is not None else 0.0
            refuse_low_coverage(self.format.select(shape), self.format.scheme, least)
        if self.config.lora is not None:
            refuse_misplaced_adapters(shape, self.config)

    @property
    def cache(self) -> Path:
        """Shared by the runs of one root: converted models, baselines."""
        return self.directory.path.resolve().parent / ".cache"

    def tokenizer(self, folder: Path) -> Any:
        """The model's tokenizer, with the configured chat template."""
        from transformers import AutoTokenizer

        from train.data import template_text

        trust = self.config.model.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        tokenizer.chat_template = template_text(self.config.data.chat_template) or tokenizer.chat_template
        return tokenizer

    def data(self, model: LocalModel) -> Prepared:
        """Tokenised, split and fingerprinted data; one mask-coloured example is shown."""
        from train.data import PREPARED_FILES, load_prepared, prepare_data, save_prepared
        from train.data_cache import data_key, shared

        config = self.config
        method = config.train.method
        key = fingerprint_of(self.model_key, config.data.model_dump(), config.train.max_length, config.run.seed, method)
        folder = self.directory.path / "data"

        def make() -> None:
            tokenizer = self.tokenizer(model.folder)
            length, seed = config.train.max_length, config.run.seed
            save_prepared(prepare_data(config.data, tokenizer, max_length=length, seed=seed, method=method), folder)

        def work() -> dict[str, Any]:
            shared(folder, PREPARED_FILES, self.cache / "data", lambda: data_key(config, model.folder), make)
            prepared = load_prepared(folder)
            return {"fingerprint": prepared.fingerprint, "statistics": prepared.statistics}

        result = self.log.run("data", key, work, makes=[folder / name for name in PREPARED_FILES])
        prepared = load_prepared(folder)
        self.data_key = result["fingerprint"]
        self.directory.update_manifest(data_fingerprint=self.data_key, data=result["statistics"])
        self.events.emit(Event("message", {"text": prepared.example, "title": "one training example", "markup": True}))
        self._check_calibration(model)
        return prepared

    def _check_calibration(self, model: LocalModel) -> None:
        """Reads the calibration data, so that what cannot be used ends the run before anything is trained."""
        if self.jobs.format is None or "calibration" not in self.jobs.format:
            return
        from quantize.calibrate import Recipe, load_calibration

        load_calibration(Recipe.of_job(self.jobs.resolved_format()), self.tokenizer(model.folder))

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
        training += method_settings(config)
        key = fingerprint_of(self.model_key, self.data_key, training, config.run.seed, self.dtype, self.merged_dtype)
        key = fingerprint_of(key, config.model.backend, plan and [self.format_key(), config.fake_quant.model_dump()])
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

        folders = [tuning.merged, *([self.directory.path / "grid"] if plan and self.jobs.inside else [])]
        # The adapter is read once more only where the merged weights are made.
        needed = [] if all(folder.exists() for folder in folders) else [tuning.adapter]
        trained = self.log.run(f"fit-{arm}", key, train, makes=needed)
        result = self.log.run(f"merge-{arm}", key, lambda: tuning.merge(self.jobs.samples) | trained, makes=folders)
        tuning.free()
        return Tuned(tuning.merged, result)

    # ------------------------------------------------------------------ shipping

    def quantise(self, tuned: Tuned) -> dict[str, Any]:
        """Real quantisation of the merged weights, in a fresh process; not where this machine cannot run the target."""
        if self.format is None or self.format.simulated:
            return {}
        key = fingerprint_of(self.data_key, self.format_key(), tuned.result, self.merged_dtype)
        jobs = [self.jobs.convert(tuned.merged)]
        return self.log.run("quantise", key, lambda: self.log.jobs("quantise", jobs)[0], makes=[self.jobs.shipped])

    def report(
        self,
        tasks: dict[str, Any],
        baseline: dict[str, Any],
        control: Tuned | None,
        arms: dict[str, Any],
        tuned: Tuned,
        shipped: dict[str, Any],
        final: dict[str, Any],
        cost: dict[str, Any],
    ) -> tuple[dict[str, Any], str]:
        """metrics.json, report.md, report.html."""
        from quantize.hardware import describe_here
        from quantize.run_report import write_report

        manifest = self.directory.read_json("manifest.json")
        chosen = self.format
        gathered = {
            "run": self.directory.path.name,
            "command": shlex.join(["train", *manifest["argv"]]),
            "model": self.config.model.id
            if self.config.model.random is None
            else f"random {self.config.model.architecture}",
            "data": self.config.data.train,
            "recipe": self._recipe(),
            "versions": manifest["packages"],
            "losses": {arm: self.directory.training_losses(arm) for arm in ("tuned", "control")},
            "seconds": {name: entry["seconds"] for name, entry in manifest["stages"].items() if "seconds" in entry},
            "format": None if chosen is None else {**chosen.job(), "missing": list(chosen.missing)},
            "qat": self.config.qat,
            "control": control is not None,
            "control_asked": self.config.eval.control,
            "dtype": self.merged_dtype,
            "trained_on": describe_here(self.plain_dtype),
            "trust_remote_code": self.config.model.trust_remote_code,
            "batch_size": self.config.eval.batch_size,
            **self.jobs.task_settings(),
            "method": self.jobs.method,
            "version": GATHERED_VERSION,
            "task_key": tasks.get("fingerprint", ""),
            "task_fewshot": tasks.get("num_fewshot", {}),
            "task_cut": tasks.get("cut", {}),
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

    def _recipe(self) -> dict[str, Any]:
        """The settings that decide the numbers, as they were used: a default that depends on others by its value."""
        parts: dict[str, Any] = dict.fromkeys(("model", "data", "qat", "lora", "fake_quant", "train", "quantize"), True)
        parts |= {"eval": set(EvalConfig.model_fields) - {"baseline_cache"}, "run": {"seed"}}
        parts |= {} if self.config.train.method == "sft" else {self.config.train.method: True}
        recipe: dict[str, Any] = self.config.model_dump(mode="json", include=parts)
        recipe["model"]["dtype"] = self.dtype
        if self.config.qat is None:
            del recipe["fake_quant"]
        else:
            recipe["fake_quant"]["start"] = self.config.fake_quant.starts_at
        if self.format is not None:
            recipe["quantize"] |= {name: self.format.job()[name] for name in ("scheme", "target", "group_size", "skip")}
        recipe["quantize"]["dtype"] = self.merged_dtype
        return recipe

    def _step(self, arm: str) -> Callable[[int, int, dict[str, float]], None]:
        def report(step: int, total: int, numbers: dict[str, float]) -> None:
            self.events.emit(Event("step", {"arm": arm, "step": step, **numbers}))
            shown = next(name for name in ("reward", "rewards/accuracies", "loss") if name in numbers)
            text = f"{shown.rpartition('/')[2]} {numbers[shown]:.4f}"
            data = {"stage": f"fit-{arm}", "done": step, "total": total, "text": text}
            self.events.emit(Event("progress", data))

        return report

    @property
    def plain_dtype(self) -> str:
        """What the plain graph computes in: the dtype that ships.

        Where the target cannot run, and training is in fp32 as on a CPU, where bf16 arithmetic is emulated and slow,
        the simulation holds the bf16 weights in fp32.
        """
        simulated = self.format is not None and self.format.simulated
        return "float32" if simulated and self.dtype == "float32" else self.merged_dtype

    def format_key(self) -> Any:
        """What of the format decides results."""
        if self.format is None:
            return None
        job = self.format.job()
        if "calibration" in job:
            named = self.config.quantize.calibration
            text = named and task_name(named) is None and file_fingerprint(Path(named).expanduser())
            job["calibrated_on"] = [self.data_key, text or named]
        return job if job["skip"] else {key: value for key, value in job.items() if key != "skip"}
