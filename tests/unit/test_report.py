"""metrics.json's contract and the texts made from it: every null explained, no claim beyond its interval."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from quantize.arms import format_difference, format_points
from quantize.document import Items, to_markdown
from quantize.errors import UserError
from quantize.metrics import ARMS, SIZES, build_metrics, flatten, unexplained
from quantize.plots import draw_plots
from quantize.report import ReportContext, arm_rows, render_html, render_markdown, verdict
from quantize.samples import worst_samples
from quantize.schemes import SCHEMES
from quantize.tasks import Row
from quantize.verdict import recovered_text, why

CONTRACT = [
    *(f"{arm}.{key}" for arm in ARMS for key in ("loss", "accuracy", "perplexity", "vs_base.loss.value", "simulated")),
    *("train_ship_gap", "backend_gap", "recovered", "recovered_interval.low", "kl.final", "kl.reference"),
    *("size.base_mib", "size.tuned_mib", "size.final_mib", "size.bits_per_weight", "size.memory_mib"),
    *(
        "coverage.quantized_fraction",
        "coverage.share_of_all_weights",
        "coverage.skipped",
        "scheme",
        "target",
        "simulated",
        "missing",
        "finish_command",
    ),
    *("kl.final_top1", "kl.ptq", "kl.final_interval.low", "tasks", "tasks_mean.final.value", "sqnr.worst_db", "layers"),
    *("comparisons.final_vs_ptq.loss.high", "comparisons.final_vs_control.mcnemar_p", "n_samples", "n_tokens", "why"),
    *("comparisons.tuned_vs_base.loss.low", "dtype", "elsewhere.arms", "elsewhere.device", "elsewhere.dtype"),
]


@dataclass(frozen=True)
class FakeScores:
    nll: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    kl: np.ndarray | None = None
    top1: np.ndarray | None = None


def scores(shift: float, right: float, samples: int = 120) -> FakeScores:
    """An arm whose loss is `shift` above a common difficulty, and whose easiest `right` share is exact."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(2, 20, samples)
    difficulty, noise = rng.gamma(2.0, 0.5, samples), rng.normal(0, 0.02, samples)
    nll = tokens * (difficulty + shift + noise * shift)
    return FakeScores(nll, tokens, np.argsort(difficulty) < right * samples, 0.012 * tokens, tokens - 1)


LAYERS = {
    f"model.layers.{block}.mlp.{kind}": {"sqnr_db": 20.0 + block - below, "input_max": 4.0, "input_crest": 9.5}
    for block in range(4)
    for kind, below in (("up_proj", 0), ("down_proj", 3))
}


def task_rows(**changes: Any) -> dict[str, list[Row]]:
    """Three arms on a task of right and wrong, and one of text; `changes` replaces an arm's rows."""

    def arm(right: int, nats: float) -> list[Row]:
        common: dict[str, Any] = {"doc_hash": "h", "prompt": "p", "target": "t", "response": "r"}
        of_answers = {"name": "spelling", "task": "spell", "metric": "acc", "weight": 1.0, "higher_is_better": True}
        of_text = {"name": "text", "task": "text", "metric": "nats per word", "higher_is_better": False}
        rows = [Row(doc_id=n, value=float(n < right), **of_answers, **common) for n in range(60)]
        words = [9.0 + n % 3 for n in range(40)]
        text = [Row(doc_id=n, value=nats * word, weight=word, **of_text, **common) for n, word in enumerate(words)]
        return rows + text

    return {"base": arm(20, 3.0), "control": arm(50, 2.0), "ptq": arm(40, 2.2), "final": arm(49, 2.1)} | changes


ALL_ARMS = {
    "base": scores(1.0, 0.1),
    "base_quantized": scores(1.3, 0.1),
    "control": scores(0.1, 0.6),
    "ptq": scores(0.5, 0.3),
    "tuned": scores(0.15, 0.6),
    "final": scores(0.2, 0.55),
}


