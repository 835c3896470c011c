"""The gate: a run whose trained and shipped functions differ is not finished, and the layer at fault is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import find_target
from tiny_models import IDS, logits_of, tiny_model

from quantize.convert import quantise_
from quantize.gate import check_gap, layer_differences, weight_differences
from quantize.layers import select_layers
from quantize.schemes import SCHEMES
from quantize.simulate import simulate_

INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def _trained_and_shipped(scheme: str) -> tuple[Any, Any, tuple[str, ...]]:
    target, group_size = find_target(scheme, "cpu"), 32 if SCHEMES[scheme].group_sizes else None
    trained, shipped = tiny_model("qwen2"), tiny_model("qwen2")
    coverage = select_layers(trained, SCHEMES[scheme], group_size, target)
    simulate_(trained, SCHEMES[scheme], target, group_size, coverage)
    quantise_(shipped, SCHEMES[scheme], target, group_size, coverage)
    return trained, shipped, coverage.layers


@pytest.mark.parametrize("scheme", ["int8-int4", "int8-int4-mobile", "int4", "int3", "int8"])
def test_equal_layers_differ_by_nothing(scheme: str) -> None:
    trained, shipped, layers = _trained_and_shipped(scheme)
    found = layer_differences(trained, shipped, layers, INPUTS)
    assert {name for name, _ in found} == set(layers)
    assert all(difference == 0.0 for _, difference in found)
    assert torch.equal(logits_of(trained), logits_of(shipped)), "no hook of the comparison is left behind"


@pytest.mark.parametrize("scheme", ["int8-int4", "int3", "int8"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_a_corrupted_layer_is_named_alone(scheme: str, name: str) -> None:
    """On equal inputs only it differs: what comes after it sees the simulation's values, not the corrupted ones."""
    trained, shipped, layers = _trained_and_shipped(scheme)
    shipped.get_submodule(name).weight.data.scale[3] *= 1.5
    found = layer_differences(trained, shipped, layers, INPUTS)
    assert found[0][0] == name and found[0][1] > 1e-3
    assert all(difference == 0.0 for _, difference in found[1:])


@pytest.mark.parametrize("scheme", ["int8-int4-mobile", "int3"])
def test_a_corrupted_16_bit_weight_is_named_alone(scheme: str) -> None:
    trained, shipped, layers = _trained_and_shipped(scheme)
    shipped.model.norm.weight.data *= 1.3
    found = weight_differences(trained, shipped, [*layers, "model.embed_tokens"] if "mobile" in scheme else layers)
    assert found[0][0] == "model.norm.weight" and found[0][1] == pytest.approx(0.3)
    assert len(found) > 3 and all(difference == 0.0 for _, difference in found[1:])


@pytest.mark.parametrize("gap", [0.0, 0.0049, -0.0049])
def test_a_gap_within_the_bound_passes(gap: float) -> None:
    scheme = SCHEMES["int4"]
    target = scheme.targets["cuda-sm80"]
    assert target.max_gap_nats >= 0.005

    def never() -> list[tuple[str, float]]:
        raise AssertionError("asked for the layers without need")

    check_gap(gap, scheme, target, never)


@pytest.mark.parametrize("gap", [1e-9, -0.3])
def test_a_gap_beyond_the_bound_names_the_worst_layers(gap: float) -> None:
    scheme = SCHEMES["int3"]
    assert scheme.targets["cpu"].max_gap_nats == 0
    worst = [("first", 0.25), ("second", 0.1), ("third", 0.01), ("fourth", 0.0)]
    with pytest.raises(RuntimeError) as caught:
        check_gap(gap, scheme, scheme.targets["cpu"], lambda: worst)
    said = str(caught.value)
    assert f"{gap:+.6f}" in said and "int3 on cpu" in said
    assert "first: 25.00% of its norm; second: 10.00%" in said and "fourth" not in said


def test_a_gap_that_is_no_number_does_not_pass() -> None:
    scheme = SCHEMES["int4"]
    with pytest.raises(RuntimeError, match="not finished"):
        check_gap(float("nan"), scheme, scheme.targets["cuda-sm80"], list)


def test_exact_targets_have_no_tolerance_and_the_others_a_small_one() -> None:
    for name, scheme in SCHEMES.items():
        for target in scheme.targets.values():
            anywhere = target.name in ("cpu", "cuda", "cpu-intx", "cuda-intx", "executorch")
            if anywhere or name == "fp8":  # fp8 trains with the shipped kernel itself
                assert target.max_gap_nats == target.max_output_error == 0, name
            else:
                assert 0 < target.max_gap_nats <= 0.03, (name, target.name)
                assert target.max_output_error <= 0.005, (name, target.name)
