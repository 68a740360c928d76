"""``align data check`` for files of judgements, which no stage trains on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from align.config.sections import DataSource
from align.data.formats.columns import RANK
from align.data.inspect.check import Inspection, first_row
from align.data.inspect.findings import PLACES, Finding
from align.data.sources import BadRow
from align.feedback.outcomes import judgements_of
from align.types import SourceReport


def inspect_judgements(files: Sequence[str]) -> Inspection:
    """Read every row like `align data rank`, and count bad ones."""
    findings: list[Finding] = []
    formats, reports = {}, []
    for file in files:
        num_good = 0
        bad: dict[str, list[str]] = defaultdict(list)
        for judgement in judgements_of(file):
            if isinstance(judgement, BadRow):
                bad[f"{judgement.field}: {judgement.reason}"].append(str(judgement))
            else:
                num_good += 1
        findings += _of_bad(bad)
        ranked = "ranking" in first_row(DataSource(path=file)).values
        formats[file] = "ranking" if ranked else "a + b + winner"
        reports.append(
            SourceReport(
                path=file,
                sha256=None,
                rows_read=num_good + sum(map(len, bad.values())),
                rows_kept=num_good,
                dropped={reason: len(places) for reason, places in bad.items()},
            )
        )
    total = sum(report.rows_kept for report in reports)
    findings.append(Finding("note", "judgements, which no stage trains on", total, RANK))
    return Inspection(
        kind="judgements",
        formats=formats,
        reports=tuple(reports),
        num_examples=total,
        findings=tuple(findings),
    )


def _of_bad(bad: dict[str, list[str]]) -> Iterator[Finding]:
    for reason, places in bad.items():
        advice = "`align data rank` stops at it: fix the row"
        yield Finding("error", f"bad rows: {reason}", len(places), advice, tuple(places[:PLACES]))
