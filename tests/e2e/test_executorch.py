"""`quantize export`: a .pte of the weights as they are, run in ExecuTorch's own runtime beside torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_plain, tiny_model

from quantize.cli import main
from quantize.errors import UserError
from quantize.export.environment import COMMAND, PACKAGES, find_packages, packages_folder

TOKENS = 32


def is_installed() -> bool:
    """ExecuTorch's packages are here."""
    try:
        find_packages(packages_folder())
    except UserError:
        return False
    return True


needs_executorch = pytest.mark.skipif(not is_installed(), reason=f"needs ExecuTorch; install it with: {COMMAND}")


def convert(source: Path, output: Path, scheme_name: str, target: str) -> Path:
    """Quantises a 16-bit folder in this process."""
    from quantize.convert import convert_checkpoint
    from quantize.schemes import find_scheme

    scheme = find_scheme(scheme_name)
    convert_checkpoint(source, output, scheme, scheme.find_target(target), group_size=32, dtype="float32", device="cpu")
    return output


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def embedding_bytes(folder: Path) -> bytes:
    """The first rows of the stored embedding: integers where it is quantised, else float32."""
    from quantize.convert import load_plain

    model: Any = load_plain(folder)
    weight = model.get_input_embeddings().weight.data
    rows = getattr(weight, "qdata", weight)[:8]
    return bytes(rows.contiguous().numpy().tobytes())


@pytest.mark.slow
@needs_executorch
@pytest.mark.parametrize(
    ("architecture", "scheme", "target"),
    [
        ("qwen3", "int8-int4-mobile", "executorch"),
        ("llama", "int8-int4", "executorch"),
        ("phi3", "int8-int4-mobile", "cpu"),
    ],
)
def test_a_tiny_model_says_the_same_tokens_as_torch(
    architecture: str, scheme: str, target: str, runs: Any, tmp_path: Path
) -> None:
    source = save_plain(tiny_model(architecture), tmp_path / "plain")
    folder = convert(source, tmp_path / "quantised", scheme, target)
    before = contents(folder)
    options = ("--max-seq-len", "128", "--tokens", str(TOKENS), "--allow-rounded-scales")
    done = runs.quantize("export", str(folder), *options, "--output", str(tmp_path / "exported"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    record = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert f"greedy tokens equal to torch's: {TOKENS} of {TOKENS}" in done.stdout
    assert record["against_torch"]["greedy"]["equal"] == TOKENS
    assert bool(record["rounded_scales"]) == (target != "executorch") == ("rounded: the scales of" in done.stdout)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
    assert (tmp_path / "exported" / "model.pte").read_bytes().count(embedding_bytes(folder)) == 1
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "plain", "quantised"]


def test_an_export_is_wrong_where_it_is_further_from_torch_than_rounding_carries() -> None:
    from quantize.export.verify import Distance, find_fault

    floor = Distance(argmax_agreement=0.88, loss_gap=-0.02, max_abs=6.4, mean_abs=0.56)
    assert find_fault(Distance(0.843, 0.051, 7.5, 0.65), floor, 3664) is None  # as measured on SmolLM2
    assert "loss" in (find_fault(Distance(0.88, -0.2, 7.5, 0.65), floor, 3664) or "")
    assert "loss" in (find_fault(Distance(0.88, float("nan"), 7.5, 0.65), floor, 3664) or "")
    assert "80.0%" in (find_fault(Distance(0.80, 0.0, 7.5, 0.65), floor, 3664) or "")
    assert find_fault(Distance(0.80, 0.2, 7.5, 0.65), floor, 48) is None  # too few to tell


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run of scales that are no bf16 numbers, to be exported."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_failed_export_leaves_the_run_as_it_was(run_copy: Path, runs: Any, tmp_path: Path) -> None:
    before = contents(run_copy)
    empty = tmp_path / "packages"  # says that they are there, and holds none
    empty.mkdir()
    (empty / "packages.txt").write_text("\n".join(PACKAGES))
    options = ("export", str(run_copy), "--max-seq-len", "128", "--packages", str(empty))
    refused = runs.quantize(*options)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "bf16" in refused.stderr and "--quantize.target executorch" in refused.stderr
    assert "quantize convert" in refused.stderr and "--allow-rounded-scales" in refused.stderr
    assert contents(run_copy) == before
    broken = runs.quantize(*options, "--allow-rounded-scales")
    assert broken.returncode == 1 and "No module named 'executorch'" in broken.stderr
    left = contents(run_copy)
    assert {path: left[path] for path in before} == before
    assert not (run_copy / "export" / "executorch").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@needs_executorch
def test_smollm2_computes_on_phones_what_torch_does(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All 30 layers of a run, on 64 of its held-out samples, as near to torch as torch is to itself (`find_fault`)."""
    run = runs.finish(
        "--config=quickstart.yaml", "--qat=int8-int4-mobile", "--quantize.target=executorch", "--train.max-steps=2",
        "--train.warmup-steps=0", "--train.save-steps=2", "--eval.tasks=[]", "--eval.control=False",
        "--eval.cost-batches=[]", "--run.name=phone",
    )  # fmt: skip
    before = contents(run)
    assert main(["export", str(run), "--samples", "64", "--max-seq-len", "256"]) == 0, capsys.readouterr().err
    after = contents(run)
    assert {path: after[path] for path in before} == before
    folder = run / "export" / "executorch"
    record = json.loads((folder / "export.json").read_text())
    check = record["against_torch"]
    assert record["rounded_scales"] is None and check["n_samples"] == 64
    assert (folder / "model.pte").read_bytes().count(embedding_bytes(run / "quantized")) == 1
