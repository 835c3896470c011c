"""A layer's inputs on their grid, one token (row) per program: read once, written once.

The SwiGLU before a down projection is computed in the same pass: its product is written rounded only. Backward, the
product comes back in the same pass as the gradients of gate and up.

Shapes: `N` tokens, `I` in_features.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.arithmetic import (
    at_least,
    clamped,
    divided,
    fp8_scale,
    greatest,
    least,
    nearest,
    quotient,
    to_dtype,
    to_float8,
)
from qat.kernels.launch import Launcher, Plan, next_power_of_2
from quantize.numerics import Quantised

KINDS = {"none": 0, "int8": 1, "fp8": 2, "fp8-mslk": 3}
"""How inputs are rounded: not at all, as `int8_asymmetric_per_token`, `quantise_fp8_token` or `quantise_fp8_mslk`."""


@triton.jit
def _int8_token(x, BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr):
    """`int8_asymmetric_per_token` of one row whose padding is zero, which lies in every range."""
    low, high = least(x, 0, EXACT), greatest(x, 0, EXACT)
    low, high = tl.where(low > 0.0, 0.0, low), tl.where(high < 0.0, 0.0, high)
    width = tl.full([1], 0.0, tl.float32) + to_dtype(high - low, BF16, EXACT)
    scale = to_dtype(divided(width, 255.0, RECIPROCAL), BF16, EXACT)
    scale = at_least(scale, 1.1754943508222875e-38)
    below = nearest(to_dtype(tl.div_rn(tl.zeros([1], tl.float32) + low, scale), BF16, EXACT))
    zero_point = clamped(to_dtype(-128.0 - below, BF16, EXACT), -128.0, 127.0)
    inverse = to_dtype(tl.div_rn(tl.full([1], 1.0, tl.float32), scale), BF16, EXACT)
    steps = nearest(to_dtype(x * inverse, BF16, EXACT))
    values = clamped(to_dtype(steps + zero_point, BF16, EXACT), -128.0, 127.0)
    return to_dtype((values - zero_point) * scale, BF16, EXACT)


@triton.jit
def _fp8_token(x, MSLK: tl.constexpr, BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr):
    """(values, scale (1,)) of one row: `quantise_fp8_token`, `quantise_fp8_mslk`."""
    largest = tl.zeros([1], tl.float32) + greatest(tl.abs(x), 0, EXACT)
    if not MSLK:
        largest = at_least(largest, 9.094947017729282e-13)  # FP8_LEAST
    scale = fp8_scale(largest, MSLK, BF16, EXACT, RECIPROCAL)
    steps = quotient(x, scale, BF16 and not MSLK, EXACT)
    return to_float8(clamped(steps, -448.0, 448.0), EXACT), scale


@triton.jit
def _swiglu(gate, up, BF16: tl.constexpr, EXACT: tl.constexpr):
    """(sigmoid(gate), silu(gate) rounded as torch rounds it, its product with up)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = to_dtype(gate * sigmoid, BF16, EXACT)
    return sigmoid, silu, to_dtype(silu * up, BF16, EXACT)


