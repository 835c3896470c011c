"""Model cards: complete, true to the metrics, and their code and settings run as they are shown."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hub_imitation import TOKEN, imitation
from releases import PROJECT, QUICKSTART, gathered_of, make_folder, make_run, quickstart_metrics

from quantize.cli import _parser, main
from quantize.metrics import ARMS, COMPARISONS
from quantize.release.base_model import ask_hub, find_base
from quantize.release.card import render_card, write_run_card
from quantize.release.recipe import public_settings
from quantize.release.source import find_release
from quantize.release.text import find_blanks, with_repository


def card_of(source: Path, name: str | None = None) -> str:
    text = render_card(find_release(str(source), "runs", name))
    assert find_blanks(text) == []
    assert find_blanks(text.replace("| 1.1558 |", "|  |")) or "1.1558" not in text  # the search would see one
    return text


def front_of(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert huggingface_hub.ModelCard(card).data.to_dict() == found  # as the hub's own library reads it
    return found  # type: ignore[no-any-return]


def blocks_of(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)


def without_control(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same run without `eval.control` and tasks, as `build_metrics` would give it."""
    empty = {"value": None, "low": None, "high": None}
    reason = "eval.control is false"
    for arm in ("control", "ptq"):
        metrics[arm] = {**metrics[arm], "loss": None, "accuracy": None, "vs_base": {"loss": empty, "accuracy": empty}}
    for a, b in COMPARISONS:
        if {a, b} & {"control", "ptq"}:
            metrics["comparisons"][f"{a}_vs_{b}"] = {"loss": empty, "accuracy": empty, "mcnemar_p": None}
    metrics |= {"recovered": None, "recovered_interval": {"low": None, "high": None}, "tasks": {}}
    metrics["kl"]["reference"] = "tuned"
    metrics["why"] |= {"control": reason, "ptq": reason, "recovered": reason}
    return metrics


def test_a_run_with_control_and_tasks(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "run", quickstart_metrics()), "me/shipped")
    assert front_of(card) == {
        "base_model": "Qwen/Qwen3-0.6B", "base_model_relation": "quantized", "library_name": "transformers",
        "pipeline_tag": "text-generation", "datasets": ["HuggingFaceTB/smoltalk"],
        "tags": ["torchao", "ongrid", "int8-int4", "qat"],
    }  # fmt: skip
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| (\d+\.\d{4}) \|", card, re.MULTILINE)
    metrics = json.loads(QUICKSTART.read_text())
    assert rows == [(arm, f"{metrics[arm]['loss']:.4f}") for arm in ARMS]
    for said in (
        "| final | this checkpoint | 1.1558 | -1.3144 [-1.5731, -1.0770] | 6.7% | +6.7 [+2.2, +12.6] | 225.4 |",
        "| base | untouched | 2.4701 | reference | 0.0% | reference | 513.2 |",
        "| choices | acc | 60 | 60.0 | 61.7 | 65.0 | 56.7 | 65.0 | 60.0 | -5.0 [-11.4, +1.4] | 0.25 |",
        "Of the loss that quantisation costs, 53% is recovered (95% interval 42% to 65%).",
        "trained function minus shipped function: 0 (equal to the last bit)",
        "prefill, tokens/s | 602 | 357 | 0.59 times as fast",
        "model.layers.N.mlp.down_proj (N = 0, 1): group size 32 does not divide its in_features 100",
        "from 50% of the steps on", "ongrid", "x86_64 CPU, 2 threads",
        "hf download me/shipped --local-dir ./shipped\nquantize export ./shipped --to executorch",
        "trained on: HuggingFaceTB/smoltalk (on the hub, split train)", "Nothing else was evaluated",
    ):  # fmt: skip
        assert said in card, said
    assert "on this machine" not in card and str(tmp_path) not in card


def test_without_control_rows_are_left_out_with_the_reason(tmp_path: Path) -> None:
    metrics = without_control(quickstart_metrics())
    metrics["cost"] = {"tuned": None, "final": None, "ratio": None}
    metrics["why"]["cost"] = "eval.cost_batches is empty"
    metrics["size"]["memory_mib"] = None
    metrics["why"]["size.memory_mib"] = "not measured in this run"
    card = card_of(make_run(tmp_path / "run", metrics))
    assert "| control |" not in card and "| ptq |" not in card and "| final |" in card
    assert "- control: eval.control is false" in card
    assert "No benchmark tasks were run" in card and "Not measured: eval.cost_batches is empty." in card
    assert "weights in memory: not known (not measured in this run)" in card


