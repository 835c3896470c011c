"""The forwards that are bound on a model's layers while quantisation is simulated, and taken off again.

A linear layer by itself; layers that share an input, which the first of them computes all at once; a gated MLP as one
function. They are bound on instances, so that no class is patched, and they hold for every backend: what a backend
fuses by itself, it gives up for a layer that it has to call.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import adapter_of, base_linear
from qat.experts import ExpertMatrix, expert_matrices, experts_forward
from qat.layer import LayerNumerics, Projection
from qat.linear import fake_quant_linear, fake_quant_linears, fake_quant_swiglu
from qat.reference import never
from quantize.errors import UserError

_MARK = "activation_fake_quantizer"  # a child of this name makes Unsloth's fused kernels call the projection instead
_SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
"""Names of sibling layers that are called one after another with the same input, in every model known to us."""
_GATED = ("gate_proj", "up_proj", "down_proj")

Layers = Sequence[tuple[Any, LayerNumerics]]


@dataclass
class Binding:
    """A forward on one instance.

    Attributes:
        module: whose forward it is.
        forward: (module, inputs) -> outputs.
        before: the instance's own forward that it replaces, such as Unsloth's; None = its class's.
        is_reference: whether the model is asked, at the moment, for what it was before the fine-tuning.
    """

    module: Any
    forward: Callable[..., Any]
    before: Any = None
    is_reference: Callable[[], bool] = never

    def bind(self) -> None:
        """Puts the forward in."""

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if module is not self.module:
                raise UserError("this is a copy of a prepared model; copy it before prepare_qat, and prepare the copy")
            if self.is_reference():
                plain = self.before or types.MethodType(type(module).forward, module)
                return plain(*args, **kwargs)
            return self.forward(module, *args, **kwargs)

        forward.fake_quantised = True  # type: ignore[attr-defined]
        self.before = vars(self.module).get("forward")
        self.module.forward = types.MethodType(forward, self.module)
        if hasattr(self.module, "base_layer"):
            self.module.base_layer.add_module(_MARK, nn.Identity())

    def unbind(self) -> None:
        """Puts back what was there before."""
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before
        if hasattr(self.module, "base_layer"):
            del self.module.base_layer._modules[_MARK]


def is_bound(module: nn.Module) -> bool:
    """Whether one of these forwards is in."""
    return hasattr(vars(module).get("forward"), "fake_quantised")


def bindings_inside(model: nn.Module, layers: Layers) -> list[Binding]:
    """The forwards that put the adapters inside the fake quantisers."""
    numerics = {id(module): found for module, found in layers}
    shared: dict[int, Binding] = {}
    blocks: list[Binding] = []
    for parent in model.modules():
        for names in _SHARED:
            members = _children(parent, names, numerics)
            if len({base_linear(module).in_features for module, _ in members}) == 1:
                group = _SharedInput(members)
                shared |= {
                    id(module): Binding(module, group.forward(index)) for index, (module, _) in enumerate(members)
                }
        members = _children(parent, _GATED, numerics)
        if members and _is_swiglu(parent):
            blocks.append(Binding(parent, _gated_forward(members)))
    return [*(shared.get(id(module)) or Binding(module, _inside(module, found)) for module, found in layers), *blocks]


def bindings_outside(layers: Layers) -> list[Binding]:
    """The forwards that leave the adapters outside, for comparison."""
    return [Binding(module, _outside(module, numerics)) for module, numerics in layers]


def bindings_of_experts(
    model: nn.Module, layers: Mapping[str, tuple[Any, LayerNumerics]], *, inside: bool
) -> list[Binding]:
    """The forwards of fused experts of which at least one matrix is fake-quantised.

    Args:
        layers: name -> (layer, its numbers) of all that is.
    """
    together: dict[int, list[tuple[ExpertMatrix, LayerNumerics | None]]] = {}
    for name, matrix in expert_matrices(model).items():
        found, numerics = layers.get(name, (matrix, None))
        together.setdefault(id(matrix.experts), []).append((found, numerics))
    return [
        Binding(pair[0][0].outer, experts_forward(pair, inside=inside))
        for pair in together.values()
        if any(numerics is not None for _, numerics in pair)
    ]


def _children(parent: nn.Module, names: Sequence[str], numerics: dict[int, LayerNumerics]) -> list[tuple[Any, Any]]:
    """(layer, its numerics) of the children of these names, which must all be fake-quantised alike."""
    modules = [parent._modules.get(name) for name in names]
    members = [(module, numerics[id(module)]) for module in modules if module is not None and id(module) in numerics]
    if len(members) < len(names) or len({(n.numbers, n.group_size, n.dtype) for _, n in members}) > 1:
        return []
    weights = [base_linear(module).weight for module, _ in members]
    return members if len({(weight.device, weight.dtype) for weight in weights}) == 1 else []


# ---------------------------------------------------------------------- one layer


class _Tensors:
    """What one layer multiplies, looked up in its modules at each call, where peft may have changed it."""

    def __init__(self, module: Any, numerics: LayerNumerics) -> None:
        self.module, self.numerics = module, numerics
        self.linear = base_linear(module)
        self.adapted = adapter_of(module)[0] is not None
        if self.adapted:
            (self.name,) = module.active_adapters

    def projection(self) -> Projection:
        """The tensors in use: no adapter where peft disabled that of this layer alone (`qat.reference` has the rest).

        Raises:
            UserError: peft changed the adapter since it was prepared: what is computed would not be what ships.
        """
        module, parameters = self.module, self.linear._parameters
        weight = parameters["weight"]
        assert weight is not None
        lora_a = lora_b = None
        if self.adapted and not module.disable_adapters:
            if module.merged:
                raise UserError(
                    f"{self.numerics.name}: its adapter was merged after prepare_qat; "
                    "call model.unmerge_adapter() first"
                )
            if module.active_adapters != [self.name] or module.scaling[self.name] != self.numerics.scaling:
                raise UserError(
                    f"{self.numerics.name}: another adapter was made active after prepare_qat; prepare the model again"
                )
            lora_a, lora_b = (matrices[self.name]._parameters["weight"] for matrices in (module.lora_A, module.lora_B))
        return Projection(weight, lora_a, lora_b, parameters["bias"], self.numerics.factor)


def _inside(module: Any, numerics: LayerNumerics) -> Callable[..., Tensor]:
    tensors = _Tensors(module, numerics)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projection = tensors.projection()
        output = fake_quant_linear(x, projection, numerics)
        numerics.count()
        dropout = _dropout(self)
        if dropout is None or projection.lora_a is None or projection.lora_b is None:
            return output
        # Dropout perturbs the adapter's input around its mean, which is what the merged weight multiplies.
        noise = dropout(x) - x
        return output + _adapter_output(noise, projection, numerics.scaling).to(output.dtype)

    return forward


def _outside(module: Any, numerics: LayerNumerics) -> Callable[..., Tensor]:
    tensors = _Tensors(module, numerics)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projection = tensors.projection()
        output = fake_quant_linear(x, projection._replace(lora_a=None, lora_b=None), numerics)
        numerics.count()
        if projection.lora_a is None or projection.lora_b is None:
            return output
        dropout = _dropout(self)
        inputs = x if dropout is None else dropout(x)
        return output + _adapter_output(inputs, projection, numerics.scaling).to(output.dtype)

    return forward


def _adapter_output(inputs: Tensor, projection: Projection, scaling: float) -> Tensor:
    assert projection.lora_a is not None and projection.lora_b is not None
    return inputs.to(projection.lora_a.dtype) @ projection.lora_a.t() @ projection.lora_b.t() * scaling


def _dropout(module: Any) -> nn.Dropout | None:
    """LoRA's dropout of a layer, where it does something at the moment."""
    if not getattr(module, "lora_dropout", None) or not module.training or module.disable_adapters:
        return None
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name] if name in module.lora_dropout else None
    return dropout if isinstance(dropout, nn.Dropout) and dropout.p > 0 else None


