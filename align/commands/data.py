"""``align data check|convert|rank|trace``: check, rewrite, rank and trace data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.base.console import say
from align.base.files import require_writable
from align.commands import rank, trace
from align.commands.files import write_rows
from align.config.sections import DataSource
from align.types import AlignError

if TYPE_CHECKING:
    from align.data.inspect.check import Inspection

OPTIONS = {
    "base_model=FOLDER": "--base-model FOLDER",
    "trust_remote_code=true": "--trust-remote-code",
}
"""A recipe's keys in advice about a model -> the options of ``data check``."""
EPILOG = """\
  align data check pairs.jsonl --model runs/tiny/sft/model --test held_out.jsonl
  align data convert hh.jsonl.gz --to messages -o pairs.jsonl
  align data rank judgements.jsonl --pairs pairs.jsonl
  align data trace runs/tiny/sft --step 17

check ends with 1 if there is an error (with --strict: or a warning), for CI.
"""


def add_parser(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="check, convert, rank or trace data",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="show how the data are read, and their problems")
    _add_files(check)
    check.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out rows")
    check.add_argument("--model", help="its tokenizer shows rows as tokens (folder or hub id)")
    check.add_argument("--base-model", metavar="MODEL", help="base of the adapter --model")
    check.add_argument("--trust-remote-code", action="store_true", help="run --model's own code")
    check.add_argument("--max-tokens", type=int, default=1024, help="data.max_tokens (1024)")
    check.add_argument("--rows", type=int, default=5, help="rows shown (5)")
    check.add_argument("--json", action="store_true", help="one JSON object instead of a page")
    check.add_argument("--strict", action="store_true", help="warnings count as errors")
    check.set_defaults(run=run_check)
    convert = actions.add_parser("convert", help="rewrite rows in another format, as JSONL")
    _add_files(convert)
    convert.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="strings, messages, conversations, hh, sharegpt, alpaca, ranking, text, prompts",
    )
    convert.add_argument("-o", "--output", required=True, metavar="FILE", help="a new .jsonl")
    convert.add_argument("--skip-bad-rows", action="store_true", help="count and skip them")
    convert.set_defaults(run=run_convert)
    rank.add_parser(actions)
    trace.add_parser(actions)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, a folder or a hub set")
    parser.add_argument("--kind", choices=["sft", "preference", "prompt"], help="kind of the rows")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="such as prompt=question"
    )


def sources(files: Sequence[str], columns: Sequence[str]) -> tuple[DataSource, ...]:
    renamed = {}
    for column in columns:
        ours, sign, theirs = column.partition("=")
        if not sign or not ours or not theirs:
            raise AlignError(f"--columns {column}: wanted ours=theirs, such as prompt=question")
        renamed[ours] = theirs
    return tuple(DataSource(path=file, columns=renamed) for file in files)


def run_check(args: argparse.Namespace) -> int:
    from align.data.formats.columns import is_judgement
    from align.data.inspect.check import first_row, inspect
    from align.feedback.checking import inspect_judgements

    tokenizer = _tokenizer(args)
    given = sources(args.files, args.columns)
    if args.kind is None and all(is_judgement(first_row(source).values) for source in given):
        return _report(inspect_judgements(args.files), args)
    found = inspect(
        given,
        kind=args.kind,
        test=sources(args.test, args.columns),
        tokenizer=tokenizer,
        max_tokens=args.max_tokens,
        num_shown=args.rows,
    )
    return _report(found, args)


def _tokenizer(args: argparse.Namespace) -> Any:
    """Load the tokenizer of ``--model``; advice about a recipe's keys becomes that about options.

    Raises:
        AlignError: It cannot be loaded, or an option about it has no effect.
    """
    if not args.model:
        if args.base_model or args.trust_remote_code:
            option = "--base-model" if args.base_model else "--trust-remote-code"
            raise AlignError(f"{option}: has no effect without --model; name the model too")
        return None
    from align.models import load_tokenizer
    from align.models.adapters import find_adapter

    options = {"trust_remote_code": args.trust_remote_code, "base_model": args.base_model}
    try:
        tokenizer = load_tokenizer(args.model, **options)
        adapter = find_adapter(args.model, base_model=args.base_model)
    except AlignError as error:
        said = str(error)
        for key, option in OPTIONS.items():
            said = said.replace(key, option)
        raise AlignError(said) from error
    if args.base_model and adapter is None:
        raise AlignError("--base-model: has no effect, for --model is no adapter; remove it")
    return tokenizer


def _report(found: Inspection, args: argparse.Namespace) -> int:
    if args.json:
        say(json.dumps(asdict(found), ensure_ascii=False, indent=1))
    else:
        from align.commands.data_page import print_page

        print_page(found)
    failing = ("error", "warning") if args.strict else ("error",)
    return int(found.worst() in failing)


def run_convert(args: argparse.Namespace) -> None:
    from align.data.examples import load_examples
    from align.data.inspect.check import kind_of_sources
    from align.data.inspect.convert import convert

    output = Path(args.output)
    if output.suffix != ".jsonl":
        raise AlignError(f"-o {output}: must end in .jsonl; rows are written one a line")
    require_writable(output, "-o", new=True)
    given = sources(args.files, args.columns)
    kind = args.kind or kind_of_sources(given)
    on_bad_row: Literal["skip", "stop"] = "skip" if args.skip_bad_rows else "stop"
    try:
        loaded = load_examples(given, kind=kind, on_bad_row=on_bad_row)
    except AlignError as error:
        flag = str(error).replace("set data.on_bad_row=skip", "add --skip-bad-rows")
        raise AlignError(flag) from error
    write_rows(output, [convert(example, args.to) for example in loaded.examples])
    say(f"{output}: {len(loaded.examples)} rows ({kind}), as {args.to}")
    for report in loaded.reports:
        if report.unread:
            say(f"  {report.path}: not written: {', '.join(report.unread)}")
        for reason, count in report.dropped.items():
            say(f"  {report.path}: left out {count} rows: {reason}")
