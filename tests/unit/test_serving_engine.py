"""Starting, asking and ending a server: tests/fake_vllm.py serves a tiny quantised checkpoint."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import make_environment
from tiny_models import save_plain, tiny_model

from quantize.errors import UserError
from quantize.serving import client, gpu, server
from quantize.serving.environment import Vllm, find_vllm
from quantize.serving.server import Server, serving

FLOAT32 = ("--dtype", "float32")
PROMPTS = [[5, 6, 7, 8], [40, 41, 42], [90, 3, 17, 64, 64, 2]]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    return find_vllm(make_environment(tmp_path_factory.mktemp("vllm") / "env"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 in the layout for CUDA, which torchao computes on a CPU as well."""
    from quantize.convert import convert_checkpoint
    from quantize.schemes import find_scheme

    place = tmp_path_factory.mktemp("served")
    save_plain(tiny_model(vocab_size=320, max_position_embeddings=64), place / "plain")
    scheme = find_scheme("int8")
    convert_checkpoint(
        place / "plain", place / "int8", scheme, scheme.find_target("cuda"), group_size=None, dtype="float32",
        device="cpu",
    )  # fmt: skip
    return place / "int8"


@pytest.fixture(scope="module")
def served(folder: Path, vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with serving(folder, vllm, log=log, model="tiny", arguments=FLOAT32) as found:
        yield found


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    from quantize.convert import load_plain

    return load_plain(folder)


def test_it_says_what_it_serves(served: Server) -> None:
    assert (served.model, served.max_length) == ("tiny", 64)
    command, started = served.log.read_text().splitlines()[:2]  # type: ignore[union-attr]
    assert "second runner 0, GPUs by PCI_BUS_ID" in started
    assert "--generation-config vllm" in command
    assert re.search(r"--dtype float32 --host 127\.0\.0\.1 --port \d+$", command)


def test_scores_are_the_models_own(served: Server, model: torch.nn.Module) -> None:
    for ids, found in zip(PROMPTS, client.score(served, PROMPTS), strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(found.logprobs), expected[range(len(ids) - 1), ids[1:]])
        assert found.argmax == expected.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(found.argmax_logprobs), expected.max(-1).values)
    assert client.score(served, [[7]]) == [client.Score([], [], [])]


def test_completions_are_greedy_and_in_order(served: Server, model: torch.nn.Module) -> None:
    seen = []
    found = client.complete(served, PROMPTS, [3, 4, 5], ignore_eos=True, progress=lambda *at: seen.append(at))
    for ids, count, each in zip(PROMPTS, (3, 4, 5), found, strict=True):
        tokens = list(ids)
        for _ in range(count):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert each.tokens == tokens[len(ids) :]
        assert each.finish_reason == "length"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    whole = found[2].text
    assert whole
    (stopped,) = client.complete(served, [PROMPTS[2]], 5, stop=[whole[1:2]], ignore_eos=True)
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[1:2])], "stop")


def test_text_and_chat(served: Server) -> None:
    assert isinstance(client.continue_text(served, "What is", 4), str)
    assert isinstance(client.chat(served, "What is 12 + 30?", 4), str)


def test_what_is_refused_is_said_in_its_words(served: Server) -> None:
    with pytest.raises(RuntimeError, match=r"HTTP 400\): .*maximum context length is 64"):
        client.score(served, [[5] * 64])
    with pytest.raises(RuntimeError, match=r"HTTP 404\): The model `other` does not exist"):
        client.complete(Server(served.url, "other", 64), [[5]], 1)


