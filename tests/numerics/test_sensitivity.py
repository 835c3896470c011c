"""`quantize sensitivity`: each group's numbers are those of the model with just that group quantised."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tiny_models import IDS, logits_of, tiny_model

from quantize.errors import UserError
from quantize.evaluate import Sample, evaluate_model
from quantize.layers import select_layers
from quantize.names import is_kept
from quantize.schemes import find_scheme
from quantize.sensitivity import Sizes, choose_sets, group_layers, propose, scan_model
from quantize.simulate import simulate_
from quantize.texts import load_samples

BROKEN = "model.layers.1.mlp.down_proj"


def _samples(count: int = 24) -> list[Sample]:
    ids = torch.randint(2, 96, (count, 20), generator=torch.Generator().manual_seed(1))
    return [Sample(row.tolist(), [0] * 5 + [1] * 15) for row in ids]


def _scan(name: str = "int8-int4", *, broken: bool = True, growth: float = 0.5, **options: Any) -> Any:
    """(model, quantised, result); in the quantised one a layer is far from its original."""
    model, quantised = tiny_model(), tiny_model()
    scheme = find_scheme(name)
    target = next(iter(scheme.targets.values()))
    coverage = select_layers(quantised, scheme, 32, target)
    simulate_(quantised, scheme, target, 32, coverage)
    if broken:
        weight = quantised.get_submodule(BROKEN).weight
        torch.nn.init.normal_(weight.data, std=0.3, generator=torch.Generator().manual_seed(2))
    settings = {"ways": ("block", "kind", "layer"), "batch_size": 4, "progress": lambda done, total: None} | options
    return model, quantised, scan_model(model, quantised, scheme, 32, coverage, _samples(), growth=growth, **settings)


def test_a_groups_numbers_are_those_of_the_model_with_that_group_quantised() -> None:
    seen: list[tuple[int, int]] = []
    model, quantised, found = _scan(progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(logits_of(model), logits_of(tiny_model())), "the model is left as it was"
    assert seen[-1] == (24, 24) and seen == sorted(seen)
    rows = {(row["way"], row["name"]): row for row in found["groups"]}
    assert len(rows) == 2 + 7 + 14
    for way, name in (("layer", BROKEN), ("kind", "q_proj"), ("block", "model.layers.0")):
        row = rows[way, name]
        variant = copy.deepcopy(model)
        for layer in row["layers"]:
            variant.set_submodule(layer, quantised.get_submodule(layer))
        scores = evaluate_model(variant, _samples()[:12], batch_size=4, reference=model)
        assert row["kl"]["value"] == scores.kl_per_token
        before = evaluate_model(model, _samples()[:12], batch_size=4)
        assert row["loss"]["value"] == pytest.approx(scores.loss - before.loss, abs=1e-12)
    whole = evaluate_model(quantised, _samples()[12:], batch_size=4, reference=model)
    assert found["all"]["kl"]["value"] == whole.kl_per_token


def test_the_layer_that_hurts_is_proposed_and_what_that_buys_is_measured() -> None:
    model, quantised, found = _scan(growth=0.2)
    worst = max(found["groups"], key=lambda row: row["excess"])
    assert worst["layers"] == [BROKEN] and found["sets"][0]["skip"] == [BROKEN] and BROKEN in found["proposal"]
    kept = copy.deepcopy(quantised)
    kept.set_submodule(BROKEN, model.get_submodule(BROKEN))
    scores = evaluate_model(kept, _samples()[12:], batch_size=4, reference=model)
    assert found["sets"][0]["kl"]["value"] == scores.kl_per_token
    change = found["sets"][0]["kl_change"]
    assert change == found["sets"][0]["kl_step"]
    assert change["value"] == pytest.approx(scores.kl_per_token - found["all"]["kl"]["value"]) and change["high"] < 0
    assert all(0 < each["growth"] <= 0.2 for each in found["sets"])
    json.dumps(found, allow_nan=False)


def test_nothing_is_proposed_where_nothing_fits_or_helps() -> None:
    assert _scan(growth=1e-6)[2]["sets"] == []
    gain, no_gain, unknown = (
        {"skip": [name], "kl_step": {"value": -0.1, "low": -0.3, "high": high}}
        for name, high in (("gain", -0.01), ("none", 0.01), ("unknown", None))
    )
    assert propose([no_gain, gain]) == propose([unknown, gain]) == propose([]) == []
    assert propose([gain, no_gain, gain]) == ["gain"]


def test_an_embedding_is_measured_and_never_proposed() -> None:
    model, _, found = _scan("int8-int4-mobile", broken=False, growth=9.0)
    (row,) = [row for row in found["groups"] if row["way"] == "embedding"]
    assert row["name"] == "model.embed_tokens" and row["kl"]["value"] > 0
    assert not any("model.embed_tokens" in each["skip"] for each in found["sets"])
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    words = model.model.embed_tokens.weight.numel()
    assert found["all"]["mib"] == (4.5 * linears + 8 * words + 16 * norms) / 8 / 2**20  # lm_head among the linears


def test_groups_carry_names_that_skip_understands() -> None:
    layers = {"model.layers.10.mlp.experts.3.up_proj": 8, "model.layers.1.mlp.up_proj": 4, "lm_head": 2}
    groups = {(group.way, group.name): group for group in group_layers(layers, ("block", "kind", "layer"))}
    assert groups["block", "model.layers.10"].weights == 8 and groups["block", "lm_head"].weights == 2
    assert groups["kind", "up_proj"].layers == tuple(list(layers)[:2])
    for group in groups.values():
        assert [name for name in layers if is_kept(name, [group.name])] == list(group.layers)


def test_sets_take_the_worst_for_their_weights_without_overlap() -> None:
    def row(name: str, layers: list[str], excess: float, way: str = "kind") -> dict[str, Any]:
        return {"name": name, "layers": layers, "weights": 100 * len(layers), "excess": excess, "way": way}

    rows = [row("a", ["x.a", "y.a"], 2.0), row("x", ["x.a", "x.b"], 3.0, "block"), row("dull", ["x.c"], 1.2),
            row("large", [f"{n}.d" for n in range(9)], 5.0), row("b", ["y.b"], 1.9)]  # fmt: skip
    size = Sizes(plain_weights=0, quantised_weights=1400, bits=4)
    assert size.mib(0) == 1400 * 4 / 8 / 2**20 and size.growth(1400) == 3.0
    assert choose_sets(rows, size, growth=0.7) == [["x"], ["x", "b"]]


def test_numbers_that_are_not_finite_are_an_error_with_the_groups_name() -> None:
    model, quantised = tiny_model(), tiny_model()
    scheme = find_scheme("int8-int4")
    quantised.get_submodule(BROKEN).weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the model with all quantised gives numbers that are not finite"):
        scan_model(
            model, quantised, scheme, 32, select_layers(model, scheme, 32), _samples(),
            ways=("kind",), growth=0.1, batch_size=4, progress=lambda done, total: None,
        )  # fmt: skip
    assert torch.equal(logits_of(model, IDS), logits_of(tiny_model(), IDS))


class _Tokenizer:
    """A token a character."""

    chat_template: str | None = "<role>content"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(character) for character in text]

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool = False) -> str:
        text = "".join(f"<{message['role']}>{message['content']};" for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def _text(tokens: Any, mask: Any = None) -> str:
    return "".join(chr(token) for token, kept in zip(tokens, mask or [1] * len(tokens), strict=True) if kept)


def test_texts_become_samples(tmp_path: Any) -> None:
    rows = [
        {"text": "ab"},
        {"prompt": "q" * 600, "completion": "yes"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"text": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second, third, fourth = load_samples(path, _Tokenizer(), 10)
    assert first == Sample([1, 97, 98], [1, 1, 1])
    assert len(second.input_ids) == 256 + 4 and second.loss_mask == [0] * 256 + [1] * 4
    assert _text(second.input_ids).endswith("qqq;<assistant>yes;")
    assert _text(third.input_ids) == "<user>hi;" and all(third.loss_mask)  # as the template gives it, nothing added
    assert _text(fourth.input_ids) == "<user>hi;<assistant>yo;" and _text(fourth.input_ids, fourth.loss_mask) == "yo;"
    text = tmp_path / "long.txt"
    text.write_text("x" * 1500)
    assert [len(sample.input_ids) for sample in load_samples(text, _Tokenizer(), 2)] == [512, 512]


def test_a_tokenizer_without_a_template_takes_pairs_as_they_are(tmp_path: Any) -> None:
    tokenizer = _Tokenizer()
    tokenizer.chat_template = None
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c"}))
    assert load_samples(path, tokenizer, 10) == [Sample([1, 112, 99], [0, 0, 1])]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(UserError, match="messages need a chat template, and this tokenizer has none"):
        load_samples(path, tokenizer, 10)


def test_a_format_that_reaches_nothing_is_refused() -> None:
    model, scheme = tiny_model(), find_scheme("int8-int4")
    with pytest.raises(UserError, match="int8-int4 reaches no layer of this model: group size 256 does not divide"):
        scan_model(
            model, model, scheme, 256, select_layers(model, scheme, 256), _samples(),
            ways=("kind",), growth=0.1, batch_size=4, progress=lambda done, total: None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"question": "?"}', "row 1 has neither text, messages, nor prompt and completion, but question"),
        ("a.jsonl", "{", "--data"),
        ("a.txt", "", "it holds no sample"),
        ("a.pdf", "x", "give a .txt, .jsonl or .parquet file"),
        ("a.parquet", "x", "--data"),
        ("gone.txt", None, "there is no such file"),
    ],
)
def test_what_is_no_text_is_said(name: str, content: str | None, said: str, tmp_path: Any) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        load_samples(path, _Tokenizer(), 10)