@triton.jit
def _tokens_kernel(
    x_ptr, up_ptr, grad_ptr, out_ptr, scale_ptr,
    COLUMNS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SWIGLU: tl.constexpr,
    GRADIENT: tl.constexpr, BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Rounds x, or silu(x) * up; with `GRADIENT` first replaces x and up, whose rows lie `STRIDE` apart."""
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    offsets = tl.program_id(0).to(tl.int64) * COLUMNS + columns
    strided = tl.program_id(0).to(tl.int64) * STRIDE + columns
    x = tl.load(x_ptr + strided, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(up_ptr + strided, mask=inside, other=0.0).to(tl.float32)
        gate = x
        sigmoid, silu, x = _swiglu(gate, up, BF16, EXACT)
        if GRADIENT:
            grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            to_silu = to_dtype(grad * up, BF16, EXACT)
            to_gate = to_silu * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
            tl.store(x_ptr + strided, to_dtype(to_gate, BF16, EXACT).to(x_ptr.dtype.element_ty), mask=inside)
            to_up = to_dtype(grad * silu, BF16, EXACT)
            tl.store(up_ptr + strided, to_up.to(up_ptr.dtype.element_ty), mask=inside)
    if KIND == 1:
        x = _int8_token(x, BF16, EXACT, RECIPROCAL)
    if KIND >= 2:
        x, scale = _fp8_token(x, KIND == 3, BF16, EXACT, RECIPROCAL)
        tl.store(scale_ptr + tl.program_id(0) + tl.arange(0, 1), scale)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _restore_kernel(
    value_ptr, scale_ptr, out_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr,
    EXACT: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    values = tl.load(value_ptr + row * COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
    restored = to_dtype(values * tl.load(scale_ptr + row), BF16, EXACT)
    tl.store(out_ptr + row * COLUMNS + columns, restored.to(out_ptr.dtype.element_ty), mask=inside)


_tokens = Launcher(_tokens_kernel)
_restore = Launcher(_restore_kernel)


def _launch(
    x: Tensor, up: Tensor | None, grad: Tensor | None, kind: str, out: Tensor, scale: Tensor | None
) -> Tensor | Quantised:
    columns = x.shape[-1]
    # Of halves of one tensor; the stride of a dimension of size 1 says nothing, hence the rows' after flattening.
    stride = columns if up is None else x.reshape(-1, columns).stride(0)
    plan = _tokens_plan(columns, stride, kind, x.dtype, up is not None, None if grad is None else grad.dtype, out.dtype)
    _tokens(plan, (x, up, grad, out, scale), grid=(x.numel() // columns, 1, 1))
    return out if scale is None else Quantised(out, scale)


@cache
def _tokens_plan(
    columns: int, stride: int, kind: str, dtype: torch.dtype, swiglu: bool, grad: torch.dtype | None, out: torch.dtype
) -> Plan:
    block = next_power_of_2(columns)
    constants = columns, stride, block, KINDS[kind], swiglu, grad is not None, dtype == torch.bfloat16
    return Plan(grid=None, numbers=(), constants=constants, warps=min(16, max(1, block // 512)))


def _room(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    if not kind.startswith("fp8"):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), scale


def rounded(x: Tensor, kind: str) -> Tensor | Quantised:
    """Inputs (..., I) on their grid: restored for "int8", values and scale for float8, x itself for "none"."""
    if kind == "none":
        return x
    x = x.contiguous()
    return _launch(x, None, None, kind, *_room(x, kind))


def swiglu(gate: Tensor, up: Tensor, kind: str) -> Tensor | Quantised:
    """silu(gate) * up (..., I), rounded as by `rounded`. Both may be halves of one tensor."""
    return _launch(gate, up, None, kind, *_room(gate, kind))


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor, kind: str) -> Tensor | Quantised:
    """Replaces gate and up by their gradients; returns what `swiglu` gave. Overwrites `grad` where it has the room."""
    out, scale = (grad, None) if not kind.startswith("fp8") else _room(gate, kind)
    return _launch(gate, up, grad, kind, out, scale)


def restored_rows(encoded: Quantised, dtype: torch.dtype) -> Tensor:
    """Values times the row's scale, in float32, rounded once: (..., I) with scales (..., 1)."""
    values = encoded.values
    columns = values.shape[-1]
    out = torch.empty_like(values, dtype=dtype)
    plan = _restore_plan(columns, values.dtype, encoded.scale.dtype, dtype)
    _restore(plan, (values, encoded.scale, out), grid=(values.numel() // columns, -(-columns // plan.constants[1]), 1))
    return out


@cache
def _restore_plan(columns: int, values: torch.dtype, scale: torch.dtype, dtype: torch.dtype) -> Plan:
    block = min(2048, next_power_of_2(columns))
    return Plan(grid=None, numbers=(), constants=(columns, block, dtype == torch.bfloat16), warps=4)
