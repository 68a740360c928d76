"""Serve the labelling page: a Flask app for people on this machine only.

It listens on the loopback address, and accepts requests that name that address (so that no web page
reaches it through a domain of its own), that no other page sent, and whose path begins with a
random token. A malformed request is answered with 400 and changes nothing.
"""

from __future__ import annotations

import hmac
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any, NoReturn

from flask import Flask, Response, abort, jsonify, request

from align.base.console import complain
from align.base.page_policy import content_security_policy
from align.feedback.agreement import krippendorff_alpha
from align.feedback.choosing import Chooser
from align.feedback.store import SAID, Answer, Store

PAGE = Path(__file__).with_name("page.html")
LONGEST_NAME = 40
ALLOWED = f"said: one of {', '.join(SAID)}; pair: two responses to one prompt"
LONGEST_BODY = 16_384
LONGEST_ANSWER = 1e7
"""Largest valid time for one answer, seconds (four months)."""
HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(store: Store, *, goal: int | None = None, overlap: float = 0.2) -> Flask:
    """Build the app over one store.

    Args:
        store: Source of responses and destination of answers.
        goal: Answers asked of each annotator; None asks for every pair.
        overlap: Share of an annotator's pairs that somebody else has answered.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LONGEST_BODY
    token, labelling = store.token, _Labelling(store, goal=goal, overlap=overlap)
    html = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(html, connect="'self'") + "; frame-ancestors 'none'"

    @app.before_request
    def only_from_here() -> None:
        host = request.host.rpartition(":")[0] or request.host
        if host not in ("127.0.0.1", "localhost"):
            abort(403)
        sender = request.headers.get("Origin", f"http://{request.host}")
        asked_by = request.headers.get("Sec-Fetch-Site", "same-origin")
        if sender != f"http://{request.host}" or asked_by not in ("same-origin", "none"):
            abort(403)  # a page of another origin, or another program's on this machine
        given = (request.view_args or {}).get("given", "")
        if not hmac.compare_digest(given.encode(), token.encode()):
            abort(404)

    @app.after_request
    def closed(response: Response) -> Response:
        response.headers.update({**HEADERS, "Content-Security-Policy": policy})
        return response

    @app.get("/<given>/")
    def page(given: str) -> Response:
        return Response(html, mimetype="text/html")

    @app.get("/<given>/state")
    def current(given: str) -> Response:
        return jsonify(labelling.current(_annotator(request.args.get("annotator"))))

    @app.post("/<given>/answer")
    def answer(given: str) -> Response:
        body = _body()
        return jsonify(labelling.answered(_answer(body), seconds=_seconds(body)))

    @app.post("/<given>/undo")
    def undo(given: str) -> Response:
        return jsonify(labelling.undone(_annotator(_body().get("annotator"))))

    @app.errorhandler(sqlite3.Error)
    def not_written(error: sqlite3.Error) -> tuple[str, int]:
        complain(f"{store.path}: an answer could not be written: {error}; the page tries again")
        return "not written", 503

    return app


class _Labelling:
    """State of the answers and the next question; one request at a time.

    Every method returns the page's next content.
    """

    def __init__(self, store: Store, *, goal: int | None, overlap: float) -> None:
        self.store, self.goal = store, goal
        self.texts = {r.id: r for r in store.responses()}
        self.chooser = Chooser(store.responses(), store.answers(), overlap=overlap)
        self.pairs = set(self.chooser.pairs)
        self.lock = threading.Lock()

    def current(self, annotator: str) -> dict[str, Any]:
        with self.lock:
            return self._shown(annotator)

    def answered(self, answer: Answer, *, seconds: float) -> dict[str, Any]:
        if answer.pair not in self.pairs:
            abort(400, ALLOWED)
        with self.lock:
            if self.store.add_answer(answer, seconds=seconds):  # a second click changes nothing
                self.chooser.add(answer)
            return self._shown(answer.annotator)

    def undone(self, annotator: str) -> dict[str, Any]:
        with self.lock:
            taken_back = self.store.undo(annotator)
            if taken_back is not None:
                self.chooser.remove(taken_back)
            return self._shown(annotator)

    def _shown(self, annotator: str) -> dict[str, Any]:
        """Return the next pair, this annotator's progress, and the agreement of all."""
        chooser = self.chooser
        total = len(chooser.pairs) if self.goal is None else min(self.goal, len(chooser.pairs))
        done = chooser.done(annotator)
        pair = chooser.next(annotator) if done < total else None
        answers = [a for a in self.store.answers() if a.said != "skip"]
        shown: dict[str, Any] = {"done": done, "total": total, **_agreement(answers)}
        if pair is not None:
            left, right = (self.texts[id] for id in pair)
            prompt = json.loads(left.prompt)
            turns = prompt if isinstance(prompt, list) else [{"role": "", "content": prompt}]
            shown |= {"prompt": turns, "left": left.text, "right": right.text, "pair": pair}
        return shown


def _annotator(name: Any) -> str:
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        abort(400, "annotator: a name of 1 to 40 characters")
    return str(name)


def _body() -> dict[str, Any]:
    """Parse the request's JSON object.

    Its content type must be JSON, which a form of another site cannot send without a preflight.
    """
    if request.mimetype != "application/json":
        abort(400, "wanted application/json")
    try:
        found = json.loads(request.get_data(), parse_constant=_refuse)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        abort(400, "the body is no JSON")
    if not isinstance(found, dict):
        abort(400, "the body is no JSON object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")  # Python's parser accepts NaN and Infinity


def _seconds(body: dict[str, Any]) -> float:
    given = body.get("seconds", 0.0)
    if type(given) not in (int, float) or not 0 <= given <= LONGEST_ANSWER:
        abort(400, "seconds: a number, 0 or more")
    return float(given)


def _answer(body: dict[str, Any]) -> Answer:
    name, said, pair = _annotator(body.get("annotator")), body.get("said"), body.get("pair")
    if said not in SAID or not isinstance(pair, list) or [type(i) for i in pair] != [int, int]:
        abort(400, ALLOWED)
    return Answer(name, pair[0], pair[1], said)


def _agreement(answers: list[Answer]) -> dict[str, Any]:
    """Measure agreement over pairs that two or more people have answered."""
    said: dict[tuple[int, int], list[float]] = {}
    for answer in answers:
        said.setdefault(answer.pair, []).append(answer.outcome())
    shared = [unit for unit in said.values() if len(unit) > 1]
    same = sum(len(set(unit)) == 1 for unit in shared)
    alpha = krippendorff_alpha(shared)
    return {
        "annotators": len({a.annotator for a in answers}),
        "shared": len(shared),
        "same": same,
        "alpha": None if alpha != alpha else round(alpha, 2),
    }
