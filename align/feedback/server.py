"""The labelling page: a Flask app for people on this machine, and nobody else.

It answers on the loopback address only, to requests that name that address (so that no page of the
web can reach it by a name of its own) and whose path begins with a random token.
"""

from __future__ import annotations

import hmac
import json
import threading
from pathlib import Path
from typing import Any

from flask import Flask, Response, abort, jsonify, request

from align.feedback.agreement import krippendorff_alpha
from align.feedback.choosing import Chooser
from align.feedback.store import SAID, Answer, Store

PAGE = Path(__file__).with_name("page.html")
LONGEST_NAME = 40
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(store: Store, *, goal: int | None = None, overlap: float = 0.2) -> Flask:
    """The app over one store.

    Args:
        store: Where responses come from and answers go.
        goal: Answers asked of each annotator; None is every pair.
        overlap: Share of an annotator's pairs that somebody else has answered.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 16_384
    token = store.token
    chooser = Chooser(store.responses(), store.answers(), overlap=overlap)
    texts = {r.id: r for r in store.responses()}
    lock = threading.Lock()

    @app.before_request
    def only_from_here() -> None:
        host = request.host.rpartition(":")[0] or request.host
        if host not in ("127.0.0.1", "localhost"):
            abort(403)
        given = (request.view_args or {}).get("given", "")
        if not hmac.compare_digest(given.encode(), token.encode()):
            abort(404)

    @app.after_request
    def closed(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    def annotator(name: Any) -> str:
        name = name.strip() if isinstance(name, str) else ""
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            abort(400, "annotator: a name of 1 to 40 characters")
        return str(name)

    def state(name: str) -> Response:
        """What the page shows now: the next pair, how far this annotator is, how far all agree."""
        total = len(chooser.pairs) if goal is None else min(goal, len(chooser.pairs))
        done = chooser.done(name)
        pair = chooser.next(name) if done < total else None
        answers = [a for a in store.answers() if a.said != "skip"]
        shown: dict[str, Any] = {"done": done, "total": total, **_agreement(answers)}
        if pair is not None:
            left, right = (texts[id] for id in pair)
            prompt = json.loads(left.prompt)
            turns = prompt if isinstance(prompt, list) else [{"role": "", "content": prompt}]
            shown |= {"prompt": turns, "left": left.text, "right": right.text, "pair": pair}
        return jsonify(shown)

    @app.get("/<given>/")
    def page(given: str) -> Response:
        return Response(PAGE.read_text(encoding="utf-8"), mimetype="text/html")

    @app.get("/<given>/state")
    def current(given: str) -> Response:
        with lock:
            return state(annotator(request.args.get("annotator")))

    @app.post("/<given>/answer")
    def answer(given: str) -> Response:
        body = request.get_json()
        name, said, pair = annotator(body.get("annotator")), body.get("said"), body.get("pair")
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
        if said not in SAID or not is_pair or tuple(sorted(pair)) not in set(chooser.pairs):
            abort(400, f"said: one of {', '.join(SAID)}; pair: two responses to one prompt")
        seconds = body.get("seconds")
        with lock:
            given_answer = Answer(name, pair[0], pair[1], said)
            took = float(seconds) if isinstance(seconds, int | float) else 0.0
            if store.add_answer(given_answer, seconds=took):  # a second click changes nothing
                chooser.add(given_answer)
            return state(name)

    @app.post("/<given>/undo")
    def undo(given: str) -> Response:
        name = annotator(request.get_json().get("annotator"))
        with lock:
            taken_back = store.undo(name)
            if taken_back is not None:
                chooser.remove(taken_back)
            return state(name)

    return app


def _agreement(answers: list[Answer]) -> dict[str, Any]:
    """Over pairs that two or more people have answered."""
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
