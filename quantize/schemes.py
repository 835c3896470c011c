"""THE place to add a format: each entry of `SCHEMES` is one numeric format, from fake quantisation to the checkpoint.

Imports no torch at module level, so that `train --help` stays quick: round trips and torchao configs are called late.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.speed import Speed, on_cpu, on_gpu

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from quantize.numerics import Numbers, Quantised


def _numbers(module: str, name: str) -> Callable[[], Numbers]:
    """The numbers of that name in `quantize.<module>`, imported when they are called for."""

    def load() -> Numbers:
        found: Numbers = getattr(import_module(f"quantize.{module}"), name)
        return found

    return load


def _tensor(name: str, **options: Any) -> Callable[[Quantised, torch.dtype], Any]:
    """The function of that name in `quantize.tensors`, imported when it is called."""

    def build(quantised: Quantised, dtype: torch.dtype) -> Any:
        return getattr(import_module("quantize.tensors"), name)(quantised, dtype, **options)

    return build


def _int8_int4_config(group_size: int | None) -> AOBaseConfig:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(group_size or 32),
    )


def _int8_config(group_size: int | None) -> AOBaseConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4_config(layout: str) -> Callable[[int | None], AOBaseConfig]:
    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Int4WeightOnlyConfig

        # No HQQ: after QAT it would choose other numbers than those that were trained.
        return Int4WeightOnlyConfig(group_size=group_size or 128, int4_packing_format=layout)

    return config


def _fp8_int4_config(group_size: int | None) -> AOBaseConfig:
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig

    # Not preshuffled: safetensors cannot hold that layout.
    return Float8DynamicActivationInt4WeightConfig(int4_packing_format="plain")


def _intx_target(bits: int, name: str, **options: Any) -> Target:
    """Intx of `bits`, weights only: integers in int8 containers, multiplied in 16 bit after they are restored."""

    def config(group_size: int | None) -> AOBaseConfig:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup

        granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
        return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)

    numbers, tensor = _numbers("integers", f"INT{bits}"), _tensor("intx_tensor", bits=bits)
    return Target(name=name, config=config, numbers=numbers, tensor=tensor, **options)


def _fp8_target(name: str, numbers: str, kernel: str, **options: Any) -> Target:
    """float8 per row on one of torchao's kernels, which also decides how the scales are rounded."""

    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
        from torchao.quantization.quantize_.common import KernelPreference

        # Never AUTO, which takes other numbers where mslk is installed.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), kernel_preference=KernelPreference[kernel]
        )

    return Target(
        name=name,
        config=config,
        numbers=_numbers("float8", numbers),
        tensor=_tensor("float8_tensor", kernel=kernel),
        dtype="bfloat16",
        multiple=16,
        **options,
    )


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
    group_sizes: tuple[int, ...] = ()
    """The group sizes that its kernel computes rightly; empty = the scheme's."""
    max_output_error: float = 0.0
    """Largest |real - simulated| / |real| of a layer's outputs (Euclidean norms); 0 = equal to the last bit."""
    max_gap_nats: float = 0.0
    """Largest |trained - shipped| loss in nats a token; 0 = equal to the last bit."""
    stored_bits: float | None = None
    """Bits that a quantised weight takes in the file, without scales; None = the scheme's own."""
    speed: Speed | None = None
    """None = not measured."""


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

    def offered_group_sizes(self, target: Target | None = None) -> tuple[int, ...]:
        """The group sizes that may be asked for, at `target` where its kernel takes fewer; empty = not adjustable."""
        return (target.group_sizes if target is not None else ()) or self.group_sizes

    def pick_group_size(self, asked: int | None, target: Target | None = None) -> int | None:
        """The group size to use. Raises UserError where this scheme, or its kernel at `target`, does not offer it."""
        size = self.group_size if asked is None else asked
        limited = target is not None and target.group_sizes
        offered = self.offered_group_sizes(target)
        if asked is None and not limited:
            return size
        if size not in offered:
            names = ", ".join(map(str, offered)) or "none: it has one scale per output row"
            where = f" for {target.name}" if limited and target is not None else ""
            raise UserError(f"quantize.group_size={size} is not offered by {self.name}{where}; it offers {names}")
        return size

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


def _named(*targets: Target) -> Mapping[str, Target]:
    return MappingProxyType({target.name: target for target in targets})


def _cpu_and_cuda(
    config: Callable[[int | None], AOBaseConfig],
    numbers: Callable[[], Numbers],
    tensor: Callable[[Quantised, torch.dtype], Any],
    cpu: Speed,
    cuda: Speed,
) -> Mapping[str, Target]:
    # torchao's Intx and int8 tensors hold every integer in a byte.
    common: dict[str, Any] = {"config": config, "numbers": numbers, "tensor": tensor, "stored_bits": 8.0}
    return _named(
        Target(name="cpu", speed=cpu, **common),
        Target(name="cuda", needs=("cuda>=7.0",), speed=cuda, **common),
    )


def _int8_int4_targets(cpu: Speed, cuda: Speed) -> Mapping[str, Target]:
    # torchao stores and computes both alike: the same numbers on either device.
    numbers, tensor = _numbers("integers", "INT8_INT4"), _tensor("intx_tensor", bits=4, int8_activations=True)
    return _cpu_and_cuda(_int8_int4_config, numbers, tensor, cpu, cuda)


_GROUPS = (32, 64, 128, 256)