def test_a_layout_that_vllm_is_not_for_says_why(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "run", quickstart_metrics()))
    assert "No command is given: int8-int4 for cpu: it is for phones and CPUs: vLLM has no kernel for it" in card
    assert "For vLLM convert the 16-bit weights to int4 (cuda-sm80), int8 (cuda), int8-int8 (cuda) or fp8" in card


def test_fp8_is_served_by_vllm_and_not_by_a_phone(tmp_path: Path) -> None:
    metrics = quickstart_metrics() | {"scheme": "fp8", "target": "cuda-sm89", "dtype": "bfloat16"}
    metrics["train_ship_gap"] = 0.00123
    card = card_of(make_run(tmp_path / "run", metrics), "me/fp8")
    assert "pip install vllm==0.23.0 torchao==0.18.0\nvllm serve me/fp8 --dtype float32\n" in card
    assert 'device_map="cuda"' in card and "a CUDA GPU of compute capability 8.9 or newer" in card
    assert "Not for fp8: ExecuTorch's XNNPACK" in card
    assert "trained function minus shipped function: +0.00123 nats per answer token" in card


CONVERTED: dict[str, Any] = {
    "source": "Qwen/Qwen3-0.6B", "revision": None, "scheme": "int4", "target": "cuda-sm80", "group_size": 128,
    "skip": [], "dtype": "bfloat16", "algorithms": [], "calibration": None, "notes": [], "license": None,
}  # fmt: skip
CALIBRATED: dict[str, Any] = {
    "source": "/data/models/mine", "scheme": "int8-int4", "target": "cpu", "group_size": 32, "skip": ["down_proj"],
    "algorithms": ["spinquant", "awq", "gptq"], "license": "mit", "versions": {"torchao": "0.18.0"}, "dtype": "float32",
    "calibration": {"data": "/home/me/wiki.txt", "samples": 128, "tokens": 65_536, "left_out": 3},
    "notes": ["awq: scaled 12 of 14 layers"],
    "coverage": {"quantized_fraction": 1.0, "share_of_all_weights": 0.5, "quantized_layers": 3, "skipped": {}},
}  # fmt: skip


def parsed(card: str) -> argparse.Namespace:
    """The options of the command in a conversion's card, which its Python gives, too."""
    (command,) = (block for block in blocks_of(card, "bash") if block.startswith("quantize convert"))
    (code,) = (block for block in blocks_of(card, "python") if "quantize.cli" in block)
    words = shlex.split(command)[1:]
    assert ast.literal_eval(code[code.index("main([") + 5 : -1]) == words
    return _parser().parse_args(words)


def test_a_conversion_by_its_record(tmp_path: Path) -> None:
    card = card_of(make_folder(tmp_path / "converted", CONVERTED))
    assert front_of(card)["base_model"] == "Qwen/Qwen3-0.6B" and "license" not in front_of(card)
    options = parsed(card)
    assert (options.source, options.scheme, options.target) == ("Qwen/Qwen3-0.6B", "int4", "cuda-sm80")
    assert (options.group_size, options.dtype, options.algorithm, options.skip) == (128, "bfloat16", [], [])
    assert "rounding to nearest. No training for that format was done." in card and "vllm serve" in card
    assert "Not evaluated" in card and "quantize eval" in card and "1.1558" not in card


def test_a_conversion_by_algorithms_with_calibration(tmp_path: Path) -> None:
    card = card_of(make_folder(tmp_path / "converted", CALIBRATED))
    front = front_of(card)
    assert front["license"] == "mit" and "base_model" not in front
    assert front["tags"] == ["torchao", "ongrid", "int8-int4", "spinquant", "awq", "gptq"]
    assert "calibration: wiki.txt (samples: 128, tokens: 65536, left out: 3)" in card
    assert "- gptq: GPTQ: each column" in card and "- awq: scaled 12 of 14 layers" in card
    assert "Its source, the local folder mine, is not published" in card
    assert "pip install torch torchao==0.18.0 transformers accelerate" in card
    options = parsed(card)
    assert (options.source, options.skip, options.algorithm) == ("mine", ["down_proj"], ["spinquant", "awq", "gptq"])
    assert (options.calibration, options.calibration_samples) == ("wiki.txt", 128)
    assert "/home" not in card and "/data/models" not in card


