"""Writes choices.jsonl from the held-out rows: the right answer among three of other rows, the same bytes each time."""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Writes the file beside this one."""
    rows = [json.loads(line) for line in (HERE.parent / "data" / "reasoning_eval.jsonl").open(encoding="utf-8")]
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["task"], []).append(row["messages"][1]["content"])
    choose = random.Random(0)
    with (HERE / "choices.jsonl").open("w", encoding="utf-8") as stream:
        for row in rows[:160]:
            right = row["messages"][1]["content"]
            others = sorted(set(answers[row["task"]]) - {right})
            choices = [right, *choose.sample(others, 3)]
            choose.shuffle(choices)
            line = {"question": row["messages"][0]["content"], "choices": choices, "answer": choices.index(right)}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
