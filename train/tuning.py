"""One fine-tuning of the line, the run's own or its 16-bit twin: trained, then merged into plain weights."""

from __future__ import annotations

import gc
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.evaluate import read_samples
from quantize.grid import save_grid
from train.data import template_text
from train.fit import Learner, OnStep, QatPlan, backend_loss, build_learner, fit, save_adapter
from train.merge import write_merged

if TYPE_CHECKING:
    from train.backends import Backend
    from train.config import RunConfig
    from train.data import Prepared
    from train.models import LocalModel
    from train.rundir import RunDir
    from train.signals import StopRequest


@dataclass(kw_only=True)
class Tuning:
    """What one fine-tuning works on, and where it leaves what it makes.

    Attributes:
        arm: "tuned", whose files stand in the run directory itself, or "control", which has a folder of its own there.
        config: as it is for this arm: QAT may have a learning rate and steps of its own.
        plan: None trains in 16 bit.
        key: fingerprint of all that it depends on.
        dtype: dtype of the weights in training.
        merged_dtype: that of the merged weights.
        learner: the model between training and merging; None before, and where a finished training is taken up again.
    """

    arm: str
    config: RunConfig
    backend: Backend
    model: LocalModel
    data: Prepared
    plan: QatPlan | None
    directory: RunDir
    key: str
    dtype: str
    merged_dtype: str
    learner: Learner | None = None

    @property
    def merged(self) -> Path:
        """The folder of the merged weights."""
        return self._home(self.arm) / "merged"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        return self._home(self.arm) / "adapter"

    def train(self, tokenizer: Any, on_step: OnStep, stop: StopRequest) -> dict[str, Any]:
        """Trains to the end and writes the adapter.

        Returns:
            {"coverage": the layers that were fake-quantised}.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        asked, checkpoints = self.config.fake_quant, self._home(self.arm) / "checkpoints"
        control = self._home("control") / "adapter"
        _drop_others(checkpoints, self.key)
        self.learner = self._build(control if self.plan and asked.initial == "control" else None)
        stop.graceful = True
        try:
            done = fit(
                self.learner,
                self.config,
                tokenizer,
                self.data.train,
                checkpoints,
                on_step,
                lambda: stop.requested,
                teacher=control,
            )
        finally:
            stop.graceful = False
        if not done:
            raise stop.stopped()
        with self.directory.commit_folder(self.adapter) as folder:
            save_adapter(self.learner, folder)
        prepared = self.learner.prepared
        return {"coverage": prepared.coverage.as_dict() if prepared else None}

    def merge(self, samples: Path) -> dict[str, Any]:
        """Writes the merged weights, and with QAT the grid that was trained.

        Args:
            samples: held-out samples, on which the run's own fine-tuning is measured in the backend's graph.

        Raises:
            UserError: that loss is not finite.
        """
        learner = self.learner or self._build(self.adapter)
        if learner.prepared is not None:
            learner.prepared.switch_on()  # a delayed start leaves it off, where a resumed run loads the finished fit
        loss = None
        if self.arm == "tuned":
            loss = backend_loss(learner, read_samples(samples), self.config.eval.batch_size)
            if not math.isfinite(loss):
                raise UserError(
                    f"the fine-tuned model's loss on the held-out samples is {loss}: its numbers overflow; start a new "
                    "run with a lower train.learning_rate or with model.dtype float32"
                )
        if learner.prepared is not None and self.config.fake_quant.placement == "inside":
            with self.directory.commit_folder(self.directory.path / "grid") as folder:
                save_grid(folder, learner.prepared.grid())
        with self.directory.commit_folder(self.merged) as folder:
            write_merged(learner, self.model.folder, folder, dtype=self.merged_dtype, settings=self.config.model)
            template = template_text(self.config.data.chat_template)
            if template is not None:  # what was trained is prompted in it
                (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return {"backend_loss": loss, "key": self.key}

    def free(self) -> None:
        """Gives the model's memory back."""
        import torch

        self.learner = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _build(self, adapter: Path | None) -> Learner:
        return build_learner(self.config, self.backend, self.model.folder, self.plan, dtype=self.dtype, adapter=adapter)

    def _home(self, arm: str) -> Path:
        return self.directory.path if arm == "tuned" else self.directory.path / arm


def _drop_others(checkpoints: Path, key: str) -> None:
    """Removes checkpoints of other inputs, which would be trained on; marks the folder as that of `key`."""
    marker = checkpoints / "fingerprint"
    if checkpoints.is_dir() and not (marker.is_file() and marker.read_text(encoding="utf-8") == key):
        shutil.rmtree(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    marker.write_text(key, encoding="utf-8")
