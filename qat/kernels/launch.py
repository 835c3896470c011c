"""How the kernels are compiled and launched: on the GPU, or by Triton's interpreter, which tests them without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DIRECT = triton.__version__.startswith("3.6.")
"""How a compiled kernel is called by its address differs between versions of Triton; this is the one that we know."""

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a launch that repeats with every call of one kind of layer. Made once and kept: its identity is a key.

    Attributes:
        grid: how many programs; None where each call says it.
        numbers: whole numbers that the kernel takes after its tensors.
        constants: what it is compiled for.
        warps: of a program.
    """

    grid: Grid | None
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    warps: int


class Launcher:
    """A kernel that is compiled once for each plan.

    Triton looks at every argument of every launch to find the compiled kernel, and asks the driver about every pointer,
    which takes a CPU longer than a GPU takes for a small layer. A training step launches the same few plans again and
    again: here one look-up finds the kernel, and it gets addresses.

    Args:
        kernel: a `triton.jit` function: tensors first, then floats, numbers and constants, `EXACT` and `RECIPROCAL`
            last. The dtypes of its tensors follow from the plan.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(self, plan: Plan, tensors: Sequence[Tensor | None], *floats: float, grid: Grid | None = None) -> None:
        """Launches on the device of the first tensor.

        Args:
            grid: where the plan has none.
        """
        grid = plan.grid or grid
        assert grid is not None
        if INTERPRETED:
            self.kernel[grid](*tensors, *floats, *plan.numbers, *plan.constants, True, False)
            return
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if device != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(device):
                self(plan, tensors, *floats, grid=grid)
            return
        addresses = []
        for tensor in tensors:
            if tensor is not None and tensor.get_device() != device:  # the GPU would read whatever lies at its address
                raise RuntimeError(
                    f"a layer's tensors are expected on one device, but lie on {first.device} and {tensor.device}"
                )
            addresses.append(None if tensor is None else tensor.data_ptr())
        aligned = tuple([address is None or address % 16 == 0 for address in addresses])  # Triton compiles for it
        key = plan, device, aligned
        compiled = self._compiled.get(key)
        if compiled is None:
            # Fused multiply-adds round once where torch's separate operations round twice.
            self._compiled[key] = self.kernel[grid](
                *tensors, *map(float, floats), *plan.numbers, *plan.constants, False, True,
                num_warps=plan.warps, enable_fp_fusion=False,
            )  # fmt: skip
        elif not _DIRECT:
            compiled[grid](*tensors, *floats, *plan.numbers, *plan.constants, False, True)
        else:  # what `compiled[grid]` comes to, without a profiler's hooks
            compiled.run(
                *grid, torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata,
                None, None, None, *addresses, *floats, *plan.numbers, *plan.constants, False, True,
            )  # fmt: skip


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