_ALL = (
    Scheme(
        name="int8-int4",
        summary="int8 dynamic activations (per token), int4 weights (per group): phones and CPUs",
        bits=4,
        targets=_int8_int4_targets(on_cpu(0.27, 0.54), on_gpu(0.47, 0.47, 0.51, 0.58, 32, prefill=0.90)),
        group_size=32,
        group_sizes=_GROUPS,
    ),
    Scheme(
        name="int8-int4-mobile",
        summary="int8-int4, with lm_head in int4 and the untied embedding in int8: the mobile releases' recipe",
        bits=4,
        targets=_int8_int4_targets(on_cpu(0.09, 0.17), on_gpu(0.28, 0.29, 0.32, 0.39, 32, prefill=0.85)),
        group_size=32,
        group_sizes=_GROUPS,
        embedding=_intx_target(8, "embedding"),
        skip=(),
    ),
    Scheme(
        name="int4",
        summary="int4 weights only (per group; tinygemm's tile-packed layout on CUDA): A100 and newer, small batches",
        bits=4,
        targets=_named(
            Target(
                name="cuda-sm80",
                config=_int4_config("tile_packed_to_4d"),
                numbers=_numbers("integers", "TINYGEMM"),
                tensor=_tensor("tile_packed_tensor"),
                needs=("cuda>=8.0",),
                dtype="bfloat16",
                max_output_error=0.0005,  # equal weights, summed in another order: measured 0.0002
                # Measured: 0.0001 to 0.0009 over 2,400 samples, 0.006 over 64 (docs/RESULTS.md): a last bit here and
                # there is noise whose mean shrinks with the samples, and a run may have few.
                max_gap_nats=0.01,
                speed=on_gpu(1.90, 1.13, 0.25, 0.09, 128, prefill=0.05),
            ),
            # The others are asked for by name: --qat int4 on a laptop is meant for a server, and without mslk at that.
            Target(
                name="cuda-sm90-mslk",
                config=_int4_config("plain"),
                numbers=_numbers("integers", "INT4_MSLK"),
                tensor=_tensor("int4_plain_tensor"),
                needs=("cuda>=9.0", "mslk"),
                dtype="bfloat16",
                by_request=True,
                group_sizes=(64, 128, 256),  # with groups of 32 mslk 1.1.0 computes something else, silently: 48% off
                max_output_error=0.0005,
                max_gap_nats=0.01,
                speed=on_gpu(0.95, 0.94, 0.92, 0.85, 128, prefill=0.93),
            ),
            _intx_target(4, "cpu", by_request=True, speed=on_cpu(0.31, 0.33, 128)),
            _intx_target(
                4,
                "cuda",
                by_request=True,
                needs=("cuda>=7.0",),
                speed=on_gpu(0.49, 0.49, 0.53, 0.61, 128, prefill=0.95),
            ),
        ),
        group_size=128,
        group_sizes=_GROUPS,
    ),
    *(
        Scheme(
            name=f"int{bits}",
            summary=f"int{bits} weights only (per group, Intx): {what}",
            bits=bits,
            targets=_named(
                _intx_target(bits, "cpu", speed=cpu), _intx_target(bits, "cuda", needs=("cuda>=7.0",), speed=cuda)
            ),
            group_size=32,
            group_sizes=_GROUPS,
        )
        for bits, what, cpu, cuda in (
            (
                3,
                "small models where 4 bits are too many",
                on_cpu(0.21, 0.27),
                on_gpu(0.48, 0.49, 0.53, 0.61, 32, prefill=0.96),
            ),
            (
                2,
                "research; needs QAT to be of use",
                on_cpu(0.25, 0.42),
                on_gpu(0.48, 0.49, 0.53, 0.60, 32, prefill=1.00),
            ),
        )
    ),
    Scheme(
        name="int8",
        summary="int8 weights only (per row): nearly free of loss, half the memory of 16 bit, slower in torch",
        bits=8,
        targets=_cpu_and_cuda(
            _int8_config,
            _numbers("integers", "INT8_ROWS"),
            _tensor("int8_tensor"),
            on_cpu(0.94, 0.61, None),
            # torch.compile makes something far slower of this layer (docs/RESULTS.md).
            on_gpu(0.24, 0.23, 0.25, 0.31, None, prefill=0.60, compiled=False),
        ),
        group_size=None,
    ),
    Scheme(
        name="fp8",
        summary="float8 dynamic activations and weights (per row): Ada, Hopper and newer",
        bits=8,
        targets=_named(
            # On a GPU that has it, training multiplies with the shipped kernel itself: equal bits for equal shapes.
            _fp8_target(
                "cuda-sm89",
                "FP8",
                "TORCH",
                needs=("cuda>=8.9",),
                speed=on_gpu(1.14, 1.13, 1.12, 1.13, None, prefill=1.52),
            ),
            # Faster, with numbers of its own.
            _fp8_target(
                "cuda-sm90-mslk",
                "FP8_MSLK",
                "MSLK",
                needs=("cuda>=9.0", "mslk"),
                by_request=True,
                speed=on_gpu(1.31, 1.29, 1.24, 1.12, None, prefill=1.46),
            ),
        ),
        group_size=None,
    ),
    Scheme(
        name="fp8-int4",
        summary="float8 dynamic activations, int4 weights (per group of 128): Hopper with mslk-cuda",
        bits=4,
        targets=_named(
            Target(
                name="cuda-sm90-mslk",
                config=_fp8_int4_config,
                numbers=_numbers("float8", "FP8_INT4"),
                tensor=_tensor("int4_plain_tensor", float8_activations=True),
                needs=("cuda>=9.0", "mslk"),
                dtype="bfloat16",
                # The kernel keeps fewer bits of its running sum than float32 has; measured: 0.003.
                max_output_error=0.004,
                max_gap_nats=0.03,
                speed=on_gpu(0.81, 0.86, 0.87, 0.72, 128, prefill=1.22),
            )
        ),
        group_size=128,
        group_sizes=(128,),
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
