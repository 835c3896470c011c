"""What `quantize export` refuses before anything heavy starts, and the parts of an export that need no ExecuTorch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantize.cli import main
from quantize.errors import UserError
from quantize.export import environment
from quantize.export.architectures import (
    check_architecture,
    fused_rows,
    layers_without_rope,
    meta_name,
    transformer_arguments,
)

INT8_INT4 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationIntxWeightConfig"}}}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip


def make_folder(folder: Path, settings: dict[str, Any] | None = INT8_INT4, **config: Any) -> Path:
    """A checkpoint's folder that holds config.json alone."""
    folder.mkdir()
    named = {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(LLAMA | named | config))
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder that says that ExecuTorch's packages are in it."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "packages.txt").write_text("\n".join(environment.PACKAGES))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `quantize export` says when it refuses."""
    assert main(["export", *options]) == 2
    return capsys.readouterr().err


def test_what_is_missing_is_said_with_the_command_that_makes_it(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "model")
    assert "quantize export RUN_OR_FOLDER" in refusal(capsys)
    assert "neither a run nor a folder" in refusal(capsys, "nothing", "--root", str(tmp_path))
    assert environment.COMMAND in refusal(capsys, str(folder), "--packages", str(tmp_path / "none"))
    (packages / "packages.txt").write_text("executorch==0.1")
    assert "renew it with: quantize export --setup" in refusal(capsys, str(folder), "--packages", str(packages))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert "train --resume" in refusal(capsys, str(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "packages", "run"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "--target executorch"),
        ({"quant_method": "gptq"}, "by gptq"),
        ({"quant_method": "torchao", "quant_type": {"_type": "Float8WeightOnlyConfig"}}, "Float8WeightOnlyConfig"),
        ({"quant_method": "torchao", "quant_type": {"_type": "IntxWeightOnlyConfig"}}, "IntxWeightOnlyConfig"),
    ],
)
def test_other_formats_are_refused_with_the_ones_that_xnnpack_computes(
    settings: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refusal(capsys, str(make_folder(tmp_path / "model", settings)))
    assert said in text and "int8-int4-mobile" in text


def test_packed_folders_are_refused_with_the_command_that_unpacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "model", ongrid_packed=1)
    assert f"quantize convert {folder} --unpack" in refusal(capsys, str(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma3_text"}, "gemma3_text cannot be exported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "biases"),
        ({"max_position_embeddings": 64}, "--max-seq-len 64"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "changes with the length"),
        ({"model_type": "phi3", "sliding_window": 32}, "slides over 32"),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 50}}, "--max-seq-len 50"),
    ],
)
def test_what_the_transformer_would_compute_otherwise_is_refused(config: dict[str, Any], said: str) -> None:
    check_architecture(LLAMA, 128)
    with pytest.raises(UserError, match=said):
        check_architecture(LLAMA | config, 128)


def test_an_output_that_holds_anything_else_or_lies_in_the_source_is_refused(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "model")
    common = (str(folder), "--packages", str(packages), "--output")
    assert "holds no export" in refusal(capsys, *common, str(tmp_path))
    assert "lies inside" in refusal(capsys, *common, str(folder / "exported"))
    assert "cannot be written" in refusal(capsys, *common, str(folder / "config.json"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    for option in ("--max-seq-len", "--layers", "--tokens", "--samples"):
        assert option in refusal(capsys, str(folder), option, "0")


def test_weights_are_found_under_meta_s_names_and_fused_ones_taken_apart() -> None:
    assert meta_name("model.layers.3.self_attn.q_proj.weight") == "layers.3.attention.wq.weight"
    assert meta_name("model.layers.0.self_attn.k_proj.bias") == "layers.0.attention.wk.bias"
    assert (meta_name("model.norm.weight"), meta_name("lm_head.weight")) == ("norm.weight", "output.weight")
    with pytest.raises(UserError, match="rotary"):
        meta_name("model.rotary.weight")
    phi = LLAMA | {"model_type": "phi3", "num_key_value_heads": 2}
    assert fused_rows(phi)["qkv_proj"] == {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    assert fused_rows(LLAMA) == {}
    assert layers_without_rope({"no_rope_layers": [1, 1, 1, 0]}) == [3]
    assert transformer_arguments(LLAMA, 128)["n_kv_heads"] == 4


def test_setup_that_fails_leaves_what_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "packages.txt").write_text("\n".join(environment.PACKAGES))

    def fail(command: list[str], **options: Any) -> Any:
        Path(command[command.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")

    monkeypatch.setattr(environment.subprocess, "run", fail)
    with pytest.raises(UserError, match="no matching distribution"):
        environment.install_packages(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"] and environment.find_packages(folder) == folder
