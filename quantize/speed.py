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
    compiled: bool = True
    """False = without torch.compile, where the layer is slower with it."""

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
        how = "" if self.compiled else ", without torch.compile"
        return f"{'; '.join(parts)} ({self.shape}{groups}, in torch on {self.device}{how})"


@dataclass(frozen=True, kw_only=True)
class ServedSpeed:
    """How fast vLLM serves a target beside the unquantised model: the time of that over its own.

    Measured by `benchmarks/serving.py` (docs/RESULTS.md): from the request to the last of 256 tokens, after 256.
    """

    latency: tuple[tuple[int, float], ...]
    """(requests at a time, ratio of the latency)."""
    weights: float
    """Memory of the weights, as a share of the unquantised model's."""
    shape: str = "Qwen3-8B"
    group_size: int | None = None
    """Weights per scale; None = one a row."""
    engine: str = "vLLM 0.23.0"
    device: str = "one H200"

    def __str__(self) -> str:
        """One line."""
        ratios = ", ".join(f"{ratio:.2f}x at batch {batch}" for batch, ratio in self.latency)
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return (
            f"{ratios}, against bf16; weights {self.weights - 1:+.0%} ({self.shape}{groups}, 256 tokens in and 256 "
            f"out, {self.engine} on {self.device})"
        )


def on_cpu(one: float, eight: float, group_size: int | None = 32) -> Speed:
    """Of one sequence and of eight at a time."""
    decode = ((1, one), (8, eight))
    return Speed(shape="Qwen3-0.6B", decode=decode, group_size=group_size, base="float32", device="two x86 cores")


def on_gpu(
    one: float, eight: float, many: float, most: float, group_size: int | None, *, prefill: float, compiled: bool = True
) -> Speed:
    """Of 1, 8, 64 and 256 sequences at a time."""
    decode = ((1, one), (8, eight), (64, many), (256, most))
    return Speed(shape="Qwen3-8B", decode=decode, group_size=group_size, prefill=prefill, compiled=compiled)
