"""How the kernels are compiled and launched: on the GPU, or by Triton's interpreter, which tests them without one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SETTINGS: dict[str, Any] = {
    "EXACT": INTERPRETED,
    "RECIPROCAL": not INTERPRETED,
    # Fused multiply-adds round once where torch's separate operations round twice.
    **({} if INTERPRETED else {"enable_fp_fusion": False}),
}


def launching(tensor: Tensor) -> AbstractContextManager[Any]:
    """Held around a launch: Triton launches on the current device, which may not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