def build(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "arms": ALL_ARMS,
        "why": {},
        "train_ship_gap": 0.0,
        "backend_gap": -1.5e-7,
        "reference": "control",
        "size": {
            "base_mib": 538.0,
            "tuned_mib": 538.1,
            "final_mib": 236.4,
            "memory_mib": 240.0,
            "bits_per_weight": 8.5,
        },
        "coverage": {
            "quantized_fraction": 1.0,
            "share_of_all_weights": 0.8,
            "skipped": {"lm_head": "int8-int4 leaves it unquantised"},
        },
        "scheme": "int8-int4",
        "target": "cpu",
        "dtype": "float32",
        "simulated": False,
        "missing": [],
        "finish_command": None,
    }
    return build_metrics(**{**arguments, **changes})


def nothing() -> dict[str, Any]:
    return build(
        arms={},
        train_ship_gap=None,
        backend_gap=None,
        reference=None,
        size={},
        coverage={},
        scheme=None,
        target=None,
    )


def simulated() -> dict[str, Any]:
    return build(
        simulated=True,
        target="cuda-sm89",
        size={"base_mib": 538.0, "tuned_mib": 538.1},
        missing=["a GPU of compute capability 8.9 or higher"],
        finish_command="quantize convert runs/demo --target cuda-sm89",
    )


def lookup(metrics: dict[str, Any], key: str) -> Any:
    value: Any = metrics
    for part in key.split("."):
        value = value[part]
    return value


def with_tasks() -> dict[str, Any]:
    return build(layers=LAYERS, task_rows=task_rows())


@pytest.mark.parametrize("make", [build, nothing, simulated, with_tasks])
def test_every_key_exists_and_every_null_has_a_reason(make: Any) -> None:
    metrics = make()
    for key in CONTRACT:
        lookup(metrics, key)
    assert unexplained(metrics) == []
    assert all(isinstance(text, str) and text for text in metrics["why"].values())
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_numbers_are_those_of_the_scores() -> None:
    metrics = build()
    control, ptq, final = (ALL_ARMS[name] for name in ("control", "ptq", "final"))
    assert metrics["final"]["loss"] == pytest.approx(final.nll.sum() / final.tokens.sum())
    assert metrics["final"]["perplexity"] == pytest.approx(math.exp(metrics["final"]["loss"]))
    assert metrics["final"]["accuracy"] == final.exact.mean()
    expected = (ptq.nll.sum() - final.nll.sum()) / (ptq.nll.sum() - control.nll.sum())
    assert metrics["recovered"] == pytest.approx(expected)
    assert metrics["recovered_interval"]["low"] < expected < metrics["recovered_interval"]["high"]
    difference = metrics["comparisons"]["final_vs_ptq"]["loss"]["value"]
    assert difference == pytest.approx(metrics["final"]["loss"] - metrics["ptq"]["loss"])
    assert metrics["final"]["vs_base"] == {
        key: metrics["comparisons"]["final_vs_base"][key] for key in ("loss", "accuracy")
    }
    assert (metrics["n_samples"], metrics["n_tokens"]) == (120, int(final.tokens.sum()))


def test_the_same_scores_give_the_same_metrics() -> None:
    assert build() == build()


def test_an_absent_arm_explains_all_that_depends_on_it() -> None:
    why = {"control": "eval.control is false", "ptq": "eval.control is false"}
    arms = {name: ALL_ARMS[name] for name in ("base", "tuned", "final")}
    metrics = build(arms=arms, why=why)
    assert metrics["control"]["loss"] is None
    assert metrics["why"]["control"] == "eval.control is false"
    assert "eval.control is false" in metrics["why"]["recovered"]
    assert "eval.control is false" in metrics["why"]["comparisons.final_vs_ptq"]
    assert metrics["comparisons"]["final_vs_tuned"]["loss"]["value"] is not None
    assert "control: eval.control is false" in render_markdown(metrics, ReportContext(run="x"))


