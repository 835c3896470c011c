"""vLLM beside transformers on the same checkpoint: loss on held-out samples, and greedy tokens after their prompts.

transformers runs first, in a process of its own that gives the GPU back, then vLLM. Both get token ids. How far a last
bit in which they differ carries is measured, too: transformers beside itself (`quantize.last_bit`) is the floor.
"""

from __future__ import annotations

import inspect
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError

if TYPE_CHECKING:
    from quantize.evaluate import Sample
    from quantize.serving.check import Served
    from quantize.serving.client import Completion, Score
    from quantize.serving.environment import Vllm
    from quantize.statistics import Interval

TOLERANCE = 0.05
"""Nats a token that the losses may be shown to be apart beyond what a last bit makes, as `quantize eval` takes for
good enough.
Other kernels sum in another order, and torch.compile leaves out roundings of fp8 (docs/RESULTS.md); a layer that is
loaded wrongly costs more."""
_LESS = 0.05
"""Share of equal argmax that vLLM may lack beside the floor's, beyond what so few tokens leave open."""
_SHORTEST = 8
"""Tokens of a prompt, where a sample has none: its own beginning is taken."""
_BATCH = 8


@dataclass(frozen=True)
class Asked:
    """What is compared on.

    Attributes:
        data: held-out text (see `quantize.texts`). samples: of it, at most.
        tokens: greedy ones after each prompt.
        arguments: of `vllm serve`.
    """

    data: Path
    samples: int
    tokens: int
    arguments: tuple[str, ...]
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Difference:
    """Where the greedy tokens after a prompt part.

    Attributes:
        position: number of equal tokens before.
        margin: nats by which transformers' most likely token is ahead of its second there.
        second: vLLM took that second.
    """

    position: int
    margin: float
    second: bool


@dataclass(frozen=True)
class Agreement:
    """What was found.

    Attributes:
        transformers, vllm: loss in nats a token. gap: vLLM's minus transformers', with its paired interval.
        same: share of the scored tokens at which both have the same most likely one. scored: how many those are.
        floor_gap, floor_same: those of transformers with a last bit changed, beside itself.
        prompts: how many. tokens: greedy ones of each. equal: those before the first difference, of all.
        differences: one for each prompt whose tokens part.
        fault: why that is no agreement; None = it is one.
    """

    transformers: float
    vllm: float
    gap: Interval
    same: float
    scored: int
    floor_gap: float
    floor_same: float
    prompts: int
    tokens: int
    equal: int
    differences: tuple[Difference, ...]

    @property
    def fault(self) -> str | None:
        """Why that is no agreement; None = it is one."""
        limit = TOLERANCE + abs(self.floor_gap)
        # By the interval: where activations are quantised, a last bit moves the loss of so few samples by as much.
        if not (self.gap.low <= limit and self.gap.high >= -limit):
            return (
                f"vLLM's loss is {self.gap.value:+.4f} [{self.gap.low:+.4f}, {self.gap.high:+.4f}] nats a token from "
                f"that of transformers on the same checkpoint, all of it beyond {TOLERANCE} and the "
                f"{abs(self.floor_gap):.4f} that a last bit makes: it does not compute the model that was measured"
            )
        if self.same < self.floor_same - _LESS - 1 / math.sqrt(self.scored):  # two standard errors of a half
            return (
                f"vLLM and transformers have the same most likely token at {self.same:.2%} of the scored ones, where a "
                f"last bit leaves {self.floor_same:.2%}: it does not compute the model that was measured"
            )
        return None


def compare(served: Served, vllm: Vllm, asked: Asked, log: Path) -> Agreement:
    """Runs both on the same samples.

    Raises:
        UserError: the text cannot be read, or does not fit the model.
        RuntimeError: either of them failed.
    """
    from quantize.serving import client
    from quantize.serving.server import serving
    from quantize.worker import run_jobs

    job = {
        "kind": "greedy", "name": "transformers", "model": str(served.folder), "data": str(asked.data.resolve()),
        "samples": asked.samples, "tokens": asked.tokens, "trust_remote_code": asked.trust_remote_code,
    }  # fmt: skip
    place = Path(tempfile.mkdtemp(prefix="agreement-"))
    try:
        (plain,) = run_jobs([job], place / "transformers.request.json")
    except RuntimeError:
        raise  # it names its log, which stays
    except BaseException:
        shutil.rmtree(place)
        raise
    shutil.rmtree(place)
    with serving(served.folder, vllm, log=log, arguments=asked.arguments, model=served.name) as server:
        _refuse_longer(plain, asked.tokens, server.max_length)
        scores = client.score(server, plain["ids"])
        completions = client.complete(server, plain["prompts"], asked.tokens, ignore_eos=True)
    return _compared(plain, scores, completions, asked.tokens)


