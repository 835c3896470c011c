"""The packages as libraries: what they give, at what price, and what `run` refuses of a config made in Python."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UserError
from train import DataConfig, EvalConfig, LoraConfig, ModelConfig, RunConfig, RunSection, TrainConfig, load_config, run
from train.result import Report, RunResult

TINY = ModelConfig(id="random", random="tiny", architecture="qwen3", backend="peft")


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, train, qat, quantize\n"
        "from train import RunConfig, ModelConfig, load_config, run, RunResult\n"
        "from quantize import SCHEMES, Scheme\n"
        "assert callable(run) and 'int8-int4' in SCHEMES\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'unsloth', 'torchao'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["train", "qat", "quantize"])
def test_every_name_of_a_package_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == dir(module)
    for name in module.__all__:
        found = getattr(module, name)
        assert name.isupper() or found.__doc__, name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'fit_all'"):
        _ = module.fit_all


def test_a_config_made_in_python_is_checked_like_a_file(tmp_path: Path) -> None:
    config = RunConfig(
        qat="int8-int5",
        model=TINY,
        data=DataConfig(train="nowhere.jsonl"),
        lora=LoraConfig(use_dora=True),
        train=TrainConfig(optim="adamm"),
        eval=EvalConfig(),
        run=RunSection(root=str(tmp_path / "runs")),
    )
    with pytest.raises(UserError) as caught:
        run(config)
    for part in ("unknown scheme 'int8-int5'", "use_dora", "adamm", "nowhere.jsonl"):
        assert any(part in line for line in caught.value.lines), (part, caught.value.lines)
    assert not (tmp_path / "runs").exists()


def test_packaged_data_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.config_loading import with_packaged_data

    monkeypatch.chdir(tmp_path)
    config = RunConfig(model=TINY, data=DataConfig(train="examples/data/reasoning_train.jsonl"))
    assert Path(with_packaged_data(config).data.train).is_file()
    assert load_config("tiny.yaml").data.train == with_packaged_data(config).data.train


def _result(folder: Path, **metrics: Any) -> RunResult:
    text = "# A run\n\n![loss](plots/loss.png) ![none](plots/none.png)\n"
    known = {"scheme": "int8-int4", "simulated": False, "missing": [], "finish_command": None}
    return RunResult(folder, {**known, **metrics}, Report.of(text, folder))


def test_a_notebook_shows_the_report_with_its_figures(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"PNG")
    result = _result(tmp_path)
    assert isinstance(result.report, str) and result.report.startswith("# A run")
    for shown in (result, result.report):
        assert shown._repr_markdown_() == "# A run\n\n![loss](data:image/png;base64,UE5H) ![none](plots/none.png)\n"


def test_a_result_knows_what_ships_or_why_nothing_does(tmp_path: Path) -> None:
    assert _result(tmp_path).shipped == tmp_path / "quantized" and _result(tmp_path).not_shipped is None
    simulated = _result(tmp_path, simulated=True, missing=["a GPU"], finish_command="on that machine: quantize convert")
    assert simulated.shipped is None and "lacks a GPU" in str(simulated.not_shipped)
    assert str(simulated.not_shipped).endswith("on that machine: quantize convert")
    plain = _result(tmp_path, scheme=None)
    assert plain.shipped is None and "neither qat nor quantize.scheme" in str(plain.not_shipped)
    assert repr(plain) == f"RunResult(path={str(tmp_path)!r}, shipped=None)"
