"""Puts fake quantisation into a model, switches it on and off, and takes it out again.

Forwards are bound on the instances of the linear layers and unbound when it is off; no class is patched, no parameter
is added to the model, and the weights are not touched: a model that is switched off computes what it computed before,
to the bit and by the same kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import adapter_of, merged_of, refuse_adapters, scaling_of, weight_of
from qat.cache import WeightCache
from qat.embedding import binding_of_embedding, find_embedding
from qat.experts import ExpertMatrix, expert_matrices
from qat.forwards import Binding, bindings_inside, bindings_of_experts, bindings_outside, is_bound
from qat.layer import LayerNumerics
from qat.reference import reference_asked
from quantize.errors import UserError
from quantize.layers import Coverage, is_outermost_linear, plain_name, select_layers
from quantize.numerics import Quantised, best_factor
from quantize.schemes import Scheme, Target, find_scheme


@dataclass(frozen=True, kw_only=True)
class Format:
    """What ships.

    Attributes:
        scheme: the format. target: where it runs. group_size: weights per scale; None = one scale a row.
        skip: what keeps 16 bit beyond the scheme's own.
        dtype: what the shipped model computes in.
    """

    scheme: Scheme
    target: Target
    group_size: int | None
    skip: tuple[str, ...]
    dtype: torch.dtype


@dataclass
class Prepared:
    """Fake quantisation in one model.

    Attributes:
        model: the model that was prepared.
        format: the numbers that ship.
        coverage: the layers that are fake-quantised, and why not the others.
        layers: plain layer name -> (module, its numbers), the quantised embedding among them.
        placement: "inside" or "outside".
        mse: choose the factors of the ranges by least squared error when it is first switched on.
        ranges_chosen: that has been done, or the factors were loaded; set it to False to choose them anew.
        calls: layer name -> how often its fake quantisation ran.
        enabled: quantisation is simulated at the moment.
        cache: fake-quantised weights that are needed again: by itself those of frozen layers alone. `qat.callback` has
            it keep those that train too, between two steps of the optimiser.
        bindings: the forwards that simulate it.
    """

    model: nn.Module = field(repr=False)
    format: Format
    coverage: Coverage
    placement: str
    mse: bool = False
    ranges_chosen: bool = False
    layers: dict[str, tuple[Any, LayerNumerics]] = field(default_factory=dict, repr=False)
    calls: Counter[str] = field(default_factory=Counter, repr=False)
    enabled: bool = False
    cache: WeightCache = field(default_factory=lambda: WeightCache(limit=0), repr=False)
    bindings: list[Binding] = field(default_factory=list, repr=False)

    def switch_on(self) -> None:
        """Simulates quantisation from here on."""
        if self.enabled:
            return
        if self.mse and not self.ranges_chosen:
            self._choose_ranges()
        for binding in self.bindings:
            binding.bind()
        self.enabled = True

    def switch_off(self) -> None:
        """Every layer computes again what its class computes."""
        if not self.enabled:
            return
        for binding in self.bindings:
            binding.unbind()
        self.cache.clear()
        self.enabled = False

    @contextmanager
    def trial(self) -> Iterator[None]:
        """On for the time of a `with`; what is done there leaves no trace in the counts and the choice of ranges."""
        before = self.enabled, self.ranges_chosen, self.calls.copy()
        self.switch_on()
        try:
            yield
        finally:
            enabled, self.ranges_chosen, calls = before
            self.calls.clear()
            self.calls.update(calls)
            if not enabled:
                self.switch_off()

    @property
    def factors(self) -> dict[str, Tensor]:
        """Layer name -> the factor (O, G) of its ranges; empty where every range is that of its extremes."""
        return {name: numerics.factor for name, (_, numerics) in self.layers.items() if numerics.factor is not None}

    def load_factors(self, stored: dict[str, Tensor]) -> None:
        """Takes factors that `factors` gave, in place of choosing them."""
        for name, factor in self.factors.items():
            factor.data.copy_(stored[name])
        self.cache.clear()
        self.ranges_chosen = True

    def silent(self) -> list[str]:
        """The layers whose fake quantisation has not run yet."""
        return [name for name in self.layers if not self.calls[name]]

    @torch.no_grad()
    def grid(self) -> Iterator[tuple[str, Quantised]]:
        """(layer name, its weight on the grid that was trained): what ships.

        Raises:
            AssertionError: the adapter was trained outside; no grid was trained then.
        """
        assert self.placement == "inside", "with the adapter outside no grid was trained"
        for name, (module, numerics) in self.layers.items():
            if isinstance(module, ExpertMatrix):
                yield name, module.quantise(numerics)
            else:
                lora = (None, None) if isinstance(module, nn.Embedding) else adapter_of(module)
                yield name, numerics.quantise(weight_of(module), *lora)

    @torch.no_grad()
    def _choose_ranges(self) -> None:
        for module, numerics in self.layers.values():
            if numerics.factor is not None:
                weight = merged_of(module) if self.placement == "inside" else weight_of(module)
                weight = weight.flatten(0, -2)
                numerics.factor.data.copy_(best_factor(numerics.numbers, weight, numerics.group_size, numerics.dtype))
        self.ranges_chosen = True


def prepare_qat(
    model: nn.Module,
    scheme: Scheme | str,
    *,
    target: Target | str | None = None,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    placement: str = "inside",
    ranges: str = "minmax",
    learned_scales: bool = False,
    enabled: bool = True,
    fused: bool = True,
    cache_mib: int = 1024,
) -> Prepared:
    """Fake-quantises the linear layers of `model` for training, with LoRA's adapters inside the quantiser.

    Args:
        model: a transformers model, with PEFT's LoRA layers or without (full fine-tuning).
        scheme: the format, or its name.
        target: where it will run; the scheme's first by default.
        group_size: weights per scale; the scheme's own by default.
        skip: names of layers that keep 16 bit beyond the scheme's own (see `quantize.names`).
        dtype: what the shipped model computes in, and the dtype of its scales; the model's own by default.
        placement: "inside" trains fq(W + s B A), what ships; "outside" trains fq(W) + s B A, for comparison.
        ranges: "minmax" spans each group's extremes; "mse" shrinks that range to the least squared error, once.
        learned_scales: the ranges are learned; their parameters, `Prepared.factors`, are for the caller's optimiser.
        fused: compute by fused kernels where there are some (CUDA); False asks for the plain definition everywhere.
        cache_mib: what fake-quantised weights that are needed again may take, in MiB: those of frozen layers, and all
            from forward to backward where they fit.
        enabled: switch it on at once; else `Prepared.switch_on` does, which also chooses the ranges then.

    Returns:
        What was prepared.

    Raises:
        UserError: nothing can be quantised, an entry of `skip` fits no layer, or an adapter cannot be merged exactly
            (with the layers' names).
    """
    scheme = find_scheme(scheme) if isinstance(scheme, str) else scheme
    target = scheme.find_target(target) if isinstance(target, str) else target or next(iter(scheme.targets.values()))
    group_size = scheme.pick_group_size(group_size, target)
    coverage = select_layers(model, scheme, group_size, target, skip)
    modules = _covered(model, scheme, coverage)
    ships_in = dtype or weight_of(next(iter(modules.values()))).dtype
    chosen = Format(scheme=scheme, target=target, group_size=group_size, skip=tuple(skip), dtype=ships_in)
    prepared = Prepared(model, chosen, coverage, placement, mse=ranges == "mse", cache=WeightCache(cache_mib * 2**20))
    size = sum(weight_of(module).nbytes for module in modules.values())
    common = LayerNumerics(
        name="",
        numbers=target.numbers(),
        group_size=group_size,
        dtype=dtype or torch.float32,
        scaling=1.0,
        calls=prepared.calls,
        fused=fused,
        keep=size <= prepared.cache.limit,
        cache=prepared.cache,
    )
    for name, module in modules.items():
        weight = weight_of(module)
        count = module.count if isinstance(module, ExpertMatrix) else 1
        numerics = replace(common, name=name, dtype=dtype or weight.dtype, scaling=scaling_of(module), experts=count)
        if ranges == "mse" or learned_scales:
            numerics = replace(numerics, factor=_factor(weight, numerics, learned_scales))
        prepared.layers[name] = (module, numerics)
    inside = placement == "inside"
    layers = [found for found in prepared.layers.values() if not isinstance(found[0], ExpertMatrix)]
    prepared.bindings = bindings_inside(model, layers) if inside else bindings_outside(layers)
    prepared.bindings += bindings_of_experts(model, prepared.layers, inside=inside)
    if scheme.embedding is not None:
        name, embedding = find_embedding(model)
        numerics = replace(common, name=name, numbers=scheme.embedding.numbers(), group_size=None)
        numerics = replace(numerics, dtype=dtype or embedding.weight.dtype)
        prepared.layers[name] = (embedding, numerics)
        prepared.bindings.append(binding_of_embedding(embedding, numerics))
    is_reference = reference_asked(model)
    for binding in prepared.bindings:
        binding.is_reference = is_reference
    if enabled:
        prepared.switch_on()
    return prepared


def remove_qat(prepared: Prepared) -> None:
    """Undoes `prepare_qat`: each layer computes again what its class computes."""
    prepared.switch_off()
    prepared.layers.clear()
    prepared.bindings.clear()


def _covered(model: nn.Module, scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """Layer name -> module (or `ExpertMatrix`) of the covered layers, which must be such that they can be prepared."""
    if not coverage.layers:
        reasons = sorted(set(coverage.skipped.values())) or ["the model has no linear layer"]
        raise UserError(f"{scheme.name} reaches no layer of this model: {'; '.join(reasons)}")
    chosen = set(coverage.layers)
    found: dict[str, Any] = dict(expert_matrices(model))
    found |= {plain_name(name): module for name, module in model.named_modules() if is_outermost_linear(name, module)}
    modules = {name: module for name, module in found.items() if name in chosen}
    refuse_adapters(modules)
    if any(is_bound(getattr(module, "outer", module)) for module in modules.values()):
        raise UserError("this model is prepared already; undo that with remove_qat first")
    return modules


def _factor(weight: Tensor, numerics: LayerNumerics, learned: bool) -> Tensor:
    weight = weight.flatten(0, -2)
    groups = numerics.numbers.quantise(weight[:1], numerics.group_size, numerics.dtype, None).scale.shape[-1]
    return nn.Parameter(torch.ones(weight.shape[0], groups, device=weight.device), requires_grad=learned)
