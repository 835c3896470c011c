"""Through the command line: what is trained is what ships, to the last bit, and a run where it is not fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LINE = ("--config", "tiny.yaml", "--eval.control=False")


@pytest.fixture(scope="module")
def int3(runs: Any) -> Path:
    """An int3 run of unsloth."""
    return runs.finish(*LINE, "--qat", "int3", "--run.name=gate-int3")  # type: ignore[no-any-return]


def _check(run: Path, runs: Any) -> None:
    metrics = runs.metrics(run)
    assert metrics["train_ship_gap"] == 0.0 and not metrics["simulated"]
    assert metrics["coverage"]["quantized_fraction"] == 1.0
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    assert abs(metrics["backend_gap"]) < 1e-4
    assert (run / "grid" / "grid.safetensors").is_file()


def test_int3_ships_what_it_trained(int3: Path, runs: Any) -> None:
    _check(int3, runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--qat=int8", "--fake_quant.start=0.5"),
        ("--qat=int4", "--quantize.target=cpu", "--fake_quant.learned_scales=True", "--fake_quant.ranges=mse"),
        ("--qat=int3", "--fake_quant.distill=0.5", "--fake_quant.start=4", "--lora.lora_dropout=0.1"),
        ("--qat=int3", "--fake_quant.distill=0.5", "--fake_quant.teacher=control", "--fake_quant.initial=control",
         "--fake_quant.max_steps=3", "--eval.control=True", "--model.backend=peft"),
    ],
    ids=["int8", "int4-cpu", "distilled", "after-the-control"],
)  # fmt: skip
def test_other_formats_and_switches_ship_what_they_trained(options: tuple[str, ...], runs: Any) -> None:
    name = "gate" + "".join(word.partition("=")[2] for word in options)
    run = runs.finish(*LINE, *options, f"--run.name={name}")
    _check(run, runs)
    if name in ("gateint80.5", "gateint4cpuTruemse"):  # killed after the fit, which a delayed start left switched off
        before, manifest = runs.metrics(run), json.loads((run / "manifest.json").read_text())
        for stage in ("merge-tuned", "arms", "quantise", "final"):
            del manifest["stages"][stage]
        (run / "manifest.json").write_text(json.dumps(manifest))
        again = runs.train("--resume", str(run))
        assert again.returncode == 0, again.stdout[-1000:] + again.stderr[-2000:]
        assert runs.metrics(run) == before


def test_a_layer_that_does_not_ship_as_trained_fails_the_run_and_is_named(int3: Path, runs: Any) -> None:
    """As if the conversion had gone wrong: one layer's scales are changed in the checkpoint on disk."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    (file,) = (int3 / "quantized").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    (scale,) = [name for name in tensors if "layers.1.mlp.up_proj" in name and name.endswith("scale")]
    good, tensors[scale] = file.read_bytes(), tensors[scale] * 1.25
    save_file(tensors, file, metadata=metadata)
    manifest = json.loads((int3 / "manifest.json").read_text())
    del manifest["stages"]["final"]
    (int3 / "manifest.json").write_text(json.dumps(manifest))
    failed = runs.train("--resume", str(int3))
    assert failed.returncode == 1, failed.stdout[-1000:] + failed.stderr[-2000:]
    assert "the trained function and the shipped one differ by" in failed.stderr
    assert "16-bit weights by themselves: model.layers.1.mlp.up_proj: " in failed.stderr
    file.write_bytes(good)
