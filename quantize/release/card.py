"""The model card of a release: README.md with its front matter, from what was measured and recorded alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantize.document import Block, Heading, Paragraph, Table, to_markdown
from quantize.files import write_atomically
from quantize.release.base_model import ask_hub
from quantize.release.evidence import cost_sections, coverage_sections, evaluation_sections
from quantize.release.recipe import data_origin, data_sections, dataset_ids, recipe_sections, version_sections
from quantize.release.source import Release, find_release, of_run
from quantize.release.usage import usage_sections

FILE = "README.md"


def write_card(source: str, root: str, name: str | None = None, evaluation: Path | None = None) -> Path:
    """Writes the card of a run or of a converted folder beside its weights, over one that is there.

    Args:
        name: what the code in it loads the release by; None = its folder.
        evaluation: as for `quantize.release.source.find_release`.

    Raises:
        UserError: there is nothing to release there.
    """
    return write_release(find_release(source, root, name, evaluation))


def write_run_card(run: Path, metrics: Mapping[str, Any], gathered: Mapping[str, Any]) -> None:
    """Writes the card of a run, with its report; none where what ships is not written, or was taken away."""
    if gathered["shipped"] and (run / "quantized" / "config.json").is_file():
        write_release(of_run(run, metrics, gathered))


def write_release(release: Release) -> Path:
    """Writes a release's card beside its weights."""
    path = release.folder / FILE
    write_atomically(path, render_card(replace(release, base=ask_hub(release.base))))
    return path


def render_card(release: Release) -> str:
    """The text of README.md."""
    import yaml

    front = yaml.safe_dump(front_matter(release), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{to_markdown(list(_blocks(release)))}"


def front_matter(release: Release) -> dict[str, Any]:
    """What the hub reads of the card; a key whose value is not known is left out."""
    found: dict[str, Any] = {}
    if release.base.hub_id is not None:
        found |= {"base_model": release.base.hub_id, "base_model_relation": "quantized"}
    found |= release.base.license
    found |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    data = dataset_ids(release)
    if data:
        found["datasets"] = data
    tags = ["torchao", "ongrid", release.scheme, "qat" if release.qat else None, *release.algorithms]
    return found | {"tags": [tag for tag in dict.fromkeys(tags) if tag]}


def _blocks(release: Release) -> Iterator[Block]:
    yield Heading(f"{release.base.title}, {release.scheme or 'quantised'}", 1)
    yield Paragraph(_summary(release), strong=True)
    yield Table(("what", "value"), list(_facts(release)))
    yield from usage_sections(release)
    yield from evaluation_sections(release)
    yield from cost_sections(release)
    yield from coverage_sections(release)
    yield from data_sections(release)
    yield from recipe_sections(release)
    yield from version_sections(release)
    yield Heading("Licence")
    yield Paragraph(_license(release))
    yield Paragraph("Written by ongrid from what was measured and recorded; no number in it was typed by hand.")


def _summary(release: Release) -> str:
    form = release.scheme or "a torchao format"
    base = release.base.text[0].upper() + release.base.text[1:] if release.base.hub_id is None else release.base.text
    if release.trained:
        return f"{base}, fine-tuned with quantisation-aware training and shipped in {form}."
    if not release.is_run:
        converted = f"converted to {form}, its numbers chosen by {_numbers(release)}"
        return f"{base}, {converted}. No training for that format was done."
    trained = f"fine-tuned on {data_origin(release.gathered['recipe']['data']['train'])[0]}"
    how = " with quantisation-aware training" if release.qat else ""
    return f"{base}, {trained}{how} and shipped in {form}."


def _facts(release: Release) -> Iterator[tuple[str, str]]:
    yield "base model", release.base.text
    yield "licence", release.base.license.get("license") or f"not known ({release.base.why})"
    if release.is_run:
        yield "fine-tuning", _fine_tuning(release.gathered["recipe"])
    yield "format", f"{release.scheme}: {release.entry.summary}" if release.entry else _unknown(release.scheme)
    yield "target", _unknown(release.target)
    if release.scheme:
        yield "weights per scale", str(release.group_size or "one output row")
    yield "numbers chosen by", _numbers(release)
    yield "what is not quantised", f"in {release.dtype}" if release.dtype else "its dtype is in config.json"
    if release.coverage:
        yield "quantised share of all weights", f"{release.coverage['share_of_all_weights']:.1%}"
    yield "weights on disk", f"{release.size_mib:,.1f} MiB"


def _unknown(value: str | None) -> str:
    return value or "not recorded by the conversion"


def _fine_tuning(recipe: Mapping[str, Any]) -> str:
    train, lora = recipe["train"], recipe["lora"]
    how = f"LoRA of rank {lora['r']}" if lora else "all weights"
    steps = f"{train['max_steps']} steps" if train["max_steps"] > 0 else f"{train['num_train_epochs']:g} epochs"
    rate = f"learning rate {train['learning_rate']:g}"
    return f"{how}, {steps}, {rate}, {recipe['model']['backend']} backend, seed {recipe['run']['seed']}"


def _numbers(release: Release) -> str:
    if release.trained:
        return "quantisation-aware training: they are the very numbers that were trained"
    if release.qat:
        settings = release.gathered["recipe"]["fake_quant"]
        where = "W + s*B*A" if settings["placement"] == "inside" else "W alone"
        start = settings["start"]
        begins = "from the first step on" if not start else f"from {_share(start)} on"
        return f"quantisation-aware training of {where}, {begins}; rounded to nearest on the trained grid"
    return ", ".join(release.algorithms) or "rounding to nearest"


def _share(start: float) -> str:
    return f"{start:.0%} of the steps" if start < 1 else f"step {start:g}"


def _license(release: Release) -> str:
    found = release.base.license
    if not found:
        of = "the base model and the data" if release.is_run else "the base model"
        return (
            f"No licence is stated here: {release.base.why}. Whatever terms {of} came under hold for these weights, "
            "too: look them up before you pass them on."
        )
    named = found.get("license_name", found["license"])
    link = f", {found['license_link']}" if "license_link" in found else ""
    return f"{named}{link}: carried over from the base model." + " The terms of the data hold, too." * release.is_run
