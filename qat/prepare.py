"""Puts fake quantisation into a model and takes it out again.

Forwards are bound on the instances of the linear layers and undone by `remove_qat`; no class is patched, no parameter
is added, and the weights are not touched, so that removal is exact to the bit.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.linear import FakeQuantLinear, FakeQuantSwitch, LayerNumerics, RoundTrip, merged_weight
from quantize.errors import UserError
from quantize.layers import Coverage, plain_name, select_layers
from quantize.schemes import Scheme, Target, find_scheme

_MARK = "activation_fake_quantizer"  # a child of this name makes Unsloth's fused kernels call the projection instead


@dataclass
class Prepared:
    """Fake quantisation in one model: what it covers, its switch, and what `remove_qat` needs.

    Attributes:
        coverage: the layers that are fake-quantised, and why not the others.
        switch: turns all of them on and off, and remembers which ran.
        numerics: plain layer name -> its numbers.
    """

    coverage: Coverage
    switch: FakeQuantSwitch
    numerics: dict[str, LayerNumerics] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)


def prepare_qat(
    model: nn.Module,
    scheme: Scheme | str,
    *,
    target: Target | str | None = None,
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
    placement: str = "inside",
) -> Prepared:
    """Fake-quantises the linear layers of `model` for training, with LoRA's adapters inside the quantiser.

    Args:
        model: a transformers model, with PEFT's LoRA layers or without (full fine-tuning).
        scheme: the format, or its name.
        target: where it will run; the scheme's first by default.
        group_size: weights per scale; the scheme's own by default.
        dtype: dtype of the 16-bit weight that ships; the model's own by default.
        placement: "inside" trains fq(W + s B A), what ships; "outside" trains fq(W) + s B A, for comparison.

    Raises:
        UserError: nothing can be quantised, several adapters are active, or an adapter cannot go inside.
    """
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    target = scheme.find_target(target) if isinstance(target, str) else target or next(iter(scheme.targets.values()))
    group_size = scheme.pick_group_size(group_size)
    coverage = select_layers(model, scheme, group_size)
    if not coverage.layers:
        reasons = sorted(set(coverage.skipped.values())) or ["the model has no linear layer"]
        raise UserError(f"{scheme.name} reaches no layer of this model: {'; '.join(reasons)}")
    prepared = Prepared(coverage, FakeQuantSwitch())
    chosen = set(coverage.layers)
    found = [(plain_name(name), module) for name, module in model.named_modules() if _is_outermost(name, module)]
    for name, module in found:
        if name in chosen:
            _check_adapter(name, module, placement)
    for name, module in found:
        if name in chosen:
            linear = base_linear(module)
            numerics = LayerNumerics(
                name=name,
                weight=_with_group_size(target, group_size),
                activation=target.activation,
                merged_dtype=dtype or linear.weight.dtype,
                scaling=_scaling(module),
                switch=prepared.switch,
            )
            _bind(module, numerics, placement)
            prepared.numerics[name], prepared.modules[name] = numerics, module
    if scheme.embedding is not None:
        _bind_embedding(model, scheme, prepared)
    return prepared


def remove_qat(prepared: Prepared) -> None:
    """Undoes `prepare_qat`: each layer computes again what its class computes."""
    for module in prepared.modules.values():
        del module.forward
        if hasattr(module, "base_layer"):
            del module.base_layer._modules[_MARK]
    prepared.modules.clear()


def _with_group_size(target: Target, group_size: int | None) -> RoundTrip:
    def round_trip(weight: Tensor) -> Tensor:
        return target.weight(weight, group_size)

    return round_trip


def base_linear(module: nn.Module) -> nn.Linear:
    """The linear layer under a LoRA layer, or the module itself."""
    linear = getattr(module, "base_layer", module)
    assert isinstance(linear, nn.Linear)
    return linear


def adapter_of(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """(A, B) of the one active adapter of a LoRA layer; (None, None) for a plain linear."""
    if not hasattr(module, "lora_A") or not module.lora_A:
        return None, None
    (name,) = module.active_adapters
    return module.lora_A[name].weight, module.lora_B[name].weight


def layer_merged_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The 16-bit weight (O, I) that a layer ships: W + s B A rounded to `dtype`."""
    lora_a, lora_b = adapter_of(module)
    return merged_weight(base_linear(module).weight, lora_a, lora_b, _scaling(module), dtype)


def _is_outermost(name: str, module: nn.Module) -> bool:
    """A LoRA layer, or a plain linear that is no part of one."""
    if ".lora_" in name or name.endswith(".base_layer"):
        return False
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


def _scaling(module: Any) -> float:
    if adapter_of(module)[0] is None:
        return 1.0
    (name,) = module.active_adapters
    return float(module.scaling[name])


def _check_adapter(name: str, module: Any, placement: str) -> None:
    if not hasattr(module, "lora_A"):
        return
    adapters = list(module.active_adapters)
    if len(adapters) != 1:
        raise UserError(f"{name} has {len(adapters)} active adapters; QAT trains exactly one (model.set_adapter(name))")
    if module.use_dora.get(adapters[0], False):
        raise UserError(f"{name} uses DoRA, which cannot go inside the fake quantiser yet; set lora.use_dora=false")
    dropout = module.lora_dropout[adapters[0]] if adapters[0] in module.lora_dropout else None
    if placement == "inside" and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        raise UserError(
            f"{name} has LoRA dropout {dropout.p}, which has no meaning inside W + s B A; set lora.lora_dropout=0"
        )


def _bind(module: Any, numerics: LayerNumerics, placement: str) -> None:
    def inside(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        linear = base_linear(self)
        lora_a, lora_b = adapter_of(self)
        return FakeQuantLinear.apply(x, linear.weight, lora_a, lora_b, linear.bias, numerics)  # type: ignore[no-any-return]

    def outside(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        linear = base_linear(self)
        lora_a, lora_b = adapter_of(self)
        output = FakeQuantLinear.apply(x, linear.weight, None, None, linear.bias, numerics)
        if lora_a is None or lora_b is None:
            return output  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        dropped = self.lora_dropout[name](x.to(lora_a.dtype))
        return output + (dropped @ lora_a.t() @ lora_b.t() * numerics.scaling).to(output.dtype)  # type: ignore[no-any-return]

    module.forward = types.MethodType(inside if placement == "inside" else outside, module)
    linear = base_linear(module)
    if linear is not module:
        linear.add_module(_MARK, nn.Identity())


def _bind_embedding(model: nn.Module, scheme: Scheme, prepared: Prepared) -> None:
    """Rounds the embedding's rows on look-up. A tied lm_head keeps its own numbers: the two part when they ship."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]

    def look_up(self: Any, ids: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(ids, self.weight)
        # One scale per row, so the rows that are looked up are all that needs rounding.
        rounded = scheme.embedding_weight(rows, None) if prepared.switch.enabled else rows
        return rows + (rounded - rows).detach() if rows.requires_grad else rounded

    embedding.forward = types.MethodType(look_up, embedding)
    prepared.modules["embedding"] = embedding
