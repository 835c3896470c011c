"""A card's sections on how a release was made: data, recipe as settings and as code, versions."""

from __future__ import annotations

import pprint
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.algorithms import ALGORITHMS
from quantize.document import Block, Code, Heading, Items, Paragraph, Table
from quantize.record import RECORD
from quantize.release.base_model import cached_repository
from quantize.release.source import Release

_PROJECT = Path(__file__).resolve().parents[2]
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RUN_CODE = """from train.config_loading import load_config
from train.pipeline import run

result = run(load_config("recipe.yaml"))
print(result.path, result.metrics["final"]["loss"])"""


def data_sections(release: Release) -> Iterator[Block]:
    """What was learned, what was held out, and what calibration looked at."""
    yield Heading("Data")
    calibration = _calibration(release)
    if not release.is_run:
        yield Items([calibration or "none: the weights were converted as they are, without training or calibration"])
        return
    data, rows = release.gathered["recipe"]["data"], release.rows
    held_out = f"split off the training data, sharing no row with it ({data['eval_samples']} rows)"
    if data.get("eval"):
        held_out = data_text(data["eval"], split=data.get("eval_split"))
    trained = data_text(data["train"], subset=data.get("subset"), split=data.get("split"))
    lines = [f"trained on: {trained}", f"held out: {held_out}"]
    for split, name in (("train", "training"), ("eval", "held-out")):
        if split in rows:
            found = rows[split]
            learned = f"loss on {found['learned_tokens']:,} of them"
            lines.append(f"{name} rows: {found['rows']:,}, {found['tokens']:,} tokens, {learned}")
    dropped = {reason: number for reason, number in (rows.get("dropped") or {}).items() if number}
    lines += [f"dropped rows: {', '.join(f'{number} {reason}' for reason, number in dropped.items())}"] * bool(dropped)
    yield Items([*lines, *([calibration] if calibration else [])])


def data_origin(source: str) -> tuple[str, str]:
    """(name, where it comes from) of a data set: of the hub, of this project, or a file of the author's."""
    path = Path(source).expanduser()
    name = str(public_settings(source))
    if (_PROJECT / name).is_file():
        return name, "part of ongrid"
    if path.is_absolute() or path.suffix in _DATA_SUFFIXES or not _DATASET_ID.fullmatch(source):
        return path.name, "a local file that is not published with this model"
    return source, "on the hub"


def data_text(source: str, **of_hub: str | None) -> str:
    """`HuggingFaceTB/smoltalk (on the hub, split train)`; what a hub's data set alone has is left out of others."""
    name, where = data_origin(source)
    known = [f"{key} {value}" for key, value in of_hub.items() if value and where == "on the hub"]
    return f"{name} ({', '.join([where, *known])})"


def dataset_ids(release: Release) -> list[str]:
    """The data sets' repositories on the hub; none of local files."""
    data = release.gathered["recipe"]["data"] if release.is_run else {}
    named = [data[key] for key in ("train", "eval") if data.get(key)]
    return list(dict.fromkeys(name for name in named if data_origin(name)[1] == "on the hub"))


def recipe_sections(release: Release) -> Iterator[Block]:
    """What repeats the release: settings and code."""
    yield Heading("Recipe")
    if release.is_run:
        yield from _training(release)
    else:
        yield from _conversion(release)
    if release.algorithms:
        yield Paragraph("What chose the numbers, in this order:")
        known = {name: ALGORITHMS[name].summary for name in release.algorithms if name in ALGORITHMS}
        yield Items([f"{name}: {known[name]}" if name in known else name for name in release.algorithms])
    if release.notes:
        yield Paragraph("What they did:")
        yield Items(list(release.notes))
    yield from _torchao(release)


def _training(release: Release) -> Iterator[Block]:
    yield Paragraph("With ongrid installed. Every setting that decides the numbers, as it was used (recipe.yaml):")
    yield Code(recipe_yaml(release), "yaml")
    yield Paragraph("The command that trains, evaluates and quantises with it, and the same from Python:")
    yield Code("train --config recipe.yaml")
    yield Code(_RUN_CODE, "python")
    data, model = release.gathered["recipe"]["data"], release.gathered["recipe"]["model"]
    local = [
        name for name, where in map(data_origin, filter(None, (data["train"], data.get("eval")))) if "local" in where
    ]
    unpublished = release.base.hub_id is None and model.get("random") is None and not model["id"].startswith("pypi:")
    local += [release.base.title] * unpublished
    if local:
        yield Paragraph(f"It needs what is not published with this model, beside recipe.yaml: {', '.join(local)}.")
    losses = release.gathered["losses"].get("tuned") or []
    if losses:
        said = ", ".join(f"{loss:.4f} at step {step:g}" for step, loss in (losses[0], losses[-1]))
        yield Paragraph(f"Training loss: {said}.")


def _conversion(release: Release) -> Iterator[Block]:
    if release.scheme is None or release.base.title == release.folder.resolve().name:
        yield Paragraph(f"Not known: no {RECORD} beside the weights says what they were made from, or how.")
        return
    words = convert_words(release)
    yield Paragraph("With ongrid installed, as a command and the same from Python:")
    yield Code(shlex.join(["quantize", *words]))
    yield Code(f"from quantize.cli import main\n\nmain({pprint.pformat(words, width=100, compact=True)})", "python")
    if release.base.hub_id is None:
        yield Paragraph(f"Its source, {release.base.text}, is not published with this model.")