def test_a_reason_is_dropped_where_the_number_exists() -> None:
    assert "final" not in build(why={"final": "not asked for"})["why"]


def test_simulation_is_marked_where_it_was_used() -> None:
    metrics = simulated()
    assert {name for name in ARMS if metrics[name]["simulated"]} == {"base_quantized", "ptq", "final"}
    assert metrics["comparisons"]["final_vs_base"]["simulated"]
    assert metrics["kl"]["simulated"]
    assert metrics["size"]["final_mib"] is None
    assert "does not run here" in metrics["why"]["size.final_mib"]
    assert not any(metrics[name]["simulated"] for name in ("base", "control", "tuned"))


def test_nothing_to_recover_is_null_with_a_reason() -> None:
    metrics = build(arms={**ALL_ARMS, "ptq": ALL_ARMS["control"]})
    assert metrics["recovered"] is None
    assert "nothing to recover" in metrics["why"]["recovered"]


def test_one_sample_has_numbers_but_no_intervals() -> None:
    metrics = build(arms={name: scores(0.1 * number, 1.0, samples=1) for number, name in enumerate(ARMS)})
    assert metrics["final"]["loss"] is not None
    assert metrics["final"]["loss_interval"] == {"low": None, "high": None}
    assert unexplained(metrics) == []
    assert "cannot tell" in verdict(metrics)[0]


def test_what_few_samples_leave_open_is_said_to_be_for_their_number() -> None:
    arms = {arm: scores(shift, 0.5, 4) for arm, shift in (("control", 0.1), ("ptq", 0.5), ("final", 0.2))}
    few = {arm: [replace(row, value=0.5 * row.value) for row in rows[:4]] for arm, rows in task_rows().items()}
    few = {arm: [*rows, *(replace(row, name="more") for row in rows)] for arm, rows in few.items() if arm in arms}
    metrics = build(arms=arms, task_rows=few)
    keys = ("final.loss_interval.low", "kl.final_interval.low", "kl.ptq_top1_interval.high", "recovered_interval.low")
    for key in (*keys, "tasks_mean.final.value", "tasks.more.final.low"):
        assert lookup(metrics, key) is None and why(metrics, key) == "too few samples for an interval", key
    said = verdict(metrics)
    assert "brackets" not in said[0] and said[0].endswith("nats per answer token.")
    assert said[-1].endswith("with so few of them they are rough, and too few for any of a loss.")


def test_bad_arguments_are_refused() -> None:
    bad = FakeScores(np.array([math.nan, 1.0, math.inf]), np.array([1, 1, 1]), np.array([False] * 3))
    with pytest.raises(UserError, match="final: the loss of 2 of 3"):
        build(arms={"final": bad})
    with pytest.raises(ValueError, match="same samples"):
        build(arms={"base": scores(0.1, 0.1, 10), "final": scores(0.1, 0.1, 11)})
    with pytest.raises(ValueError, match="finall"):
        build(arms={"finall": ALL_ARMS["final"]})
    with pytest.raises(ValueError, match="final_mb"):
        build(size={"final_mb": 3.0})
    with pytest.raises(ValueError, match="finite"):
        build(train_ship_gap=math.nan)


def test_flatten_gives_dotted_scalars() -> None:
    flat = flatten(build())
    assert flat["final.loss"] == build()["final"]["loss"]
    assert flat["size.final_mib"] == 236.4
    assert flat["comparisons.final_vs_ptq.loss.high"] < 0
    assert all(isinstance(value, float | int | bool | str) for value in flat.values())
    assert not any(key.startswith(("why", "coverage.skipped", "layers")) for key in flat)
    assert "final.loss" not in flatten(nothing())
    assert {f"size.{key}" for key in SIZES} <= set(flat)


def test_verdict_claims_a_clear_difference() -> None:
    first = verdict(build())[0]
    assert first.startswith(
        "The shipped model (final) has a lower loss than the control quantised after training (ptq)"
    )
    assert any("is recovered (95% interval" in sentence for sentence in verdict(build()))
    worse = verdict(build(arms={**ALL_ARMS, "final": scores(0.9, 0.1)}))
    assert worse[0].startswith("The shipped model (final) has a higher loss than")


