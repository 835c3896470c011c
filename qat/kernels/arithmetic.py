"""The roundings that the Triton kernels share: each the same bits as torch's own operation on the GPU.

`EXACT` is for Triton's interpreter, which truncates where the hardware rounds: there the rounding is done on the bits.
`RECIPROCAL`: torch on CUDA divides by a Python number by multiplying with its float32 reciprocal; on a CPU it divides.
"""

# Triton annotates its own language (`tl.constexpr`) in ways that mypy cannot follow.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,name-defined,valid-type,misc"

import triton
import triton.language as tl


@triton.jit
def to_bf16(x, EXACT: tl.constexpr):
    """Rounded to bf16, half to even; still float32."""
    if EXACT:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def to_dtype(x, BF16: tl.constexpr, EXACT: tl.constexpr):
    """Rounded to bf16 where `BF16`, else as it is."""
    if BF16:
        return to_bf16(x, EXACT)
    return x


@triton.jit
def to_float8(x, EXACT: tl.constexpr):
    """Rounded to float8_e4m3fn, half to even. |x| <= 448."""
    if EXACT:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = tl.abs(x)
        steps = (
            (magnitude + 24576.0) - 24576.0
        ) * 512.0  # of 2**-9, the smallest subnormal; 24576 = 1.5 * 2**23 / 2**9
        rounded = ((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        code = tl.where(
            magnitude < 0.015625, steps.to(tl.uint32), rounded - 960
        )  # 960: the exponents' biases differ by 120
        code = tl.where(x == x, code, 127) | ((bits >> 31) << 7)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def nearest(x):
    """The nearest integer, half to even, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def at_least(x, low):
    """max(x, low) that keeps NaN, as torch.clamp does."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamped(x, low, high):
    """clamp(x, low, high) that keeps NaN."""
    return tl.minimum(at_least(x, low), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divided(x, by: tl.constexpr, RECIPROCAL: tl.constexpr):
    """x / number as torch computes it on this device."""
    if RECIPROCAL:
        return x * tl.div_rn(tl.full([1], 1.0, tl.float32), tl.full([1], by, tl.float32))
    return tl.div_rn(x, tl.full(x.shape, by, tl.float32))


@triton.jit
def quotient(x, divisor, SHORT: tl.constexpr, EXACT: tl.constexpr):
    """x / divisor, correctly rounded, for quotients far from overflow and underflow; the divisor broadcasts.

    With the correctly rounded inverse two fused steps give the rounded quotient (Markstein 1990, "Computation of
    elementary functions on the IBM RISC System/6000 processor"), in half of the instructions of a division, which has
    to look at every operand. One step is enough where the divisor is `SHORT`, a bf16 number: its quotients stay further
    away from the middle between two float32 numbers than the step is wrong. Both operands are first multiplied by the
    power of two that brings the divisor near to 1, which changes no bit of the quotient and keeps what is in between
    from the ends of float32's range.
    """
    if EXACT:
        result = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    else:
        exponent = divisor.to(tl.int32, bitcast=True) & 0x7F800000
        power = (0x7F000000 - tl.minimum(exponent, 0x7E000000)).to(tl.float32, bitcast=True)
        scaled = divisor * power
        infinite = tl.abs(scaled) == float("inf")
        inverse = tl.where(infinite, 0.0, tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), scaled))
        scaled = tl.where(infinite, 0.0, scaled)  # so that x / inf is 0, and inf / inf is NaN
        x = x * power
        result = x * inverse
        result = tl.fma(tl.fma(-result, scaled, x), inverse, result)
        if not SHORT:
            result = tl.fma(tl.fma(-result, scaled, x), inverse, result)
    return result


@triton.jit
def fp8_scale(largest, MSLK: tl.constexpr, BF16: tl.constexpr, EXACT: tl.constexpr, RECIPROCAL: tl.constexpr):
    """The scale of numbers up to `largest`: `quantise_fp8`, of numbers in bf16 or not; `quantise_fp8_mslk`."""
    if MSLK:
        largest = at_least(largest, 0.001953125)
        return tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    return to_dtype(divided(largest, 448.0, RECIPROCAL), BF16, EXACT)


@triton.jit
def upper(x):
    """The leading 11 bits of each number's fraction: what tf32 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """|x| as an integer of the same order, NaN above all: integer maxima keep NaN, which float maxima drop."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _ordered(x):
    """x as an integer of the same order; NaN lies above or below all, by its sign. The inverse of `_from_ordered`."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least(x, axis: tl.constexpr, EXACT: tl.constexpr):
    """The minimum along an axis; NaN where one is. (The interpreter takes minutes for a reduction of one's own.)"""
    if EXACT:  # noqa: SIM108  known when it is compiled
        result = _from_ordered(tl.min(_ordered(x), axis))
    else:
        result = tl.reduce(x, axis, _smaller)
    return result


@triton.jit
def greatest(x, axis: tl.constexpr, EXACT: tl.constexpr):
    """The maximum along an axis; NaN where one is."""
    if EXACT:  # noqa: SIM108  known when it is compiled
        result = _from_ordered(tl.max(_ordered(x), axis))
    else:
        result = tl.reduce(x, axis, _larger)
    return result