def convert_words(release: Release) -> list[str]:
    """What `quantize` is given to make this folder again."""
    base = release.base
    words = ["convert", base.hub_id or base.title, "--scheme", str(release.scheme)]
    words += ["--revision", base.revision] if base.hub_id and base.revision else []
    words += ["--target", release.target] if release.target else []
    words += ["--group-size", str(release.group_size)] if release.group_size else []
    words += ["--skip", *release.skip] if release.skip else []
    words += ["--dtype", release.dtype] if release.dtype else []
    words += ["--algorithm", *release.algorithms] if release.algorithms else []
    used = release.calibration if isinstance(release.calibration, Mapping) else {"data": release.calibration}
    words += ["--calibration", str(public_settings(used["data"]))] if used.get("data") else []
    words += ["--calibration-samples", str(used["samples"])] if used.get("samples") else []
    return words


def recipe_yaml(release: Release) -> str:
    """The run's settings, as `train --config` reads them; what is null is the default and left out."""
    import yaml

    recipe = public_settings(release.gathered["recipe"])
    kept = {
        key: {name: value for name, value in section.items() if value is not None and value != {}}
        if isinstance(section, Mapping)
        else section
        for key, section in recipe.items()
    }
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100).rstrip()


def public_settings(value: Any) -> Any:
    """Settings with packaged files named from the project's folder, those of the hub's cache by their repository, and
    other local ones without their folders."""
    if isinstance(value, Mapping):
        return {key: public_settings(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public_settings(each) for each in value]
    if isinstance(value, str) and value.startswith(("/", "~/")):
        path = Path(value)
        if path.is_relative_to(_PROJECT):
            return str(path.relative_to(_PROJECT))
        return cached_repository(path)[0] or path.name
    return value


def _calibration(release: Release) -> str:
    """`calibration: wiki.txt (samples: 128, tokens: 65536)`; empty where no data was looked at."""
    found = public_settings(release.calibration)
    if not found:
        return ""
    if not isinstance(found, Mapping):
        return f"calibration: {found}"
    known = {key: value for key, value in found.items() if value not in (None, [], {})}
    data = known.pop("data", "data that was not recorded")
    more = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in known.items())
    return f"calibration: {data}{f' ({more})' if more else ''}"


def _torchao(release: Release) -> Iterator[Block]:
    """The format in torchao's own terms; on the base model where that alone is what was converted."""
    found = (release.settings.get("quantization_config") or {}).get("quant_type")
    config = found.get("default", found) if isinstance(found, Mapping) else None
    if not config:
        return
    if config.get("_type") == "FqnToConfig":
        yield Paragraph(
            "The format in torchao's terms, a configuration for each layer (FqnToConfig), from config.json:"
        )
        yield Code(
            "from torchao.core.config import config_from_dict\nfrom transformers import AutoConfig\n\n"
            f'settings = AutoConfig.from_pretrained("{release.name}").quantization_config\n'
            'print(config_from_dict(settings["quant_type"]["default"]))',
            "python",
        )
        return
    imports = ["from torchao.core.config import config_from_dict"]
    lines = [f"config = config_from_dict(\n{_indented(pprint.pformat(config, width=100))}\n)"]
    if release.base.hub_id is None:
        yield Paragraph(f"The format in torchao's terms, as config.json holds it:{_not_the_numbers(release)}")
        lines.append("print(config)")
    else:
        yield Paragraph(
            f"The format in torchao's terms, put on the base model by transformers:{_not_the_numbers(release)}"
        )
        imports.append("from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig")
        lines += _on_base(release)
    yield Code("\n".join([*imports, "", *lines]), "python")


def _not_the_numbers(release: Release) -> str:
    if release.is_run:
        return " the training is not in it."
    return f" the numbers that {', '.join(release.algorithms)} chose are not in it." if release.algorithms else ""


def _on_base(release: Release) -> list[str]:
    base, device = release.base, "cuda" if (release.target or "").startswith("cuda") else "cpu"
    options = [f'"{base.hub_id}"', *([f'revision="{base.revision}"'] if base.revision else [])]
    dtype = [f'dtype="{release.dtype}"'] if release.dtype else []
    loaded = [*options, *dtype, f'device_map="{device}"', "quantization_config=TorchAoConfig(config)"]
    return [
        "model = AutoModelForCausalLM.from_pretrained(",
        f"    {', '.join(loaded)}",
        ")",
        f'model.save_pretrained("{base.title}-{release.scheme}")',
        f'AutoTokenizer.from_pretrained({", ".join(options)}).save_pretrained("{base.title}-{release.scheme}")',
    ]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def version_sections(release: Release) -> Iterator[Block]:
    """Packages and hardware."""
    yield Heading("Versions and hardware")
    device = release.device or "the conversion did not record it"
    yield Items([f"hardware: {device}"])
    if release.versions:
        yield Table(("package", "version"), list(release.versions.items()))
    else:
        yield Paragraph("The conversion did not record the versions of its packages.")