def test_verdict_does_not_claim_what_the_interval_does_not_show() -> None:
    ptq, rng = ALL_ARMS["ptq"], np.random.default_rng(1)
    close = FakeScores(ptq.nll + rng.normal(0, 3, len(ptq.nll)), ptq.tokens, ptq.exact)
    metrics = build(arms={**ALL_ARMS, "final": close})
    low, high = (metrics["comparisons"]["final_vs_ptq"]["loss"][key] for key in ("low", "high"))
    assert low < 0 < high
    sentences = verdict(metrics)
    assert "these samples cannot tell" in sentences[0]
    assert sentences[1].startswith("No difference in exact answers is shown")
    assert not re.search(r"lower|higher|fewer|more exact", " ".join(sentences[:2]))


def test_verdict_warns_of_few_samples_and_of_simulation() -> None:
    few = build(arms={name: scores(shift, 0.5, 12) for name, shift in (("base", 1.0), ("final", 0.2))})
    assert "rough" in verdict(few)[-1]
    assert "(final, simulated)" in verdict(simulated())[0]
    assert verdict(nothing()) == ["Nothing was compared in this run."]


def test_tasks_are_compared_in_pairs_and_claimed_only_where_they_differ() -> None:
    metrics = build(task_rows=task_rows())
    task = metrics["tasks"]["spelling"]
    assert (task["metric"], task["n_samples"], task["final"]["value"]) == ("acc", 60, pytest.approx(49 / 60))
    clear, noise = task["comparisons"]["final_vs_ptq"], task["comparisons"]["final_vs_control"]
    assert clear["p"] == pytest.approx(2 * 2.0**-9) and clear["p_holm"] == clear["p"]  # the larger of two
    assert noise["low"] < 0 < noise["high"] and noise["p"] == 1.0
    assert metrics["tasks"]["text"]["final"]["value"] == pytest.approx(2.1)
    assert task["tuned"]["value"] is None and unexplained(metrics) == []
    said = " ".join(verdict(metrics))
    assert "Task by task, final is better on spelling, text than ptq" in said
    assert "worse on text than control" in said and "worse on spelling" not in said
    text = render_markdown(metrics, ReportContext(run="x"))
    assert "| spelling | acc | 60 | 33.3 | 83.3 | 66.7 | 81.7 | -1.7 [" in text


def test_a_task_whose_interval_includes_0_is_not_claimed_whatever_its_p() -> None:
    metrics = build(task_rows=task_rows())
    compared = metrics["tasks"]["spelling"]["comparisons"]["final_vs_ptq"]
    for low, high in ((None, None), (-0.01, 0.3), (0.0, 0.3)):
        compared |= {"low": low, "high": high, "p_holm": 0.001}
        metrics["tasks"] = {"spelling": metrics["tasks"]["spelling"]}
        assert "No task shows a difference between final and ptq." in verdict(metrics)


@pytest.mark.parametrize(
    ("share", "low", "high", "said"),
    [
        (0.36, 0.2, 0.5, "Of the loss that quantisation costs, 36% is recovered (95% interval 20% to 50%)."),
        (0.1, -0.2, 0.5, "That any of the loss that quantisation costs is recovered is not shown: 10% (95% interval"),
        (2.1, None, None, "How much is recovered of the loss that quantisation costs is not shown: the loss that"),
        (0.004, 0.001, 0.2, "Of the loss that quantisation costs, 0.4% is recovered (95% interval 0.1% to 20%)."),
        (-0.3, -0.5, -0.1, "QAT adds to the loss that quantisation costs, by 30% of it"),
    ],
)
def test_recovery_is_claimed_as_far_as_its_interval_goes(
    share: float, low: float | None, high: float | None, said: str
) -> None:
    metrics = build()
    metrics |= {"recovered": share, "recovered_interval": {"low": low, "high": high}}
    metrics["why"]["recovered_interval"] = "the loss that quantisation costs is not clearly above 0"
    found = [sentence for sentence in verdict(metrics) if "recovered" in sentence]
    assert len(found) == 1 and found[0].startswith(said)
    assert recovered_text(metrics) == (
        "not shown" if low is None else "0.4% [0.1%, 20%]" if share == 0.004 else f"{share:.0%} [{low:.0%}, {high:.0%}]"
    )


