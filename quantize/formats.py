"""What a format is: a scheme and the targets that its weights can run on. The formats are in `quantize.schemes`.

Imports no torch at module level: numbers and torchao configs are called late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.speed import ServedSpeed, Speed

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from quantize.numerics import Numbers, Quantised


@dataclass(frozen=True, kw_only=True)
class Target:
    """One place the weights can run, their layout there, and the numbers of that layout."""

    name: str
    """What users type: "cpu", "cuda", "cuda-sm80"."""
    config: Callable[[int | None], AOBaseConfig]
    """Group size -> torchao config that names this layout in config.json."""
    numbers: Callable[[], Numbers]
    """The numbers of this layout, called late. Two targets of a scheme may differ in them."""
    tensor: Callable[[Quantised, torch.dtype], Any]
    """A weight on its grid -> torchao's tensor of this layout."""
    needs: tuple[str, ...] = ()
    """What the machine must have, checked by `quantize.hardware`: "cuda>=8.9"."""
    dtype: str | None = None
    """The dtype that the layer computes in; None = any."""
    by_request: bool = False
    """Taken only where `quantize.target` names it."""
    multiple: int = 1
    """in_features and out_features must be multiples of it."""
    experts: bool = False
    """Its tensor, one of `quantize.experts.TENSORS`, holds the matrices of fused experts and gives one back."""
    group_sizes: tuple[int, ...] = ()
    """The group sizes that its kernel computes rightly; empty = the scheme's."""
    max_output_error: float = 0.0
    """Largest |real - simulated| / |real| of a layer's outputs (Euclidean norms); 0 = equal to the last bit."""
    max_gap_nats: float = 0.0
    """Largest |trained - shipped| loss in nats a token; 0 = equal to the last bit."""
    stored_bits: float | None = None
    """Bits that a quantised weight takes in the file, without scales; None = the scheme's own."""
    scale_bits: int = 16
    """Bits of one scale in the file."""
    speed: Speed | None = None
    """None = not measured."""
    vllm: str = "it was never loaded there"
    """Why vLLM is not for this layout; empty = it loads the checkpoint as it is."""
    vllm_arguments: tuple[str, ...] = ()
    """Options of `vllm serve` without which it does not run this layout."""
    served: ServedSpeed | None = None
    """How fast vLLM serves it; None = not measured."""
    note: str = ""
    """One line on what sets it apart from the scheme's other targets, or on what was never tried of it."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One numeric format, from fake quantisation to export."""

    name: str
    """What users type: "int8-int4"."""
    summary: str
    """One line for --help and the docs table."""
    bits: float
    """Nominal bits a quantised weight, without scales."""
    targets: Mapping[str, Target]
    """Where it can run; the first is taken where a machine can run none of them."""
    group_size: int | None
    """Weights per scale along in_features by default; None = one scale per output row."""
    group_sizes: tuple[int, ...] = ()
    """The group sizes that may be asked for; empty = not adjustable."""
    embedding: Target | None = None
    """Quantises the (untied) input embedding too, in this layout."""
    embedding_bits: float = 8
    """Nominal bits a weight of the embedding, where it is quantised."""
    skip: tuple[str, ...] = ("lm_head",)
    """Last parts of module names that keep 16 bit."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Layouts of it that others offer and this does not -> the reason."""

    def offered_group_sizes(self, target: Target | None = None) -> tuple[int, ...]:
        """The group sizes that may be asked for, at `target` where its kernel takes others; empty = not adjustable."""
        return (target.group_sizes if target is not None else ()) or self.group_sizes

    def pick_group_size(self, asked: int | None, target: Target | None = None) -> int | None:
        """The group size to use: the one asked for, else the scheme's, or `target`'s first where it lacks that.

        Raises:
            UserError: this scheme, or its kernel at `target`, does not offer the one asked for.
        """
        limited = target is not None and bool(target.group_sizes)
        offered = self.offered_group_sizes(target)
        if asked is None:
            return offered[0] if limited and self.group_size not in offered else self.group_size
        if asked not in offered:
            names = ", ".join(map(str, offered)) or "none: it has one scale per output row"
            where = f" for {target.name}" if limited and target is not None else ""
            others = [other.name for other in self.targets.values() if asked in other.group_sizes]
            hint = f"; quantize.target={' or '.join(others)} offers {asked}" if others else ""
            raise UserError(
                f"quantize.group_size={asked} is not offered by {self.name}{where}; it offers {names}{hint}"
            )
        return asked

    def bits_on_disk(self, target: Target) -> float:
        """Bits a quantised weight in the file, with the scales of the group size that is taken by default."""
        stored = self.bits if target.stored_bits is None else target.stored_bits
        group = self.pick_group_size(None, target)
        return stored + (target.scale_bits / group if group else 0)

    def find_target(self, name: str) -> Target:
        """The target of that name. Raises UserError with this scheme's targets."""
        if name not in self.targets:
            raise UserError(f"quantize.target={name} is unknown for {self.name}; choose from {', '.join(self.targets)}")
        return self.targets[name]

    def eligible(self, asked: str | None) -> list[Target]:
        """The targets that may be taken: the one that is asked for, else all that need no asking.

        Raises:
            UserError: `asked` is no target of this scheme.
        """
        if asked is not None:
            return [self.find_target(asked)]
        return [target for target in self.targets.values() if not target.by_request]
