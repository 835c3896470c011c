"""Rows -> token ids with a mask of what is learned, split so that no held-out row is trained on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize import hub
from quantize.errors import UserError
from train.data_formats import find_format, to_messages

if TYPE_CHECKING:
    from train.config import DataConfig

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prepared:
    """Tokenised data. `train` and `eval` are datasets with columns input_ids, loss_mask (1 = learned) and row."""

    train: Any
    eval: Any
    fingerprint: str
    statistics: dict[str, Any]
    example: str

    @property
    def eval_fingerprint(self) -> str:
        """Of the held-out rows alone: what the untouched model's scores depend on."""
        return _fingerprint(self.eval)


def prepare_data(config: DataConfig, tokenizer: Any, *, max_length: int, seed: int) -> Prepared:
    """Loads, formats, tokenises, splits.

    Args:
        config: section `data`.
        tokenizer: used through `apply_chat_template` and `__call__`.
        max_length: longer rows are cut on the right.
        seed: of the subsamples and the split.

    Raises:
        UserError: the data cannot be read, has no known format, or leaves nothing to learn.
    """
    tokenizer.chat_template = template_text(config.chat_template) or tokenizer.chat_template
    dropped = {"nothing to learn after truncation": 0, "equal to a held-out row": 0, "repeated": 0}
    rows = _tokenised(config, config.train, config.split, tokenizer, max_length, dropped)
    if config.eval is not None:
        held = _tokenised(config, config.eval, config.eval_split or "train", tokenizer, max_length, dropped)
        random.Random(seed).shuffle(held)
        held = held[: config.eval_samples]
    else:
        rows = _unique(rows, dropped)
        random.Random(seed).shuffle(rows)
        share = min(config.eval_samples, max(1, len(rows) // 10))
        held, rows = rows[:share], rows[share:]
    held_ids = {tuple(row["input_ids"]) for row in held}
    kept = [row for row in rows if tuple(row["input_ids"]) not in held_ids]
    dropped["equal to a held-out row"] = len(rows) - len(kept)
    if config.train_samples is not None and config.train_samples < len(kept):
        kept = random.Random(seed).sample(kept, config.train_samples)
    if not kept or not held:
        raise UserError(
            f"data: {config.train} leaves {len(kept)} training and {len(held)} held-out rows; both need one at least"
        )
    from datasets import Dataset

    statistics = {"train": _statistics(kept), "eval": _statistics(held), "dropped": dropped}
    print_of_all = _fingerprint(kept, held)
    example = _example(kept[0], tokenizer)
    return Prepared(Dataset.from_list(kept), Dataset.from_list(held), print_of_all, statistics, example)


PREPARED_FILES = ("train.parquet", "eval.parquet", "data.json")


def save_prepared(prepared: Prepared, folder: Path) -> None:
    """Writes `PREPARED_FILES`; `load_prepared` reads them."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    prepared.train.to_parquet(partial / "train.parquet")
    prepared.eval.to_parquet(partial / "eval.parquet")
    about = {"fingerprint": prepared.fingerprint, "statistics": prepared.statistics, "example": prepared.example}
    (partial / "data.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_prepared(folder: Path) -> Prepared:
    """Reads what `save_prepared` wrote."""
    import pyarrow.parquet
    from datasets import Dataset

    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    train, held = (Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet")) for name in ("train", "eval"))
    return Prepared(train, held, about["fingerprint"], about["statistics"], about["example"])


def check_data_source(config: DataConfig) -> None:
    """Whether the data is there and has a known format, before anything heavy is loaded.

    Raises:
        UserError: one line for each source that cannot be used.
    """
    lines: list[str] = []
    for source, split in ((config.train, config.split), (config.eval, config.eval_split or "train")):
        if source is None:
            continue
        try:
            if local_file(source) is None:
                _check_hub(source)
            else:
                find_format(_load(config, source, split).column_names, config.format, source)
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)


def _check_hub(source: str) -> None:
    try:
        if not hub.is_cached("dataset", source):
            hub.check_repository("dataset", source)
    except hub.HubProblem as error:
        raise UserError(f"data: {source} is no local file, and {error}; offline, give a local file") from error


def local_file(source: str) -> Path | None:
    """The file that `source` names: as given, or among the packaged examples. None for a hub id."""
    path = Path(source).expanduser()
    packaged = Path(__file__).resolve().parent.parent / source
    for candidate in (path, packaged):
        if candidate.is_file():
            return candidate
    if path.suffix in _READERS or path.exists() or source.startswith((".", "/", "~")):
        raise UserError(f"data: no file {source}; give a {', '.join(_READERS)} file that exists, or a hub id")
    return None


def _load(config: DataConfig, source: str, split: str) -> Any:
    import datasets

    path = local_file(source)
    datasets.disable_progress_bars()
    try:
        if path is None:
            return datasets.load_dataset(source, config.subset, split=split)
        if path.suffix not in _READERS:
            raise UserError(f"data: {source} has an unknown ending; use {', '.join(_READERS)}")
        if path.suffix == ".jsonl":
            _check_lines(path)
        if path.stat().st_size == 0:
            raise UserError(f"data: {source} is empty")
        data = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    except UserError:
        raise
    except Exception as error:  # the loaders raise many kinds; each is the user's to solve
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "cannot be read" if path is not None else "is no local file, and the hub says"
        raise UserError(f"data: {source} {where}: {reason}; offline, give a local file") from error
    return data


def _check_lines(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError("a JSON object is expected")
            except ValueError as error:
                raise UserError(f"data: {path}, line {number}: malformed JSON ({error})") from error


def _tokenised(
    config: DataConfig, source: str, split: str, tokenizer: Any, max_length: int, dropped: dict[str, int]
) -> list[dict[str, Any]]:
    data = _load(config, source, split)
    if len(data) == 0:
        raise UserError(f"data: {source} has no rows")
    form = find_format(data.column_names, config.format, source)
    result = []
    for number, row in enumerate(data, 1):
        content = to_messages(row, form, number, source)
        if isinstance(content, str):
            ids = [*tokenizer(content, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            mask = [1] * len(ids)
        else:
            ids, mask = _chat(content, tokenizer, number, source)
            mask = mask if config.answers_only else [1] * len(ids)
        ids, mask = ids[:max_length], mask[:max_length]
        if any(mask[1:]):
            result.append({"input_ids": ids, "loss_mask": mask, "row": number})
        else:
            dropped["nothing to learn after truncation"] += 1
    if not result:
        raise UserError(
            f"data: {source} has no trainable token after truncation to train.max_length={max_length}: the prompts "
            "alone are longer; raise train.max_length"
        )
    return result


def _chat(messages: Sequence[dict[str, str]], tokenizer: Any, number: int, source: str) -> tuple[list[int], list[int]]:
    """Token ids of a chat and the mask of its assistant turns, the token that ends each turn included.

    Segments between prefixes of the rendered text are tokenised apart, so that a mask border never cuts a token.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; set data.chat_template=chatml or the path of a .jinja file"
        )
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    whole = _render(tokenizer, messages, False)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
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


def template_text(name: str | None) -> str | None:
    """The configured chat template; None = the tokenizer's own.

    Raises:
        UserError: there is no such template.
    """
    if name is not None:
        packaged = Path(__file__).parent / "chat_templates" / f"{name}.jinja"
        path = packaged if packaged.is_file() else Path(name).expanduser()
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in packaged.parent.glob("*.jinja")))
            raise UserError(f"data.chat_template={name} is neither packaged ({known}) nor a .jinja file")
        return path.read_text(encoding="utf-8")
    return None