# ---------------------------------------------------------------------- several layers at once


class _SharedInput:
    """Sibling layers with the same input: when the first is called it computes all, and the others take theirs.

    Where they turn out to be called with inputs of their own (cross attention), or not all of them (layers that share
    the keys of another), each computes for itself from then on.
    """

    def __init__(self, members: Layers) -> None:
        self.members = members
        self.tensors = [_Tensors(module, numerics) for module, numerics in members]
        self.numerics = [numerics for _, numerics in members]
        self.separate = self._parted = False
        self._input: tuple[Tensor, int, bool] | None = None
        self._waiting: dict[int, Tensor] = {}

    def forward(self, index: int) -> Callable[..., Tensor]:
        """The forward of the layer at that place."""
        alone = _inside(*self.members[index])

        def forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                if self._waiting:  # one of them was not called
                    self._part()
                if torch._C._current_graph_task_id() == -1:  # checkpointing recomputes what forward computed
                    self.separate = self._parted
                output = None if self.separate or self._perturbed() else self._compute(x)
            else:
                output = self._take(index, x)
            if output is None:
                return alone(module, x)
            self.numerics[index].count()  # not when it is computed: a backend may never ask for it
            return output

        return forward

    def _perturbed(self) -> bool:
        return any(_dropout(module) is not None for module, _ in self.members)

    def _compute(self, x: Tensor) -> Tensor:
        output, *others = fake_quant_linears(x, [tensors.projection() for tensors in self.tensors], self.numerics)
        self._input = (x, _version(x), torch.is_grad_enabled())
        self._waiting = dict(enumerate(others, start=1))
        return output

    def _part(self) -> None:
        self._parted, self._input, self._waiting = True, None, {}

    def _take(self, index: int, x: Tensor) -> Tensor | None:
        if index not in self._waiting:
            return None
        assert self._input is not None
        if x is not self._input[0] or (_version(x), torch.is_grad_enabled()) != self._input[1:]:
            self._part()
            return None
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _gated_forward(members: Layers) -> Callable[..., Tensor]:
    numerics = [found for _, found in members]
    layers = [_Tensors(module, found) for module, found in members]

    def forward(self: Any, x: Tensor) -> Tensor:
        if any(_dropout(module) is not None for module, _ in members):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
        output = fake_quant_swiglu(x, [tensors.projection() for tensors in layers], numerics)
        for layer in numerics:
            layer.count()
        return output

    return forward


def _is_swiglu(module: Any) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)), asked of its class's own forward."""
    own = vars(module).get("forward")
    if own is not None and not getattr(own, "__module__", "").startswith("unsloth."):
        return False
    if hasattr(module, "_unsloth_forward") or type(getattr(module, "act_fn", None)).__name__ not in _SILU:
        return False
    stand_in = types.SimpleNamespace(
        gate_proj=lambda x: _Term("gate", x),
        up_proj=lambda x: _Term("up", x),
        down_proj=lambda x: _Term("down", x),
        act_fn=lambda x: _Term("act", x),
    )
    try:
        computed = type(module).forward(stand_in, _Term("x"))
    except Exception:  # it wants more than the layers: no plain gated MLP
        return False
    return str(computed) == "down((act(gate(x())) * up(x())))"


_SILU = ("SiLU", "SiLUActivation")


class _Term:
    """A term of what a forward computes, written out."""

    def __init__(self, name: str, *inside: object) -> None:
        self.text = f"{name}({', '.join(map(str, inside))})"

    def __mul__(self, other: object) -> _Term:
        product = _Term("")
        product.text = f"({self} * {other})"
        return product

    def __str__(self) -> str:
        return self.text
