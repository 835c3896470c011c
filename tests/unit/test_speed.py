"""What is said about a format's speed is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.cli import main
from quantize.schemes import SCHEMES, Speed

LINES = Path(__file__).resolve().parents[2] / "docs" / "decode.jsonl"
MEASURED = [
    (scheme.name, target.name, target.speed)
    for scheme in SCHEMES.values()
    for target in scheme.targets.values()
    if target.speed is not None
]


def _ratios(scheme: str, target: str, speed: Speed) -> dict[tuple[str, int], float]:
    """(decode or prefill, batch) -> ratio, of the lines of that target and shape."""
    names = {f"{scheme}@{target}", f"{scheme}@{target}+eager"}
    if target == next(name for name in SCHEMES[scheme].targets if "cuda" in name):
        names |= {scheme, f"{scheme}+eager"}  # what benchmarks/decode.py takes where none is named
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    chosen = [line for line in lines if line["format"] in names and line["shape"] == speed.shape.lower()]
    return {(line["what"], line["batch"]): line["x"] for line in chosen}


@pytest.mark.parametrize(("scheme", "target", "speed"), MEASURED, ids=[f"{name}@{at}" for name, at, _ in MEASURED])
def test_a_target_s_speed_is_what_was_measured(scheme: str, target: str, speed: Speed) -> None:
    found = _ratios(scheme, target, speed)
    said = {("decode", batch): ratio for batch, ratio in speed.decode}
    if speed.prefill is not None:
        said["prefill", 1] = speed.prefill
    assert said.keys() == found.keys()
    for key, ratio in said.items():
        assert ratio == pytest.approx(found[key], abs=0.0051)


def test_it_is_said_where_a_format_pays() -> None:
    speed = Speed(shape="Qwen3-8B", decode=((1, 1.9), (8, 1.0), (64, 0.25), (256, 0.1)), prefill=0.5)
    assert str(speed) == (
        "faster than bf16 at batch 1 (1.90x); as fast as bf16 at batch 8 (1.00x); "
        "slower than bf16 at batch 64 (0.25x), 256 (0.10x), prefill 0.50x (Qwen3-8B on one H100)"
    )


def test_quantize_schemes_says_it_for_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith("speed: ") for line in lines) == sum(len(s.targets) for s in SCHEMES.values())
    for _, _, speed in MEASURED:
        assert f"speed: {speed}" in lines
