"""torchao's layouts as targets: the config that names each in config.json, its numbers and its tensor, called late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantize.formats import Target
from quantize.speed import Speed

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from quantize.numerics import Numbers, Quantised

INTX_GROUPS = (32, 64, 128, 256)
_PHONES = "it is for phones and CPUs: vLLM has no kernel for it, and would restore 16 bit for every product"
_RESTORED = "vLLM has no kernel for it, and would restore 16 bit for every product"
FOR_CPUS = "it is for CPUs, and vLLM serves on GPUs, in the layout of the target cuda"
OVER_16_ROWS = (
    "--cudagraph-capture-sizes",
    *map(str, (24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)),
)
"""torch's integer product takes more than 16 rows at a time. vLLM fills a batch up to the next size that it has a CUDA
graph of, so none of them is to be smaller; by itself it begins with 1 and does not start."""
NOT_COMPILED = ("--compilation-config.mode=none", "--compilation-config.cudagraph_mode=FULL_DECODE_ONLY")
"""vLLM without torch.compile, each decoding step still one CUDA graph."""


def numbers_of(module: str, name: str) -> Callable[[], Numbers]:
    """The numbers of that name in `quantize.<module>`, imported when they are called for."""

    def load() -> Numbers:
        found: Numbers = getattr(import_module(f"quantize.{module}"), name)
        return found

    return load


def tensor_of(name: str, **options: Any) -> Callable[[Quantised, torch.dtype], Any]:
    """The function of that name in `quantize.tensors`, imported when it is called."""

    def build(quantised: Quantised, dtype: torch.dtype) -> Any:
        return getattr(import_module("quantize.tensors"), name)(quantised, dtype, **options)

    return build


def named(*targets: Target) -> Mapping[str, Target]:
    """Targets by their names, in that order."""
    return MappingProxyType({target.name: target for target in targets})


# ---------------------------------------------------------------------- integers


def int8_int4(name: str, numbers: str = "INT8_INT4", **options: Any) -> Target:
    """int8 dynamic activations, int4 weights per group, in int8 containers."""

    def config(group_size: int | None) -> AOBaseConfig:
        import torch
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig
        from torchao.quantization.granularity import PerGroup

        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            weight_granularity=PerGroup(group_size or 32),
        )

    return Target(
        name=name,
        config=config,
        numbers=numbers_of("integers", numbers),
        tensor=tensor_of("intx_tensor", bits=4, int8_activations=True),
        stored_bits=8.0,  # torchao's Intx and int8 tensors hold every integer in a byte
        experts=True,
        vllm=_PHONES,
        **options,
    )


def int8_int4_targets(cpu: Speed, cuda: Speed) -> Mapping[str, Target]:
    """torchao stores and computes both alike: the same numbers on either device, and those of ExecuTorch."""
    return named(
        int8_int4("cpu", speed=cpu),
        int8_int4("cuda", needs=("cuda>=7.0",), speed=cuda),
        int8_int4(
            "executorch",
            "INT8_INT4_XNNPACK",
            by_request=True,
            note="scales with bf16's values, as XNNPACK reads them on phones; in torch it runs as cpu does",
        ),
    )


def intx(bits: int, name: str, **options: Any) -> Target:
    """Intx of `bits`, weights only: integers in int8 containers, multiplied in 16 bit after they are restored."""

    def config(group_size: int | None) -> AOBaseConfig:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup

        granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
        return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)

    numbers, tensor = numbers_of("integers", f"INT{bits}"), tensor_of("intx_tensor", bits=bits)
    return Target(
        name=name, config=config, numbers=numbers, tensor=tensor, stored_bits=8.0, experts=True, vllm=_RESTORED,
        **options,
    )  # fmt: skip


def intx_targets(bits: int, cpu: Speed | None = None, cuda: Speed | None = None) -> Mapping[str, Target]:
    """Intx of `bits` on either device."""
    return named(intx(bits, "cpu", speed=cpu), intx(bits, "cuda", needs=("cuda>=7.0",), speed=cuda))


def int8_rows(name: str, **options: Any) -> Target:
    """int8 weights with one scale a row, multiplied as integers in 16 bit."""

    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    numbers, tensor = numbers_of("integers", "INT8_ROWS"), tensor_of("int8_tensor")
    return Target(name=name, config=config, numbers=numbers, tensor=tensor, stored_bits=8.0, experts=True, **options)


def int8_int8(name: str, **options: Any) -> Target:
    """int8 dynamic activations per token, int8 weights per row, multiplied as integers."""

    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        # Inductor's settings are the process's own: a format does not change them.
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)

    numbers, tensor = numbers_of("integers", "INT8_INT8"), tensor_of("int8_tensor", int8_activations=True)
    return Target(name=name, config=config, numbers=numbers, tensor=tensor, stored_bits=8.0, experts=True, **options)


def int4(name: str, layout: str, numbers: str, tensor: str, **options: Any) -> Target:
    """int4 weights per group, zero points and all, in one of the layouts of torchao's GPU kernels."""

    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Int4WeightOnlyConfig

        # No HQQ: after QAT it would choose other numbers than those that were trained.
        return Int4WeightOnlyConfig(group_size=group_size or 128, int4_packing_format=layout)

    return Target(
        name=name,
        config=config,
        numbers=numbers_of("integers", numbers),
        tensor=tensor_of(tensor),
        dtype="bfloat16",
        **options,
    )


