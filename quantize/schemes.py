"""THE place to add a format: each entry of `SCHEMES` is one numeric format, from fake quantisation to the checkpoint.

Imports no torch at module level, so that `train --help` stays quick: round trips and torchao configs are called late.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from quantize.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torchao.core.config import AOBaseConfig


def _int4_weight(weight: Tensor, group_size: int | None) -> Tensor:
    from quantize.numerics import int_symmetric_per_group

    return int_symmetric_per_group(weight, group_size or weight.shape[-1], bits=4)


def _int8_row_weight(weight: Tensor, group_size: int | None) -> Tensor:
    from quantize.numerics import int_symmetric_per_group

    return int_symmetric_per_group(weight, weight.shape[-1], bits=8)


def _tinygemm_weight(weight: Tensor, group_size: int | None) -> Tensor:
    from quantize.numerics import int4_tinygemm

    return int4_tinygemm(weight, group_size or weight.shape[-1])


def _fp8_weight(weight: Tensor, group_size: int | None) -> Tensor:
    from quantize.numerics import fp8_per_row

    return fp8_per_row(weight)


def _int8_activation(activation: Tensor) -> Tensor:
    from quantize.numerics import int8_asymmetric_per_token

    return int8_asymmetric_per_token(activation)


def _fp8_activation(activation: Tensor) -> Tensor:
    from quantize.numerics import fp8_per_row

    return fp8_per_row(activation)


def _int8_int4_config(group_size: int | None) -> AOBaseConfig:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(group_size or 32),
    )


def _int8_embedding_config() -> AOBaseConfig:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))


def _int4_tile_packed_config(group_size: int | None) -> AOBaseConfig:
    from torchao.quantization import Int4WeightOnlyConfig

    # No HQQ: after QAT it would choose other numbers than those that were trained.
    return Int4WeightOnlyConfig(group_size=group_size or 128, int4_packing_format="tile_packed_to_4d")


def _fp8_config(group_size: int | None) -> AOBaseConfig:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization.quantize_.common import KernelPreference

    # The torch kernel, also where mslk is installed: mslk's has other numbers than those that were trained.
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), kernel_preference=KernelPreference.TORCH)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One place the weights can run, their layout there, and the numbers of that layout."""

    name: str
    """What users type: "cpu", "cuda", "cuda-sm80"."""
    config: Callable[[int | None], AOBaseConfig]
    """Group size -> torchao config that writes this layout."""
    weight: Callable[[Tensor, int | None], Tensor]
    """Round trip of a weight (O, I), given the group size."""
    activation: Callable[[Tensor], Tensor] | None = None
    """Round trip of a linear's input (..., I); None where activations stay in 16 bit."""
    needs: tuple[str, ...] = ()
    """What the machine must have, checked by `quantize.hardware`: "cuda>=8.9"."""
    dtype: str | None = None
    """The dtype that the merged weight must have; None = any."""
    max_gap_nats: float = 0.0
    """Largest |trained - shipped| loss in nats a token; 0 = equal to the last bit."""


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
    embedding: Callable[[], AOBaseConfig] | None = None
    """Quantises the (untied) input embedding too; its round trip is int8 per row."""
    skip: tuple[str, ...] = ("lm_head",)
    """Last parts of module names that keep 16 bit."""
    embedding_weight: Callable[[Tensor, int | None], Tensor] = field(default=_int8_row_weight)

    def pick_group_size(self, asked: int | None) -> int | None:
        """The group size to use. Raises UserError where this scheme does not offer `asked`."""
        if asked is None:
            return self.group_size
        if asked not in self.group_sizes:
            offered = ", ".join(map(str, self.group_sizes)) or "none: it has one scale per output row"
            raise UserError(f"quantize.group_size={asked} is not offered by {self.name}; it offers {offered}")
        return asked

    def find_target(self, name: str) -> Target:
        """The target of that name. Raises UserError with this scheme's targets."""
        if name not in self.targets:
            raise UserError(f"quantize.target={name} is unknown for {self.name}; choose from {', '.join(self.targets)}")
        return self.targets[name]


def _named(*targets: Target) -> Mapping[str, Target]:
    return MappingProxyType({target.name: target for target in targets})


# torchao stores and computes both alike: the same numbers on either device.
_INT8_INT4_TARGETS = _named(
    Target(name="cpu", config=_int8_int4_config, weight=_int4_weight, activation=_int8_activation),
    Target(
        name="cuda", config=_int8_int4_config, weight=_int4_weight, activation=_int8_activation, needs=("cuda>=7.0",)
    ),
)

_ALL = (
    Scheme(
        name="int8-int4",
        summary="int8 dynamic activations (per token), int4 weights (per group): phones and CPUs",
        bits=4,
        targets=_INT8_INT4_TARGETS,
        group_size=32,
        group_sizes=(32, 64, 128, 256),
    ),
    Scheme(
        name="int8-int4-mobile",
        summary="int8-int4, with lm_head in int4 and the untied embedding in int8: the mobile releases' recipe",
        bits=4,
        targets=_INT8_INT4_TARGETS,
        group_size=32,
        group_sizes=(32, 64, 128, 256),
        embedding=_int8_embedding_config,
        skip=(),
    ),
    Scheme(
        name="int4",
        summary="int4 weights only (per group, tinygemm's tile-packed layout): A100 and newer, small batches",
        bits=4,
        targets=_named(
            Target(
                name="cuda-sm80",
                config=_int4_tile_packed_config,
                weight=_tinygemm_weight,
                needs=("cuda>=8.0",),
                dtype="bfloat16",
                max_gap_nats=0.01,  # equal weights, summed in another order; measured: up to 0.002 (docs/RESULTS.md)
            )
        ),
        group_size=128,
        group_sizes=(32, 64, 128, 256),
    ),
    Scheme(
        name="fp8",
        summary="float8 dynamic activations and weights (per row): Ada, Hopper and newer",
        bits=8,
        targets=_named(
            Target(
                name="cuda-sm89",
                config=_fp8_config,
                weight=_fp8_weight,
                activation=_fp8_activation,
                needs=("cuda>=8.9",),
                dtype="bfloat16",
                # Equal weights, but the kernel sums in another order and scales after the sum: a last-bit difference
                # moves activations of the next layers over an fp8 rounding border. Measured: up to 0.021
                # (docs/RESULTS.md), of either sign, and 0.06 is what fp8 itself costs the same model.
                max_gap_nats=0.03,
            )
        ),
        group_size=None,
    ),
)

SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _ALL})


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises UserError with the nearest and all names."""
    if name in SCHEMES:
        return SCHEMES[name]
    near = difflib.get_close_matches(name, SCHEMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown scheme {name!r}; {hint}choose from {', '.join(SCHEMES)}")