def test_a_conversion_without_a_record_invents_nothing(tmp_path: Path) -> None:
    card = card_of(make_folder(tmp_path / "converted"))
    assert "base_model" not in front_of(card) and "not recorded by the conversion" in card
    assert "Not known: no ongrid.json" in card and "quantize convert" not in card


def found_by_eval(folder: Path) -> dict[str, Any]:
    """What `quantize eval` writes, of two models on 40 samples."""
    interval = {"value": 2.5, "low": 2.4, "high": 2.6}
    model = {
        "loss": interval, "perplexity": interval, "exact": {"value": 0.0, "low": 0.0, "high": 0.1}, "simulated": False,
        "disk_mib": 10.0, "memory_mib": 11.5, "computes_in": "float32", "name": "converted", "folder": str(folder),
    }  # fmt: skip
    difference = {"loss": {"value": 0.01, "low": -0.02, "high": 0.04}, "exact": interval, "kl": interval, "top1": None}
    return {
        "title": "converted", "verdict": ["Good enough: converted."], "notes": [f"converted is measured in {folder}."],
        "models": {"model": model, "reference": {**model, "name": "Qwen/Qwen3-0.6B"}},
        "tasks": {}, "tasks_mean": {}, "layers": {}, "differences": {"reference": difference},
        "n_samples": 40, "n_tokens": 400, "data": "/home/me/held_out.jsonl",
        "command": f"quantize eval {folder} --data /home/me/held_out.jsonl", "packages": {}, "device": "a CPU",
    }  # fmt: skip


def test_a_conversion_that_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    folder = make_folder(tmp_path / "converted", CONVERTED)
    beside = tmp_path / "converted-eval"
    beside.mkdir()
    (beside / "eval.json").write_text(json.dumps(found_by_eval(folder)))
    card = card_of(folder, "me/converted")
    assert "| converted | 2.5000 [2.4000, 2.6000] |" in card and "+0.0100 [-0.0200, +0.0400]" in card
    assert "Good enough: converted." in card and "11.5 MiB as it was loaded for the evaluation" in card
    assert "quantize eval converted --data held_out.jsonl" in card
    assert "/home" not in card and str(tmp_path) not in card
    moved = beside.rename(tmp_path / "elsewhere")
    assert "Not evaluated" in card_of(folder)
    assert main(["card", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"there is none at {beside} and {Path.cwd() / 'converted-eval'}; for one: quantize eval {folder}" in said
    monkeypatch.chdir(tmp_path / "here")  # where `quantize eval` writes by itself
    moved = moved.rename(tmp_path / "here" / "converted-eval")
    assert main(["card", str(folder)]) == 0 and "evaluation" not in capsys.readouterr().out
    assert "Good enough" in (folder / "README.md").read_text()
    assert main(["card", str(folder), "--evaluation", str(moved)]) == 0
    assert "Good enough" in (folder / "README.md").read_text()
    other = make_folder(tmp_path / "other", CONVERTED)
    assert main(["card", str(other), "--evaluation", str(moved)]) == 2
    assert f"it measured {folder}, not {other}" in capsys.readouterr().err


def test_licences_are_carried_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\nlicense_link: terms\n---\n# A model\n"
    )
    base = find_base(str(tmp_path))
    assert base.license == {"license": "other", "license_name": "gemma", "license_link": "terms"}
    assert find_base(str(tmp_path / "absent")).license == {} and find_base(str(tmp_path / "absent")).why
    for broken in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "no front matter", ""):
        (tmp_path / "README.md").write_text(broken)
        assert find_base(str(tmp_path)).license == {}
    assert find_base("a/b", license="Apache-2.0").license == {"license": "apache-2.0"}
    assert find_base("a/b", license="other").license == {}  # names nothing
    named = {"license": "other", "license_name": "my-own-terms"}  # the hub takes identifiers alone
    assert find_base("a/b", license="My own terms").license == named == find_base("a/b", license=named).license


