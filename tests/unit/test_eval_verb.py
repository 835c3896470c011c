"""`quantize eval`: its numbers against those computed plainly, what it compares with, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import save_plain, tiny_model

from quantize.cli import main
from quantize.errors import UserError
from quantize.evaluate import Scores, evaluate_model
from quantize.folder_eval.figures import absolute, difference, good_enough, verdict
from quantize.folder_eval.models import Asked
from quantize.folder_eval.page import terminal
from quantize.folder_eval.study import evaluate
from quantize.runs import GATHERED_VERSION
from quantize.statistics import paired_loss_difference

WORDS = ["cat", "walks", "over", "the", "river", "and", "under", "a", "red", "stone", "said", "small", "dog"]
FORMAT: dict[str, Any] = {"scheme": "int8-int4", "target": "cpu", "group_size": 32, "skip": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what int8-int4 makes of it, another of its family, and texts."""
    from quantize.convert import convert_checkpoint
    from quantize.schemes import SCHEMES

    folder = tmp_path_factory.mktemp("eval")
    save_plain(tiny_model("qwen3", vocab_size=300), folder / "plain")
    save_plain(tiny_model("qwen3", vocab_size=300, seed=1), folder / "other")
    scheme = SCHEMES["int8-int4"]
    convert_checkpoint(
        folder / "plain", folder / "small", scheme, scheme.targets["cpu"], group_size=32, dtype="float32", device="cpu"
    )
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, size=rng.integers(6, 12)))} for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run in this process, which saves seconds a test; the kinds that ran."""
    from quantize import worker, worker_jobs

    kinds: dict[str, Callable[..., Any]] = {
        "evaluate": worker_jobs.evaluate,
        "measure": worker_jobs.measure,
        "repack": worker_jobs.repack,
        "tasks": worker_jobs.check_tasks,
        "benchmark": worker_jobs.benchmark,
    }
    ran: list[str] = []

    def run_jobs(jobs: list[Mapping[str, Any]], request: Path, progress: Any = None) -> list[Any]:
        ran.extend(job["kind"] for job in jobs)
        return [kinds[job["kind"]](json.loads(json.dumps(job)), lambda done, total: None) for job in jobs]

    monkeypatch.setattr(worker, "run_jobs", run_jobs)
    return ran


def _asked(place: Path, output: Path, source: str = "small", **options: Any) -> Asked:
    known: dict[str, Any] = {"data": place / "text.jsonl", "samples": 12, "output": output, "root": str(place / "runs")}
    return Asked(source=str(place / source), **known | options)


def _plainly(folder: Path, data: Path, count: int = 12) -> Scores:
    from transformers import AutoTokenizer

    from quantize.convert import load_plain
    from quantize.texts import load_samples

    samples = load_samples(data, AutoTokenizer.from_pretrained(folder), count)
    return evaluate_model(load_plain(folder, dtype=None), samples, batch_size=8)


def test_a_model_against_itself_differs_by_exactly_0(here: list[str], place: Path, tmp_path: Path) -> None:
    found, _ = evaluate(_asked(place, tmp_path / "out", "plain", against=str(place / "plain")))
    pair = found["differences"]["reference"]
    assert pair["loss"] == {"value": 0.0, "low": 0.0, "high": 0.0} and pair["kl"]["value"] == 0
    assert pair["top1"]["value"] == 1 and found["good_enough"] is True
    names = [each["name"] for each in found["models"].values()]
    assert names == ["plain", str(place / "plain")]  # two models of one name are told apart
    assert found["verdict"][0].startswith("Good enough: plain gives the same loss as")


def test_a_conversion_against_its_source_as_users_run_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a worker of its own; the source is the recorded one."""
    output = tmp_path / "out"
    command = ["eval", str(place / "small"), "--data", str(place / "text.jsonl"), "--samples", "12"]
    assert main([*command, "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {"eval.json", "report.md", "report.html"}
    found = json.loads((output / "eval.json").read_text())
    small, plain = (_plainly(place / name, place / "text.jsonl") for name in ("small", "plain"))
    expected = paired_loss_difference(small.nll, plain.nll, small.tokens).as_dict()
    assert found["differences"]["reference"]["loss"] == pytest.approx(expected, abs=1e-7)
    assert abs(expected["value"] or 0) > 1e-4 and found["differences"]["reference"]["kl"]["value"] > 0
    assert found["models"]["model"]["loss"]["value"] == pytest.approx(small.loss, abs=1e-6)
    assert found["models"]["model"]["perplexity"]["value"] == pytest.approx(np.exp(small.loss), rel=1e-6)
    sizes = [found["models"][key] for key in ("model", "reference")]
    assert sizes[0]["disk_mib"] < sizes[1]["disk_mib"] and sizes[0]["memory_mib"] < sizes[1]["memory_mib"]
    assert found["n_tokens"] == small.tokens.sum() and len(found["layers"]) == 14
    said = capsys.readouterr().out
    assert found["verdict"][0] in said and "MiB on disk" in said and str(output / "report.html") in said
    for name in ("report.md", "report.html"):
        text = (output / name).read_text()
        assert "Which layer hurts" in text and "difference of loss [95%]" in text


def test_the_packed_form_gives_the_same_numbers(here: list[str], place: Path, tmp_path: Path) -> None:
    from quantize.packed import pack_folder

    pack_folder(place / "small", tmp_path / "packed")
    asked = _asked(place, tmp_path / "out", against=str(place / "small"))
    found, output = evaluate(Asked(**vars(asked) | {"source": str(tmp_path / "packed")}))
    assert here == ["repack", "evaluate", "evaluate"]
    assert found["differences"]["reference"]["loss"]["value"] == 0
    assert found["models"]["model"]["disk_mib"] < found["models"]["reference"]["disk_mib"]
    assert sorted(path.name for path in output.iterdir()) == ["eval.json", "report.html", "report.md"]


def test_tasks_are_compared_in_pairs(here: list[str], place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": f"spell {word}", "choices": [word, word[::-1]], "answer": 0} for word in ("cat", "stone", "river")]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {
        "task": "spelling", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "spelling.yaml").write_text(json.dumps(task))
    found, output = evaluate(_asked(place, tmp_path / "out", tasks=[str(tmp_path / "spelling.yaml")], limit=2))
    assert here[0] == "tasks" and here.count("benchmark") == 2  # refused before any model runs
    task_found = found["tasks"]["spelling"]
    assert task_found["n_samples"] == 2 and {"model", "reference"} <= set(task_found)
    pair = task_found["comparisons"]["model_vs_reference"]
    assert pair["value"] == task_found["model"]["value"] - task_found["reference"]["value"] and pair["low"] < 0
    assert "spelling" in terminal(found) and "at most 2 samples of each" in (output / "report.md").read_text()


def _run(place: Path, folder: Path) -> Path:
    """A finished run as far as `quantize eval` reads it: its base is `other`."""
    run = folder / "runs" / "mine"
    shutil.copytree(place / "plain", run / "merged")
    shutil.copytree(place / "small", run / "quantized")
    (run / "data").mkdir()
    (run / "manifest.json").write_text("{}")
    trained_on = {"device": "a CPU", "dtype": "float32", "packages": {}}
    gathered = {
        "version": GATHERED_VERSION, "format": {**FORMAT, "missing": []}, "dtype": "float32", "trained_on": trained_on,
        "trust_remote_code": False, "batch_size": 8, "tasks": None, "chat_template": None,
        "baseline": {"disk_bytes": 1 << 20},
    }  # fmt: skip
    (run / "gathered.json").write_text(json.dumps(gathered))
    from transformers import AutoTokenizer

    from quantize.folder_eval.work import write_samples
    from quantize.texts import load_samples

    samples = load_samples(place / "text.jsonl", AutoTokenizer.from_pretrained(place / "plain"), 20)
    write_samples(samples, run / "data" / "eval.parquet")
    for arm, model in (("base", "other"), ("tuned", "plain")):
        _plainly(place / model, run / "data" / "eval.parquet", 20).save(run / "eval" / f"{arm}.parquet")
    return run


@pytest.mark.parametrize("samples", [None, 9])
def test_a_run_is_measured_beside_the_arms_of_its_report(
    samples: int | None, here: list[str], place: Path, tmp_path: Path
) -> None:
    run = _run(place, tmp_path)
    found, output = evaluate(Asked(source="mine", root=str(run.parent), samples=samples))
    assert here == ["evaluate"] and output == run / "evaluation"  # what the report has is not measured again
    assert [each["name"] for each in found["models"].values()] == ["final", "base", "tuned"]
    assert found["n_samples"] == (samples or 20) and found["models"]["base"]["disk_mib"] == 1
    data = run / "data" / "eval.parquet"
    final, base = (_plainly(place / name, data, samples or 20) for name in ("small", "other"))
    expected = paired_loss_difference(final.nll, base.nll, final.tokens).as_dict()
    assert found["differences"]["base"]["loss"] == pytest.approx(expected, abs=1e-7)


def test_a_run_on_other_text_is_measured_beside_its_unquantised_form(
    here: list[str], place: Path, tmp_path: Path
) -> None:
    run = _run(place, tmp_path)
    found, _ = evaluate(Asked(source=str(run), data=place / "text.jsonl", samples=8))
    assert [each["name"] for each in found["models"].values()] == ["final", "tuned"] and "measure" in here


def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.hardware.missing_for", lambda target: ["a GPU"] if "cuda" in target.name else [])


def test_what_cannot_run_here_is_simulated_from_its_source(
    here: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_gpu(monkeypatch)
    found, _ = evaluate(_asked(place, tmp_path / "out", target="cuda"))
    model = found["models"]["model"]
    assert model["simulated"] and model["name"] == "small (simulated)" and model["disk_mib"] is None
    assert any("simulated, int8-int4 for cuda" in note and "lacks a GPU" in note for note in found["notes"])
    real = _plainly(place / "small", place / "text.jsonl")
    assert model["loss"]["value"] == pytest.approx(real.loss, abs=1e-6)  # the same numbers at both targets


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**FORMAT, "source": "gone/far/away"}, "no 16-bit model to simulate it from: its source as ongrid.json"),
        ({**FORMAT, "source": "PLAIN", "algorithms": ["hqq"]}, "its numbers were chosen by hqq; measure it where cuda"),
        ({}, "--target cuda: .* has no ongrid.json that says its format"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    record: dict[str, Any], said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_gpu(monkeypatch)
    shutil.copytree(place / "small", tmp_path / "mine")
    record = {**record, "source": str(place / "plain")} if record.get("source") == "PLAIN" else record
    (tmp_path / "mine" / "ongrid.json").write_text(json.dumps(record))
    asked = _asked(place, tmp_path / "out", target="cuda")
    with pytest.raises(UserError, match=said):
        evaluate(Asked(**vars(asked) | {"source": str(tmp_path / "mine")}))
    assert not (tmp_path / "out").exists()


def test_without_its_source_it_is_compared_with_nothing(here: list[str], place: Path, tmp_path: Path) -> None:
    found, _ = evaluate(_asked(place, tmp_path / "out", "plain"))
    assert found["good_enough"] is None and not found["differences"]
    assert found["verdict"][0].startswith("plain was compared with nothing")
    assert any("--against" in note for note in found["notes"])


def test_samples_that_chose_the_numbers_are_left_out(here: list[str], place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "small", tmp_path / "mine")
    record = json.loads((place / "small" / "ongrid.json").read_text())
    record["calibration"] = {"data": "text.jsonl", "samples": 30, "tokens": 900, "left_out": 2}
    (tmp_path / "mine" / "ongrid.json").write_text(json.dumps(record))
    asked = _asked(place, tmp_path / "out", "plain", samples=20)
    found, _ = evaluate(Asked(**vars(asked) | {"source": str(tmp_path / "mine")}))
    assert found["n_samples"] == 40 - 32
    assert any("The first 32 samples are left out" in note for note in found["notes"])


def test_the_rows_of_the_run_that_a_folder_was_made_from_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, folder = tmp_path / "run" / "data" / "eval.parquet", tmp_path / "small"
    for path in (rows, folder / "config.json"):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    (folder / "ongrid.json").write_text(json.dumps({"source": str(tmp_path / "run" / "merged")}))
    assert main(["eval", str(folder)]) == 2
    assert capsys.readouterr().err.endswith(f"; the run that it was made from has {rows}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["small"], "--data: name held-out text to measure small on"),
        (["small", "--data", "nope.jsonl"], "--data nope.jsonl: there is no such file"),
        (["small", "--data", "empty.jsonl"], "--data empty.jsonl: it holds no sample"),
        (["small", "--data", "binary.jsonl"], "--data binary.jsonl: 'utf-8' codec can't decode"),
        (["small", "--data", "broken.parquet"], "--data broken.parquet: "),
        (["small", "--data", "table.csv"], "--data table.csv: give a .txt, .jsonl or .parquet file"),
        (["nowhere", "--data", "text.jsonl"], "nowhere is neither a run nor a folder"),
        (["folder", "--data", "text.jsonl"], "folder is neither a run nor a folder with a config.json"),
        (["gptq", "--data", "text.jsonl"], "gptq is quantised by gptq; only torchao's"),
        (["small", "--data", "text.jsonl", "--against", "nowhere"], "--against: nowhere is neither"),
        (["small", "--data", "text.jsonl", "--against", "vocabulary"], "vocabulary has another vocabulary than small"),
        (["small", "--data", "text.jsonl", "--samples", "0"], "--samples 0: 1 or more"),
        (["small", "--data", "text.jsonl", "--tasks", "nope.yaml"], "--tasks: there is no file nope.yaml"),
    ],
)
def test_what_cannot_be_measured_is_said(
    words: list[str], said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("small", "plain", "text.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    shutil.copytree(place / "plain", tmp_path / "vocabulary")
    tokens = json.loads((place / "plain" / "tokenizer.json").read_text())
    turned = {token: 255 - index if index < 256 else index for token, index in tokens["model"]["vocab"].items()}
    tokens["model"]["vocab"] = turned
    (tmp_path / "vocabulary" / "tokenizer.json").write_text(json.dumps(tokens))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["eval", *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written is left


def _scores(nll: np.ndarray) -> Scores:
    tokens = np.full(len(nll), 10)
    return Scores(nll=nll * 10.0, tokens=tokens, exact=np.zeros(len(nll), dtype=bool))


@pytest.mark.parametrize(
    ("shift", "samples", "tolerance", "good", "begins"),
    [
        (0.01, 200, 0.05, True, "Good enough: the loss of new is at most 0.01"),
        (-0.1, 200, 0.05, True, "Good enough: the loss of new is at least 0.09"),
        (0.10, 200, 0.05, False, "Not good enough: the loss of new is at least 0.09"),
        (0.05, 200, 0.05, None, "Not shown whether new is good enough"),
        (0.0, 4, 0.05, None, "Not known whether new is good enough: there is no interval (6 samples"),
    ],
)
def test_the_verdict_is_about_the_whole_interval(
    shift: float, samples: int, tolerance: float, good: bool | None, begins: str
) -> None:
    rng = np.random.default_rng(1)
    reference = _scores(rng.uniform(1, 3, samples))
    model = _scores(reference.nll / 10 + shift + rng.normal(0, 0.03, samples))
    found = {
        "models": {"model": {"name": "new", **absolute(model)}, "reference": {"name": "old", **absolute(reference)}},
        "differences": {"reference": difference(model, reference, tolerance)},
        "n_samples": samples, "tolerance": tolerance, "tasks": {},
    }  # fmt: skip
    assert good_enough(found) is good
    assert verdict(found)[0].startswith(begins)


def test_a_task_that_got_worse_is_not_good_enough_whatever_the_loss() -> None:
    same = _scores(np.linspace(1, 2, 20))
    pair = {"value": -0.2, "low": -0.3, "high": -0.1, "p": 0.001, "p_holm": 0.001}
    found = {
        "models": {"model": {"name": "new", **absolute(same)}, "reference": {"name": "old", **absolute(same)}},
        "differences": {"reference": difference(same, same, 0.05)}, "n_samples": 20, "tolerance": 0.05,
        "tasks": {"spelling": {"higher_is_better": True, "comparisons": {"model_vs_reference": pair}}},
    }  # fmt: skip
    assert good_enough(found) is False
    assert verdict(found)[0] == "Not good enough: new is worse than old on spelling."