# ---------------------------------------------------------------------- floats


def fp8(name: str, numbers: str, kernel: str, **options: Any) -> Target:
    """float8 per row on one of torchao's kernels, which also decides how the scales are rounded."""

    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
        from torchao.quantization.quantize_.common import KernelPreference

        from quantize.float8 import least_of

        # Never AUTO, which takes other numbers where mslk is installed.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(),
            kernel_preference=KernelPreference[kernel],
            activation_value_lb=least_of(kernel),
        )

    return Target(
        name=name,
        config=config,
        numbers=numbers_of("float8", numbers),
        tensor=tensor_of("float8_tensor", kernel=kernel),
        dtype="bfloat16",
        multiple=16,
        experts=True,
        **options,
    )


def fp8_int4(name: str, **options: Any) -> Target:
    """float8 dynamic activations, int4 weights per group of 128, with mslk's kernel."""

    def config(group_size: int | None) -> AOBaseConfig:
        from torchao.quantization import Float8DynamicActivationInt4WeightConfig

        # Not preshuffled: safetensors cannot hold that layout.
        return Float8DynamicActivationInt4WeightConfig(int4_packing_format="plain")

    return Target(
        name=name,
        config=config,
        numbers=numbers_of("float8", "FP8_INT4"),
        tensor=tensor_of("int4_plain_tensor", float8_activations=True),
        dtype="bfloat16",
        **options,
    )


# ---------------------------------------------------------------------- blocks with scales of 8 bits

_UNTRIED = "its kernel was never run here: that it sums the simulation's very operands is torchao's code, read"


def nvfp4_targets() -> Mapping[str, Target]:
    """NVFP4 weights and activations on Blackwell; weights alone anywhere."""

    def dynamic(group_size: int | None) -> AOBaseConfig:
        from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

        # torch's own rounding of the activations: mslk's kernel is another program, and not a part of torch.
        return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)

    def weights(group_size: int | None) -> AOBaseConfig:
        from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

        return NVFP4WeightOnlyConfig()

    blocks: dict[str, Any] = {"multiple": 16, "scale_bits": 8}
    alone = blocks | {
        "config": weights,
        "numbers": numbers_of("microscaling", "NVFP4_WEIGHTS"),
        "tensor": tensor_of("nvfp4_tensor"),
        "by_request": True,
        "note": "weights only: activations stay in 16 bit, and the weight is restored for every product",
    }
    return named(
        Target(
            name="cuda-sm100",
            config=dynamic,
            numbers=numbers_of("microscaling", "NVFP4"),
            tensor=tensor_of("nvfp4_tensor", fp4_activations=True),
            needs=("cuda>=10.0",),
            dtype="bfloat16",
            max_output_error=0.0005,  # equal operands, summed in another order: as of the other bf16 kernels
            max_gap_nats=0.01,
            note=_UNTRIED,
            **blocks,
        ),
        Target(name="cpu", **alone),
        Target(name="cuda", needs=("cuda>=7.0",), **alone),
    )


def mx_targets(bits: int) -> Mapping[str, Target]:
    """MX of `bits`, weights and activations: Blackwell's kernel, and torchao's emulation of it anywhere."""
    element = {8: "float8_e4m3fn", 4: "float4_e2m1fn_x2"}[bits]

    def config_with(kernel: str) -> Callable[[int | None], AOBaseConfig]:
        def config(group_size: int | None) -> AOBaseConfig:
            import torch
            from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
            from torchao.quantization.quantize_.common import KernelPreference

            dtype = getattr(torch, element)
            return MXDynamicActivationMXWeightConfig(
                activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference[kernel]
            )

        return config

    def target(name: str, kernel: str, **options: Any) -> Target:
        return Target(
            name=name,
            config=config_with(kernel),
            numbers=numbers_of("microscaling", f"MXFP{bits}"),
            tensor=tensor_of("mx_tensor", bits=bits, kernel=kernel),
            scale_bits=8,
            **options,
        )

    emulated = "torchao's emulation: the numbers of the hardware, and slower than 16 bit"
    return named(
        target(
            "cuda-sm100",
            "AUTO",
            needs=("cuda>=10.0",),
            dtype="bfloat16",
            multiple=16,
            max_output_error=0.0005,  # equal operands, summed in another order: as of the other bf16 kernels
            max_gap_nats=0.01,
            note=_UNTRIED,
        ),
        target("cpu", "EMULATED", by_request=True, note=emulated),
        target("cuda", "EMULATED", by_request=True, needs=("cuda>=7.0",), note=emulated),
    )
