"""The parts of a decoder that the algorithms work on: its blocks, its norms, and what each linear layer reads.

Known by the names that llama, Qwen, SmolLM, Phi-3, Gemma, Mixtral and OLMoE give them in transformers; that a change
kept the function is checked by running it, so another architecture with these names is refused rather than damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.algorithms.experts import experts_of
from quantize.errors import UserError

_READS_HIDDEN = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_READS_MLP = ("gate_proj", "up_proj", "gate_up_proj")


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, modules) of the decoder blocks: the longest list of modules with linear layers each that lies in no other.

    Raises:
        UserError: there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # a block's experts
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_has_linear, module)) and not inside:
            found[name] = module
    if not found:
        raise UserError("this model has no list of decoder blocks, which calibration goes through one by one")
    return max(found.items(), key=lambda item: len(item[1]))


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Linear) for each in module.modules())


@dataclass(frozen=True)
class Rows:
    """Rows of a linear layer's weight: its outputs from `start` to `stop`."""

    linear: nn.Linear
    start: int
    stop: int

    @torch.no_grad()
    def divide(self, scale: Tensor) -> None:
        """Divides these outputs by `scale` (stop - start,)."""
        weight = self.linear.weight
        weight[self.start : self.stop] = (weight[self.start : self.stop].float() / scale[:, None]).to(weight.dtype)
        if self.linear.bias is not None:
            bias = self.linear.bias
            bias[self.start : self.stop] = (bias[self.start : self.stop].float() / scale).to(bias.dtype)


@dataclass(frozen=True)
class Norm:
    """A norm whose outputs are multiplied by its weight, or by 1 + weight (Gemma)."""

    module: Any
    offset: float

    @property
    def gain(self) -> Tensor:
        """What each channel is multiplied by, float32."""
        return self.module.weight.float() + self.offset  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_gain(self, gain: Tensor) -> None:
        """Replaces the gain."""
        self.module.weight.copy_((gain - self.offset).to(self.module.weight.dtype))

    @torch.no_grad()
    def divide(self, scale: Tensor) -> None:
        """Divides the outputs by `scale`, a bias included."""
        self.set_gain(self.gain / scale)
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            bias.copy_((bias.float() / scale).to(bias.dtype))


@dataclass(frozen=True)
class Link:
    """Channels that pass from one place to the linear layers that read them, so that a scale can move between both.

    Attributes:
        source: whose outputs are divided.
        readers: the linear layers, and routers, whose input channels are multiplied; all that read these channels.
        repeats: how often each of the source's channels is read (grouped-query attention), in blocks of `block`.
        block: neighbouring channels that are repeated together: the size of a head.
    """

    source: Norm | Rows
    readers: tuple[Any, ...]
    repeats: int = 1
    block: int = 1

    def shared(self, values: Tensor, largest: bool) -> Tensor:
        """A statistic of each input channel (I,) -> of each source channel (I / repeats,)."""
        if self.repeats == 1:
            return values
        split = values.reshape(-1, self.repeats, self.block)
        return (split.amax(1) if largest else split.mean(1)).flatten()

    def spread(self, scale: Tensor) -> Tensor:
        """A scale of each source channel -> of each input channel (I,)."""
        if self.repeats == 1:
            return scale
        return scale.reshape(-1, 1, self.block).expand(-1, self.repeats, -1).flatten()

    @torch.no_grad()
    def move(self, scale: Tensor) -> None:
        """Divides the source by `scale` and multiplies the readers by it: the function stays the same."""
        self.source.divide(scale)
        inputs = self.spread(scale)
        for reader in self.readers:
            reader.weight.copy_((reader.weight.float() * inputs).to(reader.weight.dtype))


