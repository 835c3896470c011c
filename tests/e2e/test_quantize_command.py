"""`quantize` as a user types it: the formats, folders, runs that were trained elsewhere, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize.cli import main
from quantize.compare import compare_runs
from quantize.errors import UserError
from quantize.run_report import write_report
from quantize.schemes import SCHEMES


def test_the_formats_say_where_they_run_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    text = capsys.readouterr().out
    for name, scheme in SCHEMES.items():
        assert f"{name}: {scheme.summary}" in text
        assert all(target in text for target in scheme.targets)
    assert "runs here" in text


def test_a_folder_becomes_a_quantised_checkpoint(finished: Path, runs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "small"
    options = ("--scheme", "int8-int4", "--group-size", "64", "--output", str(output))
    done = runs.quantize("convert", str(finished / "merged"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not quantised: lm_head" in done.stdout
    weight = AutoModelForCausalLM.from_pretrained(output).model.layers[0].mlp.down_proj.weight
    assert list(weight.block_size) == [1, 64]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_layers_that_are_skipped_keep_16_bit_and_load_so(finished: Path, runs: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    output = tmp_path / "small"
    options = ("--scheme", "int8-int4", "--skip", "down_proj", "model.layers.0", "--output", str(output))
    done = runs.quantize("convert", str(finished / "merged"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not quantised: model.layers.0.self_attn.q_proj (quantize.skip leaves it unquantised)" in done.stdout
    model, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, finished / "merged"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kept = "layers.0." in name or name.endswith(("down_proj", "lm_head"))
            assert (type(module.weight.data) is torch.Tensor) == kept, name
            if kept:
                assert torch.equal(module.weight, plain.get_submodule(name).weight)


def test_sensitivity_of_a_run_names_groups_and_writes_a_page(finished: Path, runs: Any, tmp_path: Path) -> None:
    output = tmp_path / "page"
    options = ("--by", "kind", "layer", "--samples", "12", "--growth", "0.5", "--output", str(output))
    done = runs.quantize("sensitivity", str(finished), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((output / "sensitivity.json").read_text())
    assert found["n_samples"] == {"groups": 6, "sets": 6} and len(found["groups"]) == 7 + 14
    assert {path.name for path in output.iterdir()} == {"sensitivity.json", "report.md", "report.html", "plots"}
    assert (output / "report.md").read_text() in done.stdout and "### By kind" in done.stdout
    if found["proposal"]:
        assert f"--run.name={finished.name}-skip" in done.stdout


def test_sensitivity_of_a_folder_takes_a_text(finished: Path, runs: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{n} and {n} is {2 * n}, as all know."}) for n in range(8)))
    options = ("--scheme", "fp8", "--data", str(text), "--output", str(tmp_path / "page"), "--growth", "3")
    done = runs.quantize("sensitivity", str(finished / "merged"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Sensitivity of merged: fp8, cuda-sm89" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["MERGED"], "--scheme: say which format, one of int8-int4"),
        (["MERGED", "--scheme", "int4"], "--data: name held-out text"),
        (["MERGED", "--scheme", "int4", "--data", "gone.txt"], "--data gone.txt: there is no such file"),
        (["RUN", "--samples", "1"], "--samples: 2 or more"),
        (["RUN", "--growth", "0"], "--growth 0.0: a share above 0"),
        (["RUN", "--scheme", "int9"], "unknown scheme 'int9'"),
        (["nowhere", "--scheme", "int4"], "nowhere is neither a run nor a folder with a config.json: there is none at"),
        (["RUN", "--output", "RUN"], "is a run, whose own report would be lost; name another folder"),
        (["RUN", "--output", "RUN/manifest.json/x"], "manifest.json is a file, not a folder); name another folder"),
    ],
)
def test_what_cannot_be_scanned_is_exit_2(
    options: list[str], said: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MERGED": finished / "merged", "RUN": finished}
    places |= {"RUN/manifest.json/x": finished / "manifest.json" / "x"}
    output = [] if "--output" in options else ["--output", str(tmp_path / "page")]
    assert main(["sensitivity", *(str(places.get(word, word)) for word in options), *output]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_report_without_an_arms_scores_says_which_file(damage: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    scores = run / "eval" / "ptq.parquet"
    scores.write_bytes(scores.read_bytes()[:100]) if damage == "torn" else scores.unlink()
    advice = "remove it, then: train --resume" if damage == "torn" else "train --resume"
    with pytest.raises(UserError, match=rf"ptq\.parquet cannot be read .*; {advice}"):
        write_report(run, json.loads((run / "gathered.json").read_text()))


def test_a_run_that_was_simulated_is_finished_where_its_target_runs(finished: Path, runs: Any, tmp_path: Path) -> None:
    """As after training on a machine that lacks the target: merged/ is there, quantized/ is not."""
    run = tmp_path / "elsewhere"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "quantized")
    gathered = json.loads((run / "gathered.json").read_text())
    gathered |= {"shipped": {}, "final": gathered["arms"]["fake"], "run": "elsewhere"}
    gathered["format"]["missing"] = ["something"]
    before, report = write_report(run, gathered)
    assert before["simulated"] and before["why"]["size.final_mib"] == "this machine lacks something"
    assert "quantize convert" in report
    done = runs.quantize("convert", str(run), "--target", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"loss {runs.metrics(finished)['final']['loss']:.4f}" in done.stdout
    after, whole = runs.metrics(run), runs.metrics(finished)
    assert not after["simulated"] and after["train_ship_gap"] == 0.0
    assert after == whole
    refused = runs.train("--resume", str(run))
    assert refused.returncode == 2 and "was taken up by `quantize convert`; measure it anew" in refused.stderr


def test_a_run_from_another_machine_is_measured_anew_where_it_is_finished(
    finished: Path, runs: Any, tmp_path: Path
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(finished, run)
    gathered = json.loads((run / "gathered.json").read_text())
    there = {"device": "an abacus", "dtype": "bfloat16", "packages": {"torch": "0.1"}}
    (run / "gathered.json").write_text(json.dumps(gathered | {"trained_on": there}))
    for arm in ("control", "ptq", "tuned"):
        (run / "eval" / f"{arm}.parquet").write_bytes(b"of another machine")
    done = runs.quantize("convert", str(run), "--target", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    after, whole = runs.metrics(run), runs.metrics(finished)
    assert after["elsewhere"] == {"arms": ["base", "base_quantized"], **there}
    assert {key: after[key] for key in ("control", "ptq", "tuned", "final", "backend_gap", "recovered")} == {
        key: whole[key] for key in ("control", "ptq", "tuned", "final", "backend_gap", "recovered")
    }
    report = (run / "report.md").read_text()
    assert (
        "were measured where the run was trained (an abacus, in bfloat16, torch 0.1; what is quantised simulated)"
        in report
    )
    assert "threads; trained on an abacus |" in report


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("control/merged", "lacks control/merged/config.json; copy the whole run directory"),
        ("grid", "lacks grid; copy the whole run directory"),
        ("eval/base.parquet", "lacks eval/base.parquet; copy the whole run directory"),
        ("gathered.json", "; renew it with: train --resume"),
    ],
)
def test_a_run_that_came_here_in_part_is_refused_before_the_first_step(
    gone: str, said: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "part"
    shutil.copytree(finished, run)
    if gone == "gathered.json":
        (run / gone).write_text("")
    elif (run / gone).is_dir():
        shutil.rmtree(run / gone)
    else:
        (run / gone).unlink()
    before = (run / "quantized" / "config.json").stat().st_mtime_ns
    assert main(["convert", str(run)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert (run / "quantized" / "config.json").stat().st_mtime_ns == before


def test_an_arm_that_overflows_is_a_row_with_its_reason(finished: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from quantize.evaluate import Scores

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "eval" / "ptq.parquet"
    scores = Scores.load(path)
    nll = scores.nll.copy()
    nll[3:5] = float("nan")
    replace(scores, nll=nll).save(path)
    metrics, report = write_report(run, json.loads((run / "gathered.json").read_text()))
    reason = "quantised to int8-int4 its numbers overflow: the loss of 2 held-out samples is NaN or infinite"
    assert metrics["ptq"]["loss"] is None and metrics["why"]["ptq"] == reason
    assert f"ptq: {reason}" in report and metrics["final"]["loss"] is not None


@pytest.mark.parametrize("arm", ["base", "ptq"])
def test_a_model_that_computes_nan_is_named_or_has_no_loss(arm: str, finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from quantize.jobs import Jobs
    from quantize.worker_jobs import evaluate

    broken = tmp_path / "model"
    shutil.copytree(finished / "merged", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    common = {"dtype": "float32", "plain_dtype": "float32", "batch_size": 8, "trust_remote_code": False}
    nothing = {"format": None, "inside": False, "tasks": None, "chat_template": None, "cost_batches": ()}
    jobs = Jobs(run=finished, **common, **nothing)  # type: ignore[arg-type]
    job = jobs.evaluate(arm, broken, folder=tmp_path)
    if arm == "ptq":
        assert evaluate(job, lambda done, total: None)["loss"] is None
    else:
        with pytest.raises(
            UserError, match=r"base: the loss of \d+ of \d+ held-out samples is NaN .* the checkpoint is"
        ):
            evaluate(job, lambda done, total: None)


def test_an_adapter_trained_outside_is_never_said_to_ship_as_trained(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "outside"
    shutil.copytree(finished, run)
    gathered = json.loads((run / "gathered.json").read_text())
    gathered["recipe"]["fake_quant"]["placement"] = "outside"
    gathered["tuned"]["backend_loss"] = gathered["final"]["loss"] + 0.25
    metrics, report = write_report(run, gathered)
    assert metrics["train_ship_gap"] == pytest.approx(0.25)
    assert metrics["backend_gap"] is None and "outside" in metrics["why"]["backend_gap"]
    assert "equal to the last bit" not in report


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["MERGED"], "say --scheme, one of int8-int4"),
        (["MERGED", "--scheme", "in4"], "unknown scheme 'in4'; did you mean int4?"),
        (
            ["MERGED", "--scheme", "int8-int4", "--target", "phone"],
            "phone is unknown for int8-int4; choose from cpu, cuda",
        ),
        (["MERGED", "--scheme", "int8-int4", "--group-size", "48"], "48 is not offered by int8-int4"),
        (["MERGED", "--scheme", "int8-int4", "--output", "RUN"], "exists and is not empty"),
        (["nowhere"], "nowhere is neither a run nor a folder with a config.json"),
        (["RUN", "--scheme", "int4"], "--scheme: a run ships what it was trained for"),
        (["RUN", "--group-size", "64"], "--group-size: a run ships what it was trained for"),
        (["MERGED", "--scheme", "int8-int4", "--skip", "q_prj"], "'q_prj' fits no linear layer of this model"),
        (["UNFINISHED"], "has no finished training yet; continue it with: train --resume"),
    ],
)
def test_what_cannot_be_converted_is_exit_2(
    options: list[str], said: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "manifest.json").write_text('{"stages": {}}')
    places = {"MERGED": finished / "merged", "RUN": finished, "UNFINISHED": tmp_path / "unfinished"}
    code = main(["convert", *(str(places.get(word, word)) for word in options)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert said in error and "Traceback" not in error


def test_a_machine_without_the_target_says_what_it_lacks(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine may run it")
    assert main(["convert", str(finished / "merged"), "--scheme", "int4"]) == 2
    assert "this machine lacks a CUDA GPU of compute capability 8.0" in capsys.readouterr().err


def test_runs_are_compared_on_one_page_in_pairs(finished: Path, runs: Any, tmp_path: Path) -> None:
    few = ("--qat=int3", "--eval.control=False", "--eval.cost-batches=[]")
    other = runs.here(*few, "--run.name=other-format")
    fewer = runs.here(*few, "--data.eval-samples=16", "--run.name=other-samples")
    output = tmp_path / "page"
    done = runs.quantize(
        "compare", str(finished), str(other), fewer.name, "--root", str(runs.root), "--output", str(output)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (output / "report.md").read_text()
    assert text.strip() in done.stdout
    assert "| qat | int8-int4 | int3 | int3 |" in text
    assert "other-samples: other held-out samples" in text
    row = next(line for line in text.splitlines() if line.startswith("| other-format | final | int3, cpu |"))
    difference = runs.metrics(other)["final"]["loss"] - runs.metrics(finished)["final"]["loss"]
    assert f"{difference:+.4f} [" in row
    assert "recovered, other-format: ptq: eval.control is false" in text
    assert "other-format: eval.cost_batches is empty" in text
    assert done.stdout.rstrip().endswith(f"report: {output / 'report.html'}")
    assert "<svg" in (output / "report.html").read_text() and (output / "plots" / "size.png").is_file()


def test_the_same_samples_in_another_order_are_paired_and_equal_names_told_apart(
    finished: Path, tmp_path: Path
) -> None:
    """Another seed shuffles the held-out samples."""
    import pyarrow.parquet

    other = tmp_path / "elsewhere" / finished.name
    for name in ("metrics.json", "manifest.json", "config.resolved.json", "eval/final.parquet"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes((finished / name).read_bytes())
    path = other / "eval" / "final.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.take(list(reversed(range(table.num_rows)))), path)
    (tmp_path / "elsewhere" / "begun").mkdir()
    (tmp_path / "elsewhere" / "begun" / "manifest.json").write_text("{}")
    text = compare_runs([str(finished), str(tmp_path / "elsewhere")], str(tmp_path), tmp_path / "page")
    assert f"Not told apart from {finished.parent.name}/{finished.name} by these samples: elsewhere/" in text
    assert "| +0.0000 [+0.0000, +0.0000] |" in text
    assert "Left out, as they are not finished: begun." in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("metrics.json", "cannot be read"),
        ("loss", "is damaged or of another version"),
        ("samples", "final.parquet cannot be read"),
        ("tasks", "tasks.choices.metric is missing"),
        ("unfinished", "is not finished; continue it with: train --resume"),
        ("alone", "compare needs two runs or more"),
        ("nowhere", "is neither a run nor a folder of runs"),
    ],
)
def test_what_cannot_be_compared_is_said(
    damage: str, said: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    for name in ("metrics.json", "manifest.json", "config.resolved.json", "eval/final.parquet"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((finished / name).read_bytes())
    names = [str(finished), str(copy)]
    match damage:
        case "metrics.json":
            (copy / "metrics.json").write_text('{"final": {')
        case "loss":
            (copy / "metrics.json").write_text('{"final": {"loss": null}, "tuned": {}}')
        case "tasks":
            metrics = json.loads((copy / "metrics.json").read_text()) | {"tasks": {"choices": {}}}
            (copy / "metrics.json").write_text(json.dumps(metrics))
        case "samples":
            (copy / "eval" / "final.parquet").write_bytes(b"PAR1")
        case "unfinished":
            (copy / "metrics.json").unlink()
        case "alone":
            names = names[:1]
        case "nowhere":
            names[1] = str(tmp_path / "gone")
    assert main(["compare", *names, "--output", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_algorithms_choose_the_numbers_and_leave_a_record(finished: Path, runs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output, text = tmp_path / "small", finished / "data" / "train.parquet"
    form = ("--scheme", "int4", "--target", "cpu", "--group-size", "32", "--output", str(output))
    chosen = ("--algorithm", "gptq", "awq", "--calibration", str(text), "--calibration-samples", "16")
    done = runs.quantize("convert", str(finished / "control" / "merged"), *form, *chosen)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "awq: " in done.stdout and "calibrated on 16 samples of train.parquet" in done.stdout
    record = json.loads((output / "ongrid.json").read_text())
    assert record["algorithms"] == ["awq", "gptq"] and record["coverage"]["quantized_layers"] == 14
    assert (record["scheme"], record["target"], record["group_size"]) == ("int4", "cpu", 32)
    assert record["calibration"]["samples"] == 16 and record["calibration"]["tokens"] > 256
    model, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (output, finished / "control" / "merged"))
    norm = plain.model.layers[0].input_layernorm.weight
    assert not norm.equal(model.model.layers[0].input_layernorm.weight)  # AWQ's scales are merged into it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("merged", "--algorithm", "hqq"), "choosing other numbers would throw that training away"),
        (("control/merged", "--algorithm", "gptq"), "gptq looks at activations; name some text: --calibration FILE"),
        (("control/merged", "--algorithm", "gptw"), "unknown algorithm 'gptw'; did you mean gptq?"),
        (("control/merged", "--calibration", "a.txt"), "a.txt: round-to-nearest looks at no activations"),
        (("control/merged", "--algorithm", "awq", "--calibration", "short.txt"), "too short to tell channels apart"),
        ((".", "--algorithm", "hqq"), "--algorithm: a run ships what it was trained for"),
    ],
)  # fmt: skip
def test_algorithms_that_cannot_work_are_exit_2(
    options: tuple[str, ...], said: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    words = [str(short) if word == "short.txt" else word for word in options[1:]]
    scheme = () if options[0] == "." else ("--scheme", "int4", "--target", "cpu", "--output", str(tmp_path / "out"))
    assert main(["convert", str(finished / options[0]), *scheme, *words]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
