"""Calibration data for `quantize.algorithms`: named by the user, recorded with what ships, never a held-out sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.algorithms import are_calibrated
from quantize.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.algorithms.choose import Chosen
    from quantize.evaluate import Sample
    from quantize.layers import Coverage
    from quantize.schemes import Scheme, Target

SAMPLES = 128
"""Samples by default, as AWQ and GPTQ were published with."""
_LEAST_TOKENS = 256
_ROWS = 8  # at once


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a format's numbers are chosen.

    Attributes:
        algorithms: names of `quantize.algorithms`; empty = round to nearest.
        data: calibration text (see `quantize.texts`); None = none is needed.
        task: a benchmark whose samples are the data (see `quantize.task_text`).
        samples: how many of its samples.
        held_out: a run's held-out samples (.parquet), which are left out of `data`.
    """

    algorithms: Sequence[str] = ()
    data: Path | None = None
    task: str | None = None
    samples: int = SAMPLES
    held_out: Path | None = None

    @classmethod
    def of_job(cls, job: Mapping[str, Any]) -> Recipe:
        """From a worker's job: keys algorithms and calibration {data, task, samples, held_out}, all optional."""
        found = job.get("calibration") or {}
        data, held_out = (Path(found[key]) if found.get(key) else None for key in ("data", "held_out"))
        return cls(
            algorithms=tuple(job.get("algorithms") or ()),
            data=data,
            task=found.get("task"),
            samples=found.get("samples") or SAMPLES,
            held_out=held_out,
        )

    @property
    def named(self) -> str:
        """The data by its name."""
        return f"task:{self.task}" if self.task else str(self.data)

    @property
    def loads_model(self) -> bool:
        """Whether it must see the whole model, and not one weight after the other."""
        from quantize.algorithms import ALGORITHMS

        return any(ALGORITHMS[name].kind != "rounds" or ALGORITHMS[name].calibrated for name in self.algorithms)


@dataclass(frozen=True)
class Calibration:
    """What the algorithms look at.

    Attributes:
        batches: (token ids (B, T), attention mask (B, T)), padded on the right.
        about: JSON form: data, samples, tokens, left_out.
    """

    batches: Sequence[tuple[Tensor, Tensor]]
    about: dict[str, Any]


def load_calibration(recipe: Recipe, tokenizer: Any) -> Calibration:
    """Reads a recipe's calibration data.

    Raises:
        UserError: it cannot be read, or is too short.
    """
    from quantize.evaluate import batches
    from quantize.task_text import task_samples
    from quantize.texts import load_samples

    if recipe.data is None and recipe.task is None:
        raise UserError(
            f"{', '.join(recipe.algorithms)}: calibration data is needed; name some (--calibration FILE, or "
            "quantize.calibration in a config)"
        )
    held_out = _held_out(recipe.held_out)
    if recipe.task is not None:
        found = task_samples(recipe.task, tokenizer, recipe.samples)
    else:
        assert recipe.data is not None
        found = load_samples(recipe.data, tokenizer, recipe.samples + len(held_out), option="calibration data")
    samples = [sample for sample in found if tuple(sample.input_ids) not in held_out]
    left_out, samples = len(found) - len(samples), samples[: recipe.samples]
    tokens = sum(len(sample.input_ids) for sample in samples)
    if tokens < _LEAST_TOKENS:
        dropped = f", {left_out} held-out samples left out" if left_out else ""
        raise UserError(
            f"calibration data {recipe.named}: {tokens} tokens in {len(samples)} samples{dropped} are too short to "
            f"tell channels apart; give {_LEAST_TOKENS} tokens at least, {SAMPLES} samples are usual"
        )
    name = recipe.named if recipe.data is None else recipe.data.name
    about = {"data": name, "samples": len(samples), "tokens": tokens, "left_out": left_out}
    if recipe.task is not None:
        about |= {"task": recipe.task, "asked": recipe.samples}
    return Calibration([(ids, attention) for _, ids, attention, _ in batches(samples, _ROWS)], about)


def _held_out(path: Path | None) -> set[tuple[int, ...]]:
    if path is None:
        return set()
    from quantize.evaluate import read_samples

    samples: list[Sample] = read_samples(path)
    return {tuple(sample.input_ids) for sample in samples}


def choose_by(
    recipe: Recipe,
    model: Any,
    tokenizer: Callable[[], Any],
    scheme: Scheme,
    target: Target,
    group_size: int | None,
    coverage: Coverage,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Chosen, dict[str, Any] | None]:
    """The numbers of a loaded model by a recipe, and what calibration looked at (None where there was none).

    Args:
        model: changed in place where an algorithm rotates or scales it.
        tokenizer: called where there is calibration data.

    Raises:
        UserError: the algorithms do not fit the format or the model, or the data cannot be used.
    """
    from quantize.algorithms.choose import check_fit, choose_numbers
    from quantize.evaluate import refuse_unknown_tokens

    check_fit(recipe.algorithms, scheme, target)
    data = load_calibration(recipe, tokenizer()) if are_calibrated(recipe.algorithms) else None
    batches = data.batches if data is not None else ()
    refuse_unknown_tokens(model, max((int(ids.max()) for ids, _ in batches), default=0))
    chosen = choose_numbers(model, scheme, target, group_size, coverage, recipe.algorithms, batches, progress=progress)
    return chosen, None if data is None else data.about
