"""Which layers of a model a scheme quantises, and why not the others: nothing is skipped in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quantize import experts
from quantize.errors import UserError
from quantize.names import is_kept
from quantize.schemes import Scheme, Target


@dataclass(frozen=True)
class Coverage:
    """What a scheme reaches in one model.

    Attributes:
        layers: names of what is quantised: of linear modules, and of the parameters of fused experts.
        skipped: name -> why it keeps 16 bit.
        quantized_weights: number of weights in `layers`.
        addressed_weights: number of weights in all linear layers and fused experts that the scheme does not skip by its
            definition, and in the matrices that are neither's (GPT-2's Conv1D).
        kept_weights: number of them that a user's `skip` keeps in 16 bit.
        total_weights: number of weights in the model.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    quantized_weights: int = 0
    addressed_weights: int = 0
    kept_weights: int = 0
    total_weights: int = 0

    @property
    def quantized_fraction(self) -> float:
        """Share of the addressed weights that is quantised."""
        return self.quantized_weights / self.addressed_weights if self.addressed_weights else 0.0

    @property
    def reached_fraction(self) -> float:
        """The same, of what the user wants quantised."""
        wanted = self.addressed_weights - self.kept_weights
        return self.quantized_weights / wanted if wanted else 0.0

    def as_dict(self) -> dict[str, object]:
        """JSON form, as metrics.json stores it."""
        return {
            "quantized_fraction": self.quantized_fraction,
            "share_of_all_weights": self.quantized_weights / max(self.total_weights, 1),
            "quantized_layers": len(self.layers),
            "skipped": dict(self.skipped),
        }


def plain_name(name: str) -> str:
    """A module's name without PEFT's wrappers: `base_model.model.model.layers.0.q_proj` -> `model.layers.0.q_proj`."""
    name = re.sub(r"(\.base_layer)+$", "", name.removeprefix("base_model.model."))
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)


def embedding_name(model: nn.Module) -> str:
    """Name of a plain model's input embedding."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    (name,) = (name for name, module in model.named_modules() if module is embedding)
    return str(name)


def is_outermost_linear(name: str, module: nn.Module) -> bool:
    """A linear with its adapter, or a plain linear that is no part of one; not the untrained original of a copy."""
    if ".lora_" in name or name.endswith((".base_layer", ".original_module")):
        return False
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


def is_plain_linear(module: nn.Module) -> bool:
    """It computes `x W^T + b`, not more; so do FalconLinear and quantised layers, in forwards of their own."""
    if not isinstance(module, nn.Linear):
        return False
    kind = type(module)
    own = kind.forward is not nn.Linear.forward and kind.__name__ != "FalconLinear"
    return not (own and module.weight.is_floating_point())


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name without wrappers, linear) of each linear layer, the adapters' own matrices left out."""
    for name, module in model.named_modules():
        if is_outermost_linear(name, module):
            linear = getattr(module, "base_layer", module)
            assert isinstance(linear, nn.Linear)
            yield plain_name(name), linear


def find_weight(model: nn.Module, name: str) -> tuple[Any, str]:
    """(module, name of its parameter) of a covered layer: `weight`, or a matrix of fused experts."""
    above, _, leaf = name.rpartition(".")
    if leaf in experts.MATRICES and experts.is_fused(module := model.get_submodule(above)):
        return module, leaf
    return model.get_submodule(name), "weight"


