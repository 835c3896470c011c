"""`quantize serve` up to where vLLM takes over: what is found, the command line, GPUs, setup, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import make_environment
from test_serving_check import make

from quantize.cli import main
from quantize.commands import serve
from quantize.doctor import machine
from quantize.layouts import NOT_COMPILED
from quantize.serving import environment


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_environment(tmp_path / "vllm")
    monkeypatch.setenv("ONGRID_VLLM", str(folder))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    make(folder / "quantized", record={"scheme": "int8", "target": "cuda"})
    return folder


def gpu(capability: str = "9.0") -> list[machine.Gpu]:
    return [machine.Gpu("NVIDIA H100", capability, 79.6, "580.95.05")]


def test_a_dry_run_prints_the_command(vllm: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "first", "--root", str(run.parent), "--dry-run", "--port", "81"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words == [
        str(vllm / "bin" / "vllm"), "serve", str(run / "quantized"), "--served-model-name", "first", "--host",
        "127.0.0.1", "--port", "81", "--dtype", "bfloat16", *NOT_COMPILED,
    ]  # fmt: skip
    options = ["--dry-run", "--", "--max-model-len", "4096", "--dtype=half", "--", "x y"]
    assert main(["serve", str(run / "quantized"), *options]) == 0
    said = capsys.readouterr().out.rstrip()
    assert shlex.split(said)[3:5] == ["--served-model-name", "quantized"]
    needed = " ".join(NOT_COMPILED)
    assert said.endswith(f"--port 8000 --dtype bfloat16 {needed} --max-model-len 4096 --dtype=half -- 'x y'")


def test_this_process_becomes_vllms(
    vllm: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(machine, "find_gpus", gpu)
    monkeypatch.setattr(os, "execve", lambda *words: asked.extend(words))
    assert main(["serve", str(run), "--host", "0.0.0.0"]) == 0
    path, words, variables = asked
    assert path == vllm / "bin" / "vllm" and words[:2] == [str(path), "serve"]
    assert variables["PATH"].startswith(str(vllm / "bin") + os.pathsep)
    assert "first at http://0.0.0.0:8000/v1, vLLM 0.23.0" in capsys.readouterr().err


@pytest.mark.parametrize("option", [[], ["--smoke-test"], ["--check"]])
def test_a_machine_without_a_gpu_is_said(
    option: list[str], vllm: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "find_gpus", list)
    assert main(["serve", str(run), *option]) == 2
    assert "vLLM needs an NVIDIA GPU, and this machine has none" in capsys.readouterr().err
    monkeypatch.setattr(machine, "find_gpus", gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert main(["serve", str(run), *option]) == 2
    assert "CUDA_VISIBLE_DEVICES=3 leaves none of this machine's" in capsys.readouterr().err


def test_an_old_gpu_is_said(
    vllm: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "quantized" / "ongrid.json").write_text(json.dumps({"scheme": "fp8", "target": "cuda-sm89"}))
    monkeypatch.setattr(machine, "find_gpus", lambda: gpu("8.0"))
    assert main(["serve", str(run)]) == 2
    assert "needs compute capability 8.9 or newer, and NVIDIA H100 has 8.0" in capsys.readouterr().err


def test_no_vllm_names_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONGRID_VLLM", str(run / "none"))
    assert main(["serve", str(run)]) == 2
    assert "make one with: quantize serve --setup" in capsys.readouterr().err
    assert main(["serve", str(run), "--dry-run"]) == 0  # the command is for another machine
    told = capsys.readouterr()
    (run / "quantized" / "tokenizer.json").unlink()
    assert main(["serve", str(run)]) == 2  # no installation would change this
    assert "has no tokenizer" in capsys.readouterr().err
    assert told.out.startswith(f"vllm serve {run / 'quantized'} ") and told.err.startswith("note: $ONGRID_VLLM")


def test_what_is_missing_is_said(vllm: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["serve", *words]) == 2
        return capsys.readouterr().err

    assert "say which run or folder to serve" in said()
    assert "--data is what --check compares on" in said(str(run), "--data", "x.txt")
    assert "--tokens 0: give a number from 1 on" in said(str(run), "--check", "--tokens", "0")
    assert "--port is quantize serve's own: give it before" in said(str(run), "--", "--port=9000")
    for word in ("--api-key", "--api_key=x", "--uds", "--ssl-keyfile=x", "--root-path"):
        assert re.search(r"--check asks a server of its own, .*leave --\w+", said(str(run), "--check", "--", word))
    assert "nope is neither a run nor a folder with a config.json" in said("nope")
    (run / "quantized").rename(run / "elsewhere")
    assert "no finished training yet" in said(str(run))
    gathered = {"version": 5, "format": {"scheme": "fp8", "target": "cuda-sm89"}}
    (run / "gathered.json").write_text(json.dumps(gathered))
    assert f"quantize convert {run} --target cuda-sm89" in said(str(run))
    (run / "gathered.json").write_text(json.dumps(gathered | {"format": None}))
    assert f"quantize serve {run / 'merged'}" in said(str(run))


def test_a_template_beside_the_folder_is_enough(vllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(make(tmp_path / "folder", template=False))
    assert main(["serve", folder, "--dry-run"]) == 2
    assert "--completions-only" in capsys.readouterr().err
    for words in (["--completions-only"], ["--", "--chat-template", "x.jinja"], ["--", "--chat_template=x.jinja"]):
        assert main(["serve", folder, "--dry-run", *words]) == 0
    (tmp_path / "folder" / "tokenizer.json").unlink()
    for option in ("--tokenizer", "--config"):
        assert main(["serve", folder, "--dry-run", "--", option, "x"]) == 0


def test_setup_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "install", make_environment)
    monkeypatch.setattr(environment, "made_folder", lambda: tmp_path / "made")
    assert main(["serve", "--setup"]) == 0
    assert (
        capsys.readouterr().out == f"vLLM 0.23.0 is installed in {tmp_path / 'made'}; use it with: quantize serve RUN\n"
    )
    assert main(["serve", "--setup", "--env", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.endswith(f"quantize serve RUN --env {tmp_path / 'other'}\n")


def test_a_check_needs_text(
    vllm: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "find_gpus", gpu)
    assert main(["serve", str(run), "--check"]) == 2
    assert "--check needs held-out text" in capsys.readouterr().err


def test_only_serve_passes_words_on() -> None:
    assert serve.PASSES_ON
    assert main(["schemes", "--", "--max-model-len"]) == 2  # the name of a scheme, as it was


def test_the_formats_say_what_vllm_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes", "int8-int8"]) == 0
    assert "    vLLM: loads it as it is (with options that quantize serve gives)" in capsys.readouterr().out
    assert main(["schemes", "fp8", "int8-int4"]) == 0
    fp8, phones = capsys.readouterr().out.split("\nint8-int4: ")
    assert fp8.count("    vLLM: loads it as it is (quantize serve)") == 2
    assert phones.count("    vLLM: no, it is for phones and CPUs: ") == 3
