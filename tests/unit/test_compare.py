"""`quantize compare` on run directories made by hand: what it claims, what it shows, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.cli import main
from quantize.compare import compare_runs
from quantize.contract import READ, Each, Maybe, find_faults
from quantize.errors import UserError
from quantize.evaluate import Scores
from quantize.finished import cut_names, load_run
from quantize.metrics import build_metrics
from quantize.runs import GATHERED_VERSION
from quantize.task_rows import save_rows
from quantize.tasks import Row

SAMPLES = 80
LAYERS = {
    f"model.layers.{block}.mlp.{kind}": {"sqnr_db": 20.0 + block - below, "input_max": 4.0, "input_crest": 9.5}
    for block in range(3)
    for kind, below in (("up_proj", 0), ("down_proj", 3))
}
HEADINGS = [
    "Results", "Tasks", "Is what was trained what ships?", "What it costs to run", "Which layer hurts",
    "Where runs lost most against first", "Coverage", "What differs in the settings",
    "What differs in device and versions",
]  # fmt: skip


def scores(shift: float, right: float) -> Scores:
    """Loss `shift` above a common difficulty, the easiest `right` share exact."""
    rng = np.random.default_rng(7)
    tokens, difficulty = rng.integers(2, 20, SAMPLES), rng.gamma(2.0, 0.5, SAMPLES)
    noise = rng.normal(0, 0.02, SAMPLES)
    return Scores(
        nll=tokens * (difficulty + shift + shift * noise), tokens=tokens,
        exact=np.argsort(np.argsort(difficulty)) < right * SAMPLES, kl=0.012 * tokens, top1=tokens - 1,
    )  # fmt: skip


def task_rows(right: int, errors: float) -> list[Row]:
    """A task of right and wrong, and one counted in edits."""
    common: dict[str, Any] = {"doc_hash": "h", "prompt": "p", "target": "t", "response": "r", "weight": 1.0}
    choice = common | {"name": "spelling", "task": "s", "metric": "acc", "higher_is_better": True}
    edits = common | {"name": "edits", "task": "e", "metric": "edits", "higher_is_better": False}
    return [
        *(Row(doc_id=n, value=float(n < right), **choice) for n in range(60)),
        *(Row(doc_id=n, value=4.0 + errors + 0.1 * (n % 5), **edits) for n in range(60)),
    ]


def cost(prefill: float, decode: float) -> dict[str, Any]:
    facts = {"graph": False, "compiled": False, "prompt_tokens": 256, "peak_mib": 1000.0}
    return {"prefill_tokens_per_s": prefill, "decode_ms": {"1": decode}, **facts}


def make_run(
    folder: Path, *, shift: float = 0.3, right: float = 0.5, task: tuple[int, float] | None = (40, 0.0),
    ptq: float = 0.6, device: str = "an abacus", versions: str = "2.13", settings: dict[str, Any] | None = None,
    name_of_task: str = "spelling", **changes: Any,
) -> Path:  # fmt: skip
    """A finished run whose shipped arm has that loss, those exact answers and those results on tasks."""
    final = scores(shift, right)
    arms = {"base": scores(1.0, 0.1), "control": scores(0.1, 0.6), "ptq": scores(ptq, 0.4), "tuned": scores(0.2, 0.6)}
    rows = task_rows(*task) if task else []
    dtype = changes.get("dtype", "float32")
    arguments: dict[str, Any] = {
        "arms": arms | {"final": final}, "why": {}, "train_ship_gap": 0.0, "backend_gap": 0.0, "reference": "control",
        "size": {"base_mib": 100.0, "tuned_mib": 100.0, "final_mib": 40.0}, "scheme": "int8-int4", "target": "cpu",
        "coverage": {"quantized_fraction": 0.9999, "skipped": {"lm_head": "kept"}}, "dtype": dtype, "simulated": False,
        "layers": LAYERS, "cost": [cost(500.0, 50.0), cost(250.0, 100.0)],
        "task_rows": {"control": rows, "final": rows} if rows else None,
    }  # fmt: skip
    (folder / "eval").mkdir(parents=True)
    texts = {
        "prompt": [f"question {n}" for n in range(SAMPLES)], "answer": [f"answer {n}" for n in range(SAMPLES)],
        "greedy_text": [f"{folder.name} said {n}" for n in range(SAMPLES)],
    }  # fmt: skip
    final.save(folder / "eval" / "final.parquet", texts)
    if rows:
        save_rows(rows, folder / "eval" / "final.tasks.parquet")
    place = {"device": device, "dtype": dtype, "packages": {"torch": versions}}
    gathered = {
        "version": GATHERED_VERSION, "losses": {"tuned": [[step, 3.0 - 0.1 * step] for step in range(1, 9)]},
        "trained_on": place, "format": {"scheme": "fp8", "group_size": None, "target": "cpu"}, "dtype": dtype,
        "tuned": {"coverage": {"share_of_all_weights": 0.8}}, "shipped": {},
    }  # fmt: skip
    files = {
        "metrics.json": build_metrics(**arguments | changes), "gathered.json": gathered,
        "config.resolved.json": {"train": {"learning_rate": 0.1}, "run": {"name": folder.name}} | (settings or {}),
        "manifest.json": {"device": device, "packages": {"torch": versions, "wandb": "0.1"}, "python": "3.11"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def simulated() -> dict[str, Any]:
    return {"simulated": True, "size": {"base_mib": 100.0, "tuned_mib": 100.0}, "scheme": "fp8", "target": "cuda-sm89"}


def page(tmp_path: Path, *runs: Path) -> str:
    return compare_runs([str(run) for run in runs], str(tmp_path), tmp_path / "page")


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_page_has_what_a_runs_report_has_in_its_order(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", shift=0.5, right=0.2, task=(10, 1.0))
    text = page(tmp_path, first, other)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    metrics = json.loads((other / "metrics.json").read_text())
    row = line_of(text, "| other | final | int8-int4, cpu |")
    bounds = metrics["recovered_interval"]
    assert f"{metrics['recovered']:.0%} [{bounds['low']:.0%}, {bounds['high']:.0%}]" in row
    assert f"| {2 * 2.0**-24:.2g} |" in row, "McNemar's p: 24 of 80 samples are right in the first alone"
    assert "0.012 [0.012, 0.012]" in text and "| other | 250 (0.50) | 100.00 (0.50) | 1,000.0 (1.00) |" in text
    assert (
        "| other | 19.5 | 17.0 | model.layers.0.mlp.down_proj |" in text and "| other | 99.9% | lm_head: kept |" in text
    )
    pictures = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == [f"plots/{name}.png" for name in ("loss", "size", "forest", "tasks", "sqnr")]
    assert all((tmp_path / "page" / name).stat().st_size > 1000 for name in pictures)


def test_the_worst_samples_stand_side_by_side(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    import pyarrow.parquet

    path = other / "eval" / "final.parquet"
    table = pyarrow.parquet.read_table(path)
    nll = pyarrow.array(np.where(np.arange(SAMPLES) == 13, table["nll"].to_numpy() + 5.0, table["nll"].to_numpy()))
    table = table.set_column(table.column_names.index("nll"), "nll", nll)
    pyarrow.parquet.write_table(table.take(list(reversed(range(SAMPLES)))), path)
    text = page(tmp_path, first, other)
    before = Scores.load(first / "eval" / "final.parquet").nll[13]
    assert text.count("held-out, sample") == 1 and "held-out, sample 13: question 13" in text
    assert f"| first | {before:.2f} | first said 13 |\n| other | {before + 5:.2f} | other said 13 |" in text


def test_a_difference_is_claimed_where_interval_and_test_show_it(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    worse = make_run(tmp_path / "worse", shift=0.5, right=0.2, task=(10, 1.0))
    better = make_run(tmp_path / "better", shift=0.1, right=0.8, task=(58, -1.0))
    same = make_run(tmp_path / "same", task=(41, 0.0))
    text = page(tmp_path, first, worse, better, same)
    for claim in (
        "A lower loss than first: better.", "A higher loss than first: worse.",
        "Not told apart from first by these samples: same.",
        "Fewer exact answers than first: worse.", "More exact answers than first: better.",
        "No difference in exact answers from first is shown: same.",
        "Task by task, worse is worse on spelling, edits than first (intervals without 0, Holm-adjusted "
        r"p \< 0.05, 6 tests).",
        "Task by task, better is better on spelling, edits than first",
        "No single task shows a difference from first: same.",
    ):  # fmt: skip
        assert claim in text, claim


def test_exact_answers_need_mcnemars_test_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", right=0.2)
    assert "Fewer exact answers than first: other." in page(tmp_path, first, other)
    monkeypatch.setattr("quantize.compare.mcnemar", lambda a, b: 0.06)
    assert "No difference in exact answers from first is shown: other." in page(tmp_path, first, other)


def test_a_task_needs_its_own_interval_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize.statistics import Interval

    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", task=(10, 0.0))
    assert "other is worse on spelling than first" in page(tmp_path, first, other)
    wide = Interval(-0.5, -1.0, 0.01)
    monkeypatch.setattr("quantize.task_metrics.paired_accuracy_difference", lambda a, b: wide)
    assert "No single task shows a difference from first: other." in page(tmp_path, first, other)


def test_what_is_simulated_is_said_at_every_number(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", shift=0.5, **simulated())
    text = page(tmp_path, first, other)
    assert "A higher loss than first: other (simulated)." in text
    assert "Simulated, not measured as shipped: other (quantized/ is not written on this machine" in text
    assert line_of(text, "| other | final (simulated) | fp8, cuda-sm89 |").endswith("| 40.0 (nominal) |")
    assert "| other (simulated) | 0 (both are the same simulation) |" in text
    assert "Hollow, at the nominal size of the format, as no file is written: other (simulated)" in text


def test_a_size_that_is_not_known_has_its_reason(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", **simulated())
    third = make_run(tmp_path / "third")
    edit(other / "gathered.json", lambda gathered: gathered.update(tuned={}))
    text = page(tmp_path, first, other, third)
    assert "size, other (simulated): quantized/ is not written on this machine" in text
    assert "Not drawn, as the size is not known: other (simulated) (quantized/ is not written" in text


def test_another_device_dtype_or_package_is_shown_and_warned_of(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    text = page(tmp_path, first, make_run(tmp_path / "same"))
    assert "Nothing: device an abacus, dtype float32, torch 2.13, wandb 0.1, python 3.11." in text
    assert "that of the arithmetic" not in text
    text = page(tmp_path, first, make_run(tmp_path / "package", versions="2.14"))
    assert "| torch | 2.13 | 2.14 |" in text and "that of the arithmetic" not in text
    other = make_run(tmp_path / "other", device="a slide rule", dtype="bfloat16")
    text = page(tmp_path, first, other)
    caution = (
        "The runs were not measured in one dtype (float32; bfloat16) and device (an abacus; a slide rule): differences "
        "hold that of the arithmetic, too."
    )
    assert text.count(caution) == 2 and "| device | an abacus | a slide rule |" in text


def test_a_share_without_bounds_is_not_shown(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    edit(other / "metrics.json", lambda metrics: metrics.update(
        recovered=0.87, recovered_interval={"low": None, "high": None}, why={"recovered_interval": "it may be anything"}
    ))  # fmt: skip
    text = page(tmp_path, first, other)
    assert "| not shown |" in line_of(text, "| other |") and "87%" not in text
    assert "recovered, other: it may be anything" in text


def test_settings_that_differ_are_listed_and_names_are_none(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    assert "Nothing but names." in page(tmp_path, first, make_run(tmp_path / "same"))
    other = make_run(tmp_path / "other", settings={"train": {"learning_rate": 0.2}, "data": {"train": "数据"}})
    text = page(tmp_path, first, other)
    assert "| train.learning_rate | 0.1 | 0.2 |" in text and "| data.train | null | 数据 |" in text


def test_unequal_samples_and_tasks_that_one_lacks_say_so(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", task=None)
    import pyarrow.parquet

    path = other / "eval" / "final.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.slice(0, 50), path)
    edit(other / "metrics.json", lambda metrics: metrics.update(n_samples=50))
    text = page(tmp_path, first, other)
    assert "No two runs were scored on the same samples." in text
    assert "not paired, other: other held-out samples, or another tokenizer" in text
    assert "| spelling | - | other | not run | - | - |" in text
    assert not (tmp_path / "page" / "plots" / "tasks.png").exists()


def test_samples_whose_texts_were_not_kept_are_not_paired_by_their_lengths(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    import pyarrow.parquet

    for run in (first, other):
        path = run / "eval" / "final.parquet"
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.drop_columns(["prompt", "answer", "greedy_text"]), path)
    assert "not paired, other: the texts of its samples were not kept" in page(tmp_path, first, other)


def test_long_and_foreign_names_leave_a_page_that_can_be_read(tmp_path: Path) -> None:
    import warnings

    long = "a_trial_of_a_sweep_whose_name_holds_every_setting_that_was_changed_in_it_"
    first, *others = (make_run(tmp_path / name) for name in (long + "1", long + "2", "运行"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page(tmp_path, first, *others)
    cut = cut_names([long + "2"])[0]
    assert f"| {cut} |" in text.replace("\\", "") and len(cut) == 32
    assert f"= {long}2" in text and "| 运行 |" in text
    assert cut_names(["x" * 40, "x" * 41])[0] != cut_names(["x" * 40, "x" * 41])[1]


def test_a_run_without_gathered_json_is_compared_by_what_there_is(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    (other / "gathered.json").unlink()
    text = page(tmp_path, first, other)
    assert "Training loss by step. Not drawn: other (fewer than two losses were kept)" in text
    assert load_run(other, "other").place["device"] == "an abacus"


def _paths(form: Any, key: str = "") -> list[str]:
    """The dotted keys of what is read; * is any name."""
    if isinstance(form, Maybe | Each):
        return _paths(form.form, f"{key}.*" if isinstance(form, Each) else key)
    if callable(form):
        return [key]
    inner = [path for name, part in form.items() for path in _paths(part, f"{key}.{name}" if key else name)]
    return [key, *inner] if key else inner


def _places(content: Any, path: list[str]) -> list[tuple[Any, str]]:
    """(mapping, key) wherever that path leads to in the content."""
    if not isinstance(content, dict):
        return []
    names = list(content) if path[0] == "*" else [path[0]]
    if len(path) == 1:
        return [(content, name) for name in names]
    return [place for name in names for place in _places(content.get(name), path[1:])]


def test_what_is_read_is_what_is_written_and_a_lack_of_any_of_it_is_found(tmp_path: Path) -> None:
    whole = json.loads((make_run(tmp_path / "run") / "metrics.json").read_text())
    assert find_faults(whole) == []
    found = 0
    for path in _paths(READ):
        places = _places(json.loads(json.dumps(whole)), path.split("."))
        assert places, f"{path} is nowhere in the metrics"
        if path.endswith("*"):
            continue
        for number in range(len(places)):
            broken = json.loads(json.dumps(whole))
            parent, name = _places(broken, path.split("."))[number]
            del parent[name]
            assert any("is missing" in fault for fault in find_faults(broken)), path
            parent[name] = [math_nan := float("nan")]
            assert find_faults(broken), (path, math_nan)
            found += 1
    assert found > 200


def test_an_empty_run_fits_the_contract() -> None:
    nothing = build_metrics(
        arms={}, why={}, train_ship_gap=None, backend_gap=None, reference=None, size={}, coverage={}, scheme=None,
        target=None, dtype="float32", simulated=False,
    )  # fmt: skip
    assert find_faults(nothing) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda metrics: metrics.pop("recovered"), "recovered is missing"),
        (lambda metrics: metrics.update(recovered=10**400), "recovered is not a finite number"),
        (lambda metrics: metrics.pop("scheme"), "scheme is missing"),
        (lambda metrics: metrics.pop("kl"), "kl is missing"),
        (lambda metrics: metrics.pop("tasks"), "tasks is missing"),
        (lambda metrics: metrics.update(tasks=None), "tasks is no mapping"),
        (lambda metrics: metrics["tasks"]["edits"].pop("share"), "tasks.edits.share is missing"),
        (lambda metrics: metrics["final"].update(loss=float("nan")), "final.loss is not a finite number"),
        (lambda metrics: metrics["sqnr"].update(worst_db="low"), "sqnr.worst_db is not a finite number"),
        (lambda metrics: metrics["final"].update(accuracy=None), "final.accuracy is null"),
        (lambda metrics: [metrics[arm].update(loss=None) for arm in ("final", "tuned")], "neither final nor tuned has"),
        (lambda metrics: metrics.clear(), "is missing and "),
    ],
)
def test_a_damaged_metrics_json_is_exit_2_and_names_itself(
    change: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    edit(other / "metrics.json", change)
    assert main(["compare", str(first), str(other), "--output", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert f"{other / 'metrics.json'} is damaged or of another version (" in error and said in error
    assert f"renew it with: train --resume {other}" in error and "parquet" not in error


def _nan_loss(run: Path) -> None:
    import dataclasses

    path = run / "eval" / "final.parquet"
    found = Scores.load(path)
    dataclasses.replace(found, nll=np.where(np.arange(SAMPLES) < 2, np.nan, found.nll)).save(path)


def _nan_task(run: Path) -> None:
    import dataclasses

    rows = task_rows(40, 0.0)
    rows[3] = dataclasses.replace(rows[3], value=float("nan"))
    save_rows(rows, run / "eval" / "final.tasks.parquet")


def _rows(run: Path) -> Path:
    return run / "eval" / "final.tasks.parquet"


DAMAGES: list[tuple[Any, str]] = [
    (_nan_loss, "final.parquet cannot be read (the loss of 2 of its 80 samples is NaN or infinite); remove it, then"),
    (_nan_task, "final.tasks.parquet cannot be read (spelling has no number for 1 of 60 samples); remove it, then"),
    (lambda run: save_rows([], _rows(run)), "(it has 0 samples of spelling, metrics.json 60)"),
    (lambda run: scores(0.1, 0.5).save(_rows(run)), "final.tasks.parquet cannot be read ("),
    (lambda run: _rows(run).unlink(), "final.tasks.parquet cannot be read ("),
    (lambda run: edit(run / "metrics.json", lambda found: found.update(n_samples=7)), "80 samples, metrics.json 7"),
    (lambda run: (run / "metrics.json").write_text("{"), "renew it with: train --resume"),
    (lambda run: (run / "metrics.json").write_text("[]"), "it holds no mapping; renew it with"),
    (lambda run: (run / "config.resolved.json").unlink(), "config.resolved.json cannot be read"),
    (lambda run: (run / "gathered.json").write_text("{"), "gathered.json cannot be read"),
    (lambda run: edit(run / "gathered.json", lambda found: found.update(losses=3)), "gathered.json is damaged"),
    (lambda run: edit(run / "gathered.json", lambda found: found.update(version=1)), "by another version"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_file_is_exit_2_and_named(
    damage: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    damage(other)
    assert main(["compare", str(first), str(other), "--output", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert said in error and str(other) in error and "Traceback" not in error, error


def test_one_run_named_twice_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "skip")
    assert main(["compare", "skip", f"{run}/../skip", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"skip and {run}/../skip are one run, {run}; compare needs two runs or more" in error


def test_a_finished_comparison_names_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    output = tmp_path / "page"
    assert main(["compare", str(first), str(other), "--output", str(output)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"report: {output / 'report.html'}")
    shutil.rmtree(output)
    with pytest.raises(UserError, match="is a run, whose own report would be lost; name another folder"):
        compare_runs([str(first), str(other)], str(tmp_path), first)


@pytest.mark.parametrize("output", ["file/x", "file", "page"])
def test_a_page_that_cannot_be_written_is_exit_2(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "page" / "report.md").mkdir(parents=True)
    assert main(["compare", str(first), str(other), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert f"--output {tmp_path / output} cannot be written (" in error and "name another folder" in error
