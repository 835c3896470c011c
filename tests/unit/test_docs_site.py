"""The documentation's site: it builds without a warning, holds what is generated, and asks nothing of the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from quantize.algorithms import ALGORITHMS
from quantize.commands import VERBS
from quantize.schemes import SCHEMES
from train.config import RunConfig
from train.config_values import keys_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it, elsewhere."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stderr[-3000:]
    return folder


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.SafeLoader)

    def pages(entries: list[dict[str, object]]) -> list[str]:
        values = [value for entry in entries for value in entry.values()]
        return [page for value in values for page in ([value] if isinstance(value, str) else pages(value))]  # type: ignore[arg-type]

    named = pages(config["nav"])
    written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert len(named) == len(set(named)) and set(named) == written
    for page in named:
        text = (site / page).with_suffix(".html").read_text(encoding="utf-8")
        assert "<!-- generated" not in text and "<h1" in text, page


def test_what_is_generated_holds_every_key_verb_and_format(site: Path) -> None:
    configuration = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', configuration))
    assert {key for key in keys_of(RunConfig) if "." in key or key == "qat"} <= anchors
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="quantize-{verb}"' in commands for verb in VERBS)
    assert all(
        word in commands for word in ("--dry-run", "--resume RUN", "--calibration-samples N", "--allow-rounded-scales")
    )
    formats = (site / "reference" / "formats.html").read_text(encoding="utf-8")
    assert all(f'<h2 id="{name}">' in formats for name in SCHEMES)
    converting = (site / "converting.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in converting for name in ALGORITHMS)
    api = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in (
        "train.pipeline.run",
        "train.pipeline.resume",
        "qat.prepare.prepare_qat",
        "quantize.storage.load_quantized",
    ):
        assert f'id="{name}"' in api


class Requests(HTMLParser):
    """What a browser fetches by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        followed = tag == "link" and given.get("rel") in ("canonical", "next", "prev")
        if tag not in ("a", "form") and not followed:
            self.found += [value for name in ("src", "href", "srcset", "data", "poster") if (value := given.get(name))]


def test_the_pages_ask_nothing_of_the_network(site: Path) -> None:
    looked = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        requests = Requests()
        requests.feed(text)
        outside = [value for value in requests.found if re.match(r"(?:[a-z]+:)?//", value)]
        assert outside == [], f"{page.name}: {outside}"
        looked += len(requests.found)
    assert looked > 100
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_search_has_its_index_in_pages_from_disk(site: Path) -> None:
    assert (site / "search" / "search_index.js").stat().st_size > 10_000
    assert "search-from-disk.js" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "_site" / "search-from-disk.js").is_file()
    assert not list(site.rglob("*.py*")) and not list(site.rglob("*.jsonl"))
