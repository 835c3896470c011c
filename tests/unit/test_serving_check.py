"""What vLLM would refuse is found in headers and settings: the contract with its TorchAOConfig, and each bad input."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import make_environment
from tiny_models import save_plain, tiny_model

from quantize.doctor.machine import Gpu
from quantize.errors import UserError
from quantize.layouts import NOT_COMPILED
from quantize.schemes import SCHEMES, find_scheme, served_formats
from quantize.serving import layout, reading
from quantize.serving.check import check_folder
from quantize.serving.environment import Vllm, find_vllm
from quantize.serving.gpu import check_gpu

LINEAR = (
    *(f"self_attn.{part}_proj" for part in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
)  # fmt: skip
INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}


def make(
    folder: Path,
    quantised: Mapping[str, str] | None = None,
    *,
    config: Any = INT8,
    record: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    template: bool = True,
    **quantisation: Any,
) -> Path:
    """A folder as convert writes it, of headers alone: one block; layer -> torchao's class, of all 7 by default."""
    folder.mkdir()
    kinds = dict.fromkeys(LINEAR, "Int8Tensor") if quantised is None else dict(quantised)
    named = {
        name if "." in name and "embed" in name else f"model.layers.0.{name}": kind for name, kind in kinds.items()
    }
    plain = ["model.embed_tokens", "model.norm", *(f"model.layers.0.{name}" for name in LINEAR)]
    header: dict[str, Any] = {}
    metadata = {}
    for name in [*named, *(each for each in plain if each not in named)]:
        kind = named.get(name, "Tensor")
        parts = {f"{name}._weight_qdata": 2} if kind != "Tensor" else {f"{name}.weight": 1 if "norm" in name else 2}
        header |= {part: {"dtype": "I8", "shape": [1] * rank, "data_offsets": [0, 0]} for part, rank in parts.items()}
        metadata[f"{name}.weight"] = json.dumps(
            {"_type": kind, **({"_data": {"block_size": [1, 64]}} if parts else {})}
        )
    header["__metadata__"] = metadata | {"tensor_names": json.dumps(list(metadata))}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    said = {"quant_method": "torchao", "quant_type": {"default": config}, "modules_to_not_convert": None}
    whole = {"model_type": "qwen3", "dtype": "bfloat16", "quantization_config": said | quantisation, **(settings or {})}
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"} if template else {}))
    if record is not None:
        (folder / "ongrid.json").write_text(json.dumps(record))
    return folder


