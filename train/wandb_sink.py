"""Weights & Biases as a sink: the only file that imports wandb."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantize.arms import arm_rows
from quantize.errors import UserError
from quantize.metrics import ARMS, flatten
from quantize.plots import main_pair
from train.events import Event

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.rundir import RunDir

_BOUNDS = ("", "_low", "_high")
_ARM_COLUMNS = [
    "arm", "model", "loss", *(f"loss_vs_base{end}" for end in _BOUNDS),
    "accuracy", *(f"accuracy_vs_base{end}" for end in _BOUNDS), "mib",
]  # fmt: skip
_STOPS = ("Stopped", "StoppedEarly")
"""Ends that were asked for, by a signal (W&B's agent sends SIGTERM to stop a run early) or by a sweep: no failure."""
_REPORT_FILES = ("metrics.json", "report.md", "report.html")


class WandbSink:
    """Config, step metrics, the final table and the report, under a run id that the manifest keeps.

    Training never ends because W&B cannot be reached: the first failure is warned of, and the rest is left out.

    Attributes:
        run_id: W&B's id; a resumed run continues it.
    """

    def __init__(self, config: RunConfig, directory: RunDir) -> None:
        try:
            import wandb
            from wandb.sdk.lib.runid import generate_id
        except ImportError as error:
            raise UserError("track.wandb: wandb is not installed; pip install wandb, or set track.wandb=off") from error
        mode = config.track.wandb
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            raise UserError("track.wandb=online: not logged in; run `wandb login`, or set track.wandb=offline")
        self._wandb: Any = wandb
        self._path = directory.path
        self._works = True
        self._exit_code = 0
        wanted = directory.read_json("manifest.json").get("wandb_run_id") or generate_id()
        try:
            self._run: Any = wandb.init(
                id=wanted,
                resume="allow",
                mode="online" if mode == "online" else "offline",
                dir=str(directory.path),
                name=directory.path.name,
                project=config.track.project,
                entity=config.track.entity,
                group=config.track.group,
                tags=list(config.track.tags),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True),
            )
        except (wandb.Error, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"track.wandb={mode}: W&B says: {reason}; set track.wandb=offline, or off") from error
        self.run_id: str = self._run.id  # that of W&B's agent where one started this run
        for arm in (
            "control",
            "tuned",
        ):  # a resumed run may repeat steps: curves are drawn over the step, not the order
            self._run.define_metric(f"{arm}/step")
            self._run.define_metric(f"{arm}/*", step_metric=f"{arm}/step")

    def emit(self, event: Event) -> None:
        """Logs steps as they come, and tables, plots and the report at the end."""
        if event.kind == "run_failed":
            self._exit_code = 0 if event.data["error"] in _STOPS else 1
        if not self._works or event.kind not in ("step", "engine", "metrics", "report"):
            return
        try:
            self._log(event)
        except Exception as error:  # W&B raises many kinds, none of them worth the training
            self._works = False
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"W&B takes nothing more ({reason}); the run goes on without it", stacklevel=2)

    def _log(self, event: Event) -> None:
        if event.kind == "step":
            data = dict(event.data)
            arm, step = data.pop("arm"), data.pop("step")
            self._run.log({f"{arm}/{name}": value for name, value in data.items()} | {f"{arm}/step": step})
        elif event.kind == "engine":
            self._run.summary.update({"tasks_engine": event.data["tasks"]})
        elif event.kind == "metrics":
            self._run.summary.update(flatten(event.data))
            self._run.log({"arms": self._wandb.Table(columns=_ARM_COLUMNS, data=_arm_rows(event.data))})
            if event.data.get("tasks"):
                columns, rows = _task_table(event.data)
                self._run.log({"tasks": self._wandb.Table(columns=columns, data=rows)})
        else:
            plots = sorted((self._path / "plots").glob("*.png"))
            if plots:
                self._run.log({f"plots/{path.stem}": self._wandb.Image(str(path)) for path in plots})
            artifact = self._wandb.Artifact(f"report-{self.run_id}", type="report")
            for name in _REPORT_FILES:
                artifact.add_file(str(self._path / name))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Ends W&B's run: finished, also where it was stopped, or failed where the run did."""
        self._run.finish(exit_code=self._exit_code)


def _arm_rows(metrics: Mapping[str, Any]) -> list[list[Any]]:
    """The report's table, as numbers."""
    return [
        [
            row.name, row.description, row.loss, *_with_bounds(row.loss_vs_base),
            row.accuracy, *_with_bounds(row.accuracy_vs_base), row.size_mib,
        ]
        for row in arm_rows(metrics)
    ]  # fmt: skip


def _task_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the report's table of tasks, as numbers."""
    first, second = main_pair(metrics)
    pair = f"{first}_vs_{second}"
    columns = ["task", "metric", "n_samples", *ARMS, *(f"{pair}{end}" for end in _BOUNDS), "p", "p_holm"]
    rows: list[list[Any]] = []
    for name, task in metrics["tasks"].items():
        compared = task["comparisons"][pair]
        scores = [task[arm]["value"] for arm in ARMS]
        tested = [*_with_bounds(compared), compared["p"], compared["p_holm"]]
        rows.append([name, task["metric"], task["n_samples"], *scores, *tested])
    mean = metrics["tasks_mean"]
    if any(mean[arm]["value"] is not None for arm in ARMS):
        scores = [mean[arm]["value"] for arm in ARMS]
        rows.append(["mean", "", mean["n_tasks"], *scores, *_with_bounds(mean["comparisons"][pair]), None, None])
    return columns, rows


def _with_bounds(found: Mapping[str, float | None]) -> list[float | None]:
    return [found[key] for key in ("value", "low", "high")]