def test_agreement_on_every_token_is_not_certain() -> None:
    same = {arm: replace(each, top1=each.tokens) for arm, each in ALL_ARMS.items()}
    bounds = build(arms=same)["kl"]["final_top1_interval"]
    assert bounds["high"] == 1.0 and 0.9 < bounds["low"] < 0.99


def test_an_arm_that_overflows_on_tasks_alone_is_left_out_of_their_worst_samples(tmp_path: Path) -> None:
    rows = task_rows()
    del rows["ptq"]
    for arm, each in ALL_ARMS.items():
        pyarrow.parquet.write_table(pyarrow.table({"nll": each.nll}), tmp_path / f"{arm}.parquet")
    found = worst_samples(tmp_path, ALL_ARMS, rows)
    assert found and all([side.arm for side in sample.sides] == ["control", "final"] for sample in found)


def test_a_text_is_reported_by_its_perplexity_and_two_by_their_ratio() -> None:
    settings = {"limit": 40, "chat_template": True}
    context = ReportContext(run="x", task_settings=settings, few_shot={"spelling": 5, "text": 0})
    text = render_markdown(build(task_rows=task_rows()), context)
    row = next(line for line in text.splitlines() if line.startswith("| text |"))
    assert "| word perplexity | 40 |" in row and f"| {math.exp(2.1):.5g} | x{math.exp(0.1):.4f} [" in row
    assert (
        "run by lm-eval, at most 40 samples of each, in the chat template, 5 examples in the prompts of spelling, "
        "no examples in the prompts of text." in text
    )


def test_an_arm_without_results_on_tasks_says_why_and_prompts_that_were_cut_are_counted() -> None:
    rows = task_rows()
    del rows["ptq"]
    metrics = build(task_rows=rows, why={"tasks.spelling.ptq": "its numbers overflow on spelling"})
    text = render_markdown(metrics, ReportContext(run="x", cut={"text": 3}))
    assert "Without results on tasks:" in text and "- ptq: its numbers overflow on spelling" in text
    assert "lost their beginning, for every arm alike: text (3 samples)." in text


def test_perplexities_beyond_reading_are_shown_in_nats() -> None:
    rows = {
        arm: [replace(row, value=row.weight * nats, name="text") for row in found if row.task == "text"]
        for (arm, found), nats in zip(task_rows().items(), (900.0, 890.0, 900.0, 800.0), strict=True)
    }
    text = render_markdown(build(task_rows=rows), ReportContext(run="x"))
    row = next(line for line in text.splitlines() if line.startswith("| text |"))
    assert "| 900 nats |" in row and "| -90 [-90, -90] nats |" in row
    assert {plot.name for plot in draw_plots(build(task_rows=rows), {})} >= {"size", "forest"}


def test_a_task_of_few_samples_says_why_it_has_no_interval() -> None:
    few = {arm: [row for row in rows if row.task == "text"][:3] for arm, rows in task_rows().items()}
    row = next(
        line
        for line in render_markdown(build(task_rows=few), ReportContext(run="x")).splitlines()
        if line.startswith("| text |")
    )
    assert "(too few samples for an interval)" in row