def refused(folder: Path, vllm: Vllm | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as found:
        check_folder(folder, vllm, **options)
    return str(found.value)


# ---------------------------------------------------------------------- the contract


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(vocab_size=320, tied=False, hidden_size=128, intermediate_size=256)
    return save_plain(model.bfloat16(), tmp_path_factory.mktemp("plain") / "plain")


@pytest.mark.parametrize(
    ("name", "target", "skip"),
    [
        ("int8", "cuda", ()),
        ("int8-int8", "cuda", ()),
        ("fp8", "cuda-sm89", ()),
        ("int8", "cuda", ("o_proj",)),
        ("int8", "cuda", ("model.layers.0",)),
        ("fp8", "cuda-sm89", ("q_proj", "k_proj", "v_proj")),
        ("int8", "cuda", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_vllm_finds_what_convert_quantised_and_nothing_else(
    name: str, target: str, skip: tuple[str, ...], plain: Path, tmp_path: Path
) -> None:
    from quantize.convert import convert_checkpoint

    scheme, folder = find_scheme(name), tmp_path / "converted"
    convert_checkpoint(
        plain, folder, scheme, scheme.find_target(target), group_size=scheme.group_size, dtype="bfloat16",
        device="cpu", skip=skip,
    )  # fmt: skip
    found = check_folder(folder)
    assert (found.scheme, found.target, found.chats) == (scheme, scheme.targets[target], True)
    assert found.arguments == ("--dtype", "bfloat16", *scheme.targets[target].vllm_arguments)
    assert found.name == "converted"
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    taken = layout.is_taken("model.layers.1.self_attn.qkv_proj", settings)
    assert taken == ("q_proj" not in skip)
    (folder / "ongrid.json").unlink()
    assert check_folder(folder).target is found.target  # of a foreign folder it is read from the files


@pytest.mark.parametrize("parts", [("q_proj",), ("v_proj", "up_proj")])
def test_a_part_of_what_vllm_joins_is_named(parts: tuple[str, ...], plain: Path, tmp_path: Path) -> None:
    from quantize.convert import convert_checkpoint

    scheme = find_scheme("int8")
    convert_checkpoint(
        plain, tmp_path / "converted", scheme, scheme.find_target("cuda"), group_size=None, dtype="bfloat16",
        device="cpu", skip=parts,
    )  # fmt: skip
    said = refused(tmp_path / "converted")
    assert f"model.layers.0.self_attn.qkv_proj ({parts[0]} in 16 bit)" in said
    assert ("gate_up_proj (up_proj in 16 bit)" in said) == (len(parts) == 2)
    assert "--skip q_proj k_proj v_proj" in said and said.count("\n") == 0


@pytest.mark.parametrize(("scheme", "target"), served_formats(), ids=lambda each: each.name)
def test_torchao_reads_the_config_of_every_format_that_is_served(scheme: Any, target: Any) -> None:
    from transformers import TorchAoConfig

    settings = TorchAoConfig(target.config(scheme.pick_group_size(None, target))).to_dict()
    assert set(settings["quant_type"]) == {"default"}
    assert reading.faults_of(json.loads(json.dumps(settings["quant_type"]["default"])), []) == []


@pytest.mark.parametrize(
    ("layer", "config", "taken"),
    [
        ("a.qkv_proj", INT8, True),
        ("a.b", {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"a.b": INT8}}}, True),
        ("a.b", {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"a.b.weight": INT8}}}, False),
        ("a.b", {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"a.b": None, "_default": INT8}}}, False),
        ("a.b", {"_type": "FqnToConfig", "_data": {"fqn_to_config": {r"re:a\..": INT8}}}, True),
        ("a.bc", {"_type": "FqnToConfig", "_data": {"fqn_to_config": {r"re:a\..": INT8}}}, False),
        ("a.bc", {"_type": "ModuleFqnToConfig", "_data": {"module_fqn_to_config": {"_default": INT8}}}, True),
    ],
)
def test_the_rules_are_vllms(layer: str, config: Any, taken: bool) -> None:
    assert layout.is_taken(layer, {"quant_type": {"default": config}}) == taken


def test_modules_that_are_not_converted_are_parts_of_names() -> None:
    settings = {"quant_type": {"default": INT8}, "modules_to_not_convert": ["layers.1", "o_proj"]}
    taken = [layout.is_taken(name, settings) for name in ("model.layers.1.q", "model.layers.11.q", "model.0.o_proj")]
    assert taken == [False, True, False]


# ---------------------------------------------------------------------- bad input


def test_16_bit_is_fine(tmp_path: Path) -> None:
    folder = make(tmp_path / "merged", {}, settings={"quantization_config": None})
    assert check_folder(folder, name="mine").name == "mine"


