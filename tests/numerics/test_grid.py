"""The grid on disk: what training computed, the simulation and torchao's real layers compute from it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import EVERY_TARGET, same_bits
from tiny_models import IDS, logits_of, save_plain, tiny_model, with_lora
from torch import Tensor, nn

from qat.adapters import merged_of
from qat.prepare import Prepared, prepare_qat
from quantize.convert import load_plain, quantise_
from quantize.grid import load_grid, quantised_weights, save_grid
from quantize.layers import select_layers
from quantize.schemes import SCHEMES
from quantize.simulate import simulate_
from train.backends.peft import PeftBackend
from train.config import ModelConfig
from train.fit import Learner
from train.merge import write_merged

ON_CPU = ["int8-int4", "int8-int4-mobile", "int4", "int3", "int2", "int8"]
RANGES: dict[str, dict[str, Any]] = {
    "minmax": {},
    "mse": {"ranges": "mse"},
    "learned": {"learned_scales": True},
    "both": {"ranges": "mse", "learned_scales": True},
}


def _train(model: Any, prepared: Prepared, steps: int = 3) -> None:
    model.train()
    learned = [factor for factor in prepared.factors.values() if factor.requires_grad]
    optimizer = torch.optim.Adam([*(p for p in model.parameters() if p.requires_grad), *learned], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    model.eval()


def _written(model: Any, prepared: Prepared, source: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Merges and writes the grid as the pipeline does; the grid read back."""
    (folder / "grid").mkdir(parents=True)
    (folder / "merged").mkdir()
    save_grid(folder / "grid", prepared.grid())
    learner = Learner(model=model, prepared=prepared, dtype=dtype, backend=PeftBackend())
    settings = ModelConfig(id="random", random="tiny", architecture="qwen3")
    write_merged(learner, source, folder / "merged", dtype=dtype, settings=settings)
    return load_grid(folder / "grid")


def _real_and_simulated(folder: Path, scheme: str, grid: dict[str, Any], dtype: str) -> tuple[Tensor, Tensor]:
    """Logits of torchao's layers and of the simulation, each from the merged checkpoint and the grid."""
    chosen, found = SCHEMES[scheme], []
    target, group_size = chosen.targets["cpu"], 32 if chosen.group_sizes else None
    for change in (quantise_, simulate_):
        plain = load_plain(folder / "merged", dtype=dtype)
        change(plain, chosen, target, group_size, select_layers(plain, chosen, group_size, target), grid)
        found.append(logits_of(plain))
    return found[0], found[1]


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("scheme", ON_CPU)
def test_what_was_trained_is_what_ships_to_the_bit(scheme: str, ranges: str, tmp_path: Path) -> None:
    source = save_plain(tiny_model(), tmp_path / "source")
    model = with_lora(load_plain(source))
    group_size = 32 if SCHEMES[scheme].group_sizes else None
    prepared = prepare_qat(model, scheme, target="cpu", group_size=group_size, **RANGES[ranges])
    _train(model, prepared)
    trained = logits_of(model)
    grid = _written(model, prepared, source, tmp_path / "run", "float32")
    assert grid.keys() == prepared.layers.keys()
    if ranges != "minmax":
        assert any((factor != 1).any() for factor in prepared.factors.values())
    for logits in _real_and_simulated(tmp_path / "run", scheme, grid, "float32"):
        assert torch.equal(logits, trained)


@pytest.mark.parametrize("scheme", ON_CPU)
def test_a_bf16_model_ships_in_bf16_to_the_bit(scheme: str, tmp_path: Path) -> None:
    source = save_plain(tiny_model().bfloat16(), tmp_path / "source")
    model = with_lora(load_plain(source, dtype="bfloat16"))
    group_size = 32 if SCHEMES[scheme].group_sizes else None
    prepared = prepare_qat(model, scheme, target="cpu", group_size=group_size)
    trained = logits_of(model)
    grid = _written(model, prepared, source, tmp_path / "run", "bfloat16")
    for logits in _real_and_simulated(tmp_path / "run", scheme, grid, "bfloat16"):
        assert torch.equal(logits, trained)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_grid_survives_the_disk(scheme: str, tmp_path: Path) -> None:
    model = with_lora(tiny_model(hidden_size=128, intermediate_size=128))
    prepared = prepare_qat(model, scheme, dtype=torch.bfloat16)
    save_grid(tmp_path, prepared.grid())
    before, after = dict(prepared.grid()), load_grid(tmp_path)
    assert before.keys() == after.keys()
    for name, quantised in before.items():
        stored = after[name]
        assert same_bits(stored.values.to(quantised.values.dtype), quantised.values)
        assert torch.equal(stored.scale, quantised.scale) and stored.scale.dtype == quantised.scale.dtype
        assert (stored.zero is None) == (quantised.zero is None)
        assert quantised.zero is None or torch.equal(stored.zero, quantised.zero)
        assert (stored.tensor_scale is None) == (quantised.tensor_scale is None)
        assert quantised.tensor_scale is None or torch.equal(stored.tensor_scale, quantised.tensor_scale)
        numbers = prepared.layers[name][1].numbers
        assert torch.equal(numbers.restore(stored, torch.bfloat16), numbers.restore(quantised, torch.bfloat16))