def test_a_bound_that_few_differing_samples_cannot_give_has_its_own_reason() -> None:
    control = ALL_ARMS["control"]
    nll = control.nll.copy()
    nll[:2] += 3.0
    metrics = build(arms=ALL_ARMS | {"final": replace(control, nll=nll)})
    found = metrics["comparisons"]["final_vs_control"]["loss"]
    assert None in (found["low"], found["high"]) and unexplained(metrics) == []
    key = "low" if found["low"] is None else "high"
    assert why(metrics, f"comparisons.final_vs_control.loss.{key}") == "too few samples differ for an interval"
    said = next(sentence for sentence in verdict(metrics) if "(control)" in sentence)
    assert "cannot tell" in said and "brackets" not in said


def test_text_of_models_is_shown_as_it_is() -> None:
    said = ["- no list", "1. no list", "costs $5 and $6", "~~kept~~", "a &lt; b", "AT&T", "3.5 apples"]
    text = to_markdown([Items(said)])
    escaped = [r"\- no list", r"1\. no list", r"costs \$5 and \$6", r"\~\~kept\~\~", r"a \&lt; b", "AT&T", "3.5 apples"]
    assert text.splitlines() == [f"- {each}" for each in escaped]


def test_two_questions_of_198_read_as_noise() -> None:
    """torchao's documentation calls a like difference a recovery of 66.9%."""
    rows = {}
    for name, right in (("base", 60), ("control", 63), ("ptq", 60), ("final", 62)):
        rows[name] = [
            replace(task_rows()["base"][0], doc_id=number, value=float(number < right)) for number in range(198)
        ]
    metrics = build(task_rows=rows)
    assert any("No task shows a difference between final and ptq" in sentence for sentence in verdict(metrics))
    assert not any("better on spelling" in sentence for sentence in verdict(metrics))


def test_tasks_on_other_samples_are_refused_and_a_task_without_numbers_says_why() -> None:
    fewer = task_rows(final=task_rows()["final"][:-1])
    with pytest.raises(UserError, match=r"text: final and base were not run on the same samples \(39 and 40\)"):
        build(task_rows=fewer)
    other = task_rows(final=[replace(row, doc_hash="other") for row in task_rows()["final"]])
    with pytest.raises(UserError, match="spelling: final and base were not run on the same samples"):
        build(task_rows=other)
    broken = task_rows(final=[replace(row, value=math.nan) for row in task_rows()["final"]])
    with pytest.raises(UserError, match="final: spelling has no number for 60 of 60 samples"):
        build(task_rows=broken)
    empty = {arm: [replace(row, metric=None, value=None) for row in rows] for arm, rows in task_rows().items()}
    metrics = build(task_rows=empty)
    assert unexplained(metrics) == []
    assert "nothing to pair" in render_markdown(metrics, ReportContext(run="x"))


def test_a_fine_tune_without_a_format_is_compared_with_what_it_began_with() -> None:
    rows = task_rows()
    rows = {"base": rows["base"], "tuned": rows["control"]}
    arms = {name: ALL_ARMS[name] for name in ("base", "tuned")}
    metrics = build(arms=arms, task_rows=rows, scheme=None, target=None, train_ship_gap=None, coverage={})
    first, *others = verdict(metrics)
    assert first.startswith("The fine-tuned model (tuned) has a lower loss than the untouched model (base)")
    assert (
        "Task by task, tuned is better on spelling, text than base (intervals without 0, Holm-adjusted p < 0.05, "
        "2 tasks)." in others
    )
    text = render_markdown(metrics, ReportContext(run="x", plots=draw_plots(metrics, {})))
    assert "tuned - base [95%]" in text and "| spelling | acc | 60 | 33.3 | 83.3 | +50.0 [" in text
    assert "tuned minus base, percentage points" in text and "final - " not in text
    assert not any("tuned" in sentence for sentence in verdict(build()))  # beside a shipped model it says nothing new


def test_a_task_that_an_arm_lacks_says_why() -> None:
    rows = task_rows()
    metrics = build(arms=ALL_ARMS | {"control": None}, why={"control": "left out"}, task_rows={"final": rows["final"]})
    line = next(line for line in render_markdown(metrics, ReportContext(run="x")).splitlines() if "| spelling" in line)
    assert line == "| spelling | acc | 60 | 81.7 | not measured in this run | - |"


