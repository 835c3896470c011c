"""Fused experts: the matrices of all experts of a mixture-of-experts layer, in one parameter (E, O, I) each.

transformers 5 keeps Qwen3-MoE's experts (and Mixtral's, OLMoE's, DeepSeek-V3's) so, out of reach of whatever looks for
`nn.Linear`. Each expert is a gated MLP, `down(silu(gate(x)) * up(x))`, with gate and up in one matrix. An expert's
matrix is one like any other: rounded and multiplied by itself, as transformers' eager forward does.

Shapes: `E` experts, `O` out_features, `I` in_features, `N` tokens, `K` experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantize.numerics import Quantised

MATRICES = ("gate_up_proj", "down_proj")
"""The parameters of fused experts, each (E, O, I)."""

TENSORS = ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor", "Int4TilePackedTo4dTensor")
"""torchao's tensors of the targets whose `experts` is set (`quantize.formats.Target`)."""

Product = Callable[[int, Tensor], Tensor]
"""(expert, its inputs (n, I)) -> (n, O)."""


def is_fused(module: Any) -> bool:
    """Whether a module holds fused experts whose matrices lie as a linear layer's, (O, I), without a bias.

    Told by shapes: unsloth rebuilds the classes of transformers without the marks that say how the matrices lie.
    """
    both, down = (module._parameters.get(name) for name in MATRICES)
    if both is None or down is None or both.dim() != 3 or down.dim() != 3:
        return False
    if any("bias" in name for name in module._parameters) or not getattr(module, "is_concatenated", True):
        return False
    return tuple(both.shape) == (down.shape[0], 2 * down.shape[2], down.shape[1])


def count_of(module: Any) -> int:
    """How many experts are fused in a module."""
    return int(module._parameters[MATRICES[0]].shape[0])


def has_experts(model: nn.Module) -> bool:
    """Whether any of a model's modules holds fused experts."""
    return any(is_fused(module) for module in model.modules())


def fused_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(module name, module) of all fused experts."""
    for name, module in model.named_modules():
        if is_fused(module):
            yield name, module


def split(quantised: Quantised, experts: int) -> list[Quantised]:
    """Weights of E experts whose rows lie one below the other, (E * O, I), as E weights (O, I)."""
    fields = {name: part for name, part in vars(quantised).items() if part is not None}
    pieces = {name: part.chunk(experts) for name, part in fields.items()}
    return [replace(quantised, **{name: piece[number] for name, piece in pieces.items()}) for number in range(experts)]


def join(parts: Sequence[Quantised]) -> Quantised:
    """The inverse of `split`."""
    fields = [name for name, part in vars(parts[0]).items() if part is not None]
    return Quantised(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def stack(tensors: Sequence[Any]) -> Any:
    """torchao tensors (O, I) of equal layout as one of that layout, (E, O, I), which gives them back by `[expert]`."""
    first = tensors[0]
    kind = type(first)
    names = [*kind.tensor_data_names, *getattr(kind, "optional_tensor_data_names", ())]
    parts = {name: [getattr(tensor, name) for tensor in tensors] for name in names}
    data = {name: None if found[0] is None else torch.stack(found) for name, found in parts.items()}
    attributes = {
        name: getattr(first, name)
        for name in (*kind.tensor_attribute_names, *getattr(kind, "optional_tensor_attribute_names", ()))
    }
    attributes["block_size"] = [1, *first.block_size]
    if "shape" in attributes:
        attributes["shape"] = torch.Size((len(tensors), *first.shape))
    return kind(**data, **attributes)


def pick(tensor: Any, expert: int) -> Any:
    """The torchao tensor (O, I) of one expert, out of what `stack` made."""
    kind = type(tensor)
    names = [*kind.tensor_data_names, *getattr(kind, "optional_tensor_data_names", ())]
    parts = {name: getattr(tensor, name) for name in names}
    attributes = {
        name: getattr(tensor, name)
        for name in (*kind.tensor_attribute_names, *getattr(kind, "optional_tensor_attribute_names", ()))
    }
    attributes["block_size"] = list(tensor.block_size[1:])
    if "shape" in attributes:
        attributes["shape"] = tensor.shape[1:]
    return kind(**{name: None if part is None else part[expert] for name, part in parts.items()}, **attributes)


def let_tensors_select() -> None:
    """Lets torchao's tensors give one expert of many, `weight[expert]`, under inference mode too.

    Of torchao 0.18's own, Intx's cannot, and the others cannot in inference mode, where a view of a tensor with parts
    has no version to share. Called before a model with such experts runs.
    """
    from torchao import quantization

    getitem = torch.Tensor.__getitem__
    for kind in (getattr(quantization, name) for name in TENSORS):
        if getitem in kind._TORCH_FN_TABLE.get(kind, {}):
            continue

        @kind.implements_torch_function(getitem)
        def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            tensor, index = args
            one = isinstance(index, int) or (
                isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
            )
            if one and tensor.dim() == 3:
                return pick(tensor, int(index))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)


def _gated(activation: Callable[[Tensor], Tensor], both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return activation(gate) * up


def gate_of(experts: Any) -> Callable[[Tensor], Tensor]:
    """The activation between both products: (..., 2 F) -> (..., F)."""
    return getattr(experts, "_apply_gate", None) or partial(_gated, experts.act_fn)


def apply_experts(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, products: Mapping[str, Product]
) -> Tensor:
    """What fused experts compute, with other products in place of their own.

    The order of everything is that of transformers' eager forward, so that equal products give equal bits.

    Args:
        experts: the module.
        hidden: (N, I). chosen: (N, K) expert of each token. weights: (N, K) what its output counts.
        products: "gate_up_proj" and "down_proj" -> their product.

    Returns:
        (N, I).
    """
    count, gated = count_of(experts), gate_of(experts)
    output = torch.zeros_like(hidden)
    for expert in torch.unique(chosen).tolist():
        if expert >= count:  # stands for none, where experts are shared among devices
            continue
        place, token = torch.where(expert == chosen.T)
        inner = gated(products["gate_up_proj"](expert, hidden[token]))
        found = products["down_proj"](expert, inner) * weights[token, place, None]
        output.index_add_(0, token, found.to(output.dtype))
    return output