def _refuse_longer(plain: Mapping[str, Any], tokens: int, room: int) -> None:
    """Where memory or an option leaves less of the context than the samples need. A scored one needs a token more."""
    longest = max(max(map(len, plain["ids"])) + 1, max(map(len, plain["prompts"])) + tokens)
    if longest > room:
        raise UserError(
            f"a sample needs {longest} tokens of context, and vLLM serves the model with {room} (its GPU memory, or "
            "--max-model-len, allows no more): free memory (nvidia-smi), or give shorter samples or fewer --tokens"
        )


def _compared(
    plain: Mapping[str, Any], scores: Sequence[Score], completions: Sequence[Completion], tokens: int
) -> Agreement:
    from quantize.statistics import paired_loss_difference

    nll, same = [], 0
    for score, mask, greedy in zip(scores, plain["masks"], plain["greedy_answers"], strict=True):
        chosen = [number for number, answer in enumerate(mask[1:]) if answer]
        nll.append(-sum(score.logprobs[number] for number in chosen))
        same += sum(score.argmax[number] == best for number, best in zip(chosen, greedy, strict=True))
    count = sum(plain["counts"])
    parted = [
        _first_difference(found.tokens, greedy, margins, seconds)
        for found, greedy, margins, seconds in zip(
            completions, plain["greedy"], plain["margins"], plain["seconds"], strict=True
        )
    ]
    differences = tuple(each for each in parted if each is not None)
    lost = sum(tokens - each.position for each in differences)
    return Agreement(
        sum(plain["nll"]) / count, sum(nll) / count, paired_loss_difference(nll, plain["nll"], plain["counts"]),
        same / count, count, (sum(plain["floor_nll"]) - sum(plain["nll"])) / count, sum(plain["floor_top1"]) / count,
        len(parted), tokens, len(parted) * tokens - lost, differences,
    )  # fmt: skip


def _first_difference(
    found: Sequence[int], greedy: Sequence[int], margins: Sequence[float], seconds: Sequence[int]
) -> Difference | None:
    for position, (token, best) in enumerate(zip(found, greedy, strict=True)):
        if token != best:
            return Difference(position, margins[position], token == seconds[position])
    return None


def describe(found: Agreement) -> list[str]:
    """In words, a line each."""
    apart = found.differences
    gap = found.gap
    lines = [
        f"loss, nats a token: transformers {found.transformers:.4f}, vLLM {found.vllm:.4f}; vLLM - transformers "
        f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]",
        f"the same most likely token at {found.same:.2%} of the {found.scored} scored ones",
        f"transformers beside itself, embeddings changed by a last bit: loss {found.floor_gap:+.4f}, the same most "
        f"likely token at {found.floor_same:.2%}",
        f"greedy tokens: all {found.tokens} equal after {found.prompts - len(apart)} of {found.prompts} prompts; "
        f"{found.equal / (found.prompts * found.tokens):.1%} of all tokens lie before the first difference",
    ]
    if apart:
        margins = sorted(each.margin for each in apart)
        seconds = sum(each.second for each in apart)
        lines.append(
            f"where they part, transformers' best token is {margins[len(margins) // 2]:.4f} nats ahead of its second "
            f"(median; {margins[-1]:.4f} at most), and vLLM took that second in {seconds} of {len(apart)}"
        )
    return lines


# ---------------------------------------------------------------------- in quantize.worker


