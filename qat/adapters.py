"""What a LoRA layer of peft holds, read in one place, and which adapters cannot be merged exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.experts import ExpertMatrix
from qat.kernels import merged_weight
from quantize import experts
from quantize.errors import UserError
from quantize.layers import is_plain_linear, plain_name


def base_linear(module: nn.Module) -> nn.Linear:
    """The linear layer under a LoRA layer, or the module itself."""
    linear = getattr(module, "base_layer", module)
    assert isinstance(linear, nn.Linear)
    return linear


def active_module(module: Any) -> Any:
    """The trained copy inside peft's `modules_to_save` wrapper, or the module itself."""
    if not hasattr(module, "modules_to_save"):
        return module
    (name,) = module.active_adapters
    return module.modules_to_save[name]


def weight_of(module: Any) -> Tensor:
    """The weight of a layer: (O, I), of an embedding (V, H), of fused experts (E, O, I)."""
    if isinstance(module, nn.Embedding | ExpertMatrix):
        return module.weight
    return base_linear(module).weight


def adapter_of(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """(A, B) of the one active adapter of a LoRA layer; (None, None) for a plain linear."""
    if not hasattr(module, "lora_A") or not module.lora_A:
        return None, None
    (name,) = module.active_adapters
    if name not in module.lora_A:  # the layer has another adapter, which is not active: peft passes it over
        return None, None
    return module.lora_A[name].weight, module.lora_B[name].weight


def scaling_of(module: Any) -> float:
    """LoRA's s, which rank stabilisation changes; 1 for a plain linear."""
    if isinstance(module, ExpertMatrix):
        return module.scaling
    if adapter_of(module)[0] is None:
        return 1.0
    (name,) = module.active_adapters
    return float(module.scaling[name])


def merged_of(module: Any) -> Tensor:
    """W + s B A of a layer, in the shape of its weight, as `merged_weight` sums it."""
    if isinstance(module, ExpertMatrix):
        return module.merged()
    if isinstance(module, nn.Embedding):
        return module.weight.detach()
    lora_a, lora_b = adapter_of(module)
    return merged_weight(base_linear(module).weight.detach(), lora_a, lora_b, scaling_of(module))


def merged_16_bit(module: Any, dtype: torch.dtype) -> Tensor:
    """The 16-bit weight (O, I) of a layer: W + s B A, rounded once to `dtype`."""
    return merged_of(module).to(dtype)


def refuse_unmergeable(model: nn.Module) -> None:
    """Refuses adapters that a merged checkpoint cannot hold, with QAT or without.

    Raises:
        UserError: an adapter on an embedding, on a layer that is no plain linear layer (Conv1D, a router), or on an
            lm_head that shares the embedding's weight; one that is no weight at all (prompt tuning).
    """
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    for kind in getattr(model, "peft_config", {}).values():
        if getattr(kind, "is_prompt_learning", False):
            raise UserError(f"an adapter of the kind {kind.peft_type.value} has no place in merged weights; train LoRA")
    tokens = [name for name, module in modules if type(module).__name__ == "TrainableTokensWrapper"]
    if tokens:
        raise UserError(f"{tokens[0]}: trainable tokens are not merged; leave trainable_token_indices out")
    adapted = [(name, module) for name, module in modules if getattr(module, "lora_A", None)]
    others = [name for name, module in adapted if not is_plain_linear(module.base_layer) and not on_experts(module)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{others[0]}{more}: an adapter on a layer that is no plain linear layer is not merged; name the linear "
            "layers in lora.target_modules, such as ['q_proj', 'k_proj', 'v_proj', 'o_proj']"
        )
    names = [name for name, module in modules if getattr(module, "lora_embedding_A", None)]
    if names:
        raise UserError(
            f"{', '.join(names)}: an adapter on an embedding is not merged; leave it out of lora.target_modules, or "
            "train all weights (lora: null)"
        )
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if tied and any(name == "lm_head" and hasattr(module, "lora_A") for name, module in modules):
        raise UserError(
            "lm_head: it shares the embedding's weight, from which an adapter of its own would part it when merged; "
            "leave it out of lora.target_modules"
        )


def on_experts(module: Any) -> bool:
    """Whether an adapter is on a matrix of fused experts, which are merged one by one."""
    leaf = getattr(module, "parameter_name", None)
    return leaf in experts.MATRICES and experts.is_fused(module.get_base_layer())


def refuse_adapters(modules: Mapping[str, Any]) -> None:
    """Refuses layers whose adapter does not merge into one weight, all of them at once.

    Raises:
        UserError: one line a reason, with the layers' names.
    """
    reasons: dict[str, list[str]] = {}
    for name, module in modules.items():
        if reason := _obstacle(module):
            reasons.setdefault(reason, []).append(name)
    if reasons:
        raise UserError(
            *(
                f"{names[0]}{f' and {len(names) - 1} more layers' if len(names) > 1 else ''}: {reason}"
                for reason, names in reasons.items()
            )
        )


def _obstacle(module: Any) -> str | None:
    if isinstance(module, ExpertMatrix):
        return None if module.wrapper is None else _obstacle(module.wrapper)
    if not hasattr(module, "base_layer"):
        return None
    kind = type(module).__name__
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):  # AdaLoRA's holds bare parameters
        return f"an adapter of the kind {kind} cannot be merged exactly; QAT trains LoRA, or all weights (lora: null)"
    weight = module.get_param() if hasattr(module, "parameter_name") else base_linear(module).weight
    if not weight.is_floating_point():
        return "its frozen weight is quantised already; load the model in 16 bit"
    adapters = list(module.active_adapters)
    if len(adapters) != 1:
        return f"{len(adapters)} active adapters; QAT trains exactly one (model.set_adapter(name))"
    (adapter,) = adapters
    if module.merged:
        return "its adapter is merged already; call model.unmerge_adapter() first"
    if module.use_dora.get(adapter, False):
        return "DoRA cannot go inside the fake quantiser yet; set lora.use_dora=false"
    if getattr(module, "lora_variant", {}).get(adapter) is not None:
        return f"the LoRA variant {type(module.lora_variant[adapter]).__name__} is more than W + s B A"
    if getattr(module, "lora_bias", {}).get(adapter, False):
        return "its adapter has a bias (lora_bias), which no quantised layer holds; leave it out"
    return None
