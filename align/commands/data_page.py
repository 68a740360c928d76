"""Print ``align data check`` for people: rows in colour, then the findings."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from align.base.console import printable
from align.data.formats.unread import not_read
from align.data.inspect.check import Inspection
from align.data.inspect.findings import Finding
from align.data.tokens.findings import Shown

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
TRAINED, SEEN = "black on green", "dim"
LONGEST = 1200
"""Most characters shown of one side of a row."""


def print_page(found: Inspection) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for path, name in found.formats.items():
        console.print(_text(f"{path}: read as {found.kind}, format: {name}"))
    for report in found.reports:
        unread = not_read(report.unread)
        usable = f"  {report.rows_kept:,} of {report.rows_read:,} rows usable{unread}"
        console.print(_text(usable))
    if found.tokens:
        t = {name: f"{value:,.0f}" for name, value in found.tokens.items()}
        console.print(f"  {t['rows']} rows fit: {t['tokens']} tokens, {t['trained']} trained on")
        if "median_row" in t:
            console.print(
                f"  tokens of a row: median {t['median_row']}, 95% within {t['p95_row']}, "
                f"longest {t['longest_row']}"
            )
        console.print("\nas the model sees them:", Text("trained on", TRAINED), Text("seen", SEEN))
    elif found.kind != "judgements":
        console.print("  --model FOLDER shows rows as tokens, and checks lengths and end tokens")
    for row in found.shown:
        console.print(_row(row))
    console.print()
    for finding in found.findings:
        _print_finding(console, finding)
    counts = [sum(f.level == level for f in found.findings) for level in COLOURS]
    console.print("{} errors, {} warnings, {} notes".format(*counts))


def _text(text: str, style: str = "") -> Text:
    """Make text of a file printable: neither the terminal nor rich's markup interprets it."""
    return Text(printable(text), style=style)


def _row(row: Shown) -> Text:
    text = _text(f"\n{row.id}\n")
    for name, tokens in row.parts:
        text.append(_text(f"{name:>9} " if name else "", "bold"))
        room = LONGEST
        for i, (piece, trained) in enumerate(tokens):
            # every other token in italics, so that their bounds show
            style = TRAINED + (" italic" if i % 2 else "") if trained else SEEN
            text.append(_text(piece.replace("\n", "↵\n").replace("\t", "→"), style))
            room -= len(piece)
            if room < 0:
                text.append(f" ... {len(tokens) - i - 1} more tokens")
                break
        text.append("\n")
    return text


def _print_finding(console: Console, finding: Finding) -> None:
    level = _text(f"{finding.level:>8}", COLOURS[finding.level])
    console.print(level, _text(f"{finding.count:,} x {finding.what}; {finding.advice}"))
    for place in finding.places:
        console.print(_text(f"{'':>11}{place}", "dim"))
