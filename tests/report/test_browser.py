"""The page in a browser: at a phone's, a tablet's and a desk's width, in light and dark.

Skipped where there is no Chromium; test_page.py holds what needs none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"
)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDTHS = (360, 768, 1280)

BEFORE = "<script>window.alerts = 0; window.alert = () => { window.alerts += 1; };</script>"
# what a reader does and sees, told to the page around
PROBE = """<script>
addEventListener("load", () => {
  const seen = { width: innerWidth, alerts };
  const visible = () => [...document.querySelectorAll(".sample")].filter((s) => !s.hidden);
  const gains = () => visible().map((s) => Number(s.dataset.gain));
  const set = (id, value, kind) => {
    const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event(kind));
  };
  seen.scrollWidth = document.documentElement.scrollWidth;
  seen.first = visible().length;
  document.getElementById("more").click();
  seen.more = visible().length;
  seen.focus = document.activeElement.className;
  set("order", "best", "change"); seen.best = gains();
  set("order", "worst", "change"); seen.worst = gains();
  set("query", "Verse ALERT('out')", "input"); seen.found = visible().length;
  seen.count = document.getElementById("count").textContent;
  set("query", "no such words", "input"); seen.none = visible().length;
  set("query", "", "input");
  const marks = document.getElementById("marks");
  const missing = document.querySelector(".sample:not([hidden]) del");
  seen.marked = getComputedStyle(missing).display; marks.click();
  seen.unmarked = getComputedStyle(missing).display; marks.click();
  seen.requests = performance.getEntriesByType("resource").map((r) => r.name);
  const rgb = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  seen.contrast = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || e.closest("script, style, title") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const drawn = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(rgb(drawn)), light(behind(e))].sort((x, y) => y - x);
    const name = e.tagName.toLowerCase() + (e.className.baseVal ?? "." + e.className);
    seen.contrast[name] = Math.min(seen.contrast[name] ?? 99, (a + 0.05) / (b + 0.05));
  }
  seen.background = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""


def look(page: Path, folder: Path, *, dark: bool) -> dict[int, dict[str, Any]]:
    """Width -> what was seen there, by frames of these widths."""
    text = page.read_text(encoding="utf-8")
    text = text.replace("</head>", f"{BEFORE}</head>").replace("</body>", f"{PROBE}</body>")
    (folder / "probed.html").write_text(text, encoding="utf-8")
    frames = "".join(
        f'<iframe src="probed.html" width="{w}" height="800"></iframe>' for w in WIDTHS
    )
    listen = "onmessage = (e) => { document.body.append(Object.assign("
    listen += 'document.createElement("pre"), { textContent: e.data })); };'
    (folder / "frames.html").write_text(f"<body><script>{listen}</script>{frames}</body>")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, scheme, profile, "--virtual-time-budget=30000", "--dump-dom"]
    printed = subprocess.run(
        [*command, f"file://{folder / 'frames.html'}"], capture_output=True, text=True, timeout=300
    )
    seen = [json.loads(html.unescape(s)) for s in re.findall(r"<pre>(.*?)</pre>", printed.stdout)]
    assert len(seen) == len(WIDTHS), printed.stderr[-2000:]
    return {s["width"]: s for s in seen}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(page: Path, tmp_path: Path, dark: bool) -> None:
    seen = look(page, tmp_path, dark=dark)
    assert set(seen) == set(WIDTHS)
    for width, s in seen.items():
        assert s["scrollWidth"] <= width, f"{width} px: the page scrolls sideways"
        assert s["alerts"] == 0  # an output with a script in it is shown, not run
        assert s["requests"] == []
        assert (s["first"], s["more"], s["focus"]) == (20, 40, "sample")
        assert s["best"] == sorted(s["best"], reverse=True)
        assert s["worst"] == sorted(s["worst"])
        assert s["worst"][0] < 0 < s["best"][0]
        assert (s["found"], s["none"]) == (1, 0)
        assert s["count"] == "1 of 1 prompts shown"
        assert (s["marked"], s["unmarked"]) == ("inline", "none")
        # WCAG 2.2 AA for text
        low = {name: round(c, 2) for name, c in s["contrast"].items() if c < 4.5}
        assert low == {}
        assert len(s["contrast"]) > 20
    assert seen[360]["background"] == ("rgb(19, 21, 23)" if dark else "rgb(251, 251, 250)")
