"""What the tests of the numbers share: weights that break formulas, layers, tensors compared part by part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize.schemes import SCHEMES, Target

DTYPES = (torch.float32, torch.bfloat16)
EVERY_TARGET = [(name, target) for name, scheme in SCHEMES.items() for target in scheme.targets]


def find_target(scheme: str, target: str) -> Target:
    """The target itself; "embedding" is the one of the scheme's embedding."""
    found = SCHEMES[scheme].embedding if target == "embedding" else SCHEMES[scheme].targets[target]
    assert found is not None
    return found


def group_sizes(scheme: str, target: str) -> tuple[int | None, ...]:
    """The group sizes that the scheme offers at that target, the smallest first; (None,) = one scale a row."""
    if target == "embedding":
        return (None,)
    found = SCHEMES[scheme].targets[target]
    return tuple(sorted(found.group_sizes or SCHEMES[scheme].group_sizes)) or (None,)


def hard_weight(seed: int, shape: tuple[int, int] = (96, 256), dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights of a size that the seed decides, with the rows that break formulas in front.

    They are: zero, constant, one-sided both ways, negative zero, huge, tiny, subnormal, one outlier, one in each sign.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10.0 ** (seed % 4 - 2)
    weight[0], weight[1], weight[2], weight[3] = 0, 3.5, -weight[2].abs(), weight[3].abs()
    weight[4] = -0.0
    weight[5] *= 1e30
    weight[6] *= 1e-30
    weight[7] *= 1e-39
    weight[8, 17] = 1e4
    weight[9, ::2], weight[9, 1::2] = 1.0, -1.0
    return weight.to(dtype)


def torchao_layer(weight: Tensor, target: Target, group_size: int | None, bias: Tensor | None = None) -> Any:
    """The layer as torchao itself quantises it: an embedding for the target of that name, else a linear."""
    from torchao.quantization import quantize_

    layer: nn.Module
    if target.name == "embedding":
        layer = nn.Embedding(*weight.shape, dtype=weight.dtype, device=weight.device)
    else:
        layer = nn.Linear(
            weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device=weight.device
        )
        if bias is not None:
            layer.bias.data = bias.clone()
    layer.weight.data = weight.clone()
    quantize_(layer, target.config(group_size), filter_fn=lambda module, name: True)
    return layer


def parts_of(tensor: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inner tensors and attributes of a torchao tensor."""
    names, attributes = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    return parts, {name: value for name, value in _as_dict(tensor, attributes).items() if name != "device"}


def _as_dict(tensor: Any, attributes: Any) -> dict[str, Any]:
    if isinstance(attributes, dict):
        return attributes
    names = [*tensor.tensor_attribute_names, *getattr(tensor, "optional_tensor_attribute_names", ())]
    return {name: getattr(tensor, name, None) for name in names}


def assert_same_parts(ours: Any, theirs: Any) -> None:
    """Both are the same torchao tensor: kind, inner tensors to the last bit, attributes."""
    assert type(ours) is type(theirs)
    (tensors, attributes), (expected, wanted) = parts_of(ours), parts_of(theirs)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert same_bits(tensor, expected[name]), name
    for name, value in attributes.items():
        ours_, theirs_ = (list(v) if isinstance(v, tuple) else v for v in (value, wanted[name]))
        assert ours_ == theirs_, f"{name}: {ours_} and {theirs_}"


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to the last bit; float8 is compared as bytes, so that NaN and the sign of zero count too."""
    if ours.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    return torch.equal(ours, theirs)
