"""What is wrong with rows once they are tokens, and how a row looks to the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.chat import encode_example, over_length
from align.data.columns import Example
from align.data.findings import Finding, Level, findings_of, texts_of
from align.data.template import Tokenizer, end_token_ids
from align.types import AlignError, Message, SFTExample, Text, TokenGroup


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it: ``(text of a token, whether it is trained on)``, side by side."""

    id: str
    parts: tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]


def encode_all(
    tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int
) -> tuple[list[tuple[Example, TokenGroup]], list[Finding]]:
    """Tokens of the rows that fit, as training has them, and why the others do not."""
    encoded: list[tuple[Example, TokenGroup]] = []
    refused: dict[str, list[str]] = defaultdict(list)
    long: list[str] = []
    for example in examples:
        try:
            group = encode_example(tokenizer, example)
        except AlignError as error:
            refused[str(error)].append(example.id)
            continue
        if over_length(group, max_tokens) and not (
            isinstance(example, SFTExample) and example.text
        ):
            long.append(example.id)
            continue
        encoded.append((example, group))
    findings: list[Finding] = []
    for reason, ids in refused.items():
        what, _, advice = reason.partition("; ")
        findings += findings_of("error", what, ids, advice or "mend the rows")
    what = f"rows over data.max_tokens={max_tokens}, which are never cut"
    findings += findings_of("error", what, long, "shorten them or raise data.max_tokens")
    return encoded, findings


def of_tokens(
    tokenizer: Tokenizer, encoded: Sequence[tuple[Example, TokenGroup]]
) -> Iterator[Finding]:
    """Special tokens where none belong, and tokens that stand for what the tokenizer cannot say."""
    found: dict[str, list[str]] = defaultdict(list)
    bos, unknown, pad = tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id
    ends = set(end_token_ids(tokenizer))
    for example, group in encoded:
        is_chat = not isinstance(_prompt_of(example), str)
        for answer in group.continuations:
            ids = np.concatenate([group.prefix_ids, answer.input_ids]).tolist()
            if bos is not None and bos not in ends and ids.count(bos) > 1:
                found["bos"].append(example.id)
            inside = answer.input_ids[answer.loss_mask][:-1].tolist()
            if not is_chat and ends & set(inside):
                found["end"].append(example.id)
            if unknown is not None and unknown not in ends and unknown in ids:
                found["unknown"].append(example.id)
            if pad is not None and pad not in ends and pad in ids:
                found["pad"].append(example.id)
    for name, level, what, advice in _TOKEN_FINDINGS:
        yield from findings_of(level, what, dict.fromkeys(found[name]), advice)


_TOKEN_FINDINGS: tuple[tuple[str, Level, str, str], ...] = (
    ("bos", "error", "rows with BOS more than once", "take it out of the text; it is added"),
    (
        "end",
        "error",
        "rows with an end token in the middle, after which the model would stop",
        "take it out of the text; it is added at the end",
    ),
    ("unknown", "warning", "rows with tokens unknown to the tokenizer", "clean the text"),
    ("pad", "warning", "rows that spell out the pad token", "take it out of the text"),
)


def of_template(tokenizer: Tokenizer, examples: Sequence[Example]) -> Iterator[Finding]:
    strings = [e for e in examples if isinstance(_prompt_of(e), str) or _is_plain(e)]
    if tokenizer.chat_template and strings:
        markup = [t for t in tokenizer.all_special_tokens if t in tokenizer.chat_template]
        bare = [e.id for e in strings if not any(t in "".join(texts_of(e)) for t in markup)]
        what = "rows of strings for a model with a chat template, which is not put around strings"
        advice = "give turns, as in docs/data.md, or `align data convert --to messages`"
        yield from findings_of("note", what, bare, advice)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        advice = "harmless here; other tools may never learn to stop"
        yield Finding("note", "the pad token is the EOS token", 1, advice)


def _is_plain(example: Example) -> bool:
    return isinstance(example, SFTExample) and example.text is not None


def counts(groups: Sequence[TokenGroup]) -> dict[str, float]:
    if not groups:
        return {"rows": 0, "tokens": 0, "trained": 0}
    lengths = np.array([len(g.prefix_ids) + _longest(g) for g in groups])
    return {
        "rows": len(groups),
        "tokens": sum(g.num_tokens for g in groups),
        "trained": sum(g.num_counted for g in groups),
        "median_row": float(np.median(lengths)),
        "p95_row": float(np.percentile(lengths, 95)),
        "longest_row": float(lengths.max()),
    }


def _longest(group: TokenGroup) -> int:
    return max((len(c.input_ids) for c in group.continuations), default=0)


def show(tokenizer: Tokenizer, group: TokenGroup, id: str) -> Shown:
    names = ("chosen", "rejected") if len(group.continuations) == 2 else ("",)
    prefix = tuple((text, False) for text in _pieces(tokenizer, group.prefix_ids))
    parts = [("prompt", prefix)] if prefix else []
    for name, answer in zip(names, group.continuations, strict=False):
        trained = answer.loss_mask.tolist()
        texts = _pieces(tokenizer, answer.input_ids)
        parts.append((name, tuple(zip(texts, trained, strict=True))))
    return Shown(id, tuple(parts))


def _pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text of each token; a character of several tokens is the last one's."""
    texts, done, pending = [], 0, ids.tolist()
    for stop in range(1, len(pending) + 1):
        text = tokenizer.decode(
            pending[done:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if text.endswith("\ufffd") and stop < len(pending) and stop - done < 4:
            texts.append("")
        else:
            texts.append(text)
            done = stop
    return texts


def _prompt_of(example: Example) -> Text | tuple[Message, ...] | None:
    if isinstance(example, SFTExample):
        return example.messages if example.messages is not None else example.prompt
    return example.prompt