def _cost(prefill: float, decode: dict[str, float], peak: float) -> dict[str, Any]:
    facts = {"graph": False, "compiled": False, "prompt_tokens": 256}
    return {"prefill_tokens_per_s": prefill, "decode_ms": decode, "peak_mib": peak, **facts}


def test_the_cost_names_its_dtype_and_what_is_saved_only_where_it_is() -> None:
    plain = _cost(500.0, {"1": 50.0, "8": 80.0}, 1000.0)
    text = render_markdown(build(cost=[plain, _cost(300.0, {"1": 99.0, "8": 40.0}, 800.0)]), ReportContext(run="x"))
    assert "| tuned, in float32 | final, as shipped |" in text and "16 bit" not in text
    assert (
        "In bfloat16 the unquantised model would take 269.1 MiB: what ships" in text and "is 0.88 times that." in text
    )
    assert (
        "At batch 1 the shipped format decodes slower here than float32; what it saves there is memory and disk" in text
    )
    size = {"base_mib": 100.0, "tuned_mib": 100.0, "final_mib": 99.0}
    nothing_saved = build(cost=[plain, _cost(300.0, {"1": 99.0, "8": 40.0}, 1100.0)], size=size)
    text = render_markdown(nothing_saved, ReportContext(run="x"))
    assert "decodes slower here than float32." in text and "saves" not in text


def test_arms_that_were_measured_on_another_machine_are_named() -> None:
    elsewhere = {
        "arms": ("base", "base_quantized"),
        "device": "x86_64 CPU, 2 threads",
        "dtype": "float32",
        "packages": {"torch": "2.13"},
    }
    metrics = build(elsewhere=elsewhere, dtype="bfloat16")
    assert unexplained(metrics) == []
    text = render_markdown(metrics, ReportContext(run="x"))
    assert "base and base_quantized were measured where the run was trained (x86_64 CPU, 2 threads, in float32" in text
    assert (
        "in float32, torch 2.13; what is quantised simulated), the others where it was finished (in bfloat16)" in text
    )
    assert "were measured where" not in render_markdown(build(), ReportContext(run="x"))


def test_the_worst_layer_is_named() -> None:
    metrics = build(layers=LAYERS)
    assert metrics["sqnr"]["worst_layer"] == "model.layers.0.mlp.down_proj" and metrics["sqnr"]["worst_db"] == 17.0
    text = render_markdown(metrics, ReportContext(run="x"))
    first = next(line for line in text.splitlines() if line.startswith("| model.layers"))
    assert first == "| model.layers.0.mlp.down_proj | 17.0 | 4 | 9.5 |"


def test_gap_of_zero_is_equal_to_the_last_bit_and_others_are_numbers() -> None:
    text = render_markdown(build(), ReportContext(run="x"))
    assert "trained function minus shipped function: 0 (equal to the last bit)" in text
    assert "training backend's graph minus plain graph: -1.5e-07 nats" in text
    tiny = render_markdown(build(train_ship_gap=1e-300), ReportContext(run="x"))
    assert tiny.count("equal to the last bit") == 0


def test_all_rows_and_both_intervals_are_in_the_table() -> None:
    metrics = build()
    text = render_markdown(metrics, ReportContext(run="x"))
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.split()[1] in ARMS]
    assert [line.split()[1] for line in lines] == list(ARMS)
    for row, line in zip(arm_rows(metrics), lines, strict=True):
        assert f"{row.loss:.4f}" in line
        assert format_difference(row.loss_vs_base) in line
        assert format_points(row.accuracy_vs_base) in line


def test_a_simulated_report_ends_with_the_finishing_command() -> None:
    text = render_markdown(simulated(), ReportContext(run="demo"))
    assert text.rstrip().endswith("```bash\nquantize convert runs/demo --target cuda-sm89\n```")
    assert "a GPU of compute capability 8.9" in text
    assert "this run, as shipped (simulated)" in text
    assert "What is missing" not in render_markdown(build(), ReportContext(run="demo"))