def modules_of(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Names of the modules that compute with these layers' weights -> how many weights that are.

    A linear layer's own name; fused experts once for all their matrices.
    """
    counts: dict[str, int] = {}
    for name in names:
        module, leaf = find_weight(model, name)
        owner = name if leaf == "weight" else name.removesuffix(f".{leaf}")
        counts[owner] = counts.get(owner, 0) + int(module._parameters[leaf].numel())
    return counts


def weight_key(model: nn.Module, name: str) -> str:
    """Name of a covered layer's weight in the state dict."""
    return name if find_weight(model, name)[1] != "weight" else f"{name}.weight"


def select_layers(
    model: nn.Module,
    scheme: Scheme,
    group_size: int | None,
    target: Target | None = None,
    skip: Sequence[str] = (),
) -> Coverage:
    """Decides for each linear layer, and each matrix of fused experts, whether `scheme` quantises it.

    Args:
        model: a transformers model, with or without PEFT's wrappers.
        scheme: the format.
        group_size: weights per scale; a layer whose in_features it does not divide is skipped and listed.
        target: where it runs; the scheme's first by default.
        skip: names that the user keeps in 16 bit (see `quantize.names`), beyond the scheme's own.

    Raises:
        UserError: an entry of `skip` fits no linear layer.
    """
    where = target or next(iter(scheme.targets.values()))
    layers: list[str] = []
    skipped: dict[str, str] = {}
    quantised = addressed = kept = 0
    matrices, routers = dict(expert_matrices(model)), tuple(_routers(model))
    skipped |= dict.fromkeys(routers, "a router keeps 16 bit: it is small, and decides which experts run")
    refuse_unmatched([*(name for name, _ in linear_layers(model)), *matrices], skip)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    head = getattr(head, "base_layer", head)
    for name, linear in linear_layers(model):
        if name.rsplit(".", 1)[-1] in scheme.skip or ("lm_head" in scheme.skip and linear is head):
            skipped[name] = f"{scheme.name} leaves it unquantised"
            continue
        if name in routers:
            continue
        addressed += linear.weight.numel()
        if is_kept(name, skip):
            skipped[name] = "quantize.skip leaves it unquantised"
            kept += linear.weight.numel()
            continue
        if not is_plain_linear(linear):
            skipped[name] = f"a {type(linear).__name__} computes more than a linear layer"
            continue
        if reason := _misfit(linear.out_features, linear.in_features, group_size, where):
            skipped[name] = reason
            continue
        layers.append(name)
        quantised += linear.weight.numel()
    for name, weight in matrices.items():
        addressed += weight.numel()
        if is_kept(name, skip):
            skipped[name] = "quantize.skip leaves it unquantised"
            kept += weight.numel()
        elif not where.experts:
            skipped[name] = f"torchao's tensor of {scheme.name} for {where.name} holds no fused experts"
        elif reason := _misfit(weight.shape[1], weight.shape[2], group_size, where):
            skipped[name] = reason
        else:
            layers.append(name)
            quantised += weight.numel()
    for name, weight in _other_weights(model):
        if name not in matrices and name.removesuffix(".weight") not in routers:
            addressed += weight.numel()
            skipped[name] = "a weight outside a linear layer is not quantised"
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    return Coverage(tuple(layers), skipped, quantised, addressed, kept, total)


def _misfit(rows: int, columns: int, group_size: int | None, target: Target) -> str | None:
    """Why a matrix of that shape cannot be quantised; None where it can."""
    if group_size is not None and columns % group_size:
        return f"group size {group_size} does not divide its in_features {columns}"
    if columns % target.multiple or rows % target.multiple:
        return f"the kernel needs multiples of {target.multiple}, and its weight is {rows} x {columns}"
    return None


def expert_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name without wrappers, parameter (E, O, I)) of each matrix of fused experts."""
    for name, module in experts.fused_experts(model):
        for leaf in experts.MATRICES:
            yield f"{plain_name(name)}.{leaf}", module._parameters[leaf]


def _routers(model: nn.Module) -> Iterator[str]:
    """Names of the modules that choose among fused experts: those beside them, with a row of weights an expert."""
    fused = experts.fused_experts(model)
    beside = {plain_name(name).rpartition(".")[0]: experts.count_of(each) for name, each in fused}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            plain = plain_name(name)
            if beside.get(plain.rpartition(".")[0]) == weight.shape[0]:
                yield plain


def refuse_unmatched(layers: Sequence[str], skip: Sequence[str]) -> None:
    """Raises UserError with each entry of `skip` that fits none of the layers, which would be ignored in silence."""
    lost = [pattern for pattern in skip if not any(is_kept(name, [pattern]) for name in layers)]
    if lost:
        kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
        raise UserError(
            f"quantize.skip: {', '.join(map(repr, lost))} fits no linear layer of this model; its layers end in {kinds}"
            + (f", the first is {layers[0]}" if layers else "")
        )


def _other_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, weight) of each matrix that is no linear layer's, embedding's, convolution's or adapter's."""
    for name, module in model.named_modules():
        counted = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
        if counted or ".lora_" in name or name.endswith(".original_module"):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and "lora_" not in leaf:
                yield f"{plain_name(name)}.{leaf}", parameter


def untie(model: Any) -> None:
    """Gives lm_head weights of its own: embedding and lm_head ship in different formats."""
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        weight = model.get_input_embeddings().weight.detach().clone()
        model.get_output_embeddings().weight = nn.Parameter(weight, requires_grad=False)
        model._tied_weights_keys = None
        model.all_tied_weights_keys = {}
