"""report.html in a real browser: it loads without a request or an error, draws, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const svgs = [...document.querySelectorAll("svg")];
  const found = {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    figures: svgs.map(svg => [box(svg).width, box(svg).height, svg.querySelectorAll("path").length]),
    text: Math.min(...svgs.flatMap(svg => [...svg.querySelectorAll("text")].map(text => box(text).height))),
    body: parseFloat(getComputedStyle(document.body).fontSize),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  const shown = document.createElement("pre");
  shown.id = "probe";
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
});
</script>"""


def _open(page: Path, width: int) -> tuple[dict[str, Any], str]:
    """What a script measured in the page at a window of that width, and the browser's console."""
    assert BROWSER is not None
    probed = page.with_name(f"probed-{width}.html")
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=5000", f"--window-size={width},900", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-3000:]
    return json.loads(found[1]), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_loads_draws_and_fits(width: int, finished: Path) -> None:
    found, console = _open(finished / "report.html", width)
    assert console == "" and found["requests"] == []
    assert found["scroll"] <= found["width"], "nothing but a table scrolls sideways"
    assert len(found["figures"]) >= 3
    for figure_width, height, paths in found["figures"]:
        assert 250 < figure_width <= found["width"] and height > 80 and paths > 5
    assert found["body"] >= 16 and found["text"] >= 8


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser (Debian: apt install chromium)")
def test_the_page_fits_a_phone(finished: Path, tmp_path: Path) -> None:
    """A headless window is 500 pixels wide at least, so the phone is a frame of 375 inside one."""
    page = (finished / "report.html").read_text().replace("</body>", f"{PROBE}</body>")
    frame = tmp_path / "phone.html"
    content = page.replace("&", "&amp;").replace('"', "&quot;")
    copied = (
        "<script>addEventListener('load', () => setTimeout(() => { const shown = document.createElement('pre');"
        "shown.id = 'outer'; shown.textContent = frames[0].document.getElementById('probe').textContent;"
        "document.body.append(shown) }, 500))</script>"
    )
    frame.write_text(f'<body><iframe width="375" height="800" srcdoc="{content}"></iframe>{copied}</body>')
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="outer">(.*?)</pre>', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    measured = json.loads(found[1])
    assert 340 <= measured["width"] <= 375 and measured["scroll"] <= measured["width"]
    assert all(width <= measured["width"] for width, _, _ in measured["figures"]) and measured["text"] >= 8
