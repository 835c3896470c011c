"""What preference pairs and rewards show of a model, as rows of a task: what it prefers, what its answers are worth.

They stand among the report's tasks, with the same pairs, intervals and tests, under the names of
`quantize.task_rows.OWN`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantize.task_rows import PREFERENCES, REWARDS, Row

if TYPE_CHECKING:
    from quantize.evaluate import Scores


_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""What a model's own generation_config would fill in otherwise."""


def preference_rows(model: Any, data: Path, scores: Scores, *, batch_size: int, decode: Any) -> list[Row]:
    """1 for each held-out pair whose better answer is the more likely one, else 0.

    Args:
        data: parquet with the columns input_ids, loss_mask, rejected_ids, rejected_mask.
        scores: the model's on the better answers, in the file's order.
        batch_size: answers at once.
        decode: token ids -> text.
    """
    from quantize.evaluate import Sample, evaluate_model, texts_of

    columns = _columns(data, ("input_ids", "loss_mask", "rejected_ids", "rejected_mask"))
    better = [Sample(*pair) for pair in zip(columns["input_ids"], columns["loss_mask"], strict=True)]
    worse = [Sample(*pair) for pair in zip(columns["rejected_ids"], columns["rejected_mask"], strict=True)]
    other = evaluate_model(model, worse, batch_size=batch_size)
    texts, others = texts_of(better, scores, decode), texts_of(worse, other, decode)
    rows = []
    for number, (nll, rejected) in enumerate(zip(scores.nll.tolist(), other.nll.tolist(), strict=True)):
        prompt, answer, instead = texts["prompt"][number], texts["answer"][number], others["answer"][number]
        chosen = answer if nll < rejected else instead
        rows.append(
            Row(
                name=PREFERENCES,
                task=PREFERENCES,
                doc_id=number,
                doc_hash=_hash(prompt, answer, instead),
                metric="preferred",
                value=float(nll < rejected),
                weight=1.0,
                higher_is_better=True,
                prompt=prompt,
                target=answer,
                response=f"{chosen} ({-min(nll, rejected):.3f} against {-max(nll, rejected):.3f})",
            )
        )
    return rows


def reward_rows(model: Any, tokenizer: Any, data: Path, asked: Mapping[str, Any], *, batch_size: int) -> list[Row]:
    """The reward of a greedy answer to each of the first held-out prompts.

    Args:
        data: parquet with the columns prompt (JSON, chat messages), answer and columns (JSON).
        asked: rewards and weights (see `quantize.rewards.rate`), sources, samples, max_new_tokens.
        batch_size: prompts at once.
    """
    from quantize.rewards import rate

    columns = _columns(data, ("prompt", "answer", "columns"))
    count = min(asked["samples"], len(columns["answer"]))
    prompts = [json.loads(text) for text in columns["prompt"][:count]]
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    answered = greedy_answers(model, tokenizer, texts, max_new_tokens=asked["max_new_tokens"], batch_size=batch_size)
    answers = columns["answer"][:count]
    others = [json.loads(text) for text in columns["columns"][:count]]
    names = dict.fromkeys(name for row in others for name in row)
    known = {"answer": answers} | {name: [row.get(name) for row in others] for name in names}
    ids, completions = [ids for ids, _ in answered], [text for _, text in answered]
    values = rate(asked["rewards"], asked["weights"], prompts, completions, ids, known)
    # Runs whose rewards differ have no pairs.
    names_only = [name.rpartition("/")[2] for name in asked["rewards"]]
    rated = json.dumps([names_only, asked["sources"], asked["weights"], asked["max_new_tokens"]])
    return [
        Row(
            name=REWARDS,
            task=REWARDS,
            doc_id=number,
            doc_hash=_hash(texts[number], answers[number], rated),
            metric="reward",
            value=float(value),
            weight=1.0,
            higher_is_better=True,
            prompt=texts[number],
            target=answers[number],
            response=completions[number],
        )
        for number, value in enumerate(values)
    ]


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int
) -> list[tuple[list[int], str]]:
    """The model's most likely continuation of each prompt, token by token: its ids, without padding, and its text.

    Prompts of like length are answered together.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [*dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id])]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, disable_compile=True, **_GREEDY
    )
    device = next(model.parameters()).device
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), index))
    found: list[tuple[list[int], str]] = [([], "")] * len(ids)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(ids[index]) for index in chosen)
        padded = torch.tensor([[pad] * (longest - len(ids[index])) + ids[index] for index in chosen])
        attention = torch.tensor([[0] * (longest - len(ids[index])) + [1] * len(ids[index]) for index in chosen])
        output = model.generate(
            input_ids=padded.to(device), attention_mask=attention.to(device), generation_config=settings
        )
        for row, index in enumerate(chosen):
            said = output[row, longest:].tolist()
            end = next((place + 1 for place, token in enumerate(said) if token in ends), len(said))
            found[index] = said[:end], tokenizer.decode(said[:end], skip_special_tokens=True)
    return found


def _columns(data: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    import pyarrow.parquet

    found: dict[str, list[Any]] = pyarrow.parquet.read_table(data, columns=list(names)).to_pydict()
    return found


def _hash(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
