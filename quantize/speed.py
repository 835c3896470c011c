"""How fast a format generates, as it was measured, and how that is said. The measurements are in `quantize.schemes`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a target generates beside the unquantised model: the time of that over its own.

    Measured by `benchmarks/decode.py`; the lines are in docs/decode.jsonl.
    """

    shape: str
    """The model's."""
    decode: tuple[tuple[int, float], ...]
    """(sequences at a time, ratio of a decoding step)."""
    group_size: int | None = None
    """Weights per scale; None = one a row."""
    prefill: float | None = None
    """Ratio for one prompt of 4,096 tokens; None = not measured."""
    base: str = "bf16"
    """What the unquantised model computes in."""
    device: str = "one H100"

    def __str__(self) -> str:
        """One line: for which batch sizes it pays."""
        parts = []
        for word, low, high in (("faster than", 1.05, 1e9), ("as fast as", 0.95, 1.05), ("slower than", 0.0, 0.95)):
            found = [f"{batch} ({ratio:.2f}x)" for batch, ratio in self.decode if low <= ratio < high]
            if found:
                parts.append(f"{word} {self.base} at batch {', '.join(found)}")
        if self.prefill is not None:
            parts.append(f"prefill {self.prefill:.2f}x")
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return f"{'; '.join(parts)} ({self.shape}{groups}, in torch on {self.device})"
