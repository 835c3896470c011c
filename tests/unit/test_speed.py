"""What is said about a format's speed is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.cli import main
from quantize.schemes import SCHEMES
from quantize.speed import Speed

LINES = Path(__file__).resolve().parents[2] / "docs" / "decode.jsonl"
MEASURED = [
    (scheme.name, target.name, target.speed)
    for scheme in SCHEMES.values()
    for target in scheme.targets.values()
    if target.speed is not None
]


def _measured(scheme: str, target: str, speed: Speed) -> dict[tuple[str, int], float]:
    """(decode or prefill, batch) -> ratio, from the times of that target and of the unquantised model."""
    place = "cpu" if "cpu" in target else "cuda"
    names = {f"{scheme}@{target}"}
    if target == next(name for name in SCHEMES[scheme].targets if place in name):
        names.add(scheme)  # what benchmarks/decode.py takes where none is named
    if not speed.compiled:
        names = {f"{name}+eager" for name in names}
    device = {"one H100": "NVIDIA H100", "two x86 cores": "cpu, 2 threads"}[speed.device]
    found: dict[tuple[str, int], float] = {}
    base: dict[tuple[str | None, str, int], float] = {}
    for line in map(json.loads, LINES.read_text().splitlines()):
        if line["shape"] != speed.shape.lower() or not line["device"].startswith(device):
            continue
        if line.get("tokens", 4096) != 4096:  # other prompts, in docs/RESULTS.md alone
            continue
        assert line["layers"] == {"qwen3-0.6b": 28, "qwen3-4b": 36, "qwen3-8b": 36}[line["shape"]]
        key, run = (line["what"], line["batch"]), line.get("run")
        if line["format"] == speed.base:
            base.setdefault((run, *key), line["ms"])  # it is measured again at the end
        elif line["format"] in names:
            assert key not in found and line["group_size"] == speed.group_size
            found[key] = base[run, *key] / line["ms"]
    return found


@pytest.mark.parametrize(("scheme", "target", "speed"), MEASURED, ids=[f"{name}@{at}" for name, at, _ in MEASURED])
def test_a_target_s_speed_is_what_was_measured(scheme: str, target: str, speed: Speed) -> None:
    said = {("decode", batch): ratio for batch, ratio in speed.decode}
    if speed.prefill is not None:
        said["prefill", 1] = speed.prefill
    assert said == pytest.approx(_measured(scheme, target, speed), abs=0.0051)


def test_it_is_said_where_a_format_pays() -> None:
    speed = Speed(shape="Qwen3-8B", decode=((1, 1.9), (8, 1.0), (64, 0.25), (256, 0.1)), group_size=64, prefill=0.5)
    assert str(speed) == (
        "faster than bf16 at batch 1 (1.90x); as fast as bf16 at batch 8 (1.00x); "
        "slower than bf16 at batch 64 (0.25x), 256 (0.10x); prefill 0.50x "
        "(Qwen3-8B, groups of 64, in torch on one H100)"
    )


def test_quantize_schemes_says_it_for_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith("speed: ") for line in lines) == sum(len(s.targets) for s in SCHEMES.values())
    for _, _, speed in MEASURED:
        assert f"speed: {speed}" in lines