def test_ranges_by_squared_error_are_never_worse_and_are_those_that_train() -> None:
    models = [with_lora(tiny_model()) for _ in range(2)]
    plain = prepare_qat(models[0], "int3", group_size=32)
    chosen = prepare_qat(models[1], "int3", group_size=32, ranges="mse")
    assert not plain.factors and chosen.factors.keys() == chosen.layers.keys()
    assert not any(factor.requires_grad for factor in chosen.factors.values())
    better = 0
    for name, (module, numerics) in chosen.layers.items():
        weight = merged_of(module)
        errors = [
            (numerics.numbers.restore(grid[name], torch.float32) - weight).square().reshape(*weight.shape[:1], -1, 32)
            for grid in (dict(plain.grid()), dict(chosen.grid()))
        ]
        before, after = (error.sum(-1) for error in errors)
        assert (after <= before * (1 + 1e-6)).all()
        better += int((after < before).sum())
        x = torch.randn(3, weight.shape[1])
        with torch.no_grad():
            assert torch.equal(module(x), numerics.numbers.compute(x, dict(chosen.grid())[name], None))
    assert better > 0


def test_no_grid_was_trained_outside() -> None:
    prepared = prepare_qat(with_lora(tiny_model()), "int3", placement="outside")
    with pytest.raises(AssertionError, match="no grid was trained"):
        next(prepared.grid())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8-int4", "int8-int4-mobile"])
def test_a_resized_vocabulary_ships_its_trained_copies(scheme: str, tied: bool, tmp_path: Path) -> None:
    plain = tiny_model(tied=tied)
    plain.resize_token_embeddings(104)
    source = save_plain(plain, tmp_path / "source")
    model = with_lora(load_plain(source), modules_to_save=["lm_head", "embed_tokens"])
    prepared = prepare_qat(model, scheme, group_size=32)
    before = merged_of(model.base_model.model.model.embed_tokens.modules_to_save["default"]).clone()
    _train(model, prepared)
    trained_rows = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    assert not torch.equal(before, trained_rows) and not prepared.silent()
    trained = logits_of(model)
    grid = _written(model, prepared, source, tmp_path / "run", "float32")
    assert ("lm_head" in grid and "model.embed_tokens" in grid) == (scheme == "int8-int4-mobile")
    stored = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], trained_rows)
    for logits in _real_and_simulated(tmp_path / "run", scheme, grid, "float32"):
        assert torch.equal(logits, trained)


@pytest.mark.parametrize(("scheme", "target"), [(n, t) for n, t in EVERY_TARGET if SCHEMES[n].targets[t].dtype])
def test_a_simulation_in_float32_rounds_to_the_numbers_that_ship_in_bf16(scheme: str, target: str) -> None:
    """A CPU holds a bf16 target's weights in float32; without a grid they are what converting in bf16 gives."""
    where = SCHEMES[scheme].targets[target]
    group = SCHEMES[scheme].pick_group_size(64 if 64 in SCHEMES[scheme].group_sizes else None, where)
    layer = nn.Linear(256, 48, bias=False)
    layer.weight.data = torch.randn(48, 256, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    twin = nn.Linear(256, 48, bias=False, dtype=torch.bfloat16)
    twin.weight.data = layer.weight.data.bfloat16()
    ((_, _, _, held),) = quantised_weights(nn.Sequential(layer), SCHEMES[scheme], where, group, ["0"], None)
    ((_, _, _, shipped),) = quantised_weights(nn.Sequential(twin), SCHEMES[scheme], where, group, ["0"], None)
    assert same_bits(held.values, shipped.values) and same_bits(held.scale, shipped.scale)
