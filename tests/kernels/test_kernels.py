"""The Triton kernels give the bits of the definition in `quantize/`: on a GPU, or in Triton's interpreter without one.

Without a GPU: `make test-kernels`. They need a process of their own there, because Triton changes what other libraries
import.
"""

from __future__ import annotations

import os

import pytest
import torch
from samples import hard_weight
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="make test-kernels brings it")
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]

from qat.kernels import FusedPath, Layer, Path, fused_path, merged_weight  # noqa: E402
from quantize import float8, integers  # noqa: E402
from quantize.numerics import Numbers, Quantised  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16)
GROUPED = {
    "int2": integers.INT2, "int3": integers.INT3, "int4": integers.INT4, "int8": integers.INT8,
    "int8-int4": integers.INT8_INT4, "tinygemm": integers.TINYGEMM, "int4-mslk": integers.INT4_MSLK,
}  # fmt: skip
ROWS = {"int8-rows": integers.INT8_ROWS, "fp8": float8.FP8, "fp8-mslk": float8.FP8_MSLK}
FORMATS = [*((name, group) for name in GROUPED for group in (32, 128)), *((name, None) for name in ROWS)]


def _hard(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    weight = hard_weight(seed, shape, dtype)
    if INTERPRETED and dtype == torch.bfloat16:
        weight[7] = 0  # subnormal numbers, which the interpreter reads wrongly and a GPU does not
    return weight


def _paths(numbers: Numbers) -> tuple[FusedPath, Path]:
    fused = fused_path(numbers)
    assert fused is not None
    return fused, Path(numbers)


def _layer(
    weight: Tensor, group: int | None, dtype: torch.dtype, *, rank: int = 0, factor: Tensor | None = None
) -> Layer:
    """With a rank: an adapter whose products are exact in float32, so that the order of the sum is no matter."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rank)

    def small(*shape: int) -> Tensor:
        return (torch.randint(-4, 5, shape, generator=generator).float() / 16).to(DEVICE)

    adapter = (small(rank, columns), small(rows, rank)) if rank else (None, None)
    return Layer(
        weight=weight.to(DEVICE), lora_a=adapter[0], lora_b=adapter[1], scaling=0.5,
        factor=None if factor is None else factor.to(DEVICE), group_size=group, dtype=dtype,
    )  # fmt: skip


def _assert_same(ours: Tensor | Quantised, theirs: Tensor | Quantised) -> None:
    """Equal values, NaN where the other has NaN; -0 equals 0."""
    if isinstance(ours, Quantised) or isinstance(theirs, Quantised):
        assert isinstance(ours, Quantised) and isinstance(theirs, Quantised)
        _assert_same(ours.values, theirs.values)
        _assert_same(ours.scale, theirs.scale)
        assert (ours.zero is None) == (theirs.zero is None)
        if ours.zero is not None and theirs.zero is not None:
            _assert_same(ours.zero, theirs.zero)
        return
    assert ours.shape == theirs.shape
    # The interpreter flushes subnormal bf16 numbers when it writes them.
    smallest = torch.finfo(torch.bfloat16).smallest_normal if INTERPRETED else 0.0
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=smallest, equal_nan=True)


@pytest.mark.parametrize(("name", "group"), FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 256), (33, 384)], ids=str)
def test_a_weight_by_itself(name: str, group: int | None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    fused, plain = _paths((GROUPED | ROWS)[name])
    for seed in range(2):
        for scales in DTYPES:
            layer = _layer(_hard(seed, shape, dtype), group, scales)
            _assert_same(fused.quantise(layer), plain.quantise(layer))
            for compute in DTYPES:
                ours, theirs = fused.weights([layer], compute)[0], plain.weights([layer], compute)[0]
                _assert_same(ours, theirs)
                _assert_same(
                    fused.restored_weight(ours, scales, compute), plain.restored_weight(theirs, scales, compute)
                )


@pytest.mark.parametrize(("name", "group"), FORMATS)
@pytest.mark.parametrize("rank", [1, 16, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_is_inside(name: str, group: int | None, rank: int, dtype: torch.dtype) -> None:
    fused, plain = _paths((GROUPED | ROWS)[name])
    weight = (torch.randint(-127, 128, (48, 256), generator=torch.Generator().manual_seed(1)) / 64).to(dtype)
    layer = _layer(weight, group, dtype, rank=rank)
    merged = merged_weight(layer.weight, layer.lora_a, layer.lora_b, layer.scaling)
    assert merged.dtype == torch.float32 and not torch.equal(merged, layer.weight.float())
    _assert_same(fused.quantise(layer), plain.quantise(layer))
    _assert_same(fused.weights([layer], torch.bfloat16)[0], plain.weights([layer], torch.bfloat16)[0])


@pytest.mark.parametrize(("name", "group"), FORMATS)
@pytest.mark.parametrize("rows", [(64, 32, 32), (40, 16), (7, 130, 33)], ids=str)
def test_layers_that_share_their_input_in_one_launch(name: str, group: int | None, rows: tuple[int, ...]) -> None:
    fused, plain = _paths((GROUPED | ROWS)[name])
    generator = torch.Generator().manual_seed(7)
    weights = [(torch.randint(-127, 128, (count, 256), generator=generator) / 64).bfloat16() for count in rows]
    layers = [_layer(weight, group, torch.bfloat16, rank=8) for weight in weights]
    (ours,), theirs = fused.weights(layers, torch.bfloat16), plain.weights(layers, torch.bfloat16)
    if isinstance(ours, Tensor):
        _assert_same(ours, torch.cat([part for part in theirs if isinstance(part, Tensor)]))
    else:
        parts = [part for part in theirs if isinstance(part, Quantised)]
        _assert_same(ours, Quantised(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts])))
    apart = [*layers[:-1], layers[-1]._replace(scaling=0.25)]  # one by one, as they are not alike
    ours, theirs = fused.weights(apart, torch.bfloat16), plain.weights(apart, torch.bfloat16)
    assert len(ours) == len(rows)
    for one, other in zip(ours, theirs, strict=True):
        _assert_same(one, other)


@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_experts_in_one_launch(name: str, group: int | None) -> None:
    fused, plain = _paths((GROUPED | ROWS)[name])
    for rows, factor in ((48, None), (24, 0.75)):  # a tile and a half, and less than the smallest tile divides
        weight = torch.cat([_hard(seed, (rows, 128), torch.bfloat16) for seed in range(2)])
        factors = None if factor is None else torch.full((2 * rows, 128 // (group or 128)), factor)
        layer = _layer(weight, group, torch.bfloat16, rank=4, factor=factors)
        assert layer.lora_a is not None
        layer = layer._replace(lora_a=torch.cat([layer.lora_a, -layer.lora_a]), experts=2)
        _assert_same(fused.quantise(layer), plain.quantise(layer))
        (ours,), (theirs,) = (path.weights([layer], torch.bfloat16) for path in (fused, plain))
        _assert_same(ours, theirs)


def test_a_programs_rows_lie_within_one_expert() -> None:
    from qat.kernels import grouped, merged, rows

    for count in (16, 48, 1536, 2816, 7168):
        kind = merged.Kind((128 * count,), 2048, 16, (torch.bfloat16,) * 3, experts=128)
        for blocks in (grouped.SYMMETRIC, grouped.ASYMMETRIC, rows.MANY_ROWS, rows.FEW_ROWS):
            fitted = merged.within_expert(merged.fitted(blocks, kind, 32), kind)
            assert count % (fitted.rows * fitted.steps) == 0 and fitted.rows >= merged.SMALLEST
            assert fitted.steps == blocks.steps or count < 1536 or count % (blocks.rows * blocks.steps)


@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_matrices_that_are_not_contiguous(name: str, group: int | None) -> None:
    fused, plain = _paths((GROUPED | ROWS)[name])
    layer = _layer((torch.randint(-127, 128, (256, 48)) / 64).bfloat16(), group, torch.bfloat16, rank=4)
    assert layer.lora_a is not None and layer.lora_b is not None
    turned = layer._replace(weight=layer.weight.t(), lora_a=layer.lora_b.t(), lora_b=layer.lora_a.t())
    _assert_same(fused.quantise(turned), plain.quantise(turned))


@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_a_factor_of_the_ranges(name: str, group: int | None) -> None:
    fused, plain = _paths((GROUPED | ROWS)[name])
    for dtype in DTYPES:
        weight = _hard(3, (48, 256), dtype)
        factor = torch.rand(48, 1 if group is None else 256 // group, generator=torch.Generator().manual_seed(2)) + 0.3
        for rank in (0, 4):
            layer = _layer(weight if rank == 0 else weight.round(), group, dtype, rank=rank, factor=factor)
            _assert_same(fused.quantise(layer), plain.quantise(layer))
            _assert_same(fused.weights([layer], torch.bfloat16)[0], plain.weights([layer], torch.bfloat16)[0])


@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_the_sum_is_float32_s(name: str, group: int | None) -> None:
    """With any adapter: the grid's points are those of a float32 sum, but where it lies on a border between two."""
    fused, plain = _paths((GROUPED | ROWS)[name])
    generator = torch.Generator().manual_seed(4)
    draw = [torch.randn(shape, generator=generator) for shape in ((64, 512), (16, 512), (64, 16))]
    weight, lora_a, lora_b = (tensor.to(DEVICE) * size for tensor, size in zip(draw, (0.05, 0.3, 0.01), strict=True))
    layer = Layer(
        weight=weight.bfloat16(), lora_a=lora_a, lora_b=lora_b, scaling=2.0, factor=None, group_size=group,
        dtype=torch.bfloat16,
    )  # fmt: skip
    ours, theirs = fused.quantise(layer), plain.quantise(layer)
    differ = (ours.values.float() != theirs.values.float()).float().mean().item()
    assert differ < 2e-4
    if isinstance(restored := fused.weights([layer], torch.bfloat16)[0], Tensor):  # what trains is what ships
        assert torch.equal(restored, plain.restored_weight(ours, torch.bfloat16, torch.bfloat16))
    else:
        _assert_same(restored, ours)


def _hard_tokens(dtype: torch.dtype, columns: int) -> Tensor:
    """Tokens of all sizes, those that break formulas, and one with a NaN."""
    tokens = torch.cat([_hard(seed, (16, columns), dtype) for seed in range(4)])
    tokens[20, 5], tokens[21, 7] = float("nan"), -float("nan")
    if not INTERPRETED:  # it reads float8's NaN as a number, which inf / inf gives here
        tokens[22, 3] = float("inf")
    return tokens.to(DEVICE)


@pytest.mark.parametrize("numbers", [integers.INT8_INT4, float8.FP8, float8.FP8_MSLK], ids=["int8", "fp8", "fp8-mslk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 576, 1000])
def test_inputs(numbers: Numbers, dtype: torch.dtype, columns: int) -> None:
    fused, plain = _paths(numbers)
    x = _hard_tokens(dtype, columns)
    ours, theirs = fused.inputs(x), plain.inputs(x)
    _assert_same(ours, theirs)
    _assert_same(fused.restored_inputs(ours, dtype), plain.restored_inputs(theirs, dtype))
    odd = x.unsqueeze(0).transpose(0, 1)  # contiguous, though the stride of its middle dimension is not a row's
    assert odd.is_contiguous()
    _assert_same(fused.restored_inputs(fused.inputs(odd), dtype).squeeze(1), plain.restored_inputs(theirs, dtype))
    threefold = x[:60].reshape(3, 20, columns)
    _assert_same(fused.restored_inputs(fused.inputs(threefold), dtype).reshape(60, columns),
                 plain.restored_inputs(plain.inputs(x[:60]), dtype))  # fmt: skip


@pytest.mark.parametrize(
    "numbers", [integers.INT8_INT4, float8.FP8, float8.FP8_MSLK, integers.INT4], ids=["int8", "fp8", "fp8-mslk", "none"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "columns", [192, 196]
)  # up begins at an address that is divisible by 16, or by 8 alone in bf16
def test_swiglu_and_its_gradient(numbers: Numbers, dtype: torch.dtype, columns: int) -> None:
    fused, plain = _paths(numbers)
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(12, columns, generator=generator).to(DEVICE, dtype) * 3 for _ in range(3))
    ours, theirs = fused.swiglu(gate, up), plain.swiglu(gate, up)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3  # silu's exponential is another implementation
    largest = plain.restored_inputs(theirs, dtype).abs().amax(-1, keepdim=True).float()
    step = largest / (1e9 if numbers is integers.INT4 else 127 if numbers is integers.INT8_INT4 else 16)
    apart = (fused.restored_inputs(ours, dtype).float() - plain.restored_inputs(theirs, dtype).float()).abs()
    assert (apart <= 1.01 * step + tolerance * largest).all()
    found = []
    for path in (fused, plain):
        both = torch.cat([gate, up], dim=1)  # halves of one tensor, as one product gives them
        grads = both[:, :columns], both[:, columns:]
        if path is fused:  # torch's own silu of a half differs in last bits from that of the same numbers in a row
            _assert_same(path.swiglu(*grads), ours)
        hidden = path.swiglu_backward_(*grads, grad.clone())
        if path is fused:
            _assert_same(hidden, ours)
        found.append(grads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * tolerance, atol=tolerance)