def test_nothing_is_left_running(folder: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    monkeypatch.setattr(server, "_END_SECONDS", 0.2)
    log = tmp_path / "vllm.log"
    with serving(folder, vllm, log=log) as found:
        assert client.is_healthy(found.url)
        started = [int(word) for word in re.findall(r"pid=(\d+)|worker (\d+)", log.read_text())[0] if word]
        started += [int(re.findall(r"worker (\d+)", log.read_text())[0])]
    assert not client.is_healthy(found.url)
    assert not any(_is_running(each) for each in started)
    with pytest.raises(RuntimeError, match="no longer answers"):
        client.complete(found, [[5]], 1)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_engine_too(folder: Path, vllm: Vllm, tmp_path: Path, number: signal.Signals) -> None:
    """While it is waited for: the stand-in needs seconds to import torch."""
    log = tmp_path / "vllm.log"
    code = (
        "import sys; from pathlib import Path; from quantize.serving.environment import find_vllm\n"
        "from quantize.serving.server import serving\n"
        "with serving(Path(sys.argv[1]), find_vllm(Path(sys.argv[2])), log=Path(sys.argv[3])): pass\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(vllm.executable.parent.parent), str(log)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (log.is_file() and "worker" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    (worker,) = re.findall(r"worker (\d+)", log.read_text())
    os.kill(process.pid, number)
    assert process.wait(30) == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    assert not _is_running(int(worker))


def test_an_engine_that_dies_is_said_by_its_root_cause(
    folder: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "vllm.log"
    monkeypatch.setenv("FAKE_VLLM", "oom")
    memory = pytest.raises(UserError, match=r"exit code 1.*does not suffice: torch.OutOfMemoryError.*nvidia-smi")
    with memory, serving(folder, vllm, log=log):
        pass
    monkeypatch.setenv("FAKE_VLLM", "validation")
    refused = pytest.raises(RuntimeError, match=r"ValidationError(.|\n)*\['OddForCausalLM'\] are not supported")
    with refused, serving(folder, vllm, log=log):
        pass
    monkeypatch.delenv("FAKE_VLLM")
    unknown = pytest.raises(RuntimeError, match="unrecognized arguments: --guess")
    with unknown, serving(folder, vllm, log=log, arguments=["--guess"]):
        pass
    with (
        pytest.raises(RuntimeError, match="did not answer within 0 seconds"),
        serving(folder, vllm, log=log, timeout=0),
    ):
        pass


def test_one_that_dies_while_it_is_asked(
    folder: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dies")
    log = tmp_path / "vllm.log"
    with serving(folder, vllm, log=log) as found, pytest.raises(UserError, match=r"no longer answers .*out of memory"):
        client.score(found, PROMPTS)
    # What the real one does: requests that wait are answered before it goes.
    monkeypatch.setenv("FAKE_VLLM", "fails")
    with (
        serving(folder, vllm, log=log, hint="set less") as found,
        pytest.raises(UserError, match=r"vLLM failed at .*HTTP 500: EngineCore encountered .*memory.*, or set less;"),
    ):
        client.score(found, PROMPTS[:1])


def test_what_the_user_keeps_for_servers_of_his_own_is_not_asked_for(
    folder: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in the environment; and a number that JSON has not is no refusal."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("FAKE_VLLM", "overflows")
    with (
        serving(folder, vllm, log=tmp_path / "vllm.log") as found,
        pytest.raises(UserError, match=r"NaN or infinite: .*overflow in this dtype"),
    ):
        client.score(found, PROMPTS)


def test_memory_that_lacks_is_known_by_its_words(
    folder: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "full")
    log = tmp_path / "vllm.log"
    for arguments, said in (((), "max seq len"), (("--max-model-len", "auto"), "Cannot auto-fit")):
        lacking = pytest.raises(UserError, match=rf"does not suffice: ValueError: .*{said}.*--max-model-len 4096")
        with lacking, serving(folder, vllm, log=log, arguments=arguments):
            pass


def test_an_answer_that_is_cut_is_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("the command\nkilled\n")

    def cut(*words: object, **options: object) -> object:
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(client._opener, "open", cut)
    assert not client.is_healthy("http://127.0.0.1:1")
    with pytest.raises(RuntimeError, match=r"no longer answers \(IncompleteRead.*: killed\nall of its log is"):
        client.describe("http://127.0.0.1:1", log)


def test_a_guard_that_cannot_start_leaves_nothing_running(
    folder: Path, vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def fail(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        raise OSError("no more processes")

    monkeypatch.setenv("FAKE_VLLM", "dies")
    monkeypatch.setattr(server, "_guard", fail)
    with pytest.raises(OSError, match="no more"), serving(folder, vllm, log=tmp_path / "vllm.log"):
        pass
    assert started[0].poll() is not None


def test_the_cause_of_a_cause_is_told(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "the command\nTraceback (most recent call last):\n  File\nKeyError: 'layers.0.qkv_proj'\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n  File\nValueError: cannot load\n"
        "Traceback (most recent call last):\n  File\nRuntimeError: Engine core initialization failed. See root cause\n"
    )
    assert server.root_cause(log) == "KeyError: 'layers.0.qkv_proj'"


def test_the_share_of_memory_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def says(text: str) -> list[str]:
        fake.write_text(f"#!/bin/sh\necho '{text}'\n")
        fake.chmod(0o755)
        return gpu.memory_share(tmp_path)

    assert says("143000, 143771") == ["--gpu-memory-utilization", "0.900"]
    assert says("71885, 143771") == ["--gpu-memory-utilization", "0.471"]
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 262144}}')
    assert says("71885, 143771") == ["--gpu-memory-utilization", "0.459"]
    assert says("No devices were found") == []
    with pytest.raises(UserError, match=r"4\.9 of 140\.4 GiB free"):
        says("5000, 143771")


def test_the_gpu_is_the_first_that_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    whole = "GPU 0: A100 (UUID: GPU-a1)\n  MIG 1g.5gb Device 0: (UUID: MIG-m0)\nGPU 1: H100 (UUID: GPU-b2)"
    table = "A100, 8.0, 40960, 580.1\nH100, 9.0, 81559, 580.1"
    fake.write_text(f"#!/bin/sh\nif [ \"$1\" = -L ]; then echo '{whole}'; else echo '{table}'; fi\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    chosen = {
        "1": "H100", "GPU-b2,0": "H100", "GPU-b": "H100", "MIG-m0": None, "7": None,
        "": None, "-1": None,
    }  # fmt: skip
    assert gpu.find_gpu() is not None
    for named, name in chosen.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        found = gpu.find_gpu()
        assert (found.name if found else None) == name, named
    numbers = {
        "0,1": {},
        "": {},
        "-1": {},
        "GPU-b2, 0": {"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    }
    for named, expected in numbers.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert gpu.by_numbers() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-m0")
    with pytest.raises(UserError, match=r"MIG-m0 is the name of none that nvidia-smi -L lists .*: give numbers"):
        gpu.by_numbers()
