"""Teacher-forced evaluation on answer tokens: loss, exact match, KL divergence and agreement with a reference.

Exact match needs no generation: greedy output equals the answer exactly when every teacher-forced argmax is right, the
end-of-turn token included. Shapes: `S` samples, `B` batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantize.errors import UserError

TEXTS = ("prompt", "answer", "greedy_text")


@dataclass(frozen=True)
class Sample:
    """One held-out sample: token ids (T,) and which of them are answer tokens (T,)."""

    input_ids: Sequence[int]
    loss_mask: Sequence[int]


@dataclass(frozen=True)
class Scores:
    """Per-sample results, in the samples' order.

    Attributes:
        nll: (S,) float64, sum of nats over the sample's answer tokens.
        tokens: (S,) int64, number of answer tokens.
        exact: (S,) bool, every answer token is the argmax.
        kl: (S,) float64 sum of KL(reference || model) over answer tokens, in nats; None without a reference.
        top1: (S,) int64 number of answer tokens whose argmax is the reference's; None without a reference.
        greedy: (S) lists of the argmax at each answer token, each predicted from the tokens that are right.
    """

    nll: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    kl: np.ndarray | None = None
    top1: np.ndarray | None = None
    greedy: Sequence[Sequence[int]] | None = None

    @property
    def loss(self) -> float:
        """Nats per answer token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def kl_per_token(self) -> float | None:
        """Mean KL divergence in nats per answer token."""
        return None if self.kl is None else float(self.kl.sum() / self.tokens.sum())

    @property
    def broken(self) -> int:
        """Number of samples whose loss is NaN or infinite."""
        return int((~np.isfinite(self.nll)).sum())

    def taken(self, order: Sequence[int]) -> Scores:
        """Loss, tokens and exactness of the samples in another order."""
        index = np.asarray(order, dtype=np.int64)
        return Scores(nll=self.nll[index], tokens=self.tokens[index], exact=self.exact[index])

    def save(self, path: Path, texts: Mapping[str, Sequence[str]] | None = None) -> None:
        """Writes a parquet file with a row for each sample, `texts` as further columns; `load` reads the numbers back.

        Columns are the attributes: those that are None are left out.
        """
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, Any] = {name: getattr(self, name) for name in ("nll", "tokens", "exact", "kl", "top1")}
        if self.greedy is not None:
            columns["greedy"] = pyarrow.array([list(row) for row in self.greedy], pyarrow.list_(pyarrow.int32()))
        table = {name: column for name, column in columns.items() if column is not None} | dict(texts or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # two runs may fill one cache
        pyarrow.parquet.write_table(pyarrow.table(table), temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Reads the numbers that `save` wrote, not the texts."""
        import pyarrow.parquet

        stored = pyarrow.parquet.read_table(path)
        names = [name for name in ("nll", "tokens", "exact", "kl", "top1") if name in stored.column_names]
        return cls(**{name: stored[name].to_numpy() for name in names})


def read_texts(path: Path) -> dict[str, list[str]]:
    """The columns of text of a file that `Scores.save` wrote: prompt, answer and greedy_text where it has them."""
    import pyarrow.parquet

    stored = pyarrow.parquet.read_table(path)
    return {name: stored[name].to_pylist() for name in TEXTS if name in stored.column_names}


def texts_of(samples: Sequence[Sample], scores: Scores, decode: Callable[[Sequence[int]], str]) -> dict[str, list[str]]:
    """What each sample asks, its answer, and the answer that the model's argmax spells, as text."""
    prompts, answers = [], []
    for sample in samples:
        wanted = [position > 0 and bool(answer) for position, answer in enumerate(sample.loss_mask)]
        first = wanted.index(True)
        prompts.append(decode(list(sample.input_ids)[:first]))
        answers.append(decode([token for token, answer in zip(sample.input_ids, wanted, strict=True) if answer]))
    return {"prompt": prompts, "answer": answers, "greedy_text": [decode(list(row)) for row in scores.greedy or ()]}


def read_samples(path: Path) -> list[Sample]:
    """Reads the parquet file of tokenised samples (columns input_ids, loss_mask)."""
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(path, columns=["input_ids", "loss_mask"]).to_pydict()
    return [Sample(ids, mask) for ids, mask in zip(columns["input_ids"], columns["loss_mask"], strict=True)]


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    reference: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores `model` on `samples`; the batches depend on the samples and `batch_size` alone.

    Args:
        model: a causal language model of transformers, on one device.
        samples: tokenised, each with an answer token after the first position.
        batch_size: samples a batch.
        reference: model whose distribution the KL divergence is measured from.
        progress: called with (samples done, all samples).

    Raises:
        UserError: the samples have tokens that the model does not know.
    """
    for each in (model, reference):
        if each is not None:
            _refuse_samples(each, samples)
    tally = _Tally(len(samples), compared=reference is not None)
    with _evaluating(model) as device:
        for batch in _answers(samples, batch_size, device, progress):
            expected = None if reference is None else batch.log_probs(reference)
            tally.add(batch, batch.log_probs(model), expected)
    return tally.scores()


@torch.inference_mode()
def evaluate_variants(
    model: nn.Module,
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    samples: Sequence[Sample],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Scores]:
    """Scores variants of one model against it; each batch runs once through the model and once through each variant.

    Args:
        variants: by name, what makes the model that variant while it is held.
        progress: called with (samples done, all samples).

    Raises:
        UserError: the samples have tokens that the model does not know.
    """
    _refuse_samples(model, samples)
    tallies = {name: _Tally(len(samples), compared=True) for name in variants}
    with _evaluating(model) as device:
        for batch in _answers(samples, batch_size, device, progress):
            expected = batch.log_probs(model)
            for name, variant in variants.items():
                with variant():
                    tallies[name].add(batch, batch.log_probs(model), expected)
    return {name: tally.scores() for name, tally in tallies.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    was_training = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Answers:
    """A batch and its answer tokens: ids and attention (B, T), positions (P,) where some sample has one."""

    chosen: list[int]
    ids: Tensor
    attention: Tensor
    positions: Tensor
    wanted: Tensor  # (B, P)

    def log_probs(self, model: nn.Module) -> Tensor:
        """(B, P, V) float32 log-probabilities of the tokens at `positions`, each predicted from the one before."""
        keep = self.positions - 1
        output = model(input_ids=self.ids, attention_mask=self.attention, use_cache=False, logits_to_keep=keep)
        return torch.log_softmax(output.logits.float(), dim=-1)


def _answers(
    samples: Sequence[Sample], batch_size: int, device: torch.device, progress: Callable[[int, int], None] | None
) -> Iterator[_Answers]:
    done = 0
    for chosen, ids, attention, mask in batches(samples, batch_size):
        mask = mask.to(device)
        positions = mask.any(0).nonzero().squeeze(1)
        yield _Answers(chosen, ids.to(device), attention.to(device), positions, mask[:, positions])
        done += len(chosen)
        if progress is not None:
            progress(done, len(samples))


class _Tally:
    """Gathers one model's `Scores`, batch by batch."""

    def __init__(self, count: int, *, compared: bool) -> None:
        self.nll, self.tokens = np.zeros(count), np.zeros(count, dtype=np.int64)
        self.exact = np.zeros(count, dtype=bool)
        self.kl = np.zeros(count) if compared else None
        self.top1 = np.zeros(count, dtype=np.int64) if compared else None
        self.greedy: list[list[int]] = [[] for _ in range(count)]

    def add(self, batch: _Answers, log_probs: Tensor, expected: Tensor | None) -> None:
        """Takes a batch's log-probabilities, and those of the reference."""
        chosen, wanted = batch.chosen, batch.wanted
        targets = batch.ids[:, batch.positions]
        picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        best = log_probs.argmax(-1)  # (B, P)
        right = (best == targets) | ~wanted
        self.nll[chosen] = -(picked.double() * wanted).sum(1).cpu().numpy()
        self.tokens[chosen] = wanted.sum(1).cpu().numpy()
        self.exact[chosen] = right.all(1).cpu().numpy()
        for row, index in enumerate(chosen):
            self.greedy[index] = best[row][wanted[row]].tolist()
        if self.kl is not None and self.top1 is not None and expected is not None:
            divergence = (expected.exp() * (expected - log_probs)).sum(-1).double()
            self.kl[chosen] = (divergence * wanted).sum(1).cpu().numpy()
            self.top1[chosen] = ((expected.argmax(-1) == best) & wanted).sum(1).cpu().numpy()

    def scores(self) -> Scores:
        """What was gathered."""
        return Scores(self.nll, self.tokens, self.exact, self.kl, self.top1, self.greedy)


def _refuse_samples(model: Any, samples: Sequence[Sample]) -> None:
    refuse_unknown_tokens(model, max((max(sample.input_ids, default=0) for sample in samples), default=0))


def refuse_unknown_tokens(model: Any, largest: int) -> None:
    """Raises UserError where a token id is beyond a model's embedding: a GPU would only say that a kernel failed."""
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise UserError(
            f"the text has token {largest}, and the model's embedding ends at {known - 1}: its tokenizer is not "
            "its own, or tokens were added to it alone; use the tokenizer that the model was trained with"
        )


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """(sample numbers, ids (B, T), attention mask, answer mask), samples of like length together."""
    order = sorted(range(len(samples)), key=lambda index: (len(samples[index].input_ids), index))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(samples[index].input_ids) for index in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        attention, mask = torch.zeros_like(ids), torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, index in enumerate(chosen):
            sample = samples[index]
            length = len(sample.input_ids)
            ids[row, :length] = torch.tensor(sample.input_ids)
            attention[row, :length] = 1
            mask[row, 1:length] = torch.tensor(sample.loss_mask, dtype=torch.bool)[1:]
        yield chosen, ids, attention, mask
