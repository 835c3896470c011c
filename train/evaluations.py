"""What is measured along the line: every arm on the same held-out samples and tasks, its layers, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.evaluate import Scores
from quantize.files import copy_atomically
from quantize.gate import check_gap
from quantize.hardware import describe_here
from quantize.jobs import MAY_OVERFLOW, Job, task_rows_path
from quantize.runs import GATHERED_VERSION
from quantize.serving.engine import check_folders, engine_words
from quantize.task_rows import own_rows_path
from quantize.worker import run_timings
from train.events import Event
from train.stage_log import Tuned, fingerprint_of

if TYPE_CHECKING:
    from train.data import Prepared
    from train.models import LocalModel
    from train.stages import Stages


class Evaluations:
    """The steps of one run that measure, once `Stages.begin` has settled its format."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.config = stages, stages.config
        self.format, self.jobs, self.log = stages.format, stages.jobs, stages.log
        self.task_key = ""
        self.computed_by = [describe_here(stages.plain_dtype), GATHERED_VERSION]

    def tasks(self, model: LocalModel) -> dict[str, Any]:
        """Loads the benchmarks, so that one that cannot be loaded ends the run before anything is trained."""
        if self.jobs.tasks is None:
            return {}
        from quantize.tasks import definition_key

        if self.jobs.engine is not None:
            self.stages.events.emit(Event("engine", {"tasks": engine_words(self.jobs.engine)}))
            trust = self.config.model.trust_remote_code
            check_folders(self.jobs.engine, {model.folder: self.stages.plain_dtype}, trust_remote_code=trust)
        job = self.jobs.check_tasks(model.folder)
        files = definition_key(self.config.eval.tasks)
        key = fingerprint_of(self.stages.model_key, job, files)
        found: dict[str, Any] = self.log.run("tasks", key, lambda: self.log.jobs("tasks", [job])[0])
        # The fingerprint is of what lm-eval loaded; code beside a task, few-shot files and the template decide too.
        decides = [found["fingerprint"], files, self.jobs.chat_template]
        decides += [self.jobs.engine] if self.jobs.engine is not None else []  # no result of one is another's
        self.task_key = fingerprint_of(*decides)
        return found

    def baseline(self, model: LocalModel, data: Prepared) -> dict[str, Any]:
        """The model before fine-tuning, kept across runs, and quantised as it is, across those of one format."""
        from quantize.convert import folder_bytes

        # The rows of training are no part of it: a sweep over their number evaluates the untouched model once.
        plain = [self.stages.model_key, data.eval_fingerprint, self.stages.plain_dtype, self.config.eval.batch_size]
        plain.append(self.config.model.trust_remote_code)
        keys = {"base": fingerprint_of(plain, self.computed_by)}
        if self.jobs.method is not None:
            keys["base"] = fingerprint_of(keys["base"], self.jobs.method)
        if self.format is not None:
            keys["base_quantized"] = fingerprint_of(keys["base"], self.stages.format_key(), self.stages.merged_dtype)
        stores = {arm: self.stages.cache / "baseline" / f"{arm}-{key}" for arm, key in keys.items()}
        jobs = [self.jobs.evaluate("base", model.folder, folder=stores["base"])]
        if self.format is not None:
            jobs.append(self.jobs.simulate("base_quantized", model.folder, folder=stores["base_quantized"]))

        def work() -> dict[str, Any]:
            kept = self.config.eval.baseline_cache
            todo = [job for job in jobs if not (kept and self._is_scored(job))]
            if todo:
                self.log.jobs("baseline", todo)
            for job in jobs:
                self._copy_scores(Path(job["scores"]), self.jobs.scores(job["name"]))
            return {"disk_bytes": folder_bytes(model.folder)}

        makes = self._files([job["name"] for job in jobs])
        result = self.log.run("baseline", fingerprint_of(keys), work, makes=makes)
        # What vLLM would refuse of the format is found before an hour of tasks on the untouched model.
        for job in jobs if self.jobs.engine is None else reversed(jobs):
            arm = job["name"]
            self._benchmark(job, keys[arm], stores[arm] / self.task_key)
        return result

    def arms(self, data: Prepared, control: Tuned | None, tuned: Tuned) -> dict[str, Any]:
        """control, ptq (the control quantised), tuned, and this run's merged weights fake-quantised."""
        computed = [self.stages.plain_dtype, self.format is not None and self.format.simulated]
        upstream = [computed, self.computed_by, control and control.result, tuned.result, self.jobs.method]
        key = fingerprint_of(self.stages.data_key, self.stages.format_key(), *upstream)
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

        return self.log.run("arms", key, work, makes=self._files([job["name"] for job in jobs]))

    def final(
        self, data: Prepared, arms: dict[str, Any], control: Tuned | None, tuned: Tuned, shipped: dict[str, Any]
    ) -> dict[str, Any]:
        """What ships, reloaded from disk in a fresh process, and the proof that it is what was trained."""
        if self.format is None:
            return {}
        upstream = [self.computed_by, tuned.result, shipped, control and control.result, self.jobs.method]
        key = fingerprint_of(self.stages.data_key, self.stages.format_key(), *upstream)

        def work() -> dict[str, Any]:
            layers = [] if self.jobs.moves_layers else [self.jobs.layers(tuned.merged, simulated=not shipped)]
            if not shipped:
                self._copy_scores(self.jobs.scores("fake"), self.jobs.scores("final"))
                return {**arms["fake"], "layers": self.log.jobs("layers", layers)[0] if layers else {}}
            job = self.jobs.evaluate("final", self.jobs.shipped, reference=(control or tuned).merged)
            scored, measured = (*self.log.jobs("final", [job, *layers]), {})[:2]
            if self.jobs.inside and self.format is not None:
                gap = arms["fake"]["loss"] - scored["loss"]
                check_gap(gap, self.format.scheme, self.format.target, lambda: self._worst_layers(tuned))
            return {**scored, "layers": measured}

        return self.log.run("final", key, work, makes=self._files(["final"]))

    def _copy_scores(self, source: Path, target: Path) -> None:
        if self.jobs.method is not None and own_rows_path(source).is_file():
            copy_atomically(own_rows_path(source), own_rows_path(target))
        copy_atomically(source, target)

    def _is_scored(self, job: Job) -> bool:
        """Whether an earlier run left an arm's scores, with what its method measures unless its numbers overflow."""
        scores = Path(job["scores"])
        if not scores.is_file():
            return False
        return job["method"] is None or own_rows_path(scores).is_file() or Scores.load(scores).broken > 0

    def _files(self, arms: Sequence[str]) -> list[Path]:
        """What evaluations of these arms leave, but for rows that an arm whose numbers may overflow need not have."""
        rated = [arm for arm in arms if arm not in MAY_OVERFLOW and self.jobs.rates(arm)]
        return [self.jobs.scores(arm) for arm in arms] + [own_rows_path(self.jobs.scores(arm)) for arm in rated]

    def cost(self, tuned: Tuned, shipped: dict[str, Any]) -> dict[str, Any]:
        """What 16 bit and what ships cost to run here, one after the other in one process."""
        batches = self.config.eval.cost_batches
        if not shipped or not batches:
            return {}
        from quantize.cost import METHOD

        def work() -> dict[str, Any]:
            measured = run_timings(lambda: self.log.jobs("cost", self.jobs.cost(tuned.merged)))
            return {"measured": measured, "failed": any("failed" in found for found in measured)}

        return self.log.run("cost", fingerprint_of(self.computed_by, tuned.result, shipped, batches, METHOD), work)

    def benchmarks(self, control: Tuned | None, tuned: Tuned, shipped: dict[str, Any]) -> None:
        """The tasks on every arm that was trained, each a step of its own: it may take hours."""
        upstream = [self.computed_by, self.stages.format_key(), self.stages.plain_dtype]
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
        if not self.task_key or (job["may_overflow"] and Scores.load(self.jobs.scores(job["name"])).broken):
            return
        rows = task_rows_path(self.stages.directory.path, job["name"])
        kept = rows if store is None else store / rows.name

        def work() -> dict[str, Any]:
            if store is None or not (self.config.eval.baseline_cache and kept.is_file()):
                try:
                    self.log.jobs(f"tasks-{job['name']}", [self.jobs.benchmark(job, kept)])
                except UserError as error:  # as memory that another process holds: what there is was not for nothing
                    again = f"what there is so far is kept; continue with: {self.stages.directory.resume_command}"
                    raise UserError(*error.lines, again) from error
            if store is not None:
                copy_atomically(kept, rows)
            return {}

        self.log.run(f"tasks-{job['name']}", fingerprint_of(key, self.task_key), work, makes=[rows])

    def _worst_layers(self, tuned: Tuned) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = self.log.jobs("compare", [self.jobs.compare(tuned.merged)])[0]
        return found
