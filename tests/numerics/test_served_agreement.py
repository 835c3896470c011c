"""What `quantize serve --check` has transformers write, beside one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from quantize.serving.agreement import _continue

PROMPTS = [
    [5, 6, 7],
    [9],
    [11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    *[[30 + n, 40 + n] for n in range(7)],
    [8, 8, 8, 8],
]
COUNT = 9


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_prompts_that_are_continued_together_get_what_each_gets_alone(architecture: str) -> None:
    model, told = tiny_model(architecture), list[int]()
    found = _continue(model, PROMPTS, COUNT, lambda done, total: told.append(done))
    assert told == [8, len(PROMPTS)]
    for prompt, (tokens, margins, seconds) in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for token, margin, second in zip(tokens, margins, seconds, strict=True):
            with torch.no_grad():
                best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)  # no cache, no padding
            assert (token, second) == tuple(best.indices.tolist())
            assert margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)
            ids.append(token)
        assert len(ids) == len(prompt) + COUNT
