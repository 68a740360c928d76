"""Show answers of several models side by side, with their differences from the reference."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from align.report.runs import Row, RunRecord
from align.report.verdicts import baseline_of

MAX_SHOWN = 150
# longer texts are compared up to here: the comparison takes quadratic time
MAX_WORDS = 400

Kind = Literal["same", "added", "missing"]


@dataclass(frozen=True)
class Answer:
    """One model's answer in pieces, each shared with the reference, added, or missing."""

    model: str
    pieces: list[tuple[Kind, str]]
    reward: float | None
    gold: float | None
    finished: bool | None


@dataclass(frozen=True)
class Sample:
    """One prompt with every model's answer; ``gain``: the last reward minus the baseline's."""

    id: str
    prompt: str
    references: list[str]
    answers: list[Answer]
    gain: float | None


@dataclass(frozen=True)
class Samples:
    """Shown samples of one evaluation, and the number of prompts not shown."""

    name: str
    samples: list[Sample]
    left_out: int
    gained: str | None
    baseline: str | None


def side_by_side(run: RunRecord) -> Samples | None:
    """Line up every model's answers; of many prompts, show the best, the worst and the first."""
    if not run.outputs:
        return None
    names, baseline = list(run.outputs), baseline_of(run)
    trained = [n for n in names if n != baseline and not n.startswith("best-of-")]
    last = trained[-1] if trained else None
    rows = list(zip(*run.outputs.values(), strict=False))
    gains = [_gain(dict(zip(names, row, strict=True)), last, baseline) for row in rows]
    chosen = _choice(gains)
    samples = [_sample(names, rows[i], gains[i]) for i in chosen]
    return Samples(run.name, samples, len(rows) - len(chosen), last, baseline)


def of_training(run: RunRecord, count: int = 3) -> list[tuple[str, list[Row]]]:
    """Pick the best and the worst of a PPO run's last samples."""
    scored = [r for r in run.samples if isinstance(r.get("score"), int | float)]
    if not scored or "iteration" not in scored[-1]:
        return []
    last = [r for r in scored if r["iteration"] == scored[-1]["iteration"]]
    last.sort(key=lambda row: -row["score"])
    count = min(count, len(last) // 2)
    shown = {"best": last[:count], "worst": last[::-1][:count]}
    return [
        (name, [{**r, "prompt": as_text(r["prompt"])} for r in rows])
        for name, rows in shown.items()
    ]


def difference(text: str, reference: str | None) -> list[tuple[Kind, str]]:
    """Compare by words: pieces of ``text``, and pieces of ``reference`` missing from it."""
    if reference is None:
        return [("same", text)]
    ours, theirs = _words(text)[:MAX_WORDS], _words(reference)[:MAX_WORDS]
    pieces: list[tuple[Kind, str]] = []
    # ignore the space after a word when comparing
    bare_theirs, bare_ours = ([word.strip() for word in words] for words in (theirs, ours))
    matcher = difflib.SequenceMatcher(None, bare_theirs, bare_ours, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(ours[c:d])))
            continue
        if b > a:
            pieces.append(("missing", "".join(theirs[a:b])))
        if d > c:
            pieces.append(("added", "".join(ours[c:d])))
    rest = "".join(_words(text)[MAX_WORDS:])
    return pieces + ([("same", rest)] if rest else [])


def as_text(prompt: Any) -> str:
    """Format a prompt: a string unchanged, turns one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _sample(names: list[str], row: tuple[Row, ...], gain: float | None) -> Sample:
    references = list(row[0].get("references") or [])
    reference = references[0] if references else None
    answers = [
        Answer(
            name,
            difference(str(r["response"]), reference),
            r.get("reward"),
            r.get("gold"),
            r.get("finished"),
        )
        for name, r in zip(names, row, strict=True)
    ]
    return Sample(str(row[0].get("id", "")), as_text(row[0]["prompt"]), references, answers, gain)


def _gain(row: dict[str, Row], last: str | None, baseline: str | None) -> float | None:
    if last is None or baseline is None or baseline not in row:
        return None
    rewards = row[last].get("reward"), row[baseline].get("reward")
    return None if None in rewards else float(rewards[0] - rewards[1])  # type: ignore[operator]


def _choice(gains: list[float | None]) -> list[int]:
    """Choose at most MAX_SHOWN rows: a third each of largest, smallest and first, in order."""
    if len(gains) <= MAX_SHOWN:
        return list(range(len(gains)))
    ranked = sorted((i for i, g in enumerate(gains) if g is not None), key=lambda i: -gains[i])  # type: ignore
    third = MAX_SHOWN // 3
    kept = set(ranked[:third] + ranked[-third:])
    for i in range(len(gains)):
        if len(kept) == MAX_SHOWN:
            break
        kept.add(i)
    return sorted(kept)


def _words(text: str) -> list[str]:
    """Split into words with the space after them, so that they join to the text."""
    return re.findall(r"\s*\S+\s*", text) if len(text) < 100_000 else [text]
