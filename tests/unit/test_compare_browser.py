"""The page of `quantize compare` in a real browser: no request, no error, and nothing but tables scrolls sideways."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_compare import make_run, simulated

from quantize.compare import compare_runs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const svgs = [...document.querySelectorAll("svg")], texts = svg => [...svg.querySelectorAll("text")];
  const found = {
    width: innerWidth, scroll: document.documentElement.scrollWidth, figures: svgs.map(svg => box(svg).width),
    over: svgs.flatMap(svg => texts(svg).filter(
      text => box(text).left < box(svg).left - 2 || box(text).right > box(svg).right + 2
    ).map(text => text.textContent)),
    small: Math.min(...svgs.flatMap(svg => texts(svg).map(text => box(text).height))),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  const shown = document.createElement("pre");
  shown.id = "probe";
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
});
</script>"""
COPY = """<script>addEventListener("load", () => setTimeout(() => {
  const shown = document.createElement("pre");
  shown.id = "outer";
  shown.textContent = frames[0].document.getElementById("probe").textContent;
  document.body.append(shown);
}, 500))</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [390, 1000])
def test_the_page_loads_draws_and_fits(width: int, tmp_path: Path) -> None:
    """The page is a frame of that width: a headless window has 500 pixels at least."""
    long = "a_trial_of_a_sweep_whose_name_holds_every_setting_that_was_changed_in_it_"
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / (long + "1"), shift=0.5, task=(10, 1.0))]
    runs += [make_run(tmp_path / (long + "2"), device="a slide rule"), make_run(tmp_path / "运行", **simulated())]
    compare_runs([str(run) for run in runs], str(tmp_path), tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text().replace("</body>", f"{PROBE}</body>")
    content = page.replace("&", "&amp;").replace('"', "&quot;")
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body><iframe width="{width}" height="900" srcdoc="{content}"></iframe>{COPY}</body>')
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shown = re.search(r'<pre id="outer">(.*?)</pre>', done.stdout)
    assert shown and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    found = json.loads(shown[1])
    assert found["requests"] == [] and found["over"] == [] and found["small"] >= 8
    assert width - 20 <= found["width"] <= width and found["scroll"] <= found["width"]
    assert len(found["figures"]) == 5 and all(250 < each <= found["width"] for each in found["figures"])
