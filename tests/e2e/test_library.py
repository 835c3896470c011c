"""The library in other people's hands: TRL's stock trainers on a prepared model, and what ships from them."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_log_probs import PlainLogProbs
from tiny_models import IDS, tiny_model

from qat import QatCallback, compare_shipped, prepare_qat, ship
from quantize import load_quantized
from quantize.errors import UserError
from quantize.release.card import write_card
from train.models import byte_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
TOKENIZER = byte_tokenizer()
TEXTS = ["What is 2 plus 2?", "A longer text, so that one of the two is padded.", "42"]


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """trl as it is, but for the kernel of its loss."""
    assert "unsloth" not in sys.modules, "unsloth patches trl"
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainLogProbs)


def _model(architecture: str = "qwen3", **lora: Any) -> Any:
    import peft

    tokens = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = tiny_model(architecture, vocab_size=len(TOKENIZER), **tokens)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def _trainer(kind: str, model: Any, folder: Path, callbacks: list[Any], lora: Any = None, **settings: Any) -> Any:
    import trl
    from datasets import Dataset

    common = {
        "output_dir": str(folder / "out"), "max_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    common |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1} if kind == "GRPO" else {}
    numbers = range(24)
    columns: dict[str, list[str]] = {"prompt": [f"{i} plus {i} is " for i in numbers]}
    if kind == "SFT":
        columns = {"text": [f"{i} plus {i} is {2 * i}" for i in numbers]}
    elif kind == "DPO":
        columns |= {"chosen": [str(2 * i) for i in numbers], "rejected": [str(2 * i + 1) for i in numbers]}
    options = {"reward_funcs": _different_letters} if kind == "GRPO" else {}
    return getattr(trl, f"{kind}Trainer")(
        model, args=getattr(trl, f"{kind}Config")(**{**common, **settings}), train_dataset=Dataset.from_dict(columns),
        processing_class=TOKENIZER, callbacks=callbacks, peft_config=lora, **options,
    )  # fmt: skip


def _different_letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def _adapter(model: Any) -> dict[str, Any]:
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name and ".ref." not in name
    }


@pytest.mark.parametrize(("kind", "architecture"), [("SFT", "llama"), ("DPO", "qwen3"), ("GRPO", "qwen3")])
def test_what_a_stock_trainer_trains_is_what_ships(kind: str, architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(architecture)
    if kind == "GRPO":  # trl wraps the model itself, and its reference is the model with its adapters disabled
        trainer = _trainer(kind, model.unload(), tmp_path, [], lora=model.peft_config["default"])
        model = trainer.model
        prepared = prepare_qat(model, "int8-int4")
        trainer.add_callback(QatCallback(prepared))
    else:  # of a model that peft has wrapped, trl's reference is a frozen copy of the adapter
        prepared = prepare_qat(model, "int8-int4")
        trainer = _trainer(kind, model, tmp_path, [QatCallback(prepared)])
    before = _adapter(model)
    assert ("ref" in model.peft_config) == (kind == "DPO")
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == 3 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    moved = [not torch.equal(weight, before[name]) for name, weight in _adapter(model).items()]
    assert len(moved) == 28 and all(moved)
    if kind == "DPO":  # the reference is the model before the training, in 16 bit, not the policy
        margins = [row["rewards/margins"] for row in steps]
        assert margins[0] != 0.0 and margins[-1] > margins[0]
    if kind == "GRPO":
        assert all(row["kl"] > 0 for row in steps)

    shipped = ship(prepared, tmp_path / "shipped", TOKENIZER, merged=tmp_path / "merged")
    card = write_card(str(shipped.folder), str(tmp_path)).read_text()
    assert "fine-tuned with quantisation-aware training and shipped in int8-int4" in card and "rounding" not in card
    assert shipped.coverage.layers == prepared.coverage.layers and shipped.coverage.quantized_fraction == 1.0
    same = compare_shipped(prepared, shipped.folder, TEXTS, TOKENIZER, batch_size=2)
    assert same.largest_difference == 0.0 == same.gap and math.isfinite(same.trained_loss)
    with torch.no_grad():
        trained = model.eval()(input_ids=IDS).logits
        for loaded in (load_quantized(shipped.folder), AutoModelForCausalLM.from_pretrained(shipped.folder)):
            assert torch.equal(loaded(input_ids=IDS).logits, trained)
        prepared.switch_off()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
        torch.testing.assert_close(plain, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config.use_cache and (shipped.folder / "chat_template.jinja").is_file()


def test_without_the_callback_all_bits_are_the_same(tmp_path: Path) -> None:
    found = []
    for cache_mib, called in ((1024, True), (1024, False), (0, False)):
        model = _model()
        prepared = prepare_qat(model, "int8-int4", cache_mib=cache_mib)
        trainer = _trainer("SFT", model, tmp_path, [QatCallback(prepared)] if called else [], max_steps=4)
        trainer.train()
        found.append((_adapter(model), [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    (weights, losses), *others = found
    assert len(set(losses)) == 4
    for other, other_losses in others:
        assert other_losses == losses and all(torch.equal(weights[name], weight) for name, weight in other.items())


def test_weights_that_are_kept_follow_an_optimiser_that_tells_nobody() -> None:
    model = _model()
    prepared = prepare_qat(model, "int8-int4")
    prepared.cache.reuse = True
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            kept = model(input_ids=IDS).logits
            prepared.cache.clear()
            assert torch.equal(model(input_ids=IDS).logits, kept)


def test_fake_quantisation_starts_at_its_step(tmp_path: Path) -> None:
    model = _model()
    prepared = prepare_qat(model, "int8-int4")
    _trainer("SFT", model, tmp_path, [QatCallback(prepared, start=0.7)], gradient_accumulation_steps=1).train()
    # In the last of three steps; where checkpointing computes again, twice.
    assert prepared.enabled and set(prepared.calls.values()) <= {1, 2}
    with pytest.raises(UserError, match="never be on; give a share"):
        _trainer("SFT", model, tmp_path, [QatCallback(prepared, start=3)]).train()


def test_a_layer_that_the_trainer_goes_past_ends_the_training(tmp_path: Path) -> None:
    model = _model()
    prepared = prepare_qat(model, "int8-int4-mobile")
    with pytest.raises(UserError, match=r"lm_head: TRL's trainers read lm_head's weight.*skip=\['lm_head'\]"):
        _trainer("SFT", model, tmp_path, [QatCallback(prepared)]).train()
    with pytest.raises(UserError, match="never ran, the first is lm_head"):
        ship(prepared, tmp_path / "shipped", TOKENIZER)


def test_text_is_generated_from_what_ships(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    prepared = prepare_qat(model, "int8-int4")
    assert not prepared.cache.reuse
    prepared.cache.reuse = True
    with pytest.raises(UserError, match="no fake-quantised layer has run"):
        ship(prepared, tmp_path / "shipped", TOKENIZER)
    ship(prepared, tmp_path / "shipped", TOKENIZER, trained_elsewhere=True)
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    told = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    trained = model.generate(**prompt, **told)
    loaded = load_quantized(tmp_path / "shipped")
    # As it is in training: not trainable, as torch multiplies trainable weights otherwise; and in torch's own memory: a
    # mapped file's tensors lie at any multiple of 8 bytes, where some CPUs sum a slice's product in another order.
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach().clone(), requires_grad=False)
    shipped = loaded.generate(**prompt, **told)
    assert torch.equal(trained.sequences, shipped.sequences)
    assert all(torch.equal(a, b) for a, b in zip(trained.logits, shipped.logits, strict=True))
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        kept = model(input_ids=IDS, logits_to_keep=3).logits
        # A product of its own, not a part of the whole's: some CPUs sum so few rows in another order (4e-7 apart).
        base = model.get_base_model()
        assert torch.equal(kept, base.lm_head(base.model(input_ids=IDS).last_hidden_state[:, -3:]))
        torch.testing.assert_close(kept, whole[:, -3:], rtol=0, atol=2e-6)
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=IDS).logits, whole)


def test_all_weights_may_train_without_peft(tmp_path: Path) -> None:
    model = _model().unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    prepared = prepare_qat(model, "int3", group_size=32)
    _trainer("SFT", model, tmp_path, [QatCallback(prepared)], max_steps=1).train()
    ship(prepared, tmp_path / "shipped")
    assert compare_shipped(prepared, tmp_path / "shipped", TEXTS, TOKENIZER).largest_difference == 0.0


def test_what_cannot_ship_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown scheme 'int8int4'; did you mean int8-int4"):
        prepare_qat(_model(), "int8int4")
    with pytest.raises(UserError, match="DoRA cannot go inside"):
        prepare_qat(_model(use_dora=True), "int8-int4")
    in_4_bit = _model()
    layer = in_4_bit.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"q_proj: its frozen weight is quantised already; load the model in 16 bit"):
        prepare_qat(in_4_bit, "int8-int4")
    with pytest.raises(UserError, match="no grid was trained"):
        ship(prepare_qat(_model(), "int8-int4", placement="outside"), tmp_path / "outside")
    with pytest.raises(UserError, match=r"int4 for cuda-sm80 computes in bfloat16, and was prepared for float32: give"):
        ship(prepare_qat(_model(), "int4", group_size=32), tmp_path / "elsewhere")
    if not torch.cuda.is_available():
        prepared = prepare_qat(_model(), "int4", group_size=32, dtype=torch.bfloat16)
        with pytest.raises(UserError, match=r"int4 for cuda-sm80: this machine lacks .*another target"):
            ship(prepared, tmp_path / "elsewhere")
    model = _model()
    prepared = prepare_qat(model, "int8-int4")
    with pytest.raises(UserError, match="has 1 tokens; a comparison needs two"):
        compare_shipped(prepared, tmp_path, ["a"], TOKENIZER)
    with model.disable_adapter(), pytest.raises(UserError, match="not in use"):
        ship(prepared, tmp_path / "disabled")
    assert not any(path.name in ("outside", "elsewhere", "disabled") for path in tmp_path.iterdir())


_SUBSTITUTES = {
    "ModelConfig(": "ModelConfig(backend='peft', ",
    "eval_samples=200": "eval_samples=8, train_samples=16",
    "max_steps=100": "max_steps=2",
    "bf16=True": "bf16=False, use_cpu=True",
    "dtype=torch.bfloat16, device_map": "dtype=torch.float32, device_map",
    "max_completion_length=64": "max_completion_length=6",
    "num_generations=8": "num_generations=2, per_device_train_batch_size=2",
    "range(500)": "range(8)",
}


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/library.md from top to bottom, with a tiny model in place of the hub's and few steps on a CPU."""
    tiny = tmp_path / "tiny"
    _model().unload().save_pretrained(tiny)
    TOKENIZER.save_pretrained(tiny)
    text = PAGE.read_text(encoding="utf-8")
    for written, here in _SUBSTITUTES.items():
        assert written in text, written
        text = text.replace(written, here)
    text = text.replace('"Qwen/Qwen3-0.6B"', repr(str(tiny)))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 5 and names["same"].largest_difference == 0.0 == names["same"].gap
    assert names["result"].shipped == names["result"].path / "quantized"
    assert {path.parent.name for path in Path("out").glob("*/shipped")} == {"sft", "dpo", "grpo"}
