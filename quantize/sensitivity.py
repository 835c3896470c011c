"""Which layers a format hurts: one group of layers quantised at a time, the rest unquantised.

Then the way back: everything quantised but the groups that cost most for their size, measured as a whole, since the
divergences of groups do not add up, and on other samples than those that chose the groups, since the worst of many
looks worse than it is. A larger set is proposed only where its step from the smaller one is shown, and none after one
that is not: tests in a fixed order need no correction for their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from quantize.errors import UserError
from quantize.evaluate import Sample, Scores, evaluate_variants
from quantize.layers import Coverage, embedding_name, modules_of
from quantize.schemes import Scheme
from quantize.statistics import loss_interval, paired_loss_difference

WAYS = ("block", "kind", "layer")
"""How layers are grouped: by transformer block, by the last part of their names, or each alone."""
_STANDS_OUT = 1.5  # times its share of the weights
_MOST_SETS = 4
_REFERENCE, _ALL = "unquantised", "all"

Variant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Group:
    """Layers that are quantised together; `name` is what `quantize.skip` takes. `weights` is their number."""

    name: str
    way: str
    layers: tuple[str, ...]
    weights: int


def group_layers(layers: Mapping[str, int], ways: Sequence[str]) -> list[Group]:
    """Groups of layers (name -> number of weights), by each of the `WAYS` that is asked for."""
    groups = []
    for way in ways:
        found: dict[str, list[str]] = {}
        for name in layers:
            found.setdefault(_group_name(name, way), []).append(name)
        groups += [Group(name, way, tuple(each), sum(layers[n] for n in each)) for name, each in found.items()]
    return groups


def _group_name(name: str, way: str) -> str:
    if way == "layer":
        return name
    if way == "kind":
        return name.rsplit(".", 1)[-1]
    block = re.match(r".*?\.\d+(?=\.)", name)
    return block[0] if block else name


def scan_model(
    model: nn.Module,
    quantised: nn.Module,
    scheme: Scheme,
    group_size: int | None,
    coverage: Coverage,
    samples: Sequence[Sample],
    *,
    ways: Sequence[str],
    growth: float,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Measures every group, and what keeping the worst unquantised buys.

    Args:
        model: unquantised; left as it was.
        quantised: the same with every layer of `coverage` quantised, for real or simulated.
        ways: of `WAYS`.
        growth: share by which the shipped weights may grow for what is kept unquantised.
        samples: the first half measures the groups, the other the sets.
        progress: called with (samples done, all of them).

    Returns:
        groups and sets, with the KL divergence of each from the unquantised model in nats a token (value, low, high),
        and of a set what it changes against all, everything quantised; proposal: what to keep unquantised, empty where
        nothing is shown to help; sizes and numbers of samples.

    Raises:
        UserError: fewer than two samples, no layer is quantised, or numbers are not finite.
    """
    if len(samples) < 2:
        raise UserError("sensitivity needs two samples or more: half measure the groups, half what is proposed")
    if not coverage.layers:
        reasons = "; ".join(sorted(set(coverage.skipped.values()))) or "it has no linear layer"
        raise UserError(f"{scheme.name} reaches no layer of this model: {reasons}")
    half = (len(samples) + 1) // 2
    looked, confirming = samples[:half], samples[half:]
    layers = modules_of(model, coverage.layers)
    extra = embedding_name(model) if scheme.embedding is not None else None
    groups = group_layers(layers, ways)
    everything = [*layers, *([extra] if extra else [])]
    if extra:
        groups.append(Group(extra, "embedding", (extra,), modules_of(model, [extra])[extra]))
    hold = partial(_swapped, model, quantised)
    variants: dict[str, Variant] = {_REFERENCE: nullcontext, _ALL: partial(hold, everything)}
    variants |= {f"{group.way} {group.name}": partial(hold, group.layers) for group in groups}
    found = _measured(model, variants, looked, batch_size, lambda done, _: progress(done, len(samples)))
    size = Sizes.of(scheme, group_size, quantised, layers, extra)
    rows = [_row(group, found[f"{group.way} {group.name}"], found[_REFERENCE], groups, found) for group in groups]
    sets = choose_sets(rows, size, growth)
    members = [_members(groups, names) for names in sets]
    variants = {_REFERENCE: nullcontext, _ALL: partial(hold, everything)}
    labels = [f"all but {', '.join(names)}" for names in sets]
    for label, kept in zip(labels, members, strict=True):
        variants[label] = partial(hold, [name for name in everything if name not in kept])
    again = _measured(model, variants, confirming, batch_size, lambda done, _: progress(half + done, len(samples)))
    whole, before = again[_ALL], again[_REFERENCE]
    steps = zip(sets, members, labels, [_ALL, *labels], strict=False)
    tried = [
        _set_row(names, again[label], whole, again[smaller], size, sum(layers[name] for name in kept))
        for names, kept, label, smaller in steps
    ]
    return {
        "n_samples": {"groups": len(looked), "sets": len(confirming)},
        "all": {"kl": _kl(whole), "loss": _loss_change(whole, before), "mib": size.mib(0)},
        "groups": sorted(rows, key=lambda row: -row["kl"]["value"]),
        "growth": growth,
        "sets": tried,
        "proposal": propose(tried),
        "skipped": dict(coverage.skipped),
    }