def find_links(block: nn.Module) -> Iterator[Link]:
    """The links of one decoder block, in the order in which its layers compute."""
    attention: Any = getattr(block, "self_attn", None)
    mlp: Any = getattr(block, "mlp", None)
    before: Any = getattr(block, "input_layernorm", None)
    if attention is not None and before is not None:
        readers = _children(attention, _READS_HIDDEN)
        if readers:
            yield Link(_norm(before), readers)
        values, output = value_rows(attention), getattr(attention, "o_proj", None)
        if values is not None and isinstance(output, nn.Linear):
            repeats = output.in_features // (values.stop - values.start)
            yield Link(values, (output,), repeats, attention.head_dim)
    norm = getattr(block, "pre_feedforward_layernorm", None) or getattr(block, "post_attention_layernorm", None)
    if mlp is not None and norm is not None:
        parts, others = gated_parts(mlp)
        if others is not None and parts:
            readers = tuple(reader for part in parts for reader in _children(part, _READS_MLP))
            yield Link(_norm(norm), (*readers, *others))
        for part in parts:
            down = getattr(part, "down_proj", None)
            if isinstance(down, nn.Linear):
                # The up projection is multiplied into the gate's activation: its scale passes through.
                linear, inner = _children(part, _READS_MLP)[-1], down.in_features
                yield Link(Rows(linear, linear.out_features - inner, linear.out_features), (down,))


def gated_parts(mlp: nn.Module) -> tuple[list[Any], list[Any] | None]:
    """The gated MLPs that a block's MLP is made of, and what else reads its input.

    Of a mixture these are its experts, which `experts_apart` set apart, and those that every token goes to; what
    chooses among them (the router) or weighs them reads the same, and is a weight for `x W^T`.

    Returns:
        gated MLPs; the other readers, None where there may be others that are not known.
    """
    if _children(mlp, _READS_MLP):
        return [mlp], []
    parts: list[Any] = []
    others: list[Any] = []
    known = not list(mlp.parameters(recurse=False))
    for child in mlp.children():
        own = list(child.parameters())
        if experts := experts_of(child):
            parts += experts
        elif _children(child, _READS_MLP):
            parts.append(child)
        elif isinstance(child, nn.Linear) or (len(own) == 1 and own[0] is child._parameters.get("weight")):
            others.append(child)
        elif own:
            known = False
    readers = [*others, *(reader for part in parts for reader in _children(part, _READS_MLP))]
    known = known and len({tuple(reader.weight.shape[1:]) for reader in readers}) == 1
    return parts, others if known else None


def residual_writers(block: Any) -> list[Any]:
    """What adds to the residual stream: linear layers, None for one that is not known."""
    parts, _ = gated_parts(block.mlp)
    return [getattr(block.self_attn, "o_proj", None), *(getattr(part, "down_proj", None) for part in parts)]


def value_rows(attention: Any) -> Rows | None:
    """The rows of the weight that makes the values."""
    if isinstance(getattr(attention, "v_proj", None), nn.Linear):
        return Rows(attention.v_proj, 0, attention.v_proj.out_features)
    fused, config = getattr(attention, "qkv_proj", None), getattr(attention, "config", None)
    if isinstance(fused, nn.Linear) and config is not None:
        heads = config.num_key_value_heads * attention.head_dim
        return Rows(fused, fused.out_features - heads, fused.out_features)
    return None


def _children(module: nn.Module, names: tuple[str, ...]) -> tuple[nn.Linear, ...]:
    found = (getattr(module, name, None) for name in names)
    return tuple(each for each in found if isinstance(each, nn.Linear))


def _norm(module: nn.Module) -> Norm:
    return Norm(module, norm_offset(module))


@torch.no_grad()
def norm_offset(module: Any) -> float:
    """What a norm adds to its weight: 0, or 1 as Gemma's do; told by what it gives where the weight is 0."""
    weight = module.weight
    kept = weight.detach().clone()
    weight.zero_()
    probe = torch.ones(1, weight.numel(), dtype=weight.dtype, device=weight.device)
    probe[:, ::2] = -1
    bias = getattr(module, "bias", None)
    offset = (module(probe) - (0 if bias is None else bias)).abs().float().mean()
    weight.copy_(kept)
    return float(offset.round())
