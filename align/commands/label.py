"""``align label``: compare responses two by two in a browser, blind; answers go to one file."""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from align.base.console import say
from align.base.files import require_writable
from align.base.progress import warn
from align.commands.files import write_rows
from align.config.sections import DataSource
from align.types import AlignError

HOST = "127.0.0.1"
IDLE_SECONDS = 15
"""Time after which a silent connection is closed."""

EPILOG = """\
  align label runs/tiny/pairs/samples.jsonl --answers answers.sqlite
  align label --answers answers.sqlite --export judgements.jsonl
  align data rank judgements.jsonl --pairs my_pairs.jsonl
"""


def add_parser(commands: Any) -> None:
    label = commands.add_parser(
        "label",
        help="compare responses in a browser",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    label.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="rows of prompt + response (and model), or of prompt + responses (and models)",
    )
    label.add_argument("--answers", required=True, metavar="FILE", help="an SQLite file, kept")
    label.add_argument("--export", metavar="FILE", help="write judgements, a new .jsonl, and end")
    label.add_argument("--goal", type=int, help="answers asked of each annotator (every pair)")
    label.add_argument(
        "--overlap", type=float, default=0.2, help="share that others have answered too (0.2)"
    )
    label.add_argument("--port", type=int, help="else the last one of this file, or a free one")
    label.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from align.feedback.store import Store

    answers = Path(args.answers)
    if not args.files and not answers.is_file():
        raise AlignError(f"--answers {answers}: no such file yet; name responses to compare")
    if not 0 <= args.overlap <= 1 or (args.goal is not None and args.goal < 1):
        raise AlignError("--overlap has to be between 0 and 1, and --goal 1 or more")
    if args.export:
        require_writable(Path(args.export), "--export", new=True)
    rows = [row for file in args.files for row in read_responses(file)]
    store = Store(answers)
    store.add_responses(rows)
    if args.export:
        judgements = store.judgements()
        write_rows(Path(args.export), judgements)
        say(f"{args.export}: {len(judgements)} judgements")
        return
    serve(store, goal=args.goal, overlap=args.overlap, port=args.port)


def read_responses(file: str) -> Iterator[tuple[Any, str, str | None]]:
    """Yield (prompt, text, model) of every response of a file."""
    from align.data.formats.fields import Fields
    from align.data.formats.unread import unread_columns
    from align.data.sources import BadRow, Row, read_source

    for row in read_source(DataSource(path=file)):
        try:
            if not isinstance(row, Row):
                raise row
            values = {name: value for name, value in row.values.items() if value is not None}
            fields = Fields(values, row.where, "preference")
            prompt = fields.text("prompt")
            many = "responses" in fields
            texts = fields.get("responses") if many else [fields.get("response")]
            if not isinstance(texts, list):
                fields.bad("responses", "not a list")
            key = "models" if many else "model"
            models = (fields.value(key) or []) if many else [fields.value(key)]
            if not isinstance(models, list) or any(type(m) not in (str, NoneType) for m in models):
                fields.bad(key, "not a name of a model for each response")
            for n, text in enumerate(texts):
                name = models[n] if n < len(models) else None
                yield prompt, fields.string("response", text), name
            unread_columns(fields)
        except BadRow as error:
            raise AlignError(str(error)) from None


def serve(store: Any, *, goal: int | None, overlap: float, port: int | None) -> None:
    """Serve on the loopback address until Ctrl-C.

    Without ``port``, use the port of the last time, so that an open page keeps working.
    """
    try:
        from werkzeug.serving import WSGIRequestHandler, make_server

        from align.feedback.server import make_app
    except ImportError as error:
        raise AlignError("label: needs Flask; run pip install 'align-rlhf[label]'") from error

    class Handler(WSGIRequestHandler):
        timeout = IDLE_SECONDS  # else every silent connection keeps a thread

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # it would log the token
    with store.served_alone(), _listening(store.port, port) as listener:
        app = make_app(store, goal=goal, overlap=overlap)
        store.port = number = listener.getsockname()[1]
        handle = listener.fileno()
        with make_server(
            HOST, number, app, threaded=True, request_handler=Handler, fd=handle
        ) as server:
            say(f"http://{HOST}:{number}/{store.token}/")
            say(f"answers go to {store.path}; end with Ctrl-C")
            server.serve_forever()


def _listening(last: int | None, asked: int | None) -> socket.socket:
    """Open a socket on the requested port, else on the last one, else on a free one."""
    try:
        return socket.create_server((HOST, last if asked is None and last else asked or 0))
    except (OSError, OverflowError) as error:
        if asked is not None or last is None:
            raise AlignError(f"--port {asked}: cannot be listened on; choose another") from error
    warn(f"port {last}, where a page may still be open, is taken: open the page at the new address")
    return socket.create_server((HOST, 0))
