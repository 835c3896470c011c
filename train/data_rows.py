"""One row -> token ids and what of them is learned; for dpo a second answer, for grpo what the rewards look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quantize.errors import UserError
from train.data_formats import COLUMNS, to_messages, to_preference

Row = dict[str, Any]


class RowReader:
    """Reads the rows of one source.

    Args:
        form: its format, as `find_format` names it.
        method: `train.method`.
        answers_only: learn the answers' tokens alone.
        max_length: longer rows are cut on the right.
    """

    def __init__(
        self, tokenizer: Any, form: str, source: str, *, method: str, answers_only: bool, max_length: int
    ) -> None:
        self.tokenizer, self.form, self.source, self.method = tokenizer, form, source, method
        self.answers_only, self.max_length = answers_only, max_length

    def read(self, row: Mapping[str, Any], number: int) -> Row | None:
        """The row as columns input_ids, loss_mask (1 = learned), row; None where nothing to learn is left of it.

        Further columns: for dpo rejected_ids and rejected_mask, the prompt with the worse answer; for grpo prompt
        (JSON, chat messages), answer (the reference) and columns (JSON, the row's others).

        Args:
            number: of the row, from 1.
        """
        if self.method == "dpo":
            return self._pair(row, number)
        content = to_messages(row, self.form, number, self.source)
        if isinstance(content, str):
            ids = [*self.tokenizer(content, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
            return self._cut(number, ids, [1] * len(ids))
        if self.method == "grpo":
            return self._prompt(row, content, number)
        ids, mask = _chat(content, self.tokenizer, number, self.source)
        return self._cut(number, ids, mask if self.answers_only else [1] * len(ids))

    def _pair(self, row: Mapping[str, Any], number: int) -> Row | None:
        pair = to_preference(row, number, self.source)
        first = len(pair.prompt)
        sides = []
        for answer in (pair.chosen, pair.rejected):
            ids, mask = _chat([*pair.prompt, *answer], self.tokenizer, number, self.source, first=first)
            sides.append(self._cut(number, ids, mask))
        chosen, rejected = sides
        if chosen is None or rejected is None or chosen["input_ids"] == rejected["input_ids"]:
            return None
        return chosen | {"rejected_ids": rejected["input_ids"], "rejected_mask": rejected["loss_mask"]}

    def _prompt(self, row: Mapping[str, Any], messages: Sequence[dict[str, str]], number: int) -> Row | None:
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        if last == 0:
            raise UserError(f"{self.source}, row {number}: an answer without a prompt, which train.method=grpo needs")
        ids, mask = _chat(messages, self.tokenizer, number, self.source, first=last)
        sample = self._cut(number, ids, mask)
        if sample is None:
            return None
        others = {name: value for name, value in row.items() if name not in (*COLUMNS[self.form], "prompt", "answer")}
        return sample | {
            "prompt": json.dumps(list(messages[:last]), ensure_ascii=False),
            "answer": messages[last]["content"],
            "columns": json.dumps(others, ensure_ascii=False, default=str),
        }

    def _cut(self, number: int, ids: list[int], mask: list[int]) -> Row | None:
        ids, mask = ids[: self.max_length], mask[: self.max_length]
        return {"input_ids": ids, "loss_mask": mask, "row": number} if any(mask[1:]) else None


def _chat(
    messages: Sequence[dict[str, str]], tokenizer: Any, number: int, source: str, *, first: int = 0
) -> tuple[list[int], list[int]]:
    """Token ids of a chat and the mask of its assistant turns from message `first` on, with the token that ends each.

    Segments between prefixes of the rendered text are tokenised apart, so that a mask border never cuts a token.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; set data.chat_template=chatml or the path of a .jinja file"
        )
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    whole = _render(tokenizer, messages, False)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    spans = [span for index in answers if (span := _span(messages, index, tokenizer, whole)) is not None]
    if len(spans) < len(answers):  # the template rewrites earlier turns; the last answer is always at the end
        span = _span(messages, last, tokenizer, whole)
        spans = [] if span is None else [span]
    if not spans:
        raise UserError(
            f"{source}, row {number}: the chat template hides where the answer starts; set data.chat_template"
        )
    ids: list[int] = []
    mask: list[int] = []
    position = 0
    for start, end in [*spans, (len(whole), len(whole))]:
        for text, learned in ((whole[position:start], 0), (whole[start:end], 1)):
            if text:
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += tokens
                mask += [learned] * len(tokens)
        position = end
    return ids, mask


def _span(messages: Sequence[dict[str, str]], index: int, tokenizer: Any, whole: str) -> tuple[int, int] | None:
    prompt = _render(tokenizer, messages[:index], True)
    until = _render(tokenizer, messages[: index + 1], False)
    if not whole.startswith(until) or not until.startswith(prompt):
        return None
    # What templates put after the end-of-turn token (a line break) is not for the model to say.
    answer = until[len(prompt) :]
    return len(prompt), len(prompt) + len(answer.rstrip("\n")) if answer.strip() else len(until)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> str:
    if not messages:
        return ""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
