"""On a GPU: what DPO and GRPO compute in bf16 with TRL's own kernel is what the plain definition gives.

`pytest -m gpu tests/gpu/test_policies.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policies import TEMPLATE, config_of, log_probs, pairs, prompts

from quantize.schemes import find_scheme
from train.backends import pick_backend
from train.collators import PairCollator
from train.fit import QatPlan, build_learner
from train.models import byte_tokenizer, resolve_model
from train.trainer import build_trainer

pytest.importorskip("triton", reason="TRL's loss is a kernel of Triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "initializer_range": 0.05,
}  # fmt: skip
NOISE = 0.25
"""Nats of an answer of some 10 tokens, of about 124: sums in bf16 in another order."""


def learner_of(method: str, scheme: str, home: Path) -> tuple[Any, Any, Path]:
    config = config_of(method, scheme)
    model = config.model.model_copy(update={"random": "full", "shape": SHAPE})
    config = config.model_copy(update={"model": model})
    source = resolve_model(model, cache=home, seed=0).folder
    found = find_scheme(scheme)
    plan = QatPlan(scheme=found, target=found.find_target("cuda"), group_size=32, dtype="bfloat16")
    learner = build_learner(config, pick_backend("peft"), source, plan, dtype="bfloat16")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in learner.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return config, learner, source


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("scheme", ["int8-int4", "int8-int4-mobile"])
def test_dpo_and_its_reference(scheme: str, tmp_path: Path) -> None:
    """With lm_head as it is TRL's kernel multiplies by it; where it is quantised, it is called."""
    from transformers import AutoModelForCausalLM

    config, learner, source = learner_of("dpo", scheme, tmp_path)
    trainer = build_trainer(learner, config, byte_tokenizer(), pairs(), tmp_path / "out", None)
    batch = on_gpu(PairCollator(0)([pairs()[number] for number in range(3)]))
    mask = batch["completion_mask"][:, 1:]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    learner.model.train()

    def by_trl() -> torch.Tensor:
        output = learner.model(**given, labels=labels, fused_lm_head=True, use_cache=False)
        return output.log_probs.float().sum(1)

    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        policy = (log_probs(learner.model, batch).float() * mask).sum(1)
        torch.testing.assert_close(by_trl(), policy, rtol=0, atol=NOISE)
        reference = (log_probs(plain, batch).float() * mask).sum(1)
        with learner.model.disable_adapter():
            torch.testing.assert_close(by_trl(), reference, rtol=0, atol=NOISE)
        assert (policy - reference).abs().max() > 2 * NOISE
    with torch.autocast("cuda", torch.bfloat16):
        trainer.compute_loss(learner.model, dict(batch)).backward()
    gradients = [p.grad for name, p in learner.model.named_parameters() if ".lora_A." in name]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_grpo_samples_from_the_quantised_model(tmp_path: Path) -> None:
    config, learner, _ = learner_of("grpo", "int8-int4", tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    trainer = build_trainer(learner, config, tokenizer, prompts(), tmp_path / "out", None)
    ids = torch.randint(5, 200, (4, 20), generator=torch.Generator().manual_seed(0)).cuda()
    whole = torch.ones_like(ids)
    learner.model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        found = trainer._get_per_token_logps_and_entropies(learner.model, ids, whole, 5)[0]
        batch = {"input_ids": ids, "attention_mask": whole}
        expected = log_probs(learner.model, batch, config.grpo.temperature)[:, -5:]
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0.05)
        learner.prepared.calls.clear()
        settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        answer = learner.model.generate(**batch, **settings, disable_compile=True)
        assert min(learner.prepared.calls[name] for name in learner.prepared.layers) == 8
        same = sum(
            int(
                (learner.model(input_ids=answer[:, :n], use_cache=False).logits[:, -1].argmax(-1) == answer[:, n]).sum()
            )
            for n in range(20, 28)
        )
    assert same >= 28, "of 32 greedy tokens; a tie falls the other way with other sums"
