"""Finished runs and converted folders as their files tell them, for tests of what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
QUICKSTART = PROJECT / "docs" / "quickstart" / "metrics.json"
COVERAGE = {
    "quantized_fraction": 0.95,
    "share_of_all_weights": 0.8,
    "quantized_layers": 13,
    "skipped": {
        "lm_head": "int8-int4 leaves it unquantised",
        "model.layers.0.mlp.down_proj": "group size 32 does not divide its in_features 100",
        "model.layers.1.mlp.down_proj": "group size 32 does not divide its in_features 100",
    },
}
_CONFIG = {
    "model_type": "qwen3",
    "dtype": "float32",
    "quantization_config": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    },
}
_PACKAGES = {"torch": "2.13.0+cpu", "torchao": "0.18.0", "transformers": "5.17.0"}


def make_folder(folder: Path, record: dict[str, Any] | None = None, *, weights: int = 10_000) -> Path:
    """A folder as `quantize convert` writes it; `record` is its ongrid.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "model.safetensors").write_bytes(bytes(number * 7 % 251 for number in range(weights)))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if record is not None:
        (folder / "ongrid.json").write_text(json.dumps(record))
    return folder


def quickstart_metrics() -> dict[str, Any]:
    """Metrics of a run with a control and two tasks."""
    metrics = json.loads(QUICKSTART.read_text())
    metrics["layers"] = {}
    return metrics  # type: ignore[no-any-return]


def gathered_of(metrics: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What such a run gathered, as far as a card reads it."""
    recipe: dict[str, Any] = {
        "qat": metrics["scheme"],
        "model": {"id": "Qwen/Qwen3-0.6B", "backend": "unsloth", "revision": None, "random": None, "dtype": "float32"},
        "data": {"train": "HuggingFaceTB/smoltalk", "eval": None, "split": "train", "eval_samples": 120},
        "lora": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
        "fake_quant": {"placement": "inside", "start": 0.5, "max_steps": None},
        "train": {"learning_rate": 0.001, "max_steps": 30, "num_train_epochs": 1.0},
        "quantize": {"scheme": metrics["scheme"], "target": metrics["target"], "group_size": 32, "skip": []},
        "eval": {"control": True, "tasks": []},
        "run": {"seed": 0},
    }
    place = {"device": "x86_64 CPU, 2 threads", "dtype": "float32", "packages": _PACKAGES}
    chosen = {"scheme": metrics["scheme"], "target": metrics["target"], "group_size": 32, "skip": [], "missing": []}
    return {
        "version": 5, "recipe": recipe, "format": chosen, "qat": metrics["scheme"], "dtype": metrics["dtype"],
        "trained_on": place, "tasks": None, "losses": {"tuned": [[1, 1.9], [30, 1.4]]}, "versions": dict(_PACKAGES),
        "shipped": {"coverage": COVERAGE}, "control": True,
    } | changes  # fmt: skip


def make_run(folder: Path, metrics: dict[str, Any], **gathered: Any) -> Path:
    """A finished run with those metrics."""
    make_folder(folder / "quantized")
    manifest = {"stages": {}, "python": "3.11.7", "git": {"sha": "ab" * 20, "dirty": False}}
    for name, value in {
        "metrics": metrics, "gathered": gathered_of(metrics, **gathered), "manifest": manifest,
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
