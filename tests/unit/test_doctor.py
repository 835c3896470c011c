"""`quantize doctor` on machines that this one is not: no CUDA, an old driver, missing and broken packages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import make_environment

from quantize.cli import main
from quantize.doctor import abilities, child, examine, machine, packages, tools
from quantize.doctor.findings import Finding, look, tilde
from quantize.schemes import SCHEMES
from quantize.serving import environment

INSTALLED = {
    "ongrid": "0.1.0", "torch": "2.11.0", "torchao": "0.18.0", "transformers": "5.17.0", "peft": "0.21.2",
    "trl": "1.15.0", "unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "triton": "3.6.0", "torchvision": "0.26.0",
    "bitsandbytes": "0.50.2", "packaging": "26.3",
}  # fmt: skip
NEEDS = (
    "torch>=2.11,<2.15",
    "torchao>=0.18,<0.19",
    "transformers>=5.17,<5.18",
    "peft>=0.21.2,<0.22",
    "trl>=1.15,<1.16",
)
H100 = machine.Gpu("NVIDIA H100", "9.0", 79.6, "580.95.05")
NOTHING_RUNS = "a CUDA GPU of compute capability 7.0 or newer (torch 2.13.0+cpu is built without CUDA; ...)"


def answers_of(build: str | None, device: str | None = None, **more: Any) -> dict[str, Any]:
    """What the process that imports torch says, of a build for CUDA or None, on a GPU of that capability or None."""
    lacking = {
        scheme.name: {
            name: [NOTHING_RUNS if build is None else "compute capability 7.0 or newer"]
            * bool(target.needs and not device)
            for name, target in scheme.targets.items()
        }
        for scheme in SCHEMES.values()
    }
    version = "2.11.0+cu130" if build else "2.13.0+cpu"
    known: dict[str, Any] = {"torch": {"version": version, "cuda": build, "hip": None, "available": device is not None}}
    known |= {"targets": lacking, "torchao": {"said": []}, "seconds": 3.0}
    if device:
        known["devices"] = [{"name": H100.name, "capability": device, "computes": None}]
    return known | more


Examine = Callable[..., dict[str, dict[str, Finding]]]


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Examine:
    """`examine` with faked packages, GPUs and answers, as findings by section and name."""
    monkeypatch.setattr(packages, "asked", lambda extra=None: (f"{extra}==1",) if extra else NEEDS)
    monkeypatch.setattr(abilities.metadata, "requires", lambda name: ["torchvision", "xformers", "triton", "peft"])
    monkeypatch.setattr(machine, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "made_folder", lambda: tmp_path / "none")
    monkeypatch.delenv("ONGRID_VLLM", raising=False)

    def run(
        answers: dict[str, Any], gpus: tuple[machine.Gpu, ...] = (), *, imports: bool = False, **versions: str | None
    ) -> dict[str, dict[str, Finding]]:
        known = {name: found for name, found in (INSTALLED | versions).items() if found}
        for module in (packages, abilities, tools):
            monkeypatch.setattr(module, "version_of", known.get)
        monkeypatch.setattr(machine, "find_gpus", lambda: list(gpus))

        def ask(*question: str) -> dict[str, Any]:
            return answers if question == ("torch",) else answers.get("of " + question[1], {"imported": question[1]})

        found = examine.examine(tmp_path / "runs", imports=imports, ask=ask)
        sections = {section.title: {each.name: each for each in section.findings} for section in found.sections}
        return sections | {"": {"verdict": Finding("verdict", "fact", found.verdict, "\n".join(found.faults))}}

    return run


def test_a_gpu_that_has_everything(imagined: Examine) -> None:
    found = imagined(answers_of("13.0", "9.0"), (H100,), **{"mslk-cuda": "1.1.0"})
    assert found["Packages"]["torch's build"].state == "yes"
    assert found["Train"]["backend unsloth"].state == "yes" and "--imports" in found["Train"]["backend unsloth"].text
    assert "bfloat16" in found["Train"]["device"].text and "fp8" in found["Train"]["fused kernels"].text
    assert {found["Run: the formats"][name].state for name in SCHEMES} == {"yes"}
    assert found["Export"]["vLLM"].command == "quantize serve --setup"
    assert found[""]["verdict"].text.startswith("trains with unsloth or peft; 15 formats run here, 0 are simulated")


def test_a_vllm_that_is_there(imagined: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONGRID_VLLM", str(make_environment(tmp_path / "vllm", vllm="0.22.1")))
    told = imagined(answers_of("13.0", "9.0"), (H100,))["Export"]["vLLM"]
    assert told.state == "yes" and told.text.startswith("0.22.1 $ONGRID_VLLM (")
    assert "torchao 0.18.0, tried was 0.23.0 (quantize serve --setup); it serves int4 for cuda-sm80, " in told.text
    monkeypatch.setenv("ONGRID_VLLM", str(make_environment(tmp_path / "bare", torchao=None)))
    assert imagined(answers_of("13.0", "9.0"), (H100,))["Export"]["vLLM"].state == "broken"


def test_no_cuda_at_all(imagined: Examine) -> None:
    found = imagined(answers_of(None), torch="2.13.0+cpu", torchvision=None, triton=None)
    assert found["Packages"]["torch's build"].state == "fact"
    assert "float32" in found["Train"]["device"].text and found["Train"]["fused kernels"].state == "no"
    assert found["Run: the formats"]["int8-int4"].state == "yes"
    assert found["Run: the formats"]["fp8"].state == "simulated"
    assert "cuda-sm89 (cuda>=8.9)" in found["Run: the formats"]["fp8"].text
    assert found["Export"]["vLLM"].command == "" and found["Packages"]["mslk"].command == ""
    assert found[""]["verdict"].command == ""


def test_a_cpu_build_beside_a_gpu_is_broken_and_has_one_command(imagined: Examine) -> None:
    build = imagined(answers_of(None), (H100,), torchvision=None)["Packages"]["torch's build"]
    assert build.state == "broken" and "leaves the NVIDIA H100 unused" in build.text
    assert "LOCK=requirements/cuda-py312.txt" in build.command and "VENV=.venv-cuda" in build.command


def test_an_old_driver_names_the_one_that_is_needed(imagined: Examine) -> None:
    old = machine.Gpu("NVIDIA A100", "8.0", 40.0, "535.104.05")
    said = "The NVIDIA driver on your system is too old (found version 12020)."
    build = imagined(answers_of("13.0", no_gpu=said), (old,))["Packages"]["torch's build"]
    assert build.state == "broken" and said in build.text and "driver 535.104.05" in build.text
    assert "580.65 or newer" in build.text and build.command


def test_a_cuda_build_without_a_gpu_still_works(imagined: Examine) -> None:
    found = imagined(answers_of("13.0", no_gpu="Found no NVIDIA driver"))
    assert found["Packages"]["torch's build"].state == "fact" and not found[""]["verdict"].command


def test_a_gpu_whose_kernels_are_not_in_the_build(imagined: Examine) -> None:
    device = {"name": "Tesla P100", "capability": "6.0", "computes": "no kernel image is available"}
    found = imagined(answers_of("13.0", "6.0", devices=[device]), (H100,))
    assert "does not compute: no kernel image" in found["Packages"]["torch's build"].text
    assert "the processor" in found["Train"]["device"].text


def test_missing_packages_are_one_command_and_exit_2(
    imagined: Examine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"failed": "ModuleNotFoundError: No module named 'torch'", "seconds": 0.1}
    found = imagined(broken, torch=None, trl=None)
    missing = found["Packages"]["missing"]
    assert missing.state == "broken" and missing.command.endswith(
        "-m pip install 'torch>=2.11,<2.15' 'trl>=1.15,<1.16'"
    )
    assert found["Train"]["training"].state == found["Run: the formats"]["formats"].state == "broken"
    assert "not installed: torch>=2.11,<2.15, trl>=1.15,<1.16" in found[""]["verdict"].command
    monkeypatch.setattr(examine.examine, "__kwdefaults__", {"imports": False, "ask": lambda *question: broken})
    assert main(["doctor", "--json"]) == 2
    out, error = capsys.readouterr()
    assert json.loads(out)["can_train_and_ship"] is False and error.startswith("error: not installed: torch")


def test_a_version_out_of_range_still_trains(imagined: Examine) -> None:
    found = imagined(answers_of("13.0", "9.0"), (H100,), trl="1.20.0")
    assert (
        found["Packages"]["trl"].state == "no" and "1.20.0 is outside what is tested" in found["Packages"]["trl"].text
    )
    assert found["Packages"]["trl"].command.endswith("pip install 'trl>=1.15,<1.16'")
    assert not found[""]["verdict"].command


def test_what_breaks_unsloth_is_seen_without_importing_it(imagined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities.platform, "machine", lambda: "x86_64")
    vision = imagined(answers_of(None))["Train"]["backend unsloth"]
    assert vision.state == "broken" and vision.command.endswith("pip uninstall -y torchvision")
    lacking = imagined(answers_of("13.0", "9.0"), triton=None)["Train"]
    assert "triton" in lacking["backend unsloth"].text and lacking["backend unsloth"].command.endswith("triton")
    assert lacking["fused kernels"].state == "no"
    absent = imagined(answers_of("13.0", "9.0"), unsloth=None)
    assert absent["Train"]["backend unsloth"].command.endswith("pip install unsloth==1")
    assert absent[""]["verdict"].text.startswith("trains with peft;")


def test_imports_are_tried_where_asked_for(imagined: Examine) -> None:
    failed = {"failed": "NotImplementedError: no GPU", "seconds": 12.0}
    found = imagined(answers_of(None) | {"of unsloth": failed}, torchvision=None, imports=True)
    assert found["Imports"]["trl.trainer.sft_trainer"].state == "yes"
    assert found["Imports"]["unsloth"].text == "does not import (12.0 s): NotImplementedError: no GPU"
    assert found["Imports"]["unsloth"].command.endswith("--model.backend=peft") and not found[""]["verdict"].command
    core = imagined(answers_of(None) | {"of peft": failed}, torchvision=None, imports=True)
    assert core[""]["verdict"].command.startswith("peft does not import")


def test_torchaos_words_are_explained(imagined: Examine) -> None:
    said = "Failed to load /home/me/torchao/_C_mxfp8.so: Could not load this library: /home/me/torchao/_C_mxfp8.so"
    found = imagined(answers_of(None, torchao={"said": [said]}))["Packages"]["torchao"]
    assert found.text.startswith('says "Failed to load _C_mxfp8.so"; harmless') and found.state == "fact"


def test_a_library_that_crashes_or_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os; os.kill(os.getpid(), 11)\n")
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert child.ask("import", "crashing")["failed"] == "ended by signal 11"
    assert child.ask("import", "hanging", timeout_s=0.5)["failed"] == "no answer in 0.5 s"
    assert child.ask("import", "json")["imported"] == "json"
    assert "No module named 'nowhere'" in child.ask("import", "nowhere")["failed"]


def test_a_probe_that_fails_keeps_what_it_had() -> None:
    def probe() -> Any:
        yield Finding("first", "yes", "here")
        raise KeyError("odd")

    first, second = look("odd", probe)
    assert first.name == "first" and second.state == "unknown" and "KeyError: 'odd'" in second.text


def test_nvidia_smi_is_read_and_never_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771, 580.95.05'\necho 'Unknown, [N/A], [N/A], 580.95.05'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(program) if name == "nvidia-smi" else None)
    first, second = machine.find_gpus()
    assert (first.capability, round(first.memory_gib)) == ("9.0", 140) and second.memory_gib == 0.0
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert machine.find_gpus() == []
    program.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert machine.find_gpus() == []


def test_secrets_are_never_shown(imagined: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "secret" + "-value")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = imagined(answers_of(None), torchvision=None, wandb="0.31.0")
    assert "logged in" in found["Tools"]["wandb"].text and found["Tools"]["hub token"].state == "yes"
    assert found["Tools"]["hub offline"].command.startswith("unset HF_HUB_OFFLINE")
    assert "secret-value" not in str(found)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    gone = imagined(answers_of(None), torchvision=None, wandb="0.31.0")["Tools"]
    assert gone["hub token"].command == "hf auth login" and gone["wandb"].command.endswith("wandb login")


def test_the_users_folder_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert tilde("/home/me/.venv/bin/python and /home/meta") == "~/.venv/bin/python and /home/meta"
    monkeypatch.setenv("HOME", "/")
    assert tilde("/opt/venv") == "/opt/venv"


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    runs = machine.describe_machine(tmp_path / "file" / "runs", [])
    (disk,) = [each for each in runs if each.name == "disk" and "runs go to" in each.text]
    assert disk.state == "broken" and "is a file" in disk.text and "--run.root" in disk.command


def test_fused_kernels_begin_where_qat_takes_them() -> None:
    source = (Path(__file__).resolve().parents[2] / "qat" / "kernels" / "__init__.py").read_text(encoding="utf-8")
    assert f"needed = {abilities.FUSED_FLOAT8} if found.float8 else {abilities.FUSED}" in source


def test_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert re.search(r"Exit code 0: .* 2:\s+nothing can", capsys.readouterr().out, flags=re.DOTALL)


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "int8-int4         yes" in out and "Verdict: trains with" in out and "unknown" not in out