def test_the_hub_is_asked_for_a_licence_that_its_cache_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    base = find_base(str(snapshot))
    assert (base.hub_id, base.revision) == ("Qwen/Qwen3-0.6B", "ab" * 20)
    assert base.license == {} and "could not be read" in base.why
    with imitation() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        huggingface_hub.close_session()
        hub.private |= {"google/gemma": False, "me/bare": False}
        hub.cards["google/gemma"] = {"license": "other", "license_name": "gemma", "license_link": "LICENSE.md"}
        found = ask_hub(find_base("google/gemma", revision="v1")).license
        assert found["license_name"] == "gemma" and found["license_link"].endswith("google/gemma/blob/v1/LICENSE.md")
        assert ask_hub(find_base("me/bare")).why == "the card of me/bare states none"
        assert "could not be read" in ask_hub(find_base("me/absent")).why
    huggingface_hub.close_session()


def test_blanks_are_found() -> None:
    good = "---\na: null\n---\n\n# T\n\ntext\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n\n```python\nx = None\n```\n"
    assert find_blanks(good) == []
    for bad, said in (
        ("| x | 1 |", "| x |  |"), ("| x | 1 |", "| x | - |"), ("text", "a loss of nan"), ("text", "None"),
        ("text", "To be filled"), ("text", "TODO"), ("\n\ntext", ""), ("text", "[More Information Needed]"),
    ):  # fmt: skip
        assert find_blanks(good.replace(bad, said) if said else "# T\n\n## Empty\n\n## Other\n\ntext\n"), said


def test_only_code_is_given_the_repositorys_name() -> None:
    card = 'quantized as ./quantized\n```python\nmodel_id = "./quantized"\n```\n```bash\nvllm serve ./quantized\n```\n'
    said = with_repository(card, "me/x")
    assert said == 'quantized as ./quantized\n```python\nmodel_id = "me/x"\n```\n```bash\nvllm serve me/x\n```\n'
    assert with_repository("a card of my own", "me/x") == "a card of my own"
    export = 'model_id = "/r/quantized"\n```bash\nquantize export /r/quantized --to executorch\n```\n'
    assert "```bash\nhf download me/x --local-dir ./x\nquantize export ./x --to" in with_repository(export, "me/x")


def test_a_run_whose_numbers_algorithms_chose(tmp_path: Path) -> None:
    metrics = quickstart_metrics()
    recipe = gathered_of(metrics)["recipe"]
    recipe["quantize"] |= {"algorithm": ["awq"], "calibration": {"data": "/home/me/wiki.txt", "samples": 64}}
    recipe["data"] |= {"train": "/home/me/mine.jsonl"}
    card = card_of(make_run(tmp_path / "run", metrics, recipe=recipe, qat=None))
    assert "| numbers chosen by | awq |" in card and "calibration: wiki.txt (samples: 64)" in card
    assert "  algorithm:\n  - awq\n  calibration:\n    data: wiki.txt" in card and "/home" not in card
    assert "trained on: mine.jsonl (a local file that is not published with this model)" in card
    assert "It needs what is not published with this model, beside recipe.yaml: mine.jsonl." in card
    assert front_of(card)["tags"] == ["torchao", "ongrid", "int8-int4", "awq"] and "datasets" not in front_of(card)


def test_local_folders_stay_private() -> None:
    packaged = str(PROJECT / "examples" / "data" / "reasoning_train.jsonl")
    settings = {
        "data": {"train": packaged, "eval": "/home/me/secret/eval.jsonl"},
        "tasks": ["~/tasks/mine.yaml", "mmlu"],
    }
    assert public_settings(settings) == {
        "data": {"train": "examples/data/reasoning_train.jsonl", "eval": "eval.jsonl"}, "tasks": ["mine.yaml", "mmlu"],
    }  # fmt: skip


def test_a_run_that_ships_nothing_yet_gets_no_card(tmp_path: Path) -> None:
    metrics = quickstart_metrics()
    run = make_run(tmp_path / "run", metrics)
    write_run_card(run, metrics, gathered_of(metrics, shipped={}))
    assert not (run / "quantized" / "README.md").exists()


