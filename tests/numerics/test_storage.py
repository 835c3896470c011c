"""Checkpoints on disk: equal to transformers' own, reloaded to the bit, whole or not there, and packed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import EVERY_TARGET, assert_same_parts, find_target, group_sizes
from tiny_models import save_plain, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantize.convert import convert_checkpoint, load_plain, quantise_
from quantize.errors import UserError
from quantize.grid import load_grid, quantise_weight, save_grid
from quantize.layers import select_layers
from quantize.names import fused_names
from quantize.packed import pack_bits, pack_folder, unpack_bits, unpack_folder
from quantize.record import RECORD
from quantize.schemes import SCHEMES
from quantize.storage import load_quantized, replacing
from quantize.tensor_files import read_folder

HERE = [(name, target) for name, target in EVERY_TARGET if target not in ("cuda", "cuda-intx", "cuda-sm80")]
"""What a CPU can store: all but the twins of CPU targets, whose checkpoints are equal, and tinygemm's tiles."""
SHAPE = {"hidden_size": 128, "intermediate_size": 256}


def _convert(source: Path, output: Path, scheme: str, target: str, **options: Any) -> Any:
    chosen = SCHEMES[scheme]
    where = chosen.targets[target]
    size = chosen.pick_group_size(None, where)
    options = {"dtype": where.dtype or "float32", "device": "cpu", "group_size": size} | options
    return convert_checkpoint(source, output, chosen, where, **options)


def _in_memory(source: Path, scheme: str, target: str, dtype: str) -> Any:
    chosen = SCHEMES[scheme]
    where = chosen.targets[target]
    size = chosen.pick_group_size(None, where)
    model = load_plain(source, dtype=dtype)
    quantise_(model, chosen, where, size, select_layers(model, chosen, size, where))
    return model


def _same_files(ours: Path, theirs: Path) -> None:
    """Names, types, bytes and metadata of all tensors, and the settings beside them."""
    (places, metadata), (expected, wanted) = read_folder(ours), read_folder(theirs)
    assert places.keys() == expected.keys() and metadata == wanted
    for name, place in places.items():
        assert place.dtype == expected[name].dtype and place.shape == expected[name].shape, name
        assert torch.equal(_bytes(place.read()), _bytes(expected[name].read())), name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _same_models(ours: Any, theirs: Any) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if type(tensor) is Tensor:
            assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
        else:
            assert_same_parts(tensor, right[name])


@pytest.mark.parametrize(("scheme", "target"), HERE)
def test_from_file_to_file_is_what_transformers_saves_and_loads(scheme: str, target: str, tmp_path: Path) -> None:
    source = save_plain(tiny_model(**SHAPE).bfloat16(), tmp_path / "source")
    _convert(source, tmp_path / "streamed", scheme, target)
    model = _in_memory(source, scheme, target, SCHEMES[scheme].targets[target].dtype or "float32")
    model.save_pretrained(tmp_path / "saved")
    _same_files(tmp_path / "streamed", tmp_path / "saved")
    _same_models(load_plain(tmp_path / "streamed"), model)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3_text", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_architectures_stream_in_shards_and_small_pieces(
    architecture: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.stream.PIECE", 1000)
    source = tmp_path / "source"
    tiny_model(architecture, tied=tied, **SHAPE).save_pretrained(source, max_shard_size=50_000)
    _convert(source, tmp_path / "streamed", "int8-int4-mobile", "cpu", max_shard_size=40_000, dtype="bfloat16")
    model = _in_memory(source, "int8-int4-mobile", "cpu", "bfloat16")
    model.save_pretrained(tmp_path / "saved", max_shard_size=40_000)
    _same_files(tmp_path / "streamed", tmp_path / "saved")
    names = [{path.name for path in (tmp_path / kind).iterdir()} for kind in ("streamed", "saved")]
    assert names[0] == names[1] | {RECORD} and len(names[1]) > 4
    index = [
        json.loads((tmp_path / kind / "model.safetensors.index.json").read_text()) for kind in ("streamed", "saved")
    ]
    assert index[0] == index[1]
    _same_models(load_plain(tmp_path / "streamed"), model)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_neox"])
