"""DPO and GRPO over a fake-quantised model: losses and gradients against plain formulas, the reference, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fitted
from policies import TEMPLATE, config_of, log_probs, pairs, prompts
from transformers import AutoModelForCausalLM

from quantize.schemes import find_scheme
from train.backends import pick_backend
from train.collators import PairCollator
from train.fit import Learner, QatPlan, build_learner
from train.models import byte_tokenizer, resolve_model
from train.trainer import build_trainer


def learner_of(config: Any, home: Path, target: str = "cpu") -> tuple[Learner, Path]:
    """A learner whose adapter does something, and the model's folder."""
    source = resolve_model(config.model, cache=home, seed=0).folder
    scheme = find_scheme(config.qat)
    plan = QatPlan(scheme=scheme, target=scheme.find_target(target), group_size=32, dtype="float32")
    learner = build_learner(config, pick_backend("peft"), source, plan, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in learner.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return learner, source


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("scheme", "target"), [("int8-int4", "cpu"), ("int8-int4-mobile", "cpu")])
def test_dpo_is_its_formula_over_the_quantised_model(scheme: str, target: str, tmp_path: Path) -> None:
    """Values and gradients; the reference is the untouched model in its own dtype, whatever is fake-quantised."""
    config = config_of("dpo", scheme)
    learner, source = learner_of(config, tmp_path, target)
    trainer = build_trainer(learner, config, byte_tokenizer(), pairs(), tmp_path / "out", None)
    assert list(learner.model.peft_config) == ["default"]
    batch = PairCollator(0)([pairs()[number] for number in range(3)])
    learner.model.train()

    loss = trainer.compute_loss(learner.model, dict(batch))
    loss.backward()
    found = gradients(learner.model)

    mask = batch["completion_mask"][:, 1:]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        reference = (log_probs(plain, batch) * mask).sum(1)
    policy = (log_probs(learner.model, batch) * mask).sum(1)
    margins = (policy - reference)[:3] - (policy - reference)[3:]
    expected = -torch.nn.functional.logsigmoid(config.dpo.beta * margins).mean()
    expected.backward()
    wanted = gradients(learner.model)

    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys() and any(".lora_A." in name for name in found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_disabled_adapter_is_the_model_before_fine_tuning(tmp_path: Path) -> None:
    config = config_of("dpo")
    learner, source = learner_of(config, tmp_path)
    build_trainer(learner, config, byte_tokenizer(), pairs(), tmp_path / "out", None)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([[3, 9, 27, 81, 4]])
    with torch.no_grad():
        before = learner.model(input_ids=ids).logits
        with learner.model.disable_adapter():
            assert torch.equal(learner.model(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert torch.equal(learner.model(input_ids=ids).logits, before)
        assert not torch.equal(before, plain(input_ids=ids).logits)


def test_grpo_rates_the_quantised_models_own_answers(tmp_path: Path) -> None:
    """Its log-probabilities are the plain definition's, and greedy answers with a cache are those without one."""
    config = config_of("grpo")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    learner, _ = learner_of(config, tmp_path)
    trainer = build_trainer(learner, config, tokenizer, prompts(), tmp_path / "out", None)
    learner.model.eval()
    ids = torch.tensor([[5, 9, 30, 60, 22, 101], [7, 7, 80, 12, 33, 90]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scored, _, _ = trainer._get_per_token_logps_and_entropies(learner.model, ids, batch["attention_mask"], 3)
    torch.testing.assert_close(scored, log_probs(learner.model, batch, config.grpo.temperature)[:, -3:])

    with torch.no_grad():
        answer = learner.model.generate(
            **batch, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0, disable_compile=True
        )
        for length in range(6, 11):
            logits = learner.model(input_ids=answer[:, :length], use_cache=False).logits
            assert torch.equal(logits[:, -1].argmax(-1), answer[:, length])
    assert learner.prepared is not None and all(learner.prepared.calls.values())


@pytest.mark.parametrize("start", [0, 0.5])
def test_dpo_learns_to_prefer(start: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a few pairs, many times; the loss falls, before quantisation starts and after."""
    import fitting

    monkeypatch.setattr(fitting, "rows", lambda: pairs().select(range(4)))
    config = config_of("dpo", max_steps=24, num_train_epochs=24.0)
    config = config.model_copy(update={"fake_quant": config.fake_quant.model_copy(update={"start": start})})
    found = fitted(config, tmp_path / "out")
    assert found.finished
    assert found.losses[-1] < 0.2 < 0.5 < found.losses[0]


def test_an_adapter_on_experts_has_a_reference_too(tmp_path: Path) -> None:
    config = config_of("dpo")
    model = config.model.model_copy(update={"architecture": "qwen3_moe"})
    lora = config.lora.model_copy(update={"target_parameters": ["gate_up_proj", "down_proj"]})
    config = config.model_copy(update={"model": model, "lora": lora})
    learner, source = learner_of(config, tmp_path)
    trainer = build_trainer(learner, config, byte_tokenizer(), pairs(), tmp_path / "out", None)
    batch = PairCollator(0)([pairs()[number] for number in range(2)])
    learner.model.train()
    loss = trainer.compute_loss(learner.model, dict(batch))
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in learner.model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([[3, 9, 27, 81, 4]])
    with torch.no_grad(), learner.model.disable_adapter():
        torch.testing.assert_close(learner.model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with answers that are sampled too: the checkpoint holds the state of the random numbers."""
    import fitting

    import train.models

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(fitting, "rows", pairs if method == "dpo" else prompts)
    monkeypatch.setattr(train.models, "byte_tokenizer", lambda: tokenizer)
    (tmp_path / "own_rewards.py").write_text(
        "def even(completions, **columns):\n    return [float(len(c[0]['content']) % 2 == 0) for c in completions]\n"
    )
    config = config_of(method, max_steps=6)
    grpo = config.grpo.model_copy(update={"rewards": [f"{tmp_path}/own_rewards.py:even"]})
    start = config.fake_quant.model_copy(update={"start": 0.5})
    config = config.model_copy(update={"grpo": grpo, "fake_quant": start})
    whole = fitted(config, tmp_path / "whole")
    first = fitted(config, tmp_path / "broken", stop_after=2)
    assert not first.finished
    second = fitted(config, tmp_path / "broken")
    assert second.finished and whole.losses == [*first.losses, *second.losses]
    for name, weight in whole.adapter.items():
        assert torch.equal(weight, second.adapter[name]), name
