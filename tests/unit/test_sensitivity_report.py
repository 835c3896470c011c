"""What `quantize sensitivity` tells people to run is what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantize.sensitivity_report import Subject, _command, _verdict

TRAINED = {"scheme": "int8-int4", "target": "cpu", "group_size": 32, "skip": ["v_proj"], "missing": []}


def _subject(**options: Any) -> Subject:
    known: dict[str, Any] = {
        "model": Path("runs/first/merged"), "name": "first", "format": {}, "data": Path("x"), "dtype": "float32",
        "grid": None, "output": Path("o"), "trust_remote_code": False, "trained": TRAINED,
    }  # fmt: skip
    return Subject(**known | options)


@pytest.mark.parametrize(
    ("form", "command"),
    [
        (
            TRAINED,
            'train --config runs/first/config.yaml \'--quantize.skip=["v_proj", "down_proj"]\' --run.name=first-skip',
        ),
        (
            TRAINED | {"group_size": 64, "target": "cuda"},
            "train --config runs/first/config.yaml --quantize.target=cuda --quantize.group_size=64 "
            '\'--quantize.skip=["v_proj", "down_proj"]\' --run.name=first-skip',
        ),
        (
            {"scheme": "int4", "target": "cuda-sm80", "group_size": 128, "skip": []},
            "train --config runs/first/config.yaml --qat=int4 --quantize.scheme=null --quantize.target=cuda-sm80 "
            "--quantize.group_size=128 '--quantize.skip=[\"down_proj\"]' --run.name=first-skip",
        ),
        (
            {"scheme": "fp8", "target": "cuda-sm89", "group_size": None, "skip": []},
            "train --config runs/first/config.yaml --qat=fp8 --quantize.scheme=null --quantize.target=cuda-sm89 "
            "--quantize.group_size=null '--quantize.skip=[\"down_proj\"]' --run.name=first-skip",
        ),
    ],
)
def test_a_run_is_trained_again_in_the_format_that_was_scanned(form: dict[str, Any], command: str) -> None:
    assert _command(_subject(), form, ["down_proj"]) == command


def test_a_checkpoint_is_converted_in_the_format_that_was_scanned() -> None:
    form = {"scheme": "int4", "target": "cpu", "group_size": 64, "skip": []}
    subject = _subject(model=Path("models/mine"), name="mine", trained=None)
    expected = "quantize convert models/mine --scheme int4 --target cpu --group-size 64 --skip q_proj down_proj"
    assert _command(subject, form, ["q_proj", "down_proj"]) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": -0.1, "low": None, "high": None}, "5 samples to confirm a proposal on are too few for an interval"),
        ({"value": -0.1, "low": -0.3, "high": 0.1}, "that a first step lowers it is not shown on these samples"),
    ],
)
def test_nothing_is_proposed_with_its_reason(change: dict[str, float | None], said: str) -> None:
    found = {
        "format": {"scheme": "int4"}, "all": {"kl": {"value": 0.2, "low": None, "high": None}}, "proposal": [],
        "sets": [{"skip": ["v_proj"], "kl_change": change}], "n_samples": {"groups": 5, "sets": 5},
    }  # fmt: skip
    assert f"Nothing is proposed: {said}." in _verdict(found)
