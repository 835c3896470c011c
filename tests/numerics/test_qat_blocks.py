"""Layers computed together, weights that are kept or made again: the same numbers, and nothing is left behind."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from tiny_models import IDS, gradients, logits_of, tiny_model, with_lora
from torch import Tensor, nn

from qat import forwards
from qat.cache import WeightCache
from qat.function import NoAutocast
from qat.kernels import Layer, Path, path_of
from qat.layer import LayerNumerics, Projection
from qat.linear import fake_quant_linears, fake_quant_swiglu
from qat.prepare import Prepared, prepare_qat, remove_qat
from quantize import integers
from quantize.errors import UserError
from quantize.schemes import SCHEMES

FORMATS = ("int8-int4", "int4", "int8", "fp8")


def _prepare(model: Any, scheme: str = "int8-int4", **options: Any) -> Prepared:
    options.setdefault("group_size", 32 if SCHEMES[scheme].group_sizes else None)
    target = "cpu" if "cpu" in SCHEMES[scheme].targets else None
    return prepare_qat(model, scheme, target=target, **options)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often weights were fake-quantised, under the one key "weights"."""
    counts: Counter[str] = Counter()
    plain = Path.quantise

    def counting(self: Path, layer: Layer) -> Any:
        counts["weights"] += 1
        return plain(self, layer)

    monkeypatch.setattr(Path, "quantise", counting)
    return counts


