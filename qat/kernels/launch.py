"""How the kernels are compiled and launched: on the GPU, or by Triton's interpreter, which tests them without one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launcher:
    """A kernel that is compiled once for each kind of arguments.

    Triton looks at every argument of every launch to find the compiled kernel, which takes a CPU longer than a GPU
    takes for a small layer. A training step launches the same few kinds again and again: here one look-up finds them.
    Needs Triton 3.3 or newer, where a compiled kernel takes the constants among its arguments.

    Args:
        kernel: a `triton.jit` function: arguments of the launch first, then constants, `EXACT` and `RECIPROCAL` last.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], arguments: tuple[Any, ...], *constants: Any, num_warps: int) -> None:
        """Launches on the device of the first argument, a tensor."""
        if INTERPRETED:
            self.kernel[grid](*arguments, *constants, True, False)
            return
        device = arguments[0].device.index
        if device != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(device):
                self(grid, arguments, *constants, num_warps=num_warps)
            return
        key = (device, constants, num_warps, *map(_kind, arguments))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants, False, True)
            return
        # Fused multiply-adds round once where torch's separate operations round twice.
        self._compiled[key] = self.kernel[grid](
            *arguments, *constants, False, True, num_warps=num_warps, enable_fp_fusion=False
        )


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _kind(argument: Any) -> Any:
    """What Triton compiles for: a pointer's type and alignment, an integer's value as such; no float's."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return None if isinstance(argument, float) else argument
