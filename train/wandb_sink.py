"""Weights & Biases as a sink: the only file that imports wandb."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.metrics import flatten
from train.events import Event

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.rundir import RunDir


class WandbSink:
    """Config, step metrics, the final table and the report, under a run id that the manifest keeps.

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
        self.run_id: str = directory.read_json("manifest.json").get("wandb_run_id") or generate_id()
        self._run: Any = wandb.init(
            id=self.run_id,
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

    def emit(self, event: Event) -> None:
        """Logs steps as they come, and everything else at the end."""
        if event.kind == "step":
            data = dict(event.data)
            arm, step = data.pop("arm"), data.pop("step")
            self._run.log({f"{arm}/{name}": value for name, value in data.items()} | {f"{arm}/step": step})
        elif event.kind == "metrics":
            self._run.summary.update(flatten(event.data))
            rows = [[name, arm["loss"], arm["accuracy"]] for name, arm in event.data.items() if _is_arm(arm)]
            self._run.log({"arms": self._wandb.Table(columns=["arm", "loss", "accuracy"], data=rows)})
        elif event.kind == "report":
            artifact = self._wandb.Artifact(f"report-{self.run_id}", type="report")
            for name in ("metrics.json", "report.md", "report.html"):
                artifact.add_file(str(self._path / name))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Ends W&B's run."""
        self._run.finish()


def _is_arm(value: Any) -> bool:
    return isinstance(value, dict) and value.get("loss") is not None and "accuracy" in value