def test_float32_scales_are_served_in_float32(tmp_path: Path) -> None:
    folder = make(tmp_path / "f32", settings={"dtype": "float32"})
    assert check_folder(folder).arguments == ("--dtype", "float32", *NOT_COMPILED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"ongrid_packed": 1}}, "is packed.*--unpack --output NEW"),
        ({"quant_method": "gptq"}, "quantised by gptq, not by torchao"),
        ({"quant_type": "int4_weight_only"}, "quant_type is not one config under 'default'"),
        ({"quant_type": {"default": INT8, "lm_head": INT8}}, "quant_type is not one config under 'default'"),
        ({"config": {**INT8, "_type": "Int9Config"}}, r"torchao 0\.18\.0, which serves it, cannot read its config"),
        ({"config": {**INT8, "_version": 1}}, r"cannot read its config Int8Weight.* \(stored_version=1, "),
        ({"config": {**INT8, "_data": {"gone": 1}}}, "cannot read its config Int8WeightOnlyConfig: .*gone"),
        ({"quantised": dict.fromkeys(LINEAR, "Int9Tensor")}, "cannot read its tensors Int9Tensor"),
        ({"quantised": {}}, "config.json says torchao, but no weight in its files is quantised"),
        ({"quantised": dict.fromkeys(LINEAR[:4], "Int8Tensor")}, "down_proj: not quantised, but by config"),
        (
            {"config": {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": {"model.x.weight": INT8}}}},
            "qkv_proj, .*gate_up_proj, model.layers.0.self_attn.o_proj and 1 more: quantised, but config",
        ),
        (
            {"quantised": dict.fromkeys(LINEAR, "Int8Tensor") | {"self_attn.q_proj": "Float8Tensor"}},
            "qkv_proj: vLLM joins .* cannot join what is quantised differently",
        ),
        ({"quantised": dict.fromkeys((*LINEAR, "model.embed_tokens"), "Int8Tensor")}, "embedding and lm_head"),
        ({"quantised": dict.fromkeys((*LINEAR, "mlp.experts.down_proj"), "Int8Tensor")}, "cannot load fused experts"),
        ({"settings": {"dtype": "float16", "model_type": "gemma3"}}, "does not compute a gemma3.*--dtype bfloat16"),
        (
            {"modules_to_not_convert": ["model.language_model.layers.0.mlp.down_proj"]},
            "layers inside another model .model.language_model.layers.0.mlp.down_proj., which vLLM has under other",
        ),
        ({"template": False}, "no chat template.*-- --chat-template FILE.jinja.*--completions-only"),
        (
            {"settings": {"auto_map": {"AutoModelForCausalLM": "own.Model"}, "model_type": "own"}},
            r"code of its own \(own.Model\).*--trust-remote-code",
        ),
    ],
)  # fmt: skip
def test_each_thing_that_is_wrong_is_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = refused(make(tmp_path / "folder", **changes))
    assert re.search(said, found), found
    assert "\n" not in found


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder", template=False, quant_method="awq")
    assert len(refused(folder).splitlines()) == 2
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(folder)


