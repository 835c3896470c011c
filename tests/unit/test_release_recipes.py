"""configs/release/: each recipe quantises a tiny model of its architecture, and says what it is for."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from tiny_models import save_plain, tiny_model

from quantize.calibrate import Recipe
from quantize.commands import convert as verb
from quantize.commands.recipe import take_recipe
from quantize.convert import convert_checkpoint, load_plain
from quantize.errors import UserError
from quantize.schemes import find_scheme

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "release"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ARCHITECTURES = {"Phi-4": "phi3", "Qwen3": "qwen3", "SmolLM3": "smollm3", "gemma-3": "gemma3_text"}
TEXT = "What is left of a long text is what calibration looks at, and it must not be too short. " * 8


def options_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    options = parser.parse_args(words)
    take_recipe(options)
    return options


def test_the_releases_are_all_there() -> None:
    models = ("Phi-4-mini-instruct", "Qwen3-4B", "Qwen3-8B", "Qwen3-32B", "SmolLM3-3B", "gemma-3-270m-it")
    formats = ("INT4", "AWQ-INT4", "FP8", "INT8-INT4")
    assert {path.stem for path in RECIPES} == {f"{model}-{name}" for model in models for name in formats}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_quantises_a_tiny_model_of_its_architecture(path: Path, tmp_path: Path) -> None:
    architecture = next(name for start, name in ARCHITECTURES.items() if path.stem.startswith(start))
    options = options_of("--config", str(path))
    assert f"quantize convert --config configs/release/{path.name}" in path.read_text(encoding="utf-8")
    assert options.source.split("/")[-1] in path.stem
    scheme = find_scheme(options.scheme)
    target = scheme.find_target(options.target)
    if target.name == "cuda-sm80":  # tiles that only a GPU packs; the same recipe on the layout of a CPU
        target = scheme.find_target("cpu")
    size = scheme.pick_group_size(options.group_size, target)
    model = tiny_model(architecture, hidden_size=128, intermediate_size=256, vocab_size=320)
    source = save_plain(model.to(torch.bfloat16), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    if options.calibration:
        assert Path(options.calibration).is_file()
    coverage = convert_checkpoint(
        source, tmp_path / "out", scheme, target, group_size=size, dtype=options.dtype, device="cpu",
        recipe=Recipe(algorithms=options.algorithm, data=text if options.calibration else None),
    )  # fmt: skip
    assert coverage.quantized_fraction > 0.99, coverage.skipped
    shipped = load_plain(tmp_path / "out")
    assert torch.isfinite(shipped(torch.arange(1, 9)[None]).logits).all()


def test_the_command_line_comes_before_the_recipe_and_a_recipe_is_found_by_its_name() -> None:
    options = options_of("--config", "Qwen3-8B-AWQ-INT4.yaml", "--group-size", "64", "--algorithm", "gptq")
    assert (options.source, options.group_size, options.algorithm) == ("Qwen/Qwen3-8B", 64, ["gptq"])
    assert options.calibration_samples == 128


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "holds no mapping"),
        ("model: a/b\nschema: int4", "unknown schema; it may hold model, scheme,"),
        ("model:\n  id: a/b\nlora: null", "unknown lora; .*a config of `train` is none of `quantize convert`"),
        ("group_size: large", "group_size must be a whole number, not 'large'"),
        ("algorithm: {a: 1}", "algorithm must be a list of names"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_used_says_why(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        options_of("--config", str(path))
