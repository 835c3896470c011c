"""Rows -> token ids with a mask of what is learned, split so that no held-out row is trained on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize import hub
from quantize.errors import UserError
from train.data_formats import find_format
from train.data_rows import RowReader

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


def prepare_data(config: DataConfig, tokenizer: Any, *, max_length: int, seed: int, method: str = "sft") -> Prepared:
    """Loads, formats, tokenises, splits.

    Args:
        config: section `data`.
        tokenizer: used through `apply_chat_template` and `__call__`.
        max_length: longer rows are cut on the right.
        seed: of the subsamples and the split.
        method: `train.method`; dpo and grpo give the rows more columns (see `RowReader.read`).

    Raises:
        UserError: the data cannot be read, has no known format, or leaves nothing to learn.
    """
    tokenizer.chat_template = template_text(config.chat_template) or tokenizer.chat_template
    dropped = {"nothing to learn after truncation": 0, "equal to a held-out row": 0, "repeated": 0}
    options: dict[str, Any] = {"method": method, "max_length": max_length, "dropped": dropped}
    rows = _tokenised(config, config.train, config.split, tokenizer, **options)
    if config.eval is not None:
        held = _tokenised(config, config.eval, config.eval_split or "train", tokenizer, **options)
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


def check_data_source(config: DataConfig, method: str = "sft") -> None:
    """Whether the data is there and has a format that `train.method` reads, before anything heavy is loaded.

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
                find_format(_load(config, source, split).column_names, config.format, source, method)
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
    config: DataConfig,
    source: str,
    split: str,
    tokenizer: Any,
    *,
    method: str,
    max_length: int,
    dropped: dict[str, int],
) -> list[dict[str, Any]]:
    data = _load(config, source, split)
    if len(data) == 0:
        raise UserError(f"data: {source} has no rows")
    form = find_format(data.column_names, config.format, source, method)
    reader = RowReader(tokenizer, form, source, method=method, answers_only=config.answers_only, max_length=max_length)
    rows = [reader.read(row, number) for number, row in enumerate(data, 1)]
    result = [row for row in rows if row is not None]
    dropped["nothing to learn after truncation"] += len(rows) - len(result)
    if not result:
        raise UserError(
            f"data: {source} has no trainable token after truncation to train.max_length={max_length}: the prompts "
            "alone are longer; raise train.max_length"
        )
    return result


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
        if (key := (*row["input_ids"], -1, *row.get("rejected_ids", ()))) not in seen:
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
            digest.update(json.dumps([row["input_ids"], row["loss_mask"], *_beyond(row)]).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _beyond(row: dict[str, Any]) -> list[Any]:
    """What dpo and grpo add to a row."""
    return [row[name] for name in ("rejected_ids", "rejected_mask", "prompt", "answer", "columns") if name in row]


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
