"""The labelling server against other pages, nonsense, silence and restarts."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import werkzeug.serving

from align.cli import main
from align.commands import label
from align.feedback.server import make_app
from align.feedback.store import Store
from align.types import AlignError

JSON = {"Content-Type": "application/json"}
GOOD = {"annotator": "ann", "pair": [1, 2], "said": "left", "seconds": 1.5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "answers.sqlite")
    store.add_responses([("q", text, None) for text in "xyz"])
    return store


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),  # another program of this machine
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 403),
        ({"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({}, 200),
    ],
)
def test_no_other_page_may_ask(store: Store, headers: dict[str, str], status: int) -> None:
    client = make_app(store).test_client()
    all_headers = {"Host": "127.0.0.1:8000", **headers}
    reply = client.post(f"/{store.token}/answer", json=GOOD, headers=all_headers)
    assert reply.status_code == status
    assert len(store.answers()) == (status == 200)


@pytest.mark.parametrize(
    "changed",
    [
        {"annotator": "a\nb"},
        {"annotator": "\ud800"},
        {"annotator": ["ann"]},
        {"pair": [True, 2]},
        {"pair": [1, 2, 3]},
        {"pair": [1, 10**30]},
        {"pair": {"1": 2}},
        {"said": ["left"]},
        {"said": None},
        {"seconds": "1"},
        {"seconds": -1},
        {"seconds": True},
        {"seconds": None},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": 10**400},
    ],
)
def test_answers_that_make_no_sense_are_refused(store: Store, changed: dict) -> None:
    client, at = make_app(store).test_client(), f"/{store.token}/answer"
    assert client.post(at, json=GOOD | changed).status_code == 400
    infinite = json.dumps(GOOD).replace("1.5", "1e999")  # JSON, though no number
    assert client.post(at, data=infinite, headers=JSON).status_code == 400
    assert store.answers() == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"1", 400),
        (b"null", 400),
        (b"NaN", 400),
        (b'{"annotator": "ann"', 400),
        (b"\xff\xfe{}", 400),
        (b"[" * 16_000, 400),
        (b'{"a":' * 3_000, 400),
        (b'{"annotator": "ann", "a": "' + b"x" * 20_000 + b'"}', 413),
    ],
)
@pytest.mark.parametrize("path", ["answer", "undo"])
def test_bodies_that_are_no_objects_are_refused(
    store: Store, path: str, body: bytes, status: int
) -> None:
    client, at = make_app(store).test_client(), f"/{store.token}/{path}"
    assert client.post(at, data=body, headers=JSON).status_code == status
    good = json.dumps(GOOD)
    assert client.post(at, data=good, content_type="text/plain").status_code == 400
    assert client.post(at, data=good, headers=JSON).status_code == 200


def test_an_answer_that_cannot_be_written_is_no_answer(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page asks again at a 5xx; it is never told that the answer is there."""
    client, at = make_app(store).test_client(), f"/{store.token}/answer"
    store._db.execute("PRAGMA query_only = 1")  # what a full or read-only disk does
    assert client.post(at, json=GOOD).status_code == 503
    assert "an answer could not be written" in capsys.readouterr().err
    store._db.execute("PRAGMA query_only = 0")
    assert client.post(at, json=GOOD).status_code == 200
    assert len(store.answers()) == 1


def test_only_the_pages_own_script_runs(store: Store) -> None:
    page = make_app(store).test_client().get(f"/{store.token}/")
    text, policy = page.get_data(as_text=True), page.headers["Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r"\son\w+=", text)  # a handler in an attribute would be blocked


# ---------------------------------------------------------------- the server


@contextmanager
def serving(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """`label.serve` in a thread; its port."""
    made: Queue[Any] = Queue()
    original = werkzeug.serving.make_server

    def spying(*args: Any, **named: Any) -> Any:
        server = original(*args, **named)
        made.put(server)
        return server

    options = {"goal": None, "overlap": 0.2, "port": None}
    with monkeypatch.context() as patch:
        patch.setattr(werkzeug.serving, "make_server", spying)
        thread = threading.Thread(target=label.serve, args=(store,), kwargs=options, daemon=True)
        thread.start()
        server = made.get(timeout=20)
        try:
            yield server.port
        finally:
            server.shutdown()
            thread.join(timeout=20)


def test_a_page_finds_the_server_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store, monkeypatch) as first:
        pass
    with serving(Store(store.path), monkeypatch) as second:
        assert second == first
    taken = socket.create_server(("127.0.0.1", first))
    with serving(Store(store.path), monkeypatch) as third:
        assert third != first
    taken.close()
    with serving(Store(store.path), monkeypatch) as fourth:
        assert fourth == third
    with pytest.raises(AlignError, match="--port 70000: cannot be listened on"):
        label.serve(store, goal=None, overlap=0.2, port=70_000)


def test_two_servers_on_one_file_are_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    with serving(store, monkeypatch):
        assert main(["label", "--answers", str(store.path)]) == 2
        assert "another `align label` serves it" in capsys.readouterr().err
        out = str(tmp_path / "out.jsonl")  # reading it is no harm
        assert main(["label", "--answers", str(store.path), "--export", out]) == 0
    with serving(Store(store.path), monkeypatch):
        pass  # the lock went with the server


def test_a_connection_that_says_nothing_is_closed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent from the start, after half a request, and after half a body."""
    monkeypatch.setattr(label, "IDLE_SECONDS", 0.5)
    post = f"POST /{store.token}/answer HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
    half = post + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    with serving(store, monkeypatch) as port:
        for said in (b"", b"GET /", half):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
                line.sendall(said)
                while line.recv(4096):
                    pass  # ends when the server closes it
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        asked.request("POST", f"/{store.token}/answer", json.dumps(GOOD), JSON)
        with asked.getresponse() as reply:  # others are answered all the same
            assert (reply.status, json.load(reply)["done"]) == (200, 1)
    assert len(store.answers()) == 1


def test_names_of_models_belong_to_responses(tmp_path: Path, capsys: Any) -> None:
    samples, answers = tmp_path / "samples.jsonl", str(tmp_path / "answers.sqlite")
    for models in ("mn", [1, 2], {"a": 1}):  # letters of a string are no models
        row = {"prompt": "q", "responses": ["x", "y"], "models": models}
        samples.write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert main(["label", str(samples), "--answers", answers]) == 2
        assert "samples.jsonl:1: models: not a name" in capsys.readouterr().err