def _unique(rows: list[dict[str, Any]], dropped: dict[str, int]) -> list[dict[str, Any]]:
    seen: set[tuple[int, ...]] = set()
    kept = []
    for row in rows:
        if (key := tuple(row["input_ids"])) not in seen:
            seen.add(key)
            kept.append(row)
    dropped["repeated"] = len(rows) - len(kept)
    return kept


def _statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = sorted(len(row["input_ids"]) for row in rows)
    learned = sum(sum(row["loss_mask"]) for row in rows)
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "learned_tokens": learned,
        "length": {"min": lengths[0], "median": lengths[len(lengths) // 2],
                   "p95": lengths[int(0.95 * (len(lengths) - 1))], "max": lengths[-1]},
    }  # fmt: skip


def _fingerprint(*parts: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            digest.update(json.dumps([row["input_ids"], row["loss_mask"]]).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _example(row: dict[str, Any], tokenizer: Any) -> str:
    """One sample as rich markup: what is learned is green."""
    parts: list[tuple[int, list[int]]] = []
    for token, learned in zip(row["input_ids"], row["loss_mask"], strict=True):
        if not parts or parts[-1][0] != learned:
            parts.append((learned, []))
        parts[-1][1].append(token)
    from rich.markup import escape

    texts = [(learned, escape(tokenizer.decode(tokens))) for learned, tokens in parts]
    return "".join(f"[green]{text}[/green]" if learned else text for learned, text in texts)
