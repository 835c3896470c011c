"""`quantize serve` on a converted checkpoint, through tests/fake_vllm.py: smoke test, check, dead engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_vllm import make_environment
from tiny_models import save_plain, tiny_model

from quantize.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantize.convert import convert_checkpoint
    from quantize.schemes import find_scheme

    place, scheme = tmp_path_factory.mktemp("serve"), find_scheme("int8")
    save_plain(tiny_model(vocab_size=320, max_position_embeddings=128), place / "plain")
    convert_checkpoint(
        place / "plain", place / "tiny", scheme, scheme.find_target("cuda"), group_size=None, dtype="float32",
        device="cpu", skip=("o_proj",),
    )  # fmt: skip
    return place / "tiny"


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by what nvidia-smi says, vLLM's environment, and a folder of our own for logs."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/sh\ncase "$1" in *memory.free*) echo "80000, 81559";; *) echo "H100, 9.0, 81559, 580.95";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.setenv("ONGRID_VLLM", str(make_environment(tmp_path / "vllm")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_smoke_test_asks_for_a_chat(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--smoke-test"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("vLLM 0.23.0 serves tiny, 128 tokens long, after ")
    assert second.startswith("/v1/chat/completions: 'What is the sum of 12 and 30?' -> ")
    assert not list(tmp_path.glob("*.log"))


def test_a_check_finds_the_same_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(8)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--check", "--data", str(tmp_path / "held_out.jsonl"), "--samples", "8", "--tokens", "6"]
    assert main(["serve", str(folder), *options, "--", "--max-model-len", "100"]) == 0
    loss, same, floor, greedy = capsys.readouterr().out.splitlines()
    assert "vLLM - transformers +0.0000 [" in loss or "vLLM - transformers -0.0000 [" in loss
    assert re.fullmatch(r"the same most likely token at 100.00% of the \d+ scored ones", same)
    assert floor.startswith("transformers beside itself, embeddings changed by a last bit: loss ")
    assert greedy.startswith("greedy tokens: all 6 equal after 8 of 8 prompts; 100.0%")


def test_an_engine_that_dies_leaves_its_log(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "validation")
    assert main(["serve", str(folder), "--smoke-test"]) == 1
    error = capsys.readouterr().err
    assert "['OddForCausalLM'] are not supported" in error
    (log,) = tmp_path.glob("vllm-tiny-*.log")
    assert str(log) in error
    monkeypatch.setenv("FAKE_VLLM", "oom")
    assert main(["serve", str(folder), "--smoke-test", "--completions-only"]) == 2
    assert "memory does not suffice" in capsys.readouterr().err