def by_transformers(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The job `greedy`: scores samples, and continues each prompt greedily.

    Keys: model, data, samples, tokens, trust_remote_code.

    Returns:
        ids, masks, nll, counts, greedy_answers (most likely tokens at the scored ones) of each sample, and floor_nll,
        floor_top1 (how many of those stay the most likely) with a last bit changed; prompts, greedy, margins, seconds
        of each continuation.
    """
    from quantize.evaluate import evaluate_model, evaluate_variants
    from quantize.last_bit import last_bits_changed
    from quantize.texts import load_samples
    from quantize.worker_jobs import _load, _tokenizer

    model, _ = _load({**job, "dtype": None, "simulate": None})
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
    every = load_samples(Path(job["data"]), _tokenizer(job), job["samples"])
    samples = [sample for sample in every if len(sample.input_ids) < longest]
    room = longest - job["tokens"]
    if not samples or room < 1:
        raise UserError(
            f"--data {job['data']}: no sample of it, or --tokens {job['tokens']}, fits the model's {longest} positions"
        )
    scores = evaluate_model(model, samples, batch_size=_BATCH)
    if scores.broken:
        raise UserError(f"{job['model']}: the loss of {scores.broken} samples is NaN or infinite in transformers")
    floor = evaluate_variants(model, {"floor": lambda: last_bits_changed(model)}, samples, batch_size=_BATCH)["floor"]
    assert floor.top1 is not None
    prompts = [_prompt(sample)[-room:] for sample in samples]
    continued = _continue(model, prompts, job["tokens"], progress)
    return {
        "ids": [list(sample.input_ids) for sample in samples],
        "masks": [list(map(int, sample.loss_mask)) for sample in samples],
        "nll": scores.nll.tolist(), "counts": scores.tokens.tolist(), "greedy_answers": scores.greedy,
        "floor_nll": floor.nll.tolist(), "floor_top1": floor.top1.tolist(),
        "prompts": prompts, "greedy": [each[0] for each in continued], "margins": [each[1] for each in continued],
        "seconds": [each[2] for each in continued],
    }  # fmt: skip


def _prompt(sample: Sample) -> list[int]:
    """What comes before the answer; of a text, its first half."""
    ids = list(sample.input_ids)
    first = next(number for number, answer in enumerate(sample.loss_mask) if answer and number)
    return ids[:first] if first >= _SHORTEST else ids[: max(first, len(ids) // 2)]


def _continue(
    model: Any, prompts: Sequence[Sequence[int]], count: int, progress: Callable[[int, int], None]
) -> list[tuple[list[int], list[float], list[int]]]:
    """Of each prompt: greedy tokens, by how many nats each is ahead of the second, and those second ones.

    Prompts of like length are continued together, padded on the left. Not by `generate`, which takes settings from the
    model's folder and ends at its end token.
    """
    import torch

    device = next(model.parameters()).device
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    tokens, margins = [list[int]() for _ in prompts], [list[float]() for _ in prompts]
    seconds = [list[int]() for _ in prompts]
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        longest = len(prompts[chosen[-1]])
        missing = torch.tensor([longest - len(prompts[number]) for number in chosen])[:, None]
        ids = torch.tensor([[0] * (longest - len(prompts[number])) + list(prompts[number]) for number in chosen])
        mask, place, cache = torch.arange(longest) >= missing, torch.arange(longest) - missing, None
        with torch.inference_mode():
            for _ in range(count):
                positions = {"position_ids": place.clamp(min=0).to(device)} if takes_positions else {}
                output = model(
                    input_ids=ids.to(device), attention_mask=mask.long().to(device), past_key_values=cache,
                    use_cache=True, logits_to_keep=1, **positions,
                )  # fmt: skip
                best = output.logits[:, -1].float().topk(2)
                for number, (first, second), (high, low) in zip(
                    chosen, best.indices.tolist(), best.values.tolist(), strict=True
                ):
                    tokens[number].append(first)
                    seconds[number].append(second)
                    margins[number].append(high - low)
                ids, cache = best.indices[:, :1], output.past_key_values
                mask, place = torch.nn.functional.pad(mask, (0, 1), value=True), place[:, -1:] + 1
        progress(min(start + _BATCH, len(order)), len(order))
    return list(zip(tokens, margins, seconds, strict=True))
