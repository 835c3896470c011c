"""On a GPU with vLLM (`quantize serve --setup`, or $ONGRID_VLLM): each format that it serves loads, answers and agrees.

`pytest -m gpu -s tests/gpu/test_vllm.py`; with `-n 8` (pytest-xdist) the engines share the GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_plain, tiny_model

from quantize.cli import main
from quantize.errors import UserError
from quantize.hardware import missing_for
from quantize.schemes import find_scheme, served_formats


def _finds_vllm() -> bool:
    from quantize.serving.environment import find_vllm

    try:
        find_vllm()
    except UserError:
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _finds_vllm(), reason="needs vLLM: quantize serve --setup"),
]
_LITTLE = ["--enforce-eager", "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", "1G"]
"""vLLM takes no more than that, and does not measure what is free: others may be at work beside it."""
FORMATS = [
    pytest.param(scheme.name, target.name, skip, id=f"{scheme.name}-{target.name}{'-skip' if skip else ''}")
    for scheme, target in served_formats()
    for skip in ([], ["down_proj"])
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 320}
    model = tiny_model(**shape, max_position_embeddings=256, dtype=torch.bfloat16)
    return save_plain(model.bfloat16(), tmp_path_factory.mktemp("vllm") / "plain")


def _check(folder: Path, place: Path) -> None:
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(32)]
    (place / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--check", "--data", str(place / "held_out.jsonl"), "--samples", "32", "--tokens", "8"]
    assert main(["serve", str(folder), *options, "--", *_LITTLE]) == 0


def test_sixteen_bit_answers(plain: Path, tmp_path: Path) -> None:
    assert main(["serve", str(plain), "--smoke-test", "--", *_LITTLE]) == 0
    _check(plain, tmp_path)


@pytest.mark.parametrize(("scheme", "target", "skip"), FORMATS)
def test_a_format_agrees_with_transformers(
    scheme: str, target: str, skip: list[str], plain: Path, tmp_path: Path
) -> None:
    place = find_scheme(scheme).find_target(target)
    if missing_for(place):
        pytest.skip(f"{scheme} {target} needs {', '.join(missing_for(place))}")
    command = ["convert", str(plain), "--scheme", scheme, "--target", target, "--output", str(tmp_path / "small")]
    assert main([*command, *(["--skip", *skip] if skip else [])]) == 0
    _check(tmp_path / "small", tmp_path)