def test_what_is_no_release_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "plain")
    (folder / "config.json").write_text("{}")
    assert main(["card", str(folder)]) == 2
    assert "is not quantised; use: quantize convert" in capsys.readouterr().err
    assert main(["card", str(tmp_path / "nothing")]) == 2
    assert "is neither a run nor a folder that quantize convert wrote" in capsys.readouterr().err
    metrics = quickstart_metrics()
    del metrics["kl"]
    assert main(["card", str(make_run(tmp_path / "broken", metrics))]) == 2
    assert "metrics.json is damaged or of another version (kl is missing)" in capsys.readouterr().err


def run_python(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_recipe_is_the_runs_config(tmp_path: Path) -> None:
    from train.config_loading import load_config

    file = tmp_path / "recipe.yaml"
    config = load_config("tiny.yaml", ["--qat", "int8-int4", "--quantize.skip=o_proj", "--run.seed=3"])
    asked = {key: value for key, value in config.model_dump().items() if key not in ("track", "run")}
    run = make_run(tmp_path / "run", quickstart_metrics(), recipe=asked | {"run": {"seed": 3}})
    card = card_of(run)
    (text,) = blocks_of(card, "yaml")
    file.write_text(text)
    again = load_config(file).model_dump()
    assert {key: again[key] for key in asked} == asked and again["run"]["seed"] == 3
    assert "train --config recipe.yaml" in blocks_of(card, "bash")
    assert "not published with this model" not in card  # what it learns from is part of ongrid


def test_the_code_of_a_card_runs_as_shown(tmp_path: Path) -> None:
    from tiny_models import save_plain, tiny_model

    from quantize.convert import convert_checkpoint
    from quantize.schemes import find_scheme

    plain = save_plain(tiny_model(vocab_size=259, tied=False), tmp_path / "plain")
    scheme, folder = find_scheme("int8-int4"), tmp_path / "converted"
    convert_checkpoint(
        plain, folder, scheme, scheme.find_target("cpu"), group_size=32, dtype="float32", device="cpu",
        named="Qwen/Qwen3-0.6B",
    )  # fmt: skip
    card = card_of(folder)
    assert "quantize convert Qwen/Qwen3-0.6B --scheme int8-int4 --target cpu --group-size 32 --dtype float32" in card
    assert "| torchao | 0.18" in card and "14 layers" in card
    load, _, by_torchao = blocks_of(card, "python")
    assert f'model_id = "{folder}"' in load and "apply_chat_template" in load
    shown = by_torchao.replace("Qwen/Qwen3-0.6B", str(plain))  # as if it were on the hub
    loaded = "assert 'IntxUnpacked' in repr(model.model.layers[0].mlp.up_proj.weight)"
    equal = (
        "from safetensors.torch import load_file\n"
        f"a, b = load_file('Qwen3-0.6B-int8-int4/model.safetensors'), load_file('{folder}/model.safetensors')\n"
        "assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)"
    )
    run_python("\n".join([load, loaded, shown, equal]), tmp_path)


@pytest.mark.parametrize(("name", "target"), [("int8-int4", "cpu"), ("int8", "cpu")])
def test_the_code_for_a_mixture_of_experts_runs_as_shown(name: str, target: str, tmp_path: Path) -> None:
    from tiny_models import save_plain, tiny_model

    from quantize.convert import convert_checkpoint
    from quantize.schemes import find_scheme

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    plain = save_plain(tiny_model("qwen3_moe", vocab_size=259, tied=False, **experts), tmp_path / "plain")
    scheme, folder = find_scheme(name), tmp_path / "converted"
    convert_checkpoint(
        plain, folder, scheme, scheme.find_target(target), group_size=scheme.group_size, dtype="float32", device="cpu",
        named="Qwen/Qwen3-30B-A3B",
    )  # fmt: skip
    card = card_of(folder)
    load, *_ = blocks_of(card, "python")
    assert 'experts_implementation="eager"' in load and ("let_tensors_select()" in load) == (name == "int8-int4")
    assert "vLLM does not load fused experts in torchao's layouts" in card and "Not for a mixture" in card
    run_python(load, tmp_path)
