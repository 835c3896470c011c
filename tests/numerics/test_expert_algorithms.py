"""The algorithms on fused experts: what they keep, what they gain, and what an expert without tokens gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IDS, logits_of, save_plain, tiny_model
from torch import Tensor, nn

from quantize import experts
from quantize.algorithms import ALGORITHMS
from quantize.algorithms.choose import Chosen, choose_numbers
from quantize.algorithms.experts import experts_apart, experts_of
from quantize.algorithms.gptq import round_gptq
from quantize.algorithms.rounding import round_weight
from quantize.algorithms.structure import Norm, find_blocks, find_links
from quantize.cli import main
from quantize.convert import load_plain, quantise_
from quantize.errors import UserError
from quantize.layers import Coverage, expert_matrices, select_layers
from quantize.schemes import find_scheme
from quantize.simulate import simulate_
from train.models import byte_tokenizer

ARCHITECTURES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe")
SCHEME, GROUP = find_scheme("int4"), 32
TARGET = SCHEME.targets["cpu"]
FUSED = "model.layers.0.mlp.experts"
LONG = torch.randint(5, 96, (16, 40), generator=torch.Generator().manual_seed(1))
BATCHES = [(LONG[:8], torch.ones_like(LONG[:8])), (LONG[8:], torch.ones_like(LONG[8:]))]


def mixture(architecture: str = "qwen3_moe", **options: Any) -> Any:
    """4 experts of which each token takes 2, with uneven gains of the norms and outlier channels of the residual."""
    counts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
    model = tiny_model(architecture, tied=False, **counts | sizes | options)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.exp(0.7 * torch.randn_like(parameter)))
            elif parameter.dim() == 3:
                parameter.normal_(std=0.1)
                parameter *= torch.exp(0.5 * torch.randn_like(parameter))
        model.get_input_embeddings().weight[:, ::17] *= 10
    return model


def coverage_of(model: Any) -> Coverage:
    return select_layers(model, SCHEME, GROUP, TARGET)


def chosen_for(model: Any, *names: str, batches: Any = BATCHES) -> Chosen:
    return choose_numbers(model, SCHEME, TARGET, GROUP, coverage_of(model), names, batches)


def padded(batches: Any, columns: int) -> Any:
    pad = nn.functional.pad
    return [(pad(ids, (0, columns), value=7), pad(mask, (0, columns))) for ids, mask in batches]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["awq", "smoothquant", "spinquant"])
def test_what_changes_a_mixture_keeps_its_function(name: str, architecture: str) -> None:
    model = mixture(architecture)
    before, modules, keys = logits_of(model), [name for name, _ in model.named_modules()], list(model.state_dict())
    experts_before = model.get_parameter(f"{FUSED}.gate_up_proj").detach().clone()
    found = chosen_for(model, name)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    assert set(found.grid) == set(coverage_of(model).layers)
    assert modules == [name for name, _ in model.named_modules()] and keys == list(model.state_dict())
    assert "forward" not in vars(model.get_submodule(FUSED))
    assert not torch.equal(model.get_parameter(f"{FUSED}.gate_up_proj"), experts_before)
    assert not any("not scaled" in note or "not rotated" in note for note in found.notes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_norm_before_a_mixture_links_to_all_that_read_it(architecture: str) -> None:
    model = mixture(architecture)
    with experts_apart(model):
        block = find_blocks(model)[1][0]
        mlp = list(find_links(block))[2:]
        shared = 3 if architecture == "qwen2_moe" else 0
        assert isinstance(mlp[0].source, Norm) and mlp[0].source.module is block.post_attention_layernorm
        assert len(mlp[0].readers) == 4 + 1 + shared and any(reader is block.mlp.gate for reader in mlp[0].readers)
        assert len(mlp) == 1 + 4 + bool(shared)


def test_apart_they_compute_what_they_did_and_share_their_weights() -> None:
    model = mixture()
    before = logits_of(model)
    with experts_apart(model) as apart, torch.no_grad():
        assert torch.equal(logits_of(model), before)
        assert len(apart) == 2 * 4 * 2 and apart[f"{FUSED}.3.down_proj"] == f"{FUSED}.down_proj"
        model.get_submodule(f"{FUSED}.3.down_proj").weight.zero_()
    assert not model.get_parameter(f"{FUSED}.down_proj")[3].any() and not experts_of(model.get_submodule(FUSED))
    assert model.get_parameter(f"{FUSED}.down_proj")[:3].any()


def test_after_an_error_the_experts_are_fused_again() -> None:
    model = mixture()
    for _, module in experts.fused_experts(model):
        module.act_fn = nn.Tanh()  # still exact
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, found: (torch.tanh(found[0]),))
    with pytest.raises(UserError, match="awq: a scaled Qwen3MoeDecoderLayer computes something else"):
        chosen_for(model, "awq")
    assert not experts_of(model.get_submodule(FUSED)) and "forward" not in vars(model.get_submodule(FUSED))


def test_gptq_of_an_expert_is_that_of_the_tokens_routed_to_it() -> None:
    """To the bit, and the same where padding is routed too."""
    model = mixture()
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(FUSED).register_forward_pre_hook(lambda module, found: seen.append(found[:2]))
    for ids, _ in BATCHES:
        logits_of(model, ids)
    hook.remove()
    grids = [chosen_for(model, "gptq", batches=batches).grid for batches in (BATCHES, padded(BATCHES, 9))]
    weights = model.get_parameter(f"{FUSED}.gate_up_proj")
    for expert in range(4):
        inputs = [hidden[torch.where(expert == chosen.T)[1]] for hidden, chosen in seen]
        hessian = inputs[0].t() @ inputs[0] + inputs[1].t() @ inputs[1]
        wanted = round_gptq(TARGET.numbers(), weights[expert].detach(), GROUP, torch.float32, hessian).compact()
        found, again = (experts.split(grid[f"{FUSED}.gate_up_proj"], 4)[expert] for grid in grids)
        assert torch.equal(found.values, wanted.values) and torch.equal(found.scale, wanted.scale)
        assert float((again.values == wanted.values).float().mean()) > 0.98  # sums in another order


def test_an_expert_that_too_few_tokens_reach_is_rounded_to_nearest() -> None:
    model = mixture(num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[3] = block.mlp.gate.weight[:3].mean(0)  # never the largest
    found, nearest = chosen_for(model, "gptq"), chosen_for(model, "rtn").grid
    for leaf in experts.MATRICES:
        name = f"{FUSED}.{leaf}"
        same = [
            torch.equal(part.values, plain.values)
            for part, plain in zip(experts.split(found.grid[name], 4), experts.split(nearest[name], 4), strict=True)
        ]
        assert same[3] and not all(same)
    (note,) = found.notes
    assert note.startswith("rounded to nearest, as fewer calibration tokens reach them than they have inputs: ")
    assert note.endswith(" of 16 matrices of experts")
    few = chosen_for(model, "gptq", batches=[(IDS, torch.ones_like(IDS))])
    assert few.notes == [note.split(": ")[0] + ": 16 of 16 matrices of experts"]
    assert torch.equal(few.grid[f"{FUSED}.down_proj"].values, nearest[f"{FUSED}.down_proj"].values)


@pytest.mark.parametrize("names", [["mse"], ["hqq"], ["awq", "hqq"]])
def test_what_rounds_a_weight_by_itself_rounds_that_of_each_expert(names: list[str]) -> None:
    model = mixture()
    grid = chosen_for(model, *names).grid[f"{FUSED}.down_proj"]
    for part, weight in zip(experts.split(grid, 4), model.get_parameter(f"{FUSED}.down_proj").detach(), strict=True):
        wanted = round_weight(names[-1], TARGET.numbers(), weight, GROUP, torch.float32).compact()
        assert torch.equal(part.values, wanted.values) and torch.equal(part.scale, wanted.scale)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("names", [["gptq"], ["awq"], ["smoothquant"], ["awq", "gptq"], ["spinquant", "gptq"]])
def test_what_is_chosen_simulates_a_mixture_closer_than_rounding(names: list[str], architecture: str) -> None:
    """The experts alone quantised, so that nothing else gains; against the unquantised model, on other tokens."""
    others = torch.randint(5, 96, (4, 40), generator=torch.Generator().manual_seed(2))

    def distance(*chosen: str) -> float:
        model = mixture(architecture)
        before = logits_of(model, others)
        skip = [name for name in coverage_of(model).layers if ".experts." not in name]
        coverage = select_layers(model, SCHEME, GROUP, TARGET, skip)
        found = choose_numbers(model, SCHEME, TARGET, GROUP, coverage, chosen, BATCHES)
        assert set(found.grid) == {name for name, _ in expert_matrices(model)}
        simulate_(model, SCHEME, TARGET, GROUP, coverage, found.grid)
        return float((logits_of(model, others) - before).norm())

    assert distance(*names) < distance("rtn")


def test_scales_are_chosen_by_the_tokens_routed_to_each_expert() -> None:
    """An expert that no token reaches has no say, and its own channels are not scaled."""
    model = mixture(num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[3] = block.mlp.gate.weight[:3].mean(0)
    down = model.get_parameter(f"{FUSED}.down_proj").detach().clone()
    found = chosen_for(model, "awq")
    assert torch.equal(model.get_parameter(f"{FUSED}.down_proj")[3], down[3])
    assert not torch.equal(model.get_parameter(f"{FUSED}.down_proj")[:3], down[:3])
    assert found.notes[0].endswith(" of 14 links between layers are scaled")


def test_a_mixture_of_unknown_parts_is_named_and_keeps_its_function() -> None:
    """Something in the MLP of the second block may read its input: then nothing there is scaled or rotated."""
    for name in ("awq", "spinquant"):
        model = mixture()
        model.model.layers[1].mlp.more = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
        before = logits_of(model)
        found = chosen_for(model, name)
        torch.testing.assert_close(logits_of(model), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
        if name == "awq":
            assert "model.layers.1.mlp.experts.gate_up_proj" in found.notes[1] and "not scaled" in found.notes[1]
            assert "model.layers.0" not in found.notes[1]
        else:
            assert found.notes[0].startswith("residual stream not rotated")


def test_blocks_are_found_where_a_block_has_more_experts_than_there_are_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for block in model.layers:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    name, blocks = find_blocks(model)
    assert name == "layers" and blocks is model.layers


def test_a_converted_mixture_loads_back_and_leaves_no_experts_out(tmp_path: Path) -> None:
    model = mixture(vocab_size=300)  # bytes, and a few more
    source = save_plain(model, tmp_path / "plain")
    text = tmp_path / "text.jsonl"
    lines = (ALGORITHMS[name].summary for name in sorted(ALGORITHMS) for _ in range(3))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = ["convert", str(source), "--scheme", "int4", "--target", "cpu", "--group-size", "32"]
    arguments += ["--algorithm", "awq", "gptq", "--calibration", str(text), "--output", str(tmp_path / "small")]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "small" / "ongrid.json").read_text())
    assert record["algorithms"] == ["awq", "gptq"] and record["notes"]
    assert not any("outside" in note or "not scaled" in note for note in record["notes"])
    loaded, model = load_plain(tmp_path / "small"), load_plain(source)
    assert type(loaded.get_parameter(f"{FUSED}.down_proj").data).__name__ in experts.TENSORS
    ids = torch.tensor([byte_tokenizer()(ALGORITHMS["gptq"].summary).input_ids])
    exact, found = logits_of(model, ids), logits_of(loaded, ids)
    quantise_(model, SCHEME, TARGET, GROUP, coverage_of(model))
    assert float((found - exact).norm()) < 0.9 * float((logits_of(model, ids) - exact).norm())
