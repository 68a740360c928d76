"""``align label``: compare responses two by two in a browser, blind; answers go to one file."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.commands.files import write_rows
from align.console import say
from align.files import require_writable
from align.types import AlignError, DataSource

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
    label.add_argument("--port", type=int, default=0, help="a free one")
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
    """(prompt, text, model) of every response of a file."""
    from align.data.fields import Fields
    from align.data.formats import BadRow, Row, read_source
    from align.data.unread import unread_columns

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
            models = values.get("models", []) if many else [values.get("model")]
            for n, text in enumerate(texts):
                name = models[n] if n < len(models) else None
                yield prompt, fields.string("response", text), name
            unread_columns(fields)
        except BadRow as error:
            raise AlignError(str(error)) from None


def serve(store: Any, *, goal: int | None, overlap: float, port: int) -> None:
    try:
        from werkzeug.serving import make_server

        from align.feedback.server import make_app
    except ImportError as error:
        raise AlignError("label: needs Flask; run pip install 'align-rlhf[label]'") from error
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would log the token
    app = make_app(store, goal=goal, overlap=overlap)
    try:
        server = make_server("127.0.0.1", port, app, threaded=True)
    except (OSError, SystemExit) as error:
        raise AlignError(f"--port {port}: cannot be listened on; choose another") from error
    say(f"http://127.0.0.1:{server.server_port}/{store.token}/")
    say(f"answers go to {store.path}; end with Ctrl-C")
    server.serve_forever()
