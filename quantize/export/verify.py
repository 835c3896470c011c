"""An exported model beside the torch model of the same checkpoint: the same tokens through both.

How far a last bit in which two runtimes differ carries is measured too (`quantize.last_bit`): that is the floor.

Shapes: `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.last_bit import last_bits_changed

MAX_GAP_NATS = 0.05
"""A larger difference of the losses, beyond what so few positions leave open, is no rounding."""
MAX_LESS_AGREEMENT = 0.05
"""Share of equal argmax that an export may lack beside the floor's, beyond what so few positions leave open."""
_PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Distance:
    """How far logits are from the torch model's, teacher-forced over the same tokens.

    Attributes:
        argmax_agreement: share of positions with the same most likely token.
        loss_gap: their loss minus torch's, nats a token.
        max_abs, mean_abs: of the logits' differences.
    """

    argmax_agreement: float
    loss_gap: float
    max_abs: float
    mean_abs: float


class Program:
    """A .pte in ExecuTorch's Python runtime; the KV cache starts anew at position 0."""

    def __init__(self, path: Path) -> None:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers attention and cache
        from executorch.runtime import Runtime, Verification

        self._program = Runtime.get().load_program(path, verification=Verification.Minimal)
        self._forward = self._program.load_method("forward")

    def next_logits(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits (V,) after `tokens`, the first of which stands at `position`."""
        (logits,) = self._forward.execute([torch.tensor([list(tokens)]), torch.tensor([position])])
        return logits[0].float().clone()  # type: ignore[no-any-return]

    def all_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (T, V) after each token, one token at a time."""
        return torch.stack([self.next_logits([token], position) for position, token in enumerate(tokens)])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after a prompt, which is read at once."""
        logits, tokens = self.next_logits(prompt, 0), list[int]()
        while len(tokens) < count:
            tokens.append(int(logits.argmax()))
            logits = self.next_logits(tokens[-1:], len(prompt) + len(tokens) - 1)
        return tokens


@torch.no_grad()
def torch_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits (T, V) of the torch model after each token."""
    logits: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()
    return logits


def torch_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most likely tokens after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(torch_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def verify(path: Path, model: Any, source: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a .pte beside the torch model. Keys of `job`: samples, n_samples, n_tokens, max_seq_len.

    Returns:
        greedy {prompt, torch, executorch, equal}, n_samples, n_positions, distance, floor, and failed (why it is wrong,
        or None).
    """
    program, length = Program(path), int(job["max_seq_len"]) - 1
    prompt, samples = _texts(source, model, job)
    prompt = prompt[: max(1, length - job["n_tokens"])]
    count = min(job["n_tokens"], length - len(prompt))
    ours, theirs = torch_greedy(model, prompt, count), program.greedy(prompt, count)
    samples = [tokens[:length] for tokens in samples] or [prompt + ours]
    reference = [torch_logits(model, tokens) for tokens in samples]
    positions = sum(map(len, samples))
    distance = measure(reference, [program.all_logits(tokens) for tokens in samples], samples)
    with last_bits_changed(model):
        changed = [torch_logits(model, tokens) for tokens in samples]
    floor = measure(reference, changed, samples)
    return {
        "greedy": {
            "prompt": prompt,
            "torch": ours,
            "executorch": theirs,
            "equal": next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), count),
        },
        "n_samples": len(samples),
        "n_positions": positions,
        "distance": asdict(distance),
        "floor": asdict(floor),
        "failed": find_fault(distance, floor, positions),
    }


def find_fault(distance: Distance, floor: Distance, positions: int) -> str | None:
    """Why an export is wrong, where it is.

    A mean over few positions says little: two standard errors of it are allowed for, those of a loss whose differences
    spread by a nat, and of a share of one half.
    """
    error = 1 / math.sqrt(positions)
    if not abs(distance.loss_gap) <= MAX_GAP_NATS + 2 * error:
        return f"its loss differs from torch's by {distance.loss_gap:.4f} nats a token"
    if distance.argmax_agreement < floor.argmax_agreement - MAX_LESS_AGREEMENT - error:
        return f"it agrees with torch on {distance.argmax_agreement:.1%} of the tokens"
    return None


def measure(reference: Sequence[Tensor], logits: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> Distance:
    """How far `logits` are from `reference`: one (T, V) each a sample."""
    differences = torch.cat([(ours - theirs).abs() for ours, theirs in zip(logits, reference, strict=True)])
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(logits, reference, strict=True)])
    return Distance(
        argmax_agreement=float(agree.double().mean()),
        loss_gap=_loss(logits, samples) - _loss(reference, samples),
        max_abs=float(differences.max()),
        mean_abs=float(differences.double().mean()),
    )


def _loss(logits: Sequence[Tensor], samples: Sequence[Sequence[int]]) -> float:
    """Nats a token, each predicted from those before it."""
    total = sum(
        float(torch.nn.functional.cross_entropy(rows[:-1].double(), torch.tensor(list(tokens)[1:]), reduction="sum"))
        for rows, tokens in zip(logits, samples, strict=True)
        if len(tokens) > 1
    )
    return total / max(1, sum(len(tokens) - 1 for tokens in samples))


def _texts(source: Path, model: Any, job: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
    """A prompt, and the held-out samples; those of a folder without samples are none."""
    from transformers import AutoTokenizer

    from quantize.evaluate import read_samples

    if job["samples"]:
        samples = read_samples(Path(job["samples"]))[: job["n_samples"]]
        first = list(samples[0].input_ids)
        answer = list(samples[0].loss_mask).index(1)
        return first[: max(1, answer)], [list(sample.input_ids) for sample in samples]
    tokens = AutoTokenizer.from_pretrained(source, local_files_only=True)(_PROMPT)["input_ids"]
    return [int(token) % model.config.vocab_size for token in tokens], []