def test_the_report_says_for_which_batches_the_format_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SCHEMES["int4"].targets["cuda-sm80"].speed
    text = render_markdown(build(scheme="int4", target="cuda-sm80"), ReportContext(run="x"))
    assert f"decoding with int4 on cuda-sm80: {known}" in text
    new = replace(SCHEMES["int3"], targets={"cuda": replace(SCHEMES["int3"].targets["cuda"], speed=None)})
    monkeypatch.setattr("quantize.report.SCHEMES", {"int3": new})
    unknown = render_markdown(build(scheme="int3", target="cuda"), ReportContext(run="x"))
    assert "decoding with int3 on cuda: speed not measured" in unknown
    assert "decoding with" not in render_markdown(nothing(), ReportContext(run="x"))


def test_almost_everything_is_not_everything() -> None:
    text = render_markdown(build(coverage={"quantized_fraction": 0.9999}), ReportContext(run="x"))
    assert "99.9% of the layers' weights" in text


class _Checker(HTMLParser):
    """Collects tags and text; refuses unbalanced tags and references to the outside."""

    void = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        outside = {"src", "href", "xlink:href"}
        assert not [value for name, value in attrs if name in outside and not (value or "").startswith("#")]
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_balanced_page_with_the_figures_and_the_same_words() -> None:
    losses = {"tuned": [(step, 3.0 - 0.001 * step) for step in range(1, 2000)] + [(2000, math.nan)]}
    metrics = build(layers=LAYERS, task_rows=task_rows())
    plots = draw_plots(metrics, losses)
    assert [plot.name for plot in plots] == ["loss", "size", "forest", "sqnr"]
    assert all(plot.png.startswith(b"\x89PNG") for plot in plots)
    versions = {"torch": "2.13.0"}
    context = ReportContext(run="demo", recipe={"lora": {"r": 16}}, versions=versions, losses=losses, plots=plots)
    page = render_html(metrics, context)
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen.count("svg") == len(plots)
    assert "nan" not in page.lower()
    assert len(page) < 150_000
    assert "width=device-width" in page
    for sentence in verdict(metrics):
        assert sentence in checker.text
    for words in ("lora.r", "spelling", "down_proj", plots[0].caption):
        assert words in checker.text
    text = render_markdown(metrics, context)
    assert "![Training loss by step](plots/loss.png)" in text
    assert "Training loss (tuned): 2.9990 at step 1, 1.0010 at step 1999." in text


def test_figures_are_the_same_bytes_each_time_and_left_out_where_there_is_nothing_to_draw() -> None:
    metrics = build(layers=LAYERS)
    assert draw_plots(metrics, {}) == draw_plots(metrics, {})
    assert [plot.name for plot in draw_plots(nothing(), {"tuned": [(1, math.nan), (2, 3.0)]})] == []


def test_names_of_the_user_are_text_not_markup() -> None:
    coverage = {"quantized_fraction": 0.5, "skipped": {"<script>alert(1)</script>|x": "a `reason` [l](u)"}}
    context = ReportContext(run="<b>run</b>", command="train --config a.yaml # ```", model="a|b")
    page, text = render_html(build(coverage=coverage), context), render_markdown(build(coverage=coverage), context)
    assert "<script>" not in page
    assert "<b>" not in page
    assert r"\<script>" in text
    assert r"\`reason\` [l\](u)" in text
    assert r"a\|b" in text
    assert "````bash\ntrain --config a.yaml # ```\n````" in text
    assert "int8-int4" in text


def test_an_empty_run_still_renders() -> None:
    for text in (render_markdown(nothing(), ReportContext(run="x")), render_html(nothing(), ReportContext(run="x"))):
        assert "No arm was evaluated" in text
        assert "None" not in text