def test_what_the_user_takes_is_let_through(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    folder = make(tmp_path / "folder", template=False, settings=own)
    found = check_folder(folder, chat=False, trust_remote_code=True)
    assert found.arguments == ("--trust-remote-code", "--dtype", "bfloat16", *NOT_COMPILED) and not found.chats
    (folder / "tokenizer.json").unlink()
    assert check_folder(folder, tokenizer=False, trust_remote_code=True)  # another is given


@pytest.mark.parametrize(
    ("scheme", "target", "instead"),
    [
        ("int8-int4", "cpu", "for phones and CPUs.*--scheme int4 --target cuda-sm80"),
        ("int4", "cuda", "no kernel for it.*--scheme int4 --target cuda-sm80"),
        ("int8", "cpu", "for CPUs.*--scheme int8 --target cuda "),
        ("fp8-int4", "cuda-sm90-mslk", "was never loaded there"),
        ("mxfp8", "cpu", "was never loaded there"),
    ],
)
def test_a_layout_that_is_not_for_vllm(scheme: str, target: str, instead: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder = make(run / "quantized", record={"scheme": scheme, "target": target, "source": "Qwen/Qwen3-8B"})
    said = refused(folder)
    assert re.search(f"is {scheme} for {target}: .*{instead}", said), said
    assert "quantize convert Qwen/Qwen3-8B --scheme" in said
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}")
    assert f"quantize convert {run / 'merged'} --scheme" in refused(folder)


def test_every_reason_is_one(tmp_path: Path) -> None:
    """Each target of each format is either served or refused with its own words."""
    for scheme in SCHEMES.values():
        for target in scheme.targets.values():
            assert (scheme, target) in served_formats() or target.vllm in refused(
                make(tmp_path / f"{scheme.name}-{target.name}", record={"scheme": scheme.name, "target": target.name})
            )


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    assert "has no config.json" in refused(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert "is damaged" in refused(folder)
    weights.unlink()
    assert "pickled weights" in refused(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 2 of the 2 files" in refused(folder)


# ---------------------------------------------------------------------- vLLM's environment and the GPU


def test_the_environment_must_have_what_the_format_needs(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    assert check_folder(folder, find_vllm(make_environment(tmp_path / "same")))
    bare = find_vllm(make_environment(tmp_path / "bare", torchao=None))
    assert "has no torchao in its environment" in refused(folder, bare)
    mslk = make(tmp_path / "mslk", record={"scheme": "fp8", "target": "cuda-sm90-mslk"})
    assert "kernels are in mslk-cuda, and vLLM's environment has none" in refused(mslk, find_vllm(tmp_path / "same"))
    assert check_folder(mslk, find_vllm(make_environment(tmp_path / "with", further=("mslk-cuda==1.1.0",))))


def test_another_torchao_is_asked_itself(tmp_path: Path) -> None:
    """Of another version than ours: here its Python is one whose torchao knows no Int8Tensor."""
    folder = make(tmp_path / "folder", record={"scheme": "int8", "target": "cuda", "versions": {"torchao": "0.18.0"}})
    vllm = find_vllm(make_environment(tmp_path / "old", torchao="0.17.0"))
    assert "python could not be asked" in refused(folder, vllm)
    package = tmp_path / "torchao"
    for name, text in {
        "__init__": "",
        "core/config": "def config_from_dict(data): return data",
        "prototype/safetensors/safetensors_utils": "ALLOWED_TENSORS_SUBCLASSES = ['Float8Tensor']",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    python = tmp_path / "old" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    said = refused(folder, vllm)
    assert "written by torchao 0.18.0, and torchao 0.17.0, which serves it, cannot read its tensors Int8Tensor" in said


def test_an_older_gpu_is_told_what_it_can(tmp_path: Path) -> None:
    fp8 = check_folder(make(tmp_path / "fp8", record={"scheme": "fp8", "target": "cuda-sm89"}))
    check_gpu(fp8, Gpu("L4", "8.9", 16.0, "580.95"))
    with pytest.raises(
        UserError, match=r"needs compute capability 8\.9 or newer, and A100 has 8\.0: .* int4 for cuda-sm80"
    ):
        check_gpu(fp8, Gpu("A100", "8.0", 16.0, "580.95"))
    int8 = check_folder(make(tmp_path / "int8", record={"scheme": "int8", "target": "cuda"}))
    with pytest.raises(UserError, match=r"needs compute capability 7\.5 or newer"):
        check_gpu(int8, Gpu("V100", "7.0", 16.0, "580.95"))
    with pytest.raises(
        UserError, match=r"in bfloat16, .* from compute capability 8\.0 on, and T4 has 7\.5: .*float16$"
    ):
        check_gpu(int8, Gpu("T4", "7.5", 16.0, "580.95"))
    check_gpu(replace(int8, dtype="float16"), Gpu("T4", "7.5", 16.0, "580.95"))
    check_gpu(int8, Gpu("A100", "8.0", 16.0, "580.95"))
    check_gpu(int8, Gpu("?", "[N/A]", 16.0, "580.95"))
    with pytest.raises(UserError, match=r"serve it on a newer GPU$"):
        check_gpu(fp8, Gpu("P40", "6.1", 16.0, "580.95"))
    check_gpu(replace(fp8, scheme=None, target=None), Gpu("P40", "6.1", 16.0, "580.95"))