def _separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "_SHARED", ())
    monkeypatch.setattr(forwards, "_is_swiglu", lambda module: False)


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("learned", [False, True])
def test_together_they_compute_what_each_computes(
    scheme: str, architecture: str, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"learned_scales": learned}
    model = with_lora(tiny_model(architecture))
    prepared = _prepare(model, scheme, **options)
    bound = {type(binding.module).__name__ for binding in prepared.bindings}
    assert ("MLP" in " ".join(bound)) == (architecture in ("qwen3", "qwen2", "llama"))  # gelu, gate and up in one
    logits, grads, calls = logits_of(model), gradients(model), dict(prepared.calls)
    remove_qat(prepared)
    _separately(monkeypatch)
    prepared = _prepare(model, scheme, **options)
    assert torch.equal(logits_of(model), logits)
    alone = gradients(model)
    assert alone.keys() == grads.keys() and dict(prepared.calls) == calls
    for name, grad in grads.items():
        torch.testing.assert_close(grad, alone[name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_mlp_computes_its_gradients_once_and_says_so() -> None:
    model = with_lora(tiny_model())
    _prepare(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("scheme", FORMATS)
def test_weights_that_are_made_again_give_the_same_gradients(scheme: str) -> None:
    model = with_lora(tiny_model())
    grads = []
    for cache_mib in (1024, 0):
        prepared = _prepare(model, scheme, cache_mib=cache_mib)
        assert {numerics.keep for _, numerics in prepared.layers.values()} == {cache_mib > 0}
        grads.append(gradients(model))
        remove_qat(prepared)
    assert all(torch.equal(grad, grads[0][name]) for name, grad in grads[1].items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_no_weight_is_made_a_third_time(reentrant: bool, made: Counter[str]) -> None:
    model = with_lora(tiny_model())
    model.enable_input_require_grads()
    prepared = _prepare(model, cache_mib=0)
    expected = gradients(model)
    assert made["weights"] == 2 * len(prepared.layers)  # without checkpointing: forward, and backward again
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    made.clear()
    grads = gradients(model)
    assert made["weights"] == 2 * len(prepared.layers)  # forward, and forward again
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


def test_between_two_steps_of_the_optimiser_weights_are_made_once(made: Counter[str]) -> None:
    model = with_lora(tiny_model())
    prepared = _prepare(model)
    first = gradients(model)
    assert made["weights"] == len(prepared.layers) and prepared.cache.size == 0
    prepared.cache.reuse = True
    made.clear()
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(model).items())
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(model).items())
    assert made["weights"] == len(prepared.layers) and prepared.cache.size > 0
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "layers.1" in name and "lora_A" in name).add_(0.1)
    gradients(model)
    assert len(prepared.layers) < made["weights"] <= len(prepared.layers) + 3  # what moved, with its siblings
    prepared.cache.moved()
    assert prepared.cache.size == 0
    logits = logits_of(model)
    prepared.switch_off()
    assert prepared.cache.size == 0
    prepared.switch_on()
    assert torch.equal(logits_of(model), logits)


def test_the_cache_stays_within_its_bound() -> None:
    cache = WeightCache(limit=1000, reuse=True)
    weights = [torch.zeros(100) for _ in range(4)]
    for index, weight in enumerate(weights):
        cache.get(str(index), (weight,), None, lambda: [torch.ones(100)])
    assert cache.size == 800
    assert cache.fits("0", 800) and not cache.fits("4", 400) and cache.fits("4", 200)
    off = WeightCache(limit=0, reuse=True)
    off.get("0", (weights[0],), None, lambda: [torch.ones(1)])
    assert off.size == 0


def test_frozen_layers_are_made_once(made: Counter[str]) -> None:
    model = with_lora(tiny_model(tied=False), target_modules=["q_proj", "v_proj"])
    prepared = _prepare(model, "int8-int4-mobile")
    first, count = gradients(model), made["weights"]
    made.clear()
    assert all(torch.equal(grad, first[name]) for name, grad in gradients(model).items())
    trained = 2 * 3  # q and v train, k shares their input
    assert count == len(prepared.layers) and made["weights"] == trained
    logits = logits_of(model)
    remove_qat(prepared)
    without = _prepare(model, "int8-int4-mobile", cache_mib=0)
    assert torch.equal(logits_of(model), logits) and without.cache.size == 0


class _Cross(nn.Module):
    """Attention whose keys and values come from elsewhere."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 64), nn.Linear(width, 64), nn.Linear(width, 64)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(memory) * self.v_proj(memory)


def test_siblings_with_inputs_of_their_own_part() -> None:
    torch.manual_seed(0)
    model = _Cross()
    x, memory = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    prepared = _prepare(model)
    numbers = {name: numerics for name, (_, numerics) in prepared.layers.items()}

    def alone(name: str, value: Tensor) -> Tensor:
        layer = model.get_submodule(name)
        quantised = numbers[name].quantise(layer.weight)
        return numbers[name].numbers.compute(value, quantised, layer.bias)

    expected = alone("q_proj", x) + alone("k_proj", memory) * alone("v_proj", memory)
    for _ in range(2):
        assert torch.equal(model(x, memory), expected)
    same = alone("q_proj", x) + alone("k_proj", x) * alone("v_proj", x)
    assert torch.equal(model(x, x), same)


@pytest.mark.parametrize("together", [True, False])
def test_siblings_part_under_checkpointing_too(together: bool) -> None:
    """What they turn out to be in forward must not change what the recomputed forward saves."""
    torch.manual_seed(0)
    model = _Cross()
    _prepare(model)
    x, memory = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    grads = []
    for _ in range(2):
        model.zero_grad()
        run = model if together else (lambda x, memory: model.q_proj(x))
        output = torch.utils.checkpoint.checkpoint(run, x, memory, use_reentrant=False)
        output.square().sum().backward()
        assert model.q_proj.weight.grad is not None
        grads.append(model.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_siblings_of_other_widths_are_apart() -> None:
    model = _Cross(width=128)
    prepared = _prepare(model)
    output = model(torch.randn(2, 3, 64), torch.randn(2, 3, 128))
    assert output.shape == (2, 3, 64) and not prepared.silent()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("scheme", FORMATS)
def test_one_token_and_none(scheme: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = _Cross()
    _prepare(model, scheme)
    x = torch.zeros(shape, requires_grad=True)
    model(x, x).sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_training_goes_on_after_inference_mode() -> None:
    model = with_lora(tiny_model(), target_modules=["q_proj", "v_proj"])
    _prepare(model)
    with torch.inference_mode():
        model(input_ids=IDS)
    assert gradients(model)


def test_an_input_that_is_changed_in_place_between_siblings_is_not_taken_for_the_same() -> None:
    torch.manual_seed(0)
    model = _Cross()
    _prepare(model)
    x = torch.randn(2, 64)
    with torch.no_grad():
        model.q_proj(x)
        x.mul_(2)
        changed = model.k_proj(x)
        fresh = model.k_proj(x.clone())
    assert torch.equal(changed, fresh)


def test_where_not_all_siblings_are_called_nothing_is_kept() -> None:
    torch.manual_seed(0)
    model = _Cross()
    prepared = _prepare(model)
    x = torch.randn(2, 64)
    first = model.q_proj(x)
    assert torch.equal(model.q_proj(x), first)
    group = next(b.forward.__closure__ for b in prepared.bindings if b.module is model.q_proj)
    assert group is not None
    (shared,) = (cell.cell_contents for cell in group if isinstance(cell.cell_contents, forwards._SharedInput))
    assert shared.separate and not shared._waiting and shared._input is None
    before = dict(prepared.calls)
    model.q_proj(x)
    assert prepared.calls["q_proj"] == before["q_proj"] + 1 and not prepared.calls["k_proj"]


def test_a_layer_counts_when_it_is_used_not_when_its_sibling_computes_it() -> None:
    model = with_lora(tiny_model())
    prepared = _prepare(model)
    logits_of(model)
    assert set(prepared.calls.values()) == {1} and not prepared.silent()
    model = _Cross()
    prepared = _prepare(model)
    model.q_proj(torch.randn(2, 64))
    assert prepared.silent() == ["k_proj", "v_proj"]


def test_a_copy_does_not_compute_with_the_original_s_weights() -> None:
    model = _Cross()
    _prepare(model)
    with pytest.raises(UserError, match="prepare the copy"):
        copy.deepcopy(model)(torch.randn(2, 64), torch.randn(2, 64))


def test_what_an_instance_had_bound_before_comes_back() -> None:
    model = with_lora(tiny_model())
    mlp = model.base_model.model.model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        return x

    forward.__module__ = "unsloth.kernels.fast_lora"
    mlp.forward = forward
    prepared = _prepare(model)
    assert mlp.forward is not forward and set(prepared.silent()) == set(prepared.layers)
    logits_of(model)
    assert not prepared.silent()
    remove_qat(prepared)
    assert mlp.forward is forward
    for _, module in model.named_modules():
        assert module is mlp or "forward" not in vars(module)


def test_a_module_that_computes_more_is_no_plain_mlp() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(64, 64) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2

    class Plain(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    assert forwards._is_swiglu(Plain()) and not forwards._is_swiglu(Scaled())
    gelu = Plain()
    gelu.act_fn = nn.GELU()
    assert not forwards._is_swiglu(gelu)


def test_the_kernels_are_chosen_in_one_place() -> None:
    bf16, fp16 = torch.bfloat16, torch.float16
    assert type(path_of(integers.INT8_INT4, "cpu", bf16, bf16, fused=True)) is Path
    assert type(path_of(integers.INT8_INT4, "cuda", fp16, fp16, fused=True)) is Path
    assert type(path_of(integers.INT8_INT4, "cuda", bf16, fp16, fused=True)) is Path  # under autocast
    assert type(path_of(integers.INT8_INT4, "cuda", bf16, bf16, fused=False)) is Path


def test_autocast_is_off_inside_and_on_again_after_an_error() -> None:
    def fail() -> None:
        with NoAutocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
            raise ValueError("inside")

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert torch.is_autocast_enabled("cpu")
    with NoAutocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def _numerics(count: int, calls: Counter[str]) -> list[LayerNumerics]:
    return [
        LayerNumerics(
            name=str(index), numbers=integers.INT8_INT4, group_size=32, dtype=torch.float32, scaling=0.5 + index,
            calls=calls,
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("frozen", ["none", "x", "first adapter", "all adapters", "weights train"])
def test_each_gets_a_gradient_where_it_is_asked_for(frozen: str) -> None:
    """Layers of different ranks and scalings, with a bias and without, against each by itself."""
    torch.manual_seed(1)
    calls: Counter[str] = Counter()
    numerics = _numerics(3, calls)

    def leaves() -> tuple[Tensor, list[Projection]]:
        torch.manual_seed(2)
        x = torch.randn(2, 5, 64, requires_grad=frozen != "x")
        parts = []
        for index, (rows, rank) in enumerate(((32, 4), (16, 8), (64, 2))):
            adapter = frozen != "all adapters" and not (frozen == "first adapter" and index == 0)
            parts.append(Projection(
                torch.randn(rows, 64, requires_grad=frozen == "weights train"),
                torch.randn(rank, 64, requires_grad=adapter), torch.randn(rows, rank, requires_grad=adapter),
                torch.randn(rows, requires_grad=True) if index == 1 else None, None,
            ))  # fmt: skip
        return x, parts

    upstream = [torch.randn(2, 5, rows) for rows in (32, 16, 64)]
    found = []
    for together in (True, False):
        x, parts = leaves()
        if together:
            outputs = fake_quant_linears(x, parts, numerics)
        else:
            outputs = tuple(fake_quant_linears(x, (p,), (n,))[0] for p, n in zip(parts, numerics, strict=True))
        torch.autograd.backward(outputs, upstream)
        tensors = [x, *(tensor for part in parts for tensor in part)]
        found.append([None if tensor is None else tensor.grad for tensor in tensors])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_swiglu_equals_its_parts_by_autograd() -> None:
    torch.manual_seed(3)
    calls: Counter[str] = Counter()
    numerics = _numerics(3, calls)
    shapes = ((64, 32), (64, 32), (32, 64))

    def leaves() -> tuple[Tensor, list[Projection]]:
        torch.manual_seed(4)
        x = torch.randn(2, 5, 32, requires_grad=True)
        return x, [
            Projection(
                torch.randn(rows, columns), torch.randn(4, columns, requires_grad=True),
                torch.randn(rows, 4, requires_grad=True), torch.randn(rows, requires_grad=True), None,
            )
            for rows, columns in shapes
        ]  # fmt: skip

    (x, parts), (y, others) = leaves(), leaves()
    output = fake_quant_swiglu(x, parts, numerics)
    gate, up = fake_quant_linears(y, others[:2], numerics[:2])
    (expected,) = fake_quant_linears(nn.functional.silu(gate) * up, others[2:], numerics[2:])
    assert torch.equal(output, expected)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    tensors = [x, *(tensor for part in parts for tensor in part)]
    expected_tensors = [y, *(tensor for part in others for tensor in part)]
    for ours, theirs in zip(tensors, expected_tensors, strict=True):
        if ours is not None and ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert not calls  # the forwards count, that use them
