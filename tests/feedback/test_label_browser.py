"""The labelling page in a real browser: 60 pairs by key and by click, the server killed half-way.

Needs ``chromium`` and ``chromedriver`` on the path; skipped, and said so, where they are not.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the path"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
KEYS = {"ArrowLeft": "\ue012", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """The few commands of the WebDriver protocol that the test needs."""

    def __init__(self, port: int, profile: Path) -> None:
        self.at = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.at += f"/session/{self.send('session', wanted)['sessionId']}"

    def send(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        url = f"{self.at}/{path}".rstrip("/")
        asked = urllib.request.Request(url, data=data, method=method)
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=120) as reply:
            return json.load(reply)["value"]

    def run(self, script: str) -> Any:
        return self.send("execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        found = self.send("element", {"using": "css selector", "value": selector})
        self.send(f"element/{found[ELEMENT]}/click")

    def press(self, key: str) -> None:
        key = KEYS.get(key, key)
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.send("actions", {"actions": [{"type": "key", "id": "k", "actions": strokes}]})

    def wait_for(self, script: str) -> None:
        for _ in range(600):
            if self.run(f"return Boolean({script})"):
                return
            time.sleep(0.05)
        pytest.fail(f"never came true: {script}; {self.run('return document.body.innerText')}")

    def screenshot(self, path: Path, *, width: int, height: int, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        path.write_bytes(base64.b64decode(self.send("screenshot", method="GET")))

    def cdp(self, command: str, **params: Any) -> None:
        self.send("goog/cdp/execute", {"cmd": command, "params": params})


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    port = free_port()
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                opened = Browser(port, tmp_path / "profile")
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(0.1)
        yield opened
        opened.send("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait()


def start(samples: Path, answers: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "align", "label", str(samples), "--answers", str(answers)]
    server = subprocess.Popen([*command, f"--port={port}"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def rows_of(answers: Path) -> list[tuple[str, ...]]:
    with sqlite3.connect(answers) as db:
        return db.execute(
            "SELECT annotator, said FROM answers WHERE undone = 0 ORDER BY id"
        ).fetchall()


def test_sixty_pairs_and_a_kill_in_the_middle(browser: Browser, tmp_path: Path) -> None:
    samples, answers = tmp_path / "samples.jsonl", tmp_path / "answers.sqlite"
    long = "A longer answer, so that the page has something to wrap and to scroll. " * 6
    rows = [
        {
            "prompt": f"Question {n}: <b>what</b> is ice?",
            "responses": [f"Frozen water ({n}). {long if n % 3 else ''}", f"A cheese ({n})."],
        }
        for n in range(60)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    port = free_port()
    server, url = start(samples, answers, port)
    expected: list[str] = []
    acts = [("ArrowLeft", "left"), ("2", "right"), ("0", "tie"), ("s", "skip"), ("1", "left")]
    try:
        browser.send("url", {"url": url})
        browser.run("document.getElementById('annotator').value = 'ann'")
        browser.click("#name button")
        browser.wait_for("document.body.dataset.pair")
        assert browser.run("return document.querySelectorAll('#prompt b').length") == 0
        for number in range(60):
            if number == 30:  # no warning, no chance to write
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                assert rows_of(answers) == [("ann", said) for said in expected]
            said = answer(browser, number, acts)
            expected.append(said)
            if number == 30:
                browser.wait_for("document.body.innerText.includes('Not saved yet')")
                server, again = start(samples, answers, port)
                assert again == url  # the open page goes on by itself
            browser.wait_for(f"document.getElementById('bar').value == {number + 1}")
        assert rows_of(answers) == [("ann", said) for said in expected]
        browser.wait_for("document.body.innerText.includes('All done')")
        browser.press("u")
        browser.wait_for("document.getElementById('bar').value == 59")
        assert len(rows_of(answers)) == 59
        shots = Path(os.environ.get("ALIGN_SCREENSHOTS", tmp_path))
        for width, height in ((390, 844), (1280, 800)):
            for dark in (False, True):
                name = f"label-{width}-{'dark' if dark else 'light'}.png"
                browser.screenshot(shots / name, width=width, height=height, dark=dark)
                assert browser.run(
                    "return document.documentElement.scrollWidth <= window.innerWidth"
                ), "the page is wider than the screen"
        browser.send("url", {"url": url})  # a reload resumes
        browser.wait_for("document.getElementById('bar').value == 59")
    finally:
        server.kill()
        server.wait()


def answer(browser: Browser, number: int, acts: list[tuple[str, str]]) -> str:
    """Every third by the mouse, the others by a key."""
    if number % 3 == 2:
        said = ("left", "right", "tie", "skip")[number % 4]
        browser.click(f"[data-said={said}]")
        return said
    key, said = acts[number % len(acts)]
    browser.press(key)
    return said
