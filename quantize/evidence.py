"""The report's sections on tasks, layers and single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quantize.arms import (
    format_points,
    format_score,
    format_score_difference,
    format_size,
    format_value,
    task_unit,
)
from quantize.document import Block, Heading, Items, Paragraph, Table
from quantize.metrics import ARMS
from quantize.plots import main_pair
from quantize.samples import HELD_OUT, WorstSample
from quantize.task_rows import OWN
from quantize.verdict import why

Metrics = Mapping[str, Any]

_WORST_LAYERS = 8
_PREFILL = "prefill_tokens_per_s"
_SLOWER = 0.95  # within 5% is noise


def tasks_section(
    metrics: Metrics, asked: Metrics, examples: Mapping[str, int | str], cut: Mapping[str, int]
) -> Iterator[Block]:
    """A row for each task: every arm's score, and what quantisation costs with its interval.

    Args:
        asked: settings of the tasks (see `quantize.tasks.Settings`).
        examples: few-shot examples in the prompts, by task; of a group whose tasks differ in words.
        cut: how many prompts were longer than the model's context, by task; none where there were none.
    """
    tasks = metrics["tasks"]
    if not tasks:
        return
    # A group that might have been reported by its tasks is named beside them: only one of the two has a row.
    examples = {name: number for name, number in examples.items() if name in tasks}
    cut = {name: number for name, number in cut.items() if name in tasks}
    arms = [arm for arm in ARMS if any(task[arm]["value"] is not None for task in tasks.values())]
    first, second = main_pair(metrics)
    pair = f"{first}_vs_{second}"
    yield Heading("Tasks")
    own = [f"{name} are {text}" for name, text in OWN.items() if name in tasks]
    by_lm_eval = f", run by lm-eval{_how_run(asked, examples)}" if len(own) < len(tasks) else ""
    yield Paragraph(
        f"The same samples for every arm{by_lm_eval}. {''.join(f'{text}. ' for text in own)}Shares in percent, texts "
        f"by their perplexity, other metrics as they are. The last two columns compare {first} with {second}: "
        "difference (of perplexities, ratio) with its paired 95% interval, and p adjusted for the number of tasks "
        "(Holm)."
    )
    rows = []
    for name, task in tasks.items():
        if task["metric"] is None:
            rows.append((name, "-", str(task["n_samples"]), *("-" for _ in arms), why(metrics, f"tasks.{name}"), "-"))
            continue
        compared = task["comparisons"][pair]
        scores = [format_score(task, {**task[arm], "low": None}) for arm in arms]
        difference = format_score_difference(task, compared)
        if compared["value"] is None:
            difference = why(metrics, f"tasks.{name}.comparisons.{pair}.value")
        elif compared["low"] is None or compared["high"] is None:
            unknown = "low" if compared["low"] is None else "high"
            difference += f" ({why(metrics, f'tasks.{name}.comparisons.{pair}.{unknown}')})"
        p = "-" if compared["p_holm"] is None else f"{compared['p_holm']:.2g}"
        rows.append((name, task_unit(task), str(task["n_samples"]), *scores, difference, p))
    mean = metrics["tasks_mean"]
    if any(mean[arm]["value"] is not None for arm in arms):
        scores = [format_value({**mean[arm], "low": None}, 1, factor=100) for arm in arms]
        rows.append(("mean", f"of {mean['n_tasks']}", "", *scores, format_points(mean["comparisons"][pair]), ""))
    header = ("task", "metric", "samples", *arms, f"{first} - {second} [95%]", "p")
    yield Table(header, rows, numeric=frozenset(range(2, len(header))))
    if cut:
        counts = ", ".join(f"{name} ({number} samples)" for name, number in cut.items())
        yield Paragraph(f"Prompts longer than the model's context lost their beginning, for every arm alike: {counts}.")
    name = next(iter(tasks))
    absent = [arm for arm in ARMS if metrics[arm]["loss"] is not None and arm not in arms]
    if absent and arms:
        yield Paragraph("Without results on tasks:")
        yield Items([f"{arm}: {why(metrics, f'tasks.{name}.{arm}')}" for arm in absent])


def _how_run(asked: Metrics, examples: Mapping[str, int | str]) -> str:
    """`, at most 40 samples of each, in the chat template, 5 examples in the prompts of mmlu`."""
    words = [f"the models served by {asked['engine']}"] if asked.get("engine") else []
    words += [f"at most {asked['limit']} samples of each"] if asked.get("limit") else []
    words += [
        f"without the last {count} of {name}, which chose the numbers"
        for name, count in (asked.get("left_out") or {}).items()
    ]
    words += ["in the chat template"] if asked.get("chat_template") else []
    by_number: dict[str, list[str]] = {}
    for name, number in examples.items():
        by_number.setdefault(str(number or "no"), []).append(name)
    for number, names in by_number.items():
        count = f"{number} example{'s' * (number != '1')} in the prompts"
        words.append(count if len(by_number) == 1 else f"{count} of {', '.join(names)}")
    return "".join(f", {each}" for each in words)


def cost_section(metrics: Metrics) -> Iterator[Block]:
    """What running costs, beside the unquantised model on the same machine; whether that is a gain is said, too."""
    cost = metrics["cost"]
    yield Heading("What it costs to run")
    if cost["tuned"] is None:
        yield Paragraph(f"Not measured: {why(metrics, 'cost')}.")
        return
    tuned, final, ratio = (cost[key] for key in ("tuned", "final", "ratio"))
    size = {key: metrics["size"][f"{key}_mib"] for key in ("tuned", "final")}
    process = "" if tuned["graph"] else " of the process"

    def row(name: str, pick: Callable[[Metrics], float], digits: int, times: float, word: str) -> tuple[str, ...]:
        return name, f"{pick(tuned):,.{digits}f}", f"{pick(final):,.{digits}f}", f"{times:.2f} times as {word}"

    rows = [row("prefill, tokens/s", lambda of: of[_PREFILL], 0, ratio[_PREFILL], "fast")]
    for batch, times in ratio["decode_ms"].items():
        name = f"decoding {batch} at a time, ms a token"
        rows.append(row(name, lambda of, batch=batch: of["decode_ms"][batch], 2, times, "fast"))  # type: ignore[misc]
    if ratio["peak_mib"] is not None:
        rows.append(row(f"peak memory{process}, MiB", lambda of: of["peak_mib"], 1, ratio["peak_mib"], "much"))
    if None not in size.values():
        disk = f"{size['final'] / size['tuned']:.2f} times as much"
        rows.append(("on disk, MiB", *(format_size(size[key]) for key in ("tuned", "final")), disk))
    plain = f"tuned, in {metrics['dtype']}"
    yield Table(("", plain, "final, as shipped", ""), rows, numeric=frozenset({1, 2, 3}))
    how = " and ".join(dict.fromkeys("compiled" if of["compiled"] else "not compiled" for of in (tuned, final)))
    how += ", each step one CUDA graph" if tuned["graph"] else ""
    text = (
        f"transformers' model on this machine ({how}), the cache of a fixed size; prompts of "
        f"{tuned['prompt_tokens']} tokens, medians."
    )
    yield Paragraph(text + _beside_16_bit(metrics) + _where_slower(metrics))


def _beside_16_bit(metrics: Metrics) -> str:
    """That a saving against float32 is half of it against 16 bit."""
    size = metrics["size"]
    if metrics["dtype"] != "float32" or None in (size["final_mib"], size["tuned_mib"]):
        return ""
    return (
        f" In bfloat16 the unquantised model would take {size['tuned_mib'] / 2:,.1f} MiB: what ships, whose "
        f"unquantised part is {metrics['dtype']} here, is {2 * size['final_mib'] / size['tuned_mib']:.2f} times that."
    )


def _where_slower(metrics: Metrics) -> str:
    """A sentence on what the shipped format does not save here, and what it does."""
    ratio, size = metrics["cost"]["ratio"], metrics["size"]
    slower = [batch for batch, times in ratio["decode_ms"].items() if times < _SLOWER]
    if not slower:
        return ""
    saved = [
        word
        for word, share in (
            ("memory", ratio["peak_mib"]),
            ("disk", size["final_mib"] / size["tuned_mib"] if size["final_mib"] and size["tuned_mib"] else None),
        )
        if share is not None and share < _SLOWER
    ]
    text = f" At batch {', '.join(slower)} the shipped format decodes slower here than {metrics['dtype']}"
    return text + (f"; what it saves there is {' and '.join(saved)}, not time." if saved else ".")


def layers_section(metrics: Metrics) -> Iterator[Block]:
    """The quantised layers whose output is furthest from the unquantised layer's."""
    known = {name: health for name, health in metrics["layers"].items() if health["sqnr_db"] is not None}
    if not known:
        return
    worst = sorted(known.items(), key=lambda item: item[1]["sqnr_db"])[:_WORST_LAYERS]
    yield Heading("Which layer hurts")
    yield Paragraph(
        "Signal-to-quantisation-noise ratio of a layer's output on the inputs that the unquantised model gives it, "
        f"6 dB a bit; the median of {len(metrics['layers'])} layers is {metrics['sqnr']['median_db']:.1f} dB. Beside "
        "it the largest input, and how many times the root mean square that is: outliers, which 8-bit activations "
        "round coarsely. The worst:"
    )
    rows = [
        (name, f"{health['sqnr_db']:.1f}", f"{health['input_max']:.3g}", f"{health['input_crest']:.1f}")
        for name, health in worst
    ]
    yield Table(("layer", "SQNR, dB", "largest input", "times rms"), rows, numeric=frozenset({1, 2, 3}))


def samples_section(worst: Sequence[WorstSample]) -> Iterator[Block]:
    """Samples on which the shipped model lost most, with what each arm said."""
    if not worst:
        return
    tasks = any(sample.where != HELD_OUT for sample in worst)
    yield Heading("Where it lost most")
    yield Paragraph(
        "The held-out samples whose loss quantisation raised most"
        + (", then the task samples on which the shipped model lost most" if tasks else "")
        + '. For held-out samples, "said" is the most likely token at each position, given the right answer before it. '
        f"All samples of all arms lie in eval/ARM.parquet{' and eval/ARM.tasks.parquet' * tasks}."
    )
    for sample in worst:
        yield Paragraph(f"{sample.where}, sample {sample.number}: {sample.prompt}")
        yield Items([f"answer: {sample.answer}"])
        sides = [(side.arm, f"{side.value:.4g}", side.text) for side in sample.sides]
        yield Table(("arm", sample.unit, "said"), sides, numeric=frozenset({1}))
