"""Makes the example data: short tasks with exact answers, from reasoning-gym's generators.

    pip install reasoning-gym==0.1.25
    python examples/data/make_data.py

The same version and seed give the same bytes. Prompts and answers are short: the quickstart trains on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# task -> (what the prompt asks, settings of the generator)
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "number_sorting": {"min_numbers": 3, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0},
    "word_sorting": {"min_words": 3, "max_words": 4},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 20},
    "prime_factorization": {"min_value": 4, "max_value": 2000},
}
LONGEST_QUESTION, LONGEST_ANSWER = 220, 40


def rows(task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless rows of one task, short ones only."""
    import reasoning_gym

    block = 0
    while True:
        generator = reasoning_gym.create_dataset(task, size=500, seed=seed + 7919 * block, **TASKS[task])
        for item in generator:
            question, answer = shorten(task, item), str(item["answer"]).strip()
            if question and len(question) <= LONGEST_QUESTION and 0 < len(answer) <= LONGEST_ANSWER:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield {"task": task, "messages": messages}
        block += 1


def shorten(task: str, item: dict[str, Any]) -> str:
    """The question in one line; long instructions are replaced by a short one of our own."""
    metadata, question = item["metadata"], " ".join(str(item["question"]).split())
    if task == "number_sorting":
        numbers = ", ".join(map(str, metadata["original_numbers"]))
        order = "descending" if "descending" in question else "ascending"
        return f"Sort these numbers in {order} order and answer with a list: {numbers}"
    if task == "word_sorting":
        order = "descending" if "descending" in question else "ascending"
        return f"Sort these words in {order} ASCII order, comma-separated: {', '.join(metadata['original_words'])}"
    if task == "prime_factorization":
        return f"Write {metadata['number']} as a product of primes, factors in ascending order joined by ×."
    return question


def preference(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The row as a pair: its answer, and one that is nearly right."""
    question, answer = (message["content"] for message in row["messages"])
    return {"task": row["task"], "prompt": question, "chosen": answer, "rejected": nearly(answer, rng)}


def nearly(answer: str, rng: random.Random) -> str:
    """The answer with one number moved by up to 9, or two different neighbouring letters swapped."""
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        chosen = rng.choice(numbers)
        moved = int(chosen.group()) + rng.choice(
            [step for step in range(-9, 10) if step and int(chosen.group()) + step >= 0]
        )
        return answer[: chosen.start()] + str(moved) + answer[chosen.end() :]
    beside = [(index, answer[index : index + 2]) for index in range(len(answer) - 1)]
    pairs = [index for index, letters in beside if letters.isalpha() and letters[0] != letters[1]]
    index = rng.choice(pairs) if pairs else 0
    swapped = answer[:index] + answer[index + 1 : index + 2] + answer[index] + answer[index + 2 :]
    return swapped if swapped != answer else answer * 2


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Writes reasoning_{train,eval}.jsonl and, of their first rows, preferences_{train,eval}.jsonl beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=3000, help="training rows")
    parser.add_argument("--eval", type=int, default=400, help="held-out rows; no prompt equals a training row's")
    parser.add_argument(
        "--pairs", type=int, default=1000, help="of the training rows as preference pairs; a fifth held out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    streams = [rows(task, options.seed) for task in TASKS]
    seen: set[str] = set()
    exhausted = dict.fromkeys(range(len(streams)), 0)
    for name, count in (("eval", options.eval), ("train", options.train)):
        chosen: list[dict[str, Any]] = []
        turn = 0
        while len(chosen) < count:
            index = turn % len(streams)
            turn += 1
            # Small tasks run out of new prompts; after many repeats in a row the others take their place.
            if exhausted[index] > 2000:
                continue
            row = next(streams[index])
            while row["messages"][0]["content"] in seen and exhausted[index] <= 2000:
                exhausted[index] += 1
                row = next(streams[index])
            if row["messages"][0]["content"] not in seen:
                exhausted[index] = 0
                seen.add(row["messages"][0]["content"])
                chosen.append(row)
        write(options.output / f"reasoning_{name}.jsonl", chosen)
        rng = random.Random(options.seed)
        pairs = [preference(row, rng) for row in chosen[: options.pairs if name == "train" else options.pairs // 5]]
        write(options.output / f"preferences_{name}.jsonl", pairs)


if __name__ == "__main__":
    main()
