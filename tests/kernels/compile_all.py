"""Compiles every kernel as training launches it, for a GPU that need not be here. `test_compilation.py` runs it.

`python compile_all.py 90` prints a line for each kernel; 90 is the compute capability, times ten. A kernel that takes
more shared memory than a program may have there is an error, as it is on the GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path as File
from typing import Any

sys.path.insert(0, str(File(__file__).resolve().parents[2]))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.kernels import FusedPath, Layer, fused_path
from qat.kernels.launch import Launcher, Plan
from quantize import float8, integers

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
SHARED = {80: 163, 89: 99, 90: 227}
"""KiB of shared memory a program may have, by compute capability (CUDA C++ Programming Guide)."""
FORMATS = {
    "int8-int4": (integers.INT8_INT4, 32), "tinygemm": (integers.TINYGEMM, 128), "int4-mslk": (integers.INT4_MSLK, 128),
    "int8-rows": (integers.INT8_ROWS, None), "fp8": (float8.FP8, None), "fp8-mslk": (float8.FP8_MSLK, None),
}  # fmt: skip


def main(capability: int) -> None:
    """Goes through what the formats compute; raises where Triton or ptxas cannot compile it."""
    done: set[Any] = set()

    def compile_(launcher: Launcher, plan: Plan, tensors: Any, *floats: float, grid: Any = None) -> None:
        kinds = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        if (launcher, plan, kinds) not in done:
            done.add((launcher, plan, kinds))
            compiled = _compile(launcher.kernel, plan, tensors, floats, capability)
            shared = compiled.metadata.shared
            print(launcher.kernel.__name__, *plan.constants, f"shared={shared}", flush=True)
            assert shared <= SHARED[capability] * 1024, f"{shared} bytes of shared memory"

    Launcher.__call__ = compile_  # type: ignore[method-assign,assignment]
    for name, (numbers, group) in FORMATS.items():
        path = fused_path(numbers)
        assert path is not None
        if capability >= 89 or not name.startswith("fp8"):
            _use(path, group)


def _use(path: FusedPath, group: int | None) -> None:
    def layer(rows: int, *, adapter: bool = True, factor: bool = False, rank: int = 16) -> Layer:
        low_rank = (torch.zeros(rank, 512), torch.zeros(rows, rank)) if adapter else (None, None)
        scales = torch.ones(rows, 1 if group is None else 512 // group) if factor else None
        return Layer(torch.zeros(rows, 512).bfloat16(), *low_rank, 1.0, scales, group, torch.bfloat16)

    path.weights([layer(rows) for rows in (64, 32, 32)], torch.bfloat16)
    path.weights([layer(9000)], torch.float32)
    for rank in (32, 64, 256):
        for rows in (64, 9000):
            path.weights([layer(rows, rank=rank)], torch.bfloat16)
            if group is not None:
                path.weights([layer(rows, rank=rank)._replace(group_size=256)], torch.bfloat16)
    path.quantise(layer(64, factor=True))
    path.quantise(layer(64, adapter=False))
    x = torch.zeros(4, 512).bfloat16()
    inputs = path.inputs(x)
    if not isinstance(inputs, Tensor):
        path.restored_inputs(inputs, torch.bfloat16)
    path.inputs(x.float())
    path.swiglu(x, x)
    path.swiglu_backward_(x, x, x)


def _compile(kernel: Any, plan: Plan, tensors: Any, floats: tuple[float, ...], capability: int) -> Any:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = [*tensors, *floats, *plan.numbers, *plan.constants, False, True]
    first_number = len(tensors) + len(floats)
    for index, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
        if isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif value is not None and index < first_number:
            signature[name] = "fp32"
        elif value is not None and index < first_number + len(plan.numbers):
            signature[name] = "i32"
        else:
            signature[name], constants[(index,)] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    main(int(sys.argv[1]))
