"""The line from a model and data to a quantised checkpoint and its report, as a library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.lazy import entrance

if TYPE_CHECKING:
    from train.config import (
        DataConfig,
        DpoConfig,
        EvalConfig,
        FakeQuantConfig,
        GrpoConfig,
        LoraConfig,
        ModelConfig,
        QuantizeConfig,
        RunConfig,
        RunSection,
        TrackConfig,
        TrainConfig,
    )
    from train.config_loading import load_config
    from train.pipeline import resume, run
    from train.result import RunResult

__all__ = [
    "DataConfig",
    "DpoConfig",
    "EvalConfig",
    "FakeQuantConfig",
    "GrpoConfig",
    "LoraConfig",
    "ModelConfig",
    "QuantizeConfig",
    "RunConfig",
    "RunResult",
    "RunSection",
    "TrackConfig",
    "TrainConfig",
    "load_config",
    "resume",
    "run",
]

__getattr__, __dir__ = entrance(
    __name__,
    {
        "DataConfig": "train.config",
        "DpoConfig": "train.config",
        "EvalConfig": "train.config",
        "FakeQuantConfig": "train.config",
        "GrpoConfig": "train.config",
        "LoraConfig": "train.config",
        "ModelConfig": "train.config",
        "QuantizeConfig": "train.config",
        "RunConfig": "train.config",
        "RunResult": "train.result",
        "RunSection": "train.config",
        "TrackConfig": "train.config",
        "TrainConfig": "train.config",
        "load_config": "train.config_loading",
        "resume": "train.pipeline",
        "run": "train.pipeline",
    },
)
