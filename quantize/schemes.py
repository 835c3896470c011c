"""THE place to add a format: each entry of `SCHEMES` is one numeric format, from fake quantisation to the checkpoint.

What an entry is made of is in `quantize.formats`; the layouts of torchao that its targets take are in
`quantize.layouts`. Imports no torch at module level, so that `train --help` stays quick.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from quantize.errors import UserError
from quantize.formats import Scheme, Target
from quantize.layouts import (
    FOR_CPUS,
    INTX_GROUPS,
    NOT_COMPILED,
    OVER_16_ROWS,
    fp8,
    fp8_int4,
    int4,
    int8_int4_targets,
    int8_int8,
    int8_rows,
    intx,
    intx_targets,
    mx_targets,
    named,
    nvfp4_targets,
)
from quantize.speed import ServedSpeed, on_cpu, on_gpu

__all__ = ["SCHEMES", "Scheme", "Target", "find_scheme", "served_formats"]

_ALL = (
    Scheme(
        name="int8-int4",
        summary="int8 dynamic activations (per token), int4 weights (per group): phones and CPUs",
        bits=4,
        targets=int8_int4_targets(on_cpu(0.27, 0.54), on_gpu(0.47, 0.47, 0.51, 0.58, 32, prefill=0.90)),
        group_size=32,
        group_sizes=INTX_GROUPS,
    ),
    Scheme(
        name="int8-int4-mobile",
        summary="int8-int4, with lm_head in int4 and the untied embedding in int8: the mobile releases' recipe",
        bits=4,
        targets=int8_int4_targets(on_cpu(0.09, 0.17), on_gpu(0.28, 0.29, 0.32, 0.39, 32, prefill=0.85)),
        group_size=32,
        group_sizes=INTX_GROUPS,
        embedding=intx(8, "embedding"),
        skip=(),
    ),
    Scheme(
        name="int4",
        summary="int4 weights only (per group; tinygemm's tile-packed layout on CUDA): A100 and newer, small batches",
        bits=4,
        targets=named(
            int4(
                "cuda-sm80",
                "tile_packed_to_4d",
                "TINYGEMM",
                "tile_packed_tensor",
                needs=("cuda>=8.0",),
                experts=True,
                vllm="",
                served=ServedSpeed(latency=((1, 1.29), (256, 0.08)), weights=0.40, group_size=128),
                max_output_error=0.0005,  # equal weights, summed in another order: measured 0.0002
                # Measured: 0.0001 to 0.0009 over 2,400 samples, 0.006 over 64 (docs/RESULTS.md): a last bit here and
                # there is noise whose mean shrinks with the samples, and a run may have few.
                max_gap_nats=0.01,
                speed=on_gpu(1.90, 1.13, 0.25, 0.09, 128, prefill=0.05),
            ),
            # The others are asked for by name: --qat int4 on a laptop is meant for a server, and without mslk at that.
            int4(
                "cuda-sm90-mslk",
                "plain",
                "INT4_MSLK",
                "int4_plain_tensor",
                needs=("cuda>=9.0", "mslk"),
                by_request=True,
                vllm="",
                vllm_arguments=NOT_COMPILED,  # mslk 1.1.0 tells torch.compile nothing of this kernel's output
                served=ServedSpeed(latency=((1, 0.89), (256, 0.94)), weights=0.38, group_size=128),
                group_sizes=(64, 128, 256),  # with groups of 32 mslk 1.1.0 computes something else, silently: 48% off
                max_output_error=0.0005,
                max_gap_nats=0.01,
                speed=on_gpu(0.95, 0.94, 0.92, 0.85, 128, prefill=0.93),
            ),
            intx(4, "cpu", by_request=True, speed=on_cpu(0.31, 0.33, 128)),
            intx(
                4,
                "cuda",
                by_request=True,
                needs=("cuda>=7.0",),
                speed=on_gpu(0.49, 0.49, 0.53, 0.61, 128, prefill=0.95),
            ),
        ),
        group_size=128,
        group_sizes=INTX_GROUPS,
        left_out={
            "PRESHUFFLED (mslk)": "torchao's safetensors cannot hold Int4PreshuffledTensor, so no checkpoint "
            "of it could be loaded; cuda-sm90-mslk has the same numbers in the PLAIN layout"
        },
    ),
    *(
        Scheme(
            name=f"int{bits}",
            summary=f"int{bits} weights only (per group, Intx): {what}",
            bits=bits,
            targets=intx_targets(bits, cpu, cuda),
            group_size=32,
            group_sizes=INTX_GROUPS,
        )
        for bits, what, cpu, cuda in (
            (7, "between 6 bits and 8", None, None),
            (6, "between 4 bits and 8", None, None),
            (5, "where 4 bits are too few", None, None),
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
        targets=named(
            int8_rows("cpu", vllm=FOR_CPUS, speed=on_cpu(0.94, 0.61, None)),
            # torch.compile makes something far slower of this layer, in vLLM too (docs/RESULTS.md).
            int8_rows(
                "cuda",
                needs=("cuda>=7.0",),
                vllm="",
                vllm_arguments=NOT_COMPILED,
                served=ServedSpeed(latency=((1, 0.21), (256, 0.49)), weights=0.63),
                speed=on_gpu(0.24, 0.23, 0.25, 0.31, None, prefill=0.60, compiled=False),
            ),
            # As many bits in another layout: not a scheme of its own, as whoever asks for int8 wants rows.
            intx(
                8,
                "cpu-intx",
                by_request=True,
                group_sizes=INTX_GROUPS,
                note="a scale per group of 32 or more in place of one a row",
            ),
            intx(
                8,
                "cuda-intx",
                by_request=True,
                needs=("cuda>=7.0",),
                group_sizes=INTX_GROUPS,
                note="a scale per group of 32 or more in place of one a row",
            ),
        ),
        group_size=None,
    ),
    Scheme(
        name="int8-int8",
        summary="int8 dynamic activations (per token), int8 weights (per row): integer kernels of CPUs and GPUs",
        bits=8,
        targets=named(
            int8_int8(
                "cpu",
                vllm=FOR_CPUS,
                note="torch's int8 kernel saturates on x86 without VNNI: other numbers there than were trained",
            ),
            int8_int8(
                "cuda",
                needs=("cuda>=7.5",),
                vllm="",
                vllm_arguments=OVER_16_ROWS,
                served=ServedSpeed(latency=((1, 1.04), (256, 0.98)), weights=0.63),
            ),
        ),
        group_size=None,
    ),
    Scheme(
        name="fp8",
        summary="float8 dynamic activations and weights (per row): Ada, Hopper and newer",
        bits=8,
        targets=named(
            # On a GPU that has it, training multiplies with the shipped kernel itself: equal bits for equal shapes.
            fp8(
                "cuda-sm89",
                "FP8",
                "TORCH",
                needs=("cuda>=8.9",),
                vllm="",
                served=ServedSpeed(latency=((1, 1.05), (256, 1.29)), weights=0.63),
                speed=on_gpu(1.14, 1.13, 1.12, 1.13, None, prefill=1.52),
            ),
            # Faster, with numbers of its own.
            fp8(
                "cuda-sm90-mslk",
                "FP8_MSLK",
                "MSLK",
                needs=("cuda>=9.0", "mslk"),
                by_request=True,
                vllm="",
                served=ServedSpeed(latency=((1, 1.29), (256, 1.27)), weights=0.58),
                speed=on_gpu(1.31, 1.29, 1.24, 1.12, None, prefill=1.46),
            ),
        ),
        group_size=None,
    ),
    Scheme(
        name="fp8-int4",
        summary="float8 dynamic activations, int4 weights (per group of 128): Hopper with mslk-cuda",
        bits=4,
        targets=named(
            fp8_int4(
                "cuda-sm90-mslk",
                needs=("cuda>=9.0", "mslk"),
                # The kernel keeps fewer bits of its running sum than float32 has; measured: 0.003.
                max_output_error=0.004,
                max_gap_nats=0.03,
                speed=on_gpu(0.81, 0.86, 0.87, 0.72, 128, prefill=1.22),
            )
        ),
        group_size=128,
        group_sizes=(128,),
    ),
    *(
        Scheme(
            name=f"mxfp{bits}",
            summary=f"MXFP{bits} dynamic activations and weights (blocks of 32): Blackwell",
            bits=bits,
            targets=mx_targets(bits),
            group_size=32,
            group_sizes=(32,),
        )
        for bits in (8, 4)
    ),
    Scheme(
        name="nvfp4",
        summary="NVFP4 dynamic activations and weights (blocks of 16 under one scale of the tensor): Blackwell",
        bits=4,
        targets=nvfp4_targets(),
        group_size=16,
        group_sizes=(16,),
    ),
)

SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _ALL})


def served_formats() -> list[tuple[Scheme, Target]]:
    """The formats that vLLM loads as they are, each with the target that it does so for."""
    return [(scheme, target) for scheme in SCHEMES.values() for target in scheme.targets.values() if not target.vllm]


_ELSEWHERE = {"w4a16": "int4", "w8a16": "int8", "w4a8": "int8-int4", "w8a8": "int8-int8", "fp8-fp8": "fp8"}
"""What others call a format -> its name here."""


def find_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises UserError with the nearest and all names."""
    if name in SCHEMES:
        return SCHEMES[name]
    spelled = name.lower().replace("_", "-")
    same = [known for known in SCHEMES if sorted(known.split("-")) == sorted(spelled.split("-"))]
    near = [_ELSEWHERE[spelled]] if spelled in _ELSEWHERE else same
    near = near or difflib.get_close_matches(spelled, SCHEMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown scheme {name!r}; {hint}choose from {', '.join(SCHEMES)}")
