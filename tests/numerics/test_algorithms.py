"""HQQ, GPTQ, AWQ, SmoothQuant and rotations: what they keep, what they gain, and torchao's own where both run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import EVERY_TARGET, find_target, group_sizes
from tiny_models import IDS, logits_of, tiny_model
from torch import Tensor, nn

from quantize.algorithms import ALGORITHMS, check_algorithms
from quantize.algorithms.choose import Chosen, choose_numbers
from quantize.algorithms.gptq import round_gptq
from quantize.algorithms.hqq import round_hqq
from quantize.algorithms.rotation import hadamard, rotate_
from quantize.algorithms.structure import Norm, find_blocks, find_links, norm_offset
from quantize.calibrate import Recipe, choose_by
from quantize.errors import UserError
from quantize.evaluate import Sample, evaluate_model
from quantize.integers import INT4, INT8_INT4, TINYGEMM
from quantize.layers import select_layers
from quantize.numerics import Numbers
from quantize.schemes import SCHEMES, find_scheme
from quantize.simulate import simulate_
from train.models import byte_tokenizer

ARCHITECTURES = ("llama", "qwen3", "phi3", "smollm3", "gemma3_text")
BATCHES = [(IDS, torch.ones_like(IDS)), (IDS.flip(0), torch.tensor([[1] * 20, [1] * 12 + [0] * 8]))]


def outliers(rows: int, columns: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 0.05
    weight[::7, ::31] *= 8
    return weight


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(tokens, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))


# ---------------------------------------------------------------------- one weight


@pytest.mark.parametrize(("scheme", "target_name"), EVERY_TARGET)
def test_nearest_is_what_rounding_to_nearest_takes_and_nothing_is_nearer(scheme: str, target_name: str) -> None:
    target = find_target(scheme, target_name)
    numbers, group_size = target.numbers(), group_sizes(scheme, target_name)[0]
    weight = outliers(48, 256)
    dtype = torch.bfloat16 if target.dtype else torch.float32
    quantised = numbers.quantise(weight, group_size, dtype, None)
    again = replace(quantised, values=numbers.nearest(weight, quantised))
    first, second = ((numbers.restore(each, torch.float32) - weight).abs() for each in (quantised, again))
    # fp8-int4 rounds integer times scale to float8, up to 1/16 off: either of two integers may come out nearer then.
    slack = (weight.abs() / 8 if scheme == "fp8-int4" else 0) + 1e-3 * weight.abs().max()
    assert (second - first <= slack).all()


@pytest.mark.parametrize("numbers", [INT4, TINYGEMM], ids=["symmetric", "asymmetric"])
def test_hqq_is_closer_in_the_norm_that_it_minimises(numbers: Numbers) -> None:
    weight = outliers(64, 256)
    plain, chosen = (
        numbers.restore(each, torch.float32) - weight
        for each in (numbers.quantise(weight, 64, torch.float32, None), round_hqq(numbers, weight, 64, torch.float32))
    )
    before, after = (error.abs().pow(0.7).reshape(64, 4, 64).mean(-1) for error in (plain, chosen))
    assert (after <= before).all() and float(after.mean()) < 0.98 * float(before.mean())


@pytest.mark.parametrize("numbers", [INT4, TINYGEMM], ids=["symmetric", "asymmetric"])
def test_hqq_of_a_row_is_the_same_alone(numbers: Numbers) -> None:
    """A conversion goes by rows, the simulation by weights: both must come to the same numbers."""
    weight = outliers(64, 256)
    whole = round_hqq(numbers, weight, 64, torch.float32)
    for row in range(0, 64, 7):
        alone = round_hqq(numbers, weight[row : row + 1], 64, torch.float32)
        assert torch.equal(alone.values, whole.values[row : row + 1])
        assert torch.equal(alone.scale, whole.scale[row : row + 1])
        assert alone.zero is None or torch.equal(alone.zero, whole.zero[row : row + 1])  # type: ignore[index]


def test_hqq_of_zero_points_is_as_good_as_torchaos() -> None:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    weight = outliers(64, 256)
    values, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight, nbits=4, group_size=64, axis=1, compute_dtype=torch.float32, device="cpu", verbose=False
    )
    grouped = values.reshape(-1, 64).float()
    theirs = ((grouped - 8) * scale.reshape(-1, 1) + zero.reshape(-1, 1)).reshape(64, 256)
    ours = TINYGEMM.restore(round_hqq(TINYGEMM, weight, 64, torch.float32), torch.float32)
    assert (ours - weight).abs().pow(0.7).mean() <= 1.02 * (theirs - weight).abs().pow(0.7).mean()


def test_hqq_of_scales_is_as_good_as_torchaos() -> None:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

    weight = outliers(64, 256)
    values, scale = _choose_qparams_and_quantize_scale_only_hqq(weight, [1, 64], -8, 7)
    theirs = (values.reshape(64, 4, 64).float() * scale.reshape(64, 4, 1)).reshape(64, 256)
    ours = INT4.restore(round_hqq(INT4, weight, 64, torch.float32), torch.float32)
    assert (ours - weight).abs().pow(0.7).mean() <= 1.02 * (theirs - weight).abs().pow(0.7).mean()


@pytest.mark.parametrize(("scheme", "target_name"), EVERY_TARGET)
def test_gptq_loses_less_of_the_output_than_rounding_to_nearest(scheme: str, target_name: str) -> None:
    target = find_target(scheme, target_name)
    numbers, group_size = target.numbers(), group_sizes(scheme, target_name)[0]
    weight, inputs = outliers(48, 256), correlated(1024, 256)
    dtype = torch.bfloat16 if target.dtype else torch.float32
    rounded = inputs if numbers.activation is None else numbers.activation(inputs)
    plain = numbers.quantise(weight, group_size, dtype, None)
    chosen = round_gptq(numbers, weight, group_size, dtype, rounded.t() @ rounded)
    assert torch.equal(chosen.scale, plain.scale)
    before, after = (
        float((rounded @ (numbers.restore(each, torch.float32) - weight).t()).norm()) for each in (plain, chosen)
    )
    assert after < 0.9 * before


def test_gptq_equals_the_plain_algorithm() -> None:
    """Optimal brain surgery, one column after another, with the inverse Hessian of what remains (Frantar et al.)."""
    weight, inputs = outliers(16, 64), correlated(512, 64)
    hessian = inputs.t() @ inputs
    plain = INT4.quantise(weight, 32, torch.float32, None)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(64).double()
    left, remaining, values = list(order), weight.double().clone(), torch.empty_like(weight)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        column = left[0]
        scale = plain.scale[:, column // 32].double()
        values[:, column] = torch.clamp(torch.round(remaining[:, column] / scale), -8, 7).float()
        error = (remaining[:, column] - values[:, column] * scale) / inverse[0, 0]
        remaining[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    ours = round_gptq(INT4, weight, 32, torch.float32, hessian)
    assert (ours.values == values).float().mean() > 0.995  # ties in float32 and float64


def test_gptq_bears_inputs_that_are_always_zero_or_all_alike() -> None:
    weight = outliers(8, 64)
    inputs = torch.ones(32, 1).expand(32, 64).clone()
    inputs[:, :5] = 0
    chosen = round_gptq(INT4, weight, 32, torch.float32, inputs.t() @ inputs)
    assert torch.isfinite(INT4.restore(chosen, torch.float32)).all()


# ---------------------------------------------------------------------- whole models


def chosen_for(model: Any, names: list[str], scheme: str = "int8-int4", group_size: int = 32) -> Chosen:
    format_ = SCHEMES[scheme]
    target = next(iter(format_.targets.values()))
    coverage = select_layers(model, format_, group_size, target)
    return choose_numbers(model, format_, target, group_size, coverage, names, BATCHES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["awq", "smoothquant", "spinquant"])
def test_what_changes_the_model_keeps_its_function(name: str, architecture: str) -> None:
    model = tiny_model(architecture)
    for block in find_blocks(model)[1]:  # gains and outliers as trained models have them
        for link in find_links(block):
            if isinstance(link.source, Norm):
                link.source.set_gain(torch.rand_like(link.source.gain) * 3 + 0.2)
    before = logits_of(model)
    found = chosen_for(model, [name])
    torch.testing.assert_close(logits_of(model), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert set(found.grid) == set(select_layers(model, SCHEMES["int8-int4"], 32).layers)
    assert found.notes


def test_links_are_all_that_a_block_has() -> None:
    for architecture in ARCHITECTURES:
        links = list(find_links(find_blocks(tiny_model(architecture))[1][0]))
        assert [len(link.readers) for link in links] == ([1, 1, 1, 1] if architecture == "phi3" else [3, 1, 2, 1])


def test_gemmas_norm_adds_1() -> None:
    assert norm_offset(tiny_model("gemma3_text").model.norm) == 1
    norm = tiny_model("llama").model.norm
    before = norm.weight.clone()
    assert norm_offset(norm) == 0 and torch.equal(norm.weight, before)


@pytest.mark.parametrize("size", [1, 2, 64, 96, 576])
def test_a_hadamard_matrix_is_orthogonal_and_even(size: int) -> None:
    matrix = hadamard(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    if size == 64:
        assert torch.allclose(matrix.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))


def test_a_rotation_spreads_outliers() -> None:
    model = tiny_model("llama", tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 40
    rotate_(model)
    weight = model.model.embed_tokens.weight
    assert float(weight.abs().amax() / weight.std()) < 8


@pytest.mark.parametrize("names", [["gptq"], ["hqq"], ["mse"], ["awq"], ["smoothquant"], ["spinquant", "awq", "gptq"]])
@pytest.mark.parametrize(("scheme", "group_size"), [("int8-int4", 32), ("int4", 32)])
def test_what_is_chosen_simulates_closer_than_rounding(names: list[str], scheme: str, group_size: int) -> None:
    """On the calibration data itself, against the unquantised model."""

    def distance(chosen: list[str]) -> float:
        model = heavy_tailed(tiny_model("llama", tied=False))
        before = logits_of(model)
        format_ = SCHEMES[scheme]
        target = format_.targets["cpu"]
        coverage = select_layers(model, format_, group_size, target)
        found = choose_numbers(model, format_, target, group_size, coverage, chosen, BATCHES)
        simulate_(model, format_, target, group_size, coverage, found.grid)
        return float((logits_of(model) - before).norm())

    assert distance(names) < distance(["rtn"])


def heavy_tailed(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for _, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.weight *= torch.exp(0.5 * torch.randn_like(module.weight))
            elif "Norm" in type(module).__name__:
                module.weight *= torch.exp(0.7 * torch.randn_like(module.weight))
    return model


def test_round_to_nearest_is_what_conversion_without_an_algorithm_stores() -> None:
    model = tiny_model("qwen3")
    found = chosen_for(model, ["rtn"])
    for name, quantised in found.grid.items():
        weight = model.get_submodule(name).weight
        expected = INT8_INT4.quantise(weight, 32, torch.float32, None)
        assert torch.equal(quantised.values, expected.values) and torch.equal(quantised.scale, expected.scale)


def test_padding_does_not_count() -> None:
    padded = [
        (torch.nn.functional.pad(ids, (0, 9), value=7), torch.nn.functional.pad(mask, (0, 9))) for ids, mask in BATCHES
    ]
    format_, grids = SCHEMES["int4"], []
    for batches in (BATCHES, padded):
        model = tiny_model("llama")
        coverage = select_layers(model, format_, 32, format_.targets["cpu"])
        grids.append(choose_numbers(model, format_, format_.targets["cpu"], 32, coverage, ["gptq"], batches).grid)
    same = [float((grids[0][name].values == grids[1][name].values).float().mean()) for name in grids[0]]
    assert min(same) > 0.98  # sums in another order


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["gptx"], "unknown algorithm 'gptx'; did you mean gptq?"),
        (["hqq", "gptq"], "algorithms hqq and gptq cannot be combined: both say how the model is rounded; choose one"),
        (["awq", "smoothquant"], "algorithms awq and smoothquant cannot be combined"),
    ],
)
def test_names_that_do_not_go(names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        check_algorithms(names)


def test_they_work_in_their_order() -> None:
    assert check_algorithms(["gptq", "awq", "spinquant"]) == ("spinquant", "awq", "gptq")
    assert set(ALGORITHMS) == {"rtn", "mse", "hqq", "gptq", "awq", "smoothquant", "spinquant"}


def test_hqq_is_refused_for_floats() -> None:
    with pytest.raises(UserError, match="algorithm hqq makes no sense for fp8: it moves the zero point"):
        chosen_for(tiny_model(), ["hqq"], "fp8", None)  # type: ignore[arg-type]


def test_calibration_needs_data() -> None:
    model, format_ = tiny_model(), SCHEMES["int4"]
    coverage = select_layers(model, format_, 32, format_.targets["cpu"])
    with pytest.raises(UserError, match="gptq: calibration data is needed; name some with --calibration"):
        choose_numbers(model, format_, format_.targets["cpu"], 32, coverage, ["gptq"])


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    """A tokenizer of another model: an index error, or on a GPU a failed kernel, if nobody looks."""
    model, scheme = tiny_model("qwen3"), find_scheme("int4")
    known = model.get_input_embeddings().weight.shape[0]
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "é" * 300}) + "\n", encoding="utf-8")
    recipe, target = Recipe(algorithms=("gptq",), data=data), scheme.find_target("cpu")
    coverage = select_layers(model, scheme, 32, target)
    with pytest.raises(UserError, match=f"the model's embedding ends at {known - 1}"):
        choose_by(recipe, model, byte_tokenizer, scheme, target, 32, coverage)
    with pytest.raises(UserError, match="tokenizer"):
        evaluate_model(model, [Sample([1, known], [0, 1])], batch_size=1)


def test_an_architecture_that_computes_otherwise_is_refused() -> None:
    model = tiny_model("llama")
    block = model.model.layers[0]
    block.mlp.act_fn = nn.Identity()  # still exact
    chosen_for(model, ["awq"])
    block.mlp.register_forward_pre_hook(lambda module, arguments: (torch.tanh(arguments[0]),))
    with torch.no_grad():
        block.post_attention_layernorm.weight.copy_(torch.rand(64) * 4 + 0.1)
    with pytest.raises(UserError, match="awq: a scaled LlamaDecoderLayer computes something else"):
        chosen_for(model, ["awq"])