def test_what_transformers_joins_or_renames_is_loaded_whole(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"moe_intermediate_size": 64, "num_experts": 2} if architecture == "qwen3_moe" else {}
    source = tmp_path / "source"
    model = tiny_model(architecture, tied=False, **SHAPE, **options)
    model.save_pretrained(source)
    _convert(source, tmp_path / "converted", "int8-int4", "cpu")
    assert "loading the whole model: " in capsys.readouterr().err
    model = _in_memory(source, "int8-int4", "cpu", "float32")
    model.save_pretrained(tmp_path / "saved")
    _same_files(tmp_path / "converted", tmp_path / "saved")
    _same_models(load_plain(tmp_path / "converted"), model)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 37])
def test_integers_of_any_width_survive_packing(bits: int, columns: int) -> None:
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    values[0, 0], values[0, 1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-columns // 8) * bits)
    assert torch.equal(unpack_bits(packed, bits, columns), values)


@pytest.mark.parametrize(("scheme", "target"), HERE)
def test_the_packed_form_is_smaller_and_gives_back_every_bit(scheme: str, target: str, tmp_path: Path) -> None:
    source = save_plain(tiny_model(**SHAPE, vocab_size=300).bfloat16(), tmp_path / "source")
    _convert(source, tmp_path / "plain", scheme, target)
    pack_folder(tmp_path / "plain", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    _same_files(tmp_path / "again", tmp_path / "plain")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}
    _same_models(load_quantized(tmp_path / "packed"), load_plain(tmp_path / "plain"))
    (places, metadata), (plain, _) = read_folder(tmp_path / "packed", "packed"), read_folder(tmp_path / "plain")
    said = {key: json.loads(metadata[key]) for key in json.loads(metadata["tensor_names"])}
    for key, entry in said.items():
        if entry["_type"] == "IntxUnpackedToInt8Tensor":
            name, bits = key.replace(".weight", "._weight_qdata"), entry["_data"]["target_dtype"]["_data"][3:]
            assert places[name].size * 8 == plain[name].size * int(bits)
    with pytest.raises(ValueError, match="unpack it first with: quantize convert FOLDER --unpack"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(("scheme", "target"), HERE)
def test_config_json_is_what_vllm_reads(scheme: str, target: str, tmp_path: Path) -> None:
    """vLLM builds the config of quantization_config.quant_type.default; a skipped layer makes it an FqnToConfig."""
    from torchao.core.config import config_from_dict

    source = save_plain(tiny_model(**SHAPE), tmp_path / "source")
    where, chosen = SCHEMES[scheme].targets[target], SCHEMES[scheme]
    size = chosen.pick_group_size(None, where)
    for skip in ((), ("down_proj",)):
        output = tmp_path / f"out{len(skip)}"
        coverage = _convert(source, output, scheme, target, skip=skip)
        said = json.loads((output / "config.json").read_text())["quantization_config"]
        assert said["quant_method"] == "torchao"
        config = config_from_dict(said["quant_type"]["default"])
        wanted = where.config(size)
        if not skip and chosen.embedding is None:
            assert repr(config) == repr(wanted)
            continue
        assert type(config).__name__ == "FqnToConfig"
        expected = {name: repr(wanted) for name in (*coverage.layers, *fused_names(coverage.layers))}
        assert {name.rsplit(".", 1)[-1] for name in expected} >= {"qkv_proj", "gate_up_proj", "o_proj"}
        if chosen.embedding is not None:
            expected["model.embed_tokens"] = repr(chosen.embedding.config(None))
        assert {name: repr(each) for name, each in config.fqn_to_config.items()} == expected


@pytest.mark.parametrize(("scheme", "target"), EVERY_TARGET)
def test_every_config_survives_config_json(scheme: str, target: str) -> None:
    from torchao.core.config import config_from_dict
    from transformers import TorchAoConfig

    for group_size in group_sizes(scheme, target):
        config = find_target(scheme, target).config(group_size)
        said = json.loads(json.dumps(TorchAoConfig(config).to_dict()))
        assert repr(config_from_dict(said["quant_type"]["default"])) == repr(config)


@pytest.mark.parametrize("when", ["before", "middle", "settings"])
def test_a_full_disk_leaves_nothing_behind(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_plain(tiny_model(**SHAPE), tmp_path / "source")
    before, calls = _contents(source), 0

    def full(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 7 or when == "settings":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **options)

    write = os.pwrite
    if when == "before":
        monkeypatch.setattr("quantize.storage._free", lambda folder: 1000)
    else:
        monkeypatch.setattr(*(("os.pwrite", full) if when == "middle" else ("quantize.stream.save_settings", full)))
    said = (
        "has no room: the result takes 0.00 GiB" if when == "before" else "No space left on device .*nothing was left"
    )
    with pytest.raises(UserError, match=said):
        _convert(source, tmp_path / "out", "int8-int4", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and _contents(source) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("encoder", "a BertForMaskedLM, which is no causal language model"),
        ("translator", "a T5ForConditionalGeneration, an encoder-decoder"),
        ("quantised", r"quantised already \(torchao\); give the 16-bit model"),
        ("packed", "quantised already, in the packed form; unpack it with: --unpack"),
        ("narrow", "int8-int4 reaches no layer of .*group size 32 does not divide its in_features 24"),
        ("torn", "model.safetensors is damaged .*copy or download it again"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_stays_as_it_is(kind: str, said: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kind in ("encoder", "translator"):
        _other_model(kind).save_pretrained(source)
    elif kind in ("quantised", "packed"):
        _convert(save_plain(tiny_model(**SHAPE), tmp_path / "plain"), tmp_path / "quantised", "int3", "cpu")
        pack_folder(tmp_path / "quantised", tmp_path / "packed")
        source = tmp_path / kind
    else:
        save_plain(tiny_model(hidden_size=24, intermediate_size=24, head_dim=6), source)
    if kind == "torn":
        os.truncate(source / "model.safetensors", 4000)
    before, beside = _contents(source), sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said):
        _convert(source, tmp_path / "out", "int8-int4", "cpu")
    assert sorted(tmp_path.iterdir()) == beside and _contents(source) == before


def _other_model(kind: str) -> Any:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    if kind == "encoder":
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForMaskedLM(BertConfig(vocab_size=32, **shape))
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def test_what_a_killed_conversion_left_is_cleared_and_an_old_result_replaced_whole(tmp_path: Path) -> None:
    source = save_plain(tiny_model(**SHAPE), tmp_path / "source")
    for name in ("out", "out.partial", "out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00009.safetensors").write_bytes(b"half")
    _convert(source, tmp_path / "out", "int8-int4", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_an_old_result_is_brought_back_where_the_second_rename_did_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "old").write_bytes(b"")

    def fail(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"), replacing(output):
        patch.setattr(Path, "rename", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    output.rename(tmp_path / "out.replaced")  # killed between the two
    with pytest.raises(KeyError), replacing(output):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


@pytest.mark.parametrize("scheme", ["int8-int4-mobile", "int3"])
def test_a_trained_grid_streams_to_what_it_gives_in_memory(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.stream.PIECE", 1000)
    source = save_plain(tiny_model(**SHAPE), tmp_path / "source")
    chosen, model = SCHEMES[scheme], load_plain(source)
    target, size = chosen.targets["cpu"], chosen.group_size
    layers = select_layers(model, chosen, size, target).layers
    names = [*layers, "model.embed_tokens"] if chosen.embedding is not None else layers
    weights = {name: torch.randn_like(model.get_submodule(name).weight) for name in names}
    found = {n: quantise_weight(w, chosen.embedding or target if "embed" in n else target,
                                None if "embed" in n else size) for n, w in weights.items()}  # fmt: skip
    (tmp_path / "grid").mkdir()
    save_grid(tmp_path / "grid", found.items())
    _convert(source, tmp_path / "out", scheme, "cpu", grid=tmp_path / "grid")
    quantise_(model, chosen, target, size, select_layers(model, chosen, size, target), load_grid(tmp_path / "grid"))
    _same_models(load_plain(tmp_path / "out"), model)