@dataclass(frozen=True)
class Sizes:
    """What the weights take as they ship, in bits: those that stay unquantised, and a quantised one with its scales."""

    plain_weights: int
    quantised_weights: int
    bits: float
    embedding_bits: float = 0.0  # of the whole embedding, where the scheme quantises it

    @classmethod
    def of(
        cls, scheme: Scheme, group_size: int | None, quantised: nn.Module, layers: Mapping[str, int], extra: str | None
    ) -> Sizes:
        """Nominal: a scale of 16 bits a group.

        Args:
            quantised: the quantised model, whose embedding and lm_head are no longer tied where they ship apart.
            layers: weights of each quantised layer.
            extra: name of the embedding, where it is quantised too.
        """
        embedding = modules_of(quantised, [extra])[extra] if extra else 0
        total = sum(parameter.numel() for parameter in quantised.parameters())
        many = sum(layers.values())
        bits = scheme.bits + (16 / group_size if group_size else 0)
        return cls(total - many - embedding, many, bits, embedding * scheme.embedding_bits)

    def mib(self, kept: int) -> float:
        """MiB with so many of the quantised weights kept unquantised."""
        bits = 16 * (self.plain_weights + kept) + self.bits * (self.quantised_weights - kept)
        return (bits + self.embedding_bits) / 8 / 2**20

    def growth(self, kept: int) -> float:
        """Share by which that is larger than nothing kept."""
        return self.mib(kept) / self.mib(0) - 1


def choose_sets(rows: Sequence[Mapping[str, Any]], size: Sizes, growth: float) -> list[list[str]]:
    """Names of groups to keep unquantised, each set one group more than the one before.

    Taken by their divergence for their weights, where that stands out, while the shipped weights grow by no more than
    `growth`.
    """
    chosen: list[str] = []
    members: set[str] = set()
    weights = 0
    sets: list[list[str]] = []
    for row in sorted(rows, key=lambda row: -row["excess"]):
        overlaps = members & set(row["layers"])
        if row["excess"] < _STANDS_OUT or row["way"] == "embedding" or overlaps or len(sets) == _MOST_SETS:
            continue
        if size.growth(weights + row["weights"]) > growth:
            continue
        chosen.append(row["name"])
        members |= set(row["layers"])
        weights += row["weights"]
        sets.append(list(chosen))
    return sets


def propose(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest set up to which every step is shown to lower the divergence: its interval lies below 0."""
    proposal: list[str] = []
    for found in sets:
        high = found["kl_step"]["high"]
        if high is None or high >= 0:
            break
        proposal = list(found["skip"])
    return proposal


def _measured(
    model: nn.Module,
    variants: Mapping[str, Variant],
    samples: Sequence[Sample],
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Scores]:
    found = evaluate_variants(model, variants, samples, batch_size=batch_size, progress=progress)
    for name, scores in found.items():
        if scores.kl is None or not np.isfinite([scores.kl, scores.nll]).all():
            who = "the unquantised model" if name == _REFERENCE else f"the model with {name} quantised"
            raise UserError(f"{who} gives numbers that are not finite on these samples")
    return found


@contextmanager
def _swapped(model: nn.Module, other: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Holds `other`'s layers in place of the model's own."""
    own = {name: model.get_submodule(name) for name in layers}
    try:
        for name in layers:
            model.set_submodule(name, other.get_submodule(name))
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def _members(groups: Sequence[Group], names: Sequence[str]) -> set[str]:
    return {layer for group in groups if group.name in names for layer in group.layers}


def _row(
    group: Group, scores: Scores, before: Scores, groups: Sequence[Group], found: Mapping[str, Scores]
) -> dict[str, Any]:
    """A group's numbers; `excess`: its share of the divergence of all groups made the same way, over its share of their
    weights."""
    peers = [other for other in groups if other.way == group.way]
    divergence = sum(_sum(found[f"{other.way} {other.name}"]) for other in peers)
    share = _sum(scores) / divergence if divergence > 0 else 0.0
    return {
        "name": group.name,
        "way": group.way,
        "layers": list(group.layers),
        "weights": group.weights,
        "kl": _kl(scores),
        "loss": _loss_change(scores, before),
        "excess": share * sum(other.weights for other in peers) / group.weights,
    }


def _set_row(
    names: Sequence[str], scores: Scores, whole: Scores, smaller: Scores, size: Sizes, kept: int
) -> dict[str, Any]:
    assert scores.kl is not None and whole.kl is not None and smaller.kl is not None
    return {
        "skip": list(names),
        "mib": size.mib(kept),
        "growth": size.growth(kept),
        "kl": _kl(scores),
        "kl_change": paired_loss_difference(scores.kl, whole.kl, scores.tokens).as_dict(),
        "kl_step": paired_loss_difference(scores.kl, smaller.kl, scores.tokens).as_dict(),
        "loss_change": paired_loss_difference(scores.nll, whole.nll, scores.tokens).as_dict(),
    }


def _sum(scores: Scores) -> float:
    assert scores.kl is not None
    return max(0.0, float(scores.kl.sum()))  # a sum near 0 may round below it


def _kl(scores: Scores) -> dict[str, Any]:
    assert scores.kl is not None
    return loss_interval(scores.kl, scores.tokens).as_dict()


def _loss_change(scores: Scores, before: Scores) -> dict[str, Any]:
    return paired_loss_difference(scores.nll, before.nll, scores.tokens).as_dict()
