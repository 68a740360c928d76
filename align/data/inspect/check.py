"""``align data check``: what a data set is, how it will be read, and what is wrong with it.

Most failures of alignment runs are silent data failures, so every finding has a count, places
and what to do. Nothing is changed. Rows come through the loader and ``chat.py``, as in training:
what is shown here is what will be trained on.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from align.config.sections import DataSource
from align.data.examples import load_examples, prompt_key
from align.data.formats.columns import Example, format_name, kind_of
from align.data.formats.fields import Kind
from align.data.formats.naming import UNKNOWN, mapping
from align.data.formats.turns import ALLOWED, ROLES
from align.data.held_out import notes_of
from align.data.inspect.findings import (
    Finding,
    Level,
    findings_of,
    parts_of,
    plain,
    roles_of,
    texts_of,
)
from align.data.inspect.oddities import oddities, script
from align.data.readers.rows import TIE
from align.data.sources import BadRow, Row, read_source
from align.data.tokens.findings import Shown, counts, encode_all, of_template, of_tokens, show
from align.data.tokens.lengths import longer_wins
from align.data.tokens.text_ids import Tokenizer
from align.types import AlignError, PreferencePair, SFTExample, SourceReport

NO_VALUE = frozenset({"NA", "N/A", "NaN", "nan", "null", "NULL", "None"})
"""Cells that other readers of tables take for a missing value."""
IN_TABLE = re.compile(r"\.(csv|tsv)(\.\w+)?:", re.IGNORECASE)
"""Part of the id of a row of a table."""


@dataclass(frozen=True)
class Inspection:
    kind: Kind | Literal["judgements"]
    formats: dict[str, str]
    reports: tuple[SourceReport, ...]
    num_examples: int
    # tokens of the rows that fit, and those of them that training counts; none without tokenizer
    tokens: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    shown: tuple[Shown, ...] = ()

    def worst(self) -> Level:
        levels = {f.level for f in self.findings}
        return "error" if "error" in levels else "warning" if "warning" in levels else "note"


def inspect(
    sources: Sequence[DataSource],
    *,
    kind: Kind | None = None,
    test: Sequence[DataSource] = (),
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 1024,
    num_shown: int = 5,
) -> Inspection:
    """Read all rows as training would, bad ones skipped and counted, and look at each."""
    said, kind = kind, kind or kind_of_sources(sources)
    formats = {s.path: format_name(first_row(s), kind, columns=s.columns) for s in sources}
    loaded = load_examples(sources, kind=kind, on_bad_row="skip")
    examples = loaded.examples
    advice = "make sure that it is meant"
    findings = [Finding("note", note, 1, advice) for note in notes_of([*sources, *test])]
    findings += [*_of_reports(loaded.reports), *_of_texts(examples)]
    if kind == "preference":
        findings += _of_pairs(examples)
    if said is None and kind == "prompt":
        findings += _of_answers(sources)
    findings += _of_dialogues(examples)
    findings += _of_duplicates(examples)
    if test:
        held_out = load_examples(test, kind=kind_of_sources(test), on_bad_row="skip")
        findings += [*_of_reports(held_out.reports), *_of_leakage(examples, held_out.examples)]
    tokens: dict[str, float] = {}
    shown: tuple[Shown, ...] = ()
    if tokenizer is not None:
        encoded, problems = encode_all(tokenizer, examples, max_tokens)
        findings += [*problems, *of_tokens(tokenizer, encoded), *of_template(tokenizer, examples)]
        tokens = counts([group for _, group in encoded])
        every = max(len(encoded) // max(num_shown, 1), 1)
        picked = encoded[::every][:num_shown]
        shown = tuple(show(tokenizer, group, example) for example, group in picked)
    order = {"error": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda f: order[f.level])
    return Inspection(
        kind=kind,
        formats=formats,
        reports=loaded.reports,
        num_examples=len(examples),
        tokens=tokens,
        findings=tuple(findings),
        shown=shown,
    )


def kind_of_sources(sources: Sequence[DataSource]) -> Kind:
    """By the first row of each that can be read at all; they have to agree."""
    try:
        found = {s.path: kind_of(first_row(s), columns=s.columns) for s in sources}
    except BadRow as error:
        raise AlignError(str(error)) from None
    if len(set(found.values())) > 1:
        said = ", ".join(f"{path}: {kind}" for path, kind in found.items())
        raise AlignError(f"the files are of different kinds ({said}); give one kind, or say --kind")
    return next(iter(found.values()))


def first_row(source: DataSource) -> Row:
    bad: BadRow | None = None
    for row in read_source(source):
        if isinstance(row, Row):
            return row
        bad = bad or row
    if bad is not None:
        raise AlignError(f"no row of {source.path} can be read; the first: {bad}")
    raise AlignError(f"{source.path}: no row in it; give a file with rows")


# ---------------------------------------------------------------- findings


def _of_reports(reports: Sequence[SourceReport]) -> Iterator[Finding]:
    for report in reports:
        for reason, count in report.dropped.items():
            if reason.endswith(TIE):
                yield Finding("note", f"left out: {reason}", count, "no pair can be made of them")
                continue
            places = tuple(p for p in report.first_dropped if f" {reason};" in p)
            advice = "the loader stops at it, or leaves it out with data.on_bad_row=skip"
            yield Finding("error", f"bad rows: {reason}", count, advice, places)
        for reason, count in report.noted.items():
            places = tuple(p for p in report.first_noted if f" {reason};" in p)
            advice = "make sure which answer is the better one; nothing is trained on the scores"
            yield Finding(
                "warning", f"rows at odds with themselves: {reason}", count, advice, places
            )


def _of_answers(sources: Sequence[DataSource]) -> Iterator[Finding]:
    """Answers under a name of which prompts take no notice."""
    for source in sources:
        row = first_row(source)
        column = mapping("sft", row.values).get("completion", UNKNOWN)
        if column in {UNKNOWN, "reference", *source.columns.values()} or "references" in row.values:
            continue
        yield Finding(
            "warning",
            f"column {column} is not read: rows are taken for prompts alone",
            1,
            f"to learn from it: --kind sft --columns completion={column}; to compare with it: "
            f"--columns references={column}; else --kind prompt",
            (row.where,),
        )


def _of_texts(examples: Sequence[Example]) -> Iterator[Finding]:
    odd: dict[str, list[str]] = defaultdict(list)
    scripts: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        text = "\n".join(texts_of(example))
        for name in oddities(text):
            odd[name].append(example.id)
        if IN_TABLE.search(example.id) and NO_VALUE.intersection(texts_of(example)):
            odd["a cell of NA, NaN, null or None alone, which is read as that word"].append(
                example.id
            )
        written = script(text)
        if written:
            scripts[written].append(example.id)
    for name, ids in odd.items():
        yield from findings_of("warning", name, ids, "clean the text, or remove the rows")
    usual = max(scripts, key=lambda name: len(scripts[name]), default="")
    for name, ids in scripts.items():
        if name != usual:
            what = f"rows written mostly in {name}, where most are in {usual}"
            yield from findings_of("note", what, ids, "make sure that they belong here")


def _of_dialogues(examples: Sequence[Example]) -> Iterator[Finding]:
    dialogues = [e for e in examples if isinstance(e, SFTExample) and e.messages]
    ids = [e.id for e in dialogues if e.messages and e.messages[-1]["role"] != "assistant"]
    what = "conversations that do not end in the assistant's turn: nothing is trained on the last"
    yield from findings_of("note", what, ids, "add its answer, or remove that turn")
    strangers: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        for role in roles_of(example) - set(ROLES):
            strangers[role].append(example.id)
    for role, ids in strangers.items():
        advice = f"it stops training unless the model's chat template names it; usual are {ALLOWED}"
        yield from findings_of("warning", f"role {role!r} is an unusual one", ids, advice)


def _of_pairs(examples: Sequence[Example]) -> Iterator[Finding]:
    pairs = [e for e in examples if isinstance(e, PreferencePair)]
    sides = [(prompt_key(p), str(p.chosen), str(p.rejected)) for p in pairs]
    said = set(sides)
    against = [
        pair.id
        for pair, (prompt, chosen, rejected) in zip(pairs, sides, strict=True)
        if (prompt, rejected, chosen) in said
    ]
    yield from findings_of(
        "error",
        "contradictory pairs: the same two answers are preferred both ways",
        against,
        "settle them: `align data rank` weighs several annotators",
    )
    yield from _length_bias(pairs)


def _length_bias(pairs: Sequence[PreferencePair]) -> Iterator[Finding]:
    """Report how often the longer answer wins, with twice its standard error."""
    gaps = [len(plain(p.chosen)) - len(plain(p.rejected)) for p in pairs]
    if len(gaps) < 2 or not any(gaps):
        return
    share = longer_wins(gaps)
    error = math.sqrt(share * (1 - share) / len(gaps))
    biased = abs(share - 0.5) > max(0.1, 2 * error)
    advice = (
        "a reward model may learn length alone: compare at equal length, add short good answers"
    )
    yield Finding(
        "warning" if biased else "note",
        f"the longer answer is chosen in {share:.1%} +- {2 * error:.1%} of pairs, ties half",
        len(gaps),
        advice if biased else "near one half: length alone tells little",
    )


def _of_duplicates(examples: Sequence[Example]) -> Iterator[Finding]:
    seen: dict[tuple[str, ...], str] = {}
    again = []
    for example in examples:
        key = (prompt_key(example), *map(str, parts_of(example)))
        if key in seen:
            again.append(f"{example.id} repeats {seen[key]}")
        seen.setdefault(key, example.id)
    advice = "remove them, or say that you mean it with data.train[].weight"
    yield from findings_of("warning", "duplicated rows", again, advice)


def _of_leakage(train: Sequence[Example], test: Sequence[Example]) -> Iterator[Finding]:
    def key(example: Example) -> str:
        return " ".join(prompt_key(example).casefold().split())

    seen = {key(e): e.id for e in reversed(train)}
    leaked = [f"{e.id} is also {seen[key(e)]}" for e in test if key(e) in seen]
    advice = "held-out numbers would be too good: split by prompt (data.test_fraction does)"
    yield from findings_of("error", "held-out prompts that are trained on", leaked, advice)
