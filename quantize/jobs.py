"""What a fresh process is asked to do with a run directory: jobs of `quantize.worker`, for training and finishing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.algorithms import ALGORITHMS
from quantize.schemes import find_scheme

Job = dict[str, Any]

MAY_OVERFLOW = ("base_quantized", "ptq")
"""Arms that no choice of the user's makes better: that they have no loss is what their rows say."""
ONLY_TRAINED_ON = ("base", "base_quantized")
"""Arms of the model before fine-tuning, which is no part of a run directory: they are measured where it is."""
_TRAINED = "lower train.learning_rate, or set quantize.dtype to float32"
_SHIPPED = "lower train.learning_rate, or choose another format"
_OVERFLOW_ADVICE = {
    "base": "the checkpoint is damaged or needs another model.dtype and quantize.dtype (float32)",
    "control": _TRAINED,
    "tuned": _TRAINED,
    "fake": _SHIPPED,
    "final": _SHIPPED,
}


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """The jobs of one run.

    Attributes:
        run: its directory.
        format: {scheme, target, group_size, skip} that ships, and what chooses its numbers where training did not:
            algorithms, calibration (`quantize.calibrate.Recipe.of_job`); None = nothing is quantised.
        dtype: what the shipped model computes in.
        plain_dtype: what the plain graph of the 16-bit models computes in.
        batch_size: held-out rows at once.
        trust_remote_code: run the checkpoints' own code.
        inside: the weights were trained on the grid that ships.
        tasks: settings of `quantize.tasks`; None = no tasks.
        engine: what runs the tasks, from `quantize.serving.engine.find_engine`; None = transformers.
        chat_template: for the tokenizer; None = its own.
        cost_batches: sequences at a time for which decoding is timed.
        method: what is measured besides the loss where the run learned from it: {} = which answer of each held-out pair
            is preferred; {rewards, weights, samples, max_new_tokens, sources (`source_key` of each)} = the reward of
            answers; None = nothing.
        simulated: what ships cannot run on this machine.
    """

    run: Path
    format: Mapping[str, Any] | None
    dtype: str
    plain_dtype: str
    batch_size: int
    trust_remote_code: bool
    inside: bool
    tasks: Mapping[str, Any] | None
    chat_template: str | None
    cost_batches: Sequence[int]
    method: Mapping[str, Any] | None = None
    simulated: bool = False
    engine: Mapping[str, Any] | None = None

    @property
    def shipped(self) -> Path:
        """The folder of the checkpoint that ships."""
        return self.run / "quantized"

    @property
    def samples(self) -> Path:
        """The held-out samples."""
        return self.run / "data" / "eval.parquet"

    @property
    def grid(self) -> str | None:
        """The weights as they were trained, where they were trained on the grid that ships."""
        return str(self.run / "grid") if self.inside else None

    def resolved_format(self) -> Job:
        """The format with the run's own files by their paths."""
        assert self.format is not None, "nothing is quantised in this run"
        found = dict(self.format)
        if found.get("calibration"):
            own = found["calibration"]
            paths = {key: str(self.run / own[key]) for key in ("data", "held_out") if own.get(key)}
            found["calibration"] = own | paths
        return found

    @property
    def moves_layers(self) -> bool:
        """Whether an algorithm changes the 16-bit layers, so that none can be compared with what ships of it."""
        names = (self.format or {}).get("algorithms", ())
        return any(ALGORITHMS[name].kind != "rounds" for name in names)

    def scores(self, arm: str, folder: Path | None = None) -> Path:
        """Where an arm's scores on the held-out samples lie."""
        return (folder or self.run / "eval") / f"{arm}.parquet"

    def evaluate(self, arm: str, model: Path, *, reference: Path | None = None, folder: Path | None = None) -> Job:
        """Scores a 16-bit checkpoint, or the one that ships, into `folder` (else this run's).

        Args:
            reference: checkpoint that the KL divergence is measured from.
        """
        return {
            "kind": "evaluate",
            "name": arm,
            "model": str(model),
            "dtype": None if model == self.shipped else self.plain_dtype,
            "data": str(self.samples),
            "batch_size": self.batch_size,
            "scores": str(self.scores(arm, folder)),
            "reference": str(reference) if reference else None,
            "reference_dtype": self.plain_dtype,
            "trust_remote_code": self.trust_remote_code,
            "may_overflow": arm in MAY_OVERFLOW,
            "overflow_advice": _OVERFLOW_ADVICE.get(arm, ""),
            "chat_template": self.chat_template,
            "method": self.method if self.rates(arm) else None,
        }

    def rates(self, arm: str) -> bool:
        """Whether `method` is measured of an arm; of `fake` only where it stands in for final."""
        return self.method is not None and (arm != "fake" or self.simulated)

    def simulate(
        self, arm: str, model: Path, *, trained: bool = False, reference: Path | None = None, folder: Path | None = None
    ) -> Job:
        """Scores a 16-bit checkpoint as it would be quantised; `trained`: with the weights as this run trained them."""
        job = self.evaluate(arm, model, reference=reference, folder=folder) | {"simulate": self.resolved_format()}
        return job | ({"grid": self.grid} if trained else {})

    def convert(self, source: Path) -> Job:
        """Quantises the run's merged weights for real."""
        return {
            "kind": "convert",
            "name": "quantise",
            "source": str(source),
            "output": str(self.shipped),
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "grid": self.grid,
            **self.resolved_format(),
        }

    def layers(self, model: Path, *, simulated: bool) -> Job:
        """Each quantised layer beside its original in `model`."""
        shipped = {"grid": self.grid} if simulated else {"shipped": str(self.shipped)}
        return self.evaluate("layers", model) | {"kind": "measure", "format": self.resolved_format()} | shipped

    def compare(self, model: Path) -> Job:
        """Which layers of what ships differ from what was trained."""
        return self.simulate("compare", model, trained=True) | {"kind": "compare", "shipped": str(self.shipped)}

    def cost(self, model: Path) -> list[Job]:
        """What 16 bit and what ships cost to run, one after the other in one process."""
        assert self.format is not None, "nothing is quantised in this run"
        speed = find_scheme(self.format["scheme"]).find_target(self.format["target"]).speed
        common = {"kind": "cost", "batches": list(self.cost_batches), "trust_remote_code": self.trust_remote_code}
        plain = {"name": "16 bit", "model": str(model), "dtype": self.plain_dtype, "compiled": True}
        compiled = speed is None or speed.compiled
        shipped = {"name": "shipped", "model": str(self.shipped), "dtype": None, "compiled": compiled}
        return [plain | common, shipped | common]

    def check_tasks(self, model: Path) -> Job:
        """Loads the tasks, before any model runs on them."""
        trust = {"trust_remote_code": self.trust_remote_code}
        return {**self.task_settings(), "kind": "tasks", "name": "tasks", "model": str(model), **trust}

    def benchmark(self, job: Job, rows: Path) -> Job:
        """The tasks on the model of `job`, results in `rows`."""
        return {**job, **self.task_settings(), "kind": "benchmark", "task_rows": str(rows)}

    def task_settings(self) -> Job:
        """The tasks, what their prompts are put in, and what runs them where it is not transformers."""
        found = {"tasks": self.tasks, "chat_template": self.chat_template}
        return found | ({"engine": self.engine} if self.engine is not None else {})


def rows_paths(run: Path, arm: str, *, tasks: bool, own: bool) -> list[Path]:
    """Where an arm's results lie: on tasks (by lm-eval), and on what it learned from (`quantize.task_rows.OWN`)."""
    from quantize.task_rows import own_rows_path

    paths = [task_rows_path(run, arm)] if tasks else []
    return [*paths, *([own_rows_path(run / "eval" / f"{arm}.parquet")] if own else [])]


def task_rows_path(run: Path, arm: str) -> Path:
    """Where an arm's results on tasks lie in a run directory."""
    return run / "eval" / f"{arm}.tasks.parquet"
