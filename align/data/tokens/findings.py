"""Faults of rows once they are tokens, and how a row looks to the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.formats.columns import Example
from align.data.inspect.findings import Finding, Level, findings_of, texts_of
from align.data.tokens.chat import encode_example, over_length
from align.data.tokens.template import (
    cut_at_end,
    end_token_ids,
    opening,
    structure_ids,
    times_in_dialogue,
)
from align.data.tokens.text_ids import Tokenizer, encode_text, special_tokens
from align.types import AlignError, Message, PreferencePair, SFTExample, Text, TokenGroup


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
    bos_is_markup = bos is not None and times_in_dialogue(tokenizer, bos) > 1
    for example, group in encoded:
        turns = turns_of(example)
        for name in _spelt_out(tokenizer, turns, ends):
            found[name].append(example.id)
        if turns and not _opened(tokenizer, group):
            found["unopened"].append(example.id)
        for answer in group.continuations:
            ids = np.concatenate([group.prefix_ids, answer.input_ids]).tolist()
            if not turns and bos not in (None, *ends) and ids.count(bos) > 1 and not bos_is_markup:
                found["bos"].append(example.id)
            inside = answer.input_ids[answer.loss_mask][:-1].tolist()
            if not turns and ends & set(inside):
                found["end"].append(example.id)
            if unknown is not None and unknown not in ends and unknown in ids:
                found["unknown"].append(example.id)
            if not turns and pad is not None and pad not in ends and pad in ids:
                found["pad"].append(example.id)
        if not turns and any(_ends_itself(tokenizer, t, ends) for t in _answers_of(example)):
            found["ended"].append(example.id)
    for name, level, what, advice in _TOKEN_FINDINGS:
        yield from findings_of(level, what, dict.fromkeys(found[name]), advice)


def _spelt_out(tokenizer: Tokenizer, turns: Sequence[Message], ends: set[int]) -> set[str]:
    """Findings of a conversation whose words spell out tokens that belong to the template."""
    structure = structure_ids(tokenizer)
    found = set()
    for turn in turns:
        if not any(special_tokens(tokenizer)[i] in turn["content"] for i in structure):
            continue
        said = turn["content"]
        if turn["role"] == "assistant" and _ends_itself(tokenizer, said, ends):
            found.add("ended")
            said = cut_at_end(tokenizer, said, is_turn=False)[0]
            said = said[: -max(len(t) for t in _texts(tokenizer, ends) if said.endswith(t))]
        inside = structure & set(encode_text(tokenizer, said))
        if inside & ends and turn["role"] == "assistant":
            found.add("end")
        elif inside:
            found.add("markup")
    return found


def _opened(tokenizer: Tokenizer, group: TokenGroup) -> bool:
    """Tell whether all that is trained follows what the generation prompt opens the turn with."""
    try:
        opened = opening(tokenizer, str(tokenizer.chat_template)).rstrip()
    except AlignError:  # the template takes no single question
        return True
    for answer in group.continuations:
        first = int(answer.loss_mask.argmax())
        given = np.concatenate([group.prefix_ids, answer.input_ids[:first]])[-32:]
        if not tokenizer.decode(given, skip_special_tokens=False).rstrip().endswith(opened):
            return False
    return True


def _ends_itself(tokenizer: Tokenizer, said: str, ends: set[int]) -> bool:
    return said.rstrip().endswith(tuple(_texts(tokenizer, ends)))


def _texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    return [text for i, text in special_tokens(tokenizer).items() if i in ids]


_TOKEN_FINDINGS: tuple[tuple[str, Level, str, str], ...] = (
    ("bos", "error", "rows with BOS more than once", "take it out of the text; it is added"),
    (
        "end",
        "error",
        "rows with an end token in the middle, after which the model would stop",
        "take it out of the text; it is added at the end",
    ),
    (
        "markup",
        "error",
        "rows whose turns spell out tokens with which the chat template begins or ends turns",
        "take them out of the text: the model reads them as turns",
    ),
    (
        "ended",
        "warning",
        "rows whose answers spell out the end token, which is written once",
        "take it out of the text; it is added",
    ),
    (
        "unopened",
        "note",
        "rows with answers that lack the <think> which the generation prompt opens",
        "they are trained on a prompt without it: give them thinking, or use another template",
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


def show(tokenizer: Tokenizer, group: TokenGroup, example: Example) -> Shown:
    names = ("chosen", "rejected") if isinstance(example, PreferencePair) else ()
    prefix = tuple((text, False) for text in _pieces(tokenizer, group.prefix_ids))
    parts = [("prompt", prefix)] if prefix else []
    for k, answer in enumerate(group.continuations):
        trained = answer.loss_mask.tolist()
        texts = _pieces(tokenizer, answer.input_ids, group.prefix_ids.tolist())
        name = names[k] if names else f"turn {k + 1}" if len(group.continuations) > 1 else ""
        parts.append((name, tuple(zip(texts, trained, strict=True))))
    return Shown(example.id, tuple(parts))


def _pieces(tokenizer: Tokenizer, ids: np.ndarray, before: Sequence[int] = ()) -> list[str]:
    """The text of each token as it goes on from ``before``; a character of several tokens is the
    last one's.

    A token is decoded behind the one before it, because sentencepiece's decoders drop the space of
    the first one.
    """

    def decode(tokens: list[int]) -> str:
        found = tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(found)

    pending = [*before[-1:], *ids.tolist()]
    start = len(pending) - len(ids)
    texts, done = [], start
    for stop in range(start + 1, len(pending) + 1):
        context = pending[max(done - 1, 0) : done]
        text = decode([*context, *pending[done:stop]]).removeprefix(decode(context))
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


def turns_of(example: Example) -> tuple[Message, ...]:
    """Every turn of an example, of both answers of a pair; none of one in strings."""
    given: list[Text | None] = [_prompt_of(example)]
    if isinstance(example, SFTExample):
        given.append(example.completion)
    elif isinstance(example, PreferencePair):
        given += [example.chosen, example.rejected]
    if given[0] is None or isinstance(given[0], str):
        return ()
    turns = list(given[0])
    for answer in given[1:]:
        if isinstance(answer, str):
            turns.append({"role": "assistant", "content": answer})
        else:
            turns += answer or ()
    return tuple(turns)


def _answers_of(example: Example) -> tuple[str, ...]:
    """The string answers of an example."""
    given: tuple[Text | None, ...] = ()
    if isinstance(example, SFTExample):
        given = (example.completion,)
    elif isinstance(example, PreferencePair):
        given = (example.chosen, example.rejected)
    return tuple(text for text in given if isinstance(text, str))
