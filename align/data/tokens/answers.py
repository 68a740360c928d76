"""Prompt and tokens of each assistant turn of a conversation.

The prompt's tokens are those of the rendered conversation up to the assistant's turn, as serving
gives them. The turn's tokens are those that it has in the whole rendered conversation. Each turn
has its own prompt, because templates rewrite what came before: they drop earlier thinking, move
the system text, or write EOS after the last turn only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from align.data.tokens.template import (
    OURS,
    PROBE,
    Tokenizer,
    cut_at_end,
    encode_text,
    eos_id,
    holds,
    left_out,
    opening,
    render,
    require_keys_rendered,
    require_rendered,
    special_tokens,
)
from align.types import AlignError, Message, TokenGroup, TokenSequence

_CONTEXT = 48
"""Characters before a boundary that are looked at for the tokens after it."""


@dataclass(frozen=True)
class Answer:
    """One assistant's turn as text.

    Attributes:
        prefix: What the model is given.
        said: What it says, through the end token where ``ended``.
        ended: False where the template writes no end token: EOS is appended.
        prompt: The rendered prompt, which has the words of all earlier turns.
    """

    prefix: str
    said: str
    ended: bool
    prompt: str = ""


def answer_at(
    tokenizer: Tokenizer, turns: Sequence[Message], i: int, *, checked: tuple[int, str] = (0, "")
) -> Answer:
    """Turn ``i`` of a conversation against its own rendered prefix.

    ``checked`` is a number of turns and a text that has their words, as the prompt of an earlier
    answer has: they are not looked for again in a prefix that begins with this text.
    """
    before, turn = turns[:i], turns[i]
    whole = render(tokenizer, turns[: i + 1])
    if before:
        prompt = prefix = render(tokenizer, before, open_turn=True)
        first = checked[0] if prefix.startswith(checked[1]) else 0
        require_rendered(tokenizer, before, prefix, first=first)
    else:
        prompt, prefix = "", _opening_of_first(tokenizer, turn, whole)
    said = whole[len(prefix) :]
    if not (whole.startswith(prefix) and holds(said, turn["content"])):
        prefix, said = _rewritten(tokenizer, before, turn, prefix=prefix, whole=whole)
    return Answer(prefix, *cut_at_end(tokenizer, said), prompt)


def _rewritten(
    tokenizer: Tokenizer, before: Sequence[Message], turn: Message, *, prefix: str, whole: str
) -> tuple[str, str]:
    """(prefix, what is said) where the whole does not go on from the prefix, or leaves words out.

    Three quirks of published templates:

    - The prompt opens what the turn has not (``<think>``). An answer that begins with it, or has
      words that the rendered turn has not, goes on from there; another one has a prompt without it.
    - The turn leaves out the beginning of what was said (thinking). The model says it all the same.
    - Turns before are written otherwise once an answer follows. The prompt is as serving gives it.
    """
    content = turn["content"]
    probed = render(tokenizer, (*before, {**turn, "content": PROBE}))
    head, found, tail = probed.rpartition(PROBE)
    if not found:
        raise left_out(turn["role"])
    opened = prefix[len(head) :] if prefix.startswith(head) else ""
    words, mark = content.lstrip(), opened.strip()
    if mark and words.startswith(mark):
        space = opened[len(opened.rstrip()) :]
        return prefix, words[len(mark) :].removeprefix(space) + tail
    if not (whole.startswith(head) and holds(whole[len(head) :], content)):
        return prefix, content + tail
    if opened:
        return head, whole[len(head) :]
    return prefix, _lead(prefix, head) + whole[len(head) :]


def _lead(prefix: str, head: str) -> str:
    """Text that the template writes between a prompt and the words, where ``head`` differs.

    Both end in what the template writes after the last question: that is where they are aligned.
    """
    for length in range(min(len(prefix), 64), 3, -1):
        at = head.rfind(prefix[-length:])
        if at >= 0:
            return head[at + length :]
    return ""


def _opening_of_first(tokenizer: Tokenizer, turn: Message, whole: str) -> str:
    """Text before the words of a conversation's first turn; it may be empty."""
    try:
        header = opening(tokenizer, str(tokenizer.chat_template))
    except AlignError:  # a template that takes no single question may take this conversation
        header = ""
    if header and header in whole:
        return whole[: whole.index(header) + len(header)]
    head = render(tokenizer, ({**turn, "content": PROBE},)).partition(PROBE)[0].rstrip()
    return head if whole.startswith(head) else ""


# ---------------------------------------------------------------- tokens


def encode_after(
    tokenizer: Tokenizer, text: str, ids: list[int], more: str
) -> tuple[list[int], bool]:
    """Token ids of ``more`` as it goes on from ``text``, whose ids are ``ids``.

    Returns:
        The ids, and whether they are those of ``text + more``. Where a token of the whole would
        cross the boundary they are not: the model is given ``ids`` and cannot take them back, so
        ``more`` is tokenised by itself, without the space that sentencepiece puts in front.
    """
    for tail, tail_ids in _tails(tokenizer, text, ids):
        whole = encode_text(tokenizer, tail + more)
        if whole[: len(tail_ids)] == tail_ids:
            return whole[len(tail_ids) :], True
    line_end = encode_text(tokenizer, "\n")
    found = encode_text(tokenizer, "\n" + more)
    if found[: len(line_end)] == line_end:
        return found[len(line_end) :], False
    return encode_text(tokenizer, more), False


def _tails(tokenizer: Tokenizer, text: str, ids: list[int]) -> Iterator[tuple[str, list[int]]]:
    """Ends of a text with their ids, short ones first: no need to tokenise a long prompt twice.

    No token crosses a special one, and tokens rarely depend on what is further off than a word.
    """
    special = special_tokens(tokenizer)
    last = next((k for k in range(len(ids) - 1, -1, -1) if ids[k] in special), None)
    at = text.rfind(special[ids[last]]) if last is not None else -1
    if last is not None and 0 <= len(text) - at <= 4 * _CONTEXT and at >= 0:
        yield text[at:], ids[last:]
    else:
        cut = max(text.rfind(gap, 0, max(len(text) - _CONTEXT, 0)) for gap in (" ", "\n"))
        tail = _encode_quickly(tokenizer, text[cut:]) if cut > 0 else []
        if tail and ids[-len(tail) :] == tail:
            yield text[cut:], tail
    yield text, ids


def _encode_quickly(tokenizer: Tokenizer, text: str) -> list[int]:
    """`encode_text` in a third of its time, for ids that are compared with others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return encode_text(tokenizer, text)
    return list(backend.encode(text, add_special_tokens=False).ids)


@dataclass
class _Sequence:
    """A sequence under construction: ``ids`` are the tokens of ``text``, None where they are not.

    ``ids`` of a text that goes on are extended; so turns whose prefix is stable make one sequence.
    """

    text: str | None
    ids: list[int]
    mask: list[bool] = field(default_factory=list)

    def extended_to(self, tokenizer: Tokenizer, prefix: str) -> bool:
        """Whether this could be extended to a longer prefix, with exactly its tokens."""
        if self.text is None or not prefix.startswith(self.text):
            return False
        added, exact = encode_after(tokenizer, self.text, self.ids, prefix[len(self.text) :])
        if exact:
            self.ids += added
            self.text = prefix
        return exact

    def say(self, tokenizer: Tokenizer, answer: Answer) -> None:
        self.mask += [False] * (len(self.ids) - len(self.mask))
        added, exact = encode_after(tokenizer, answer.prefix, self.ids, answer.said)
        self.ids += added if answer.ended else [*added, eos_id(tokenizer)]
        self.mask += [True] * (len(self.ids) - len(self.mask))
        self.text = answer.prefix + answer.said if exact and answer.ended else None

    def done(self) -> TokenSequence:
        return TokenSequence(np.array(self.ids, dtype=np.int32), np.array(self.mask, dtype=bool))


def encode_turns(
    tokenizer: Tokenizer, turns: Sequence[Message], *, first: int = 0
) -> list[TokenSequence]:
    """Sequences that train the assistant's turns from ``first`` on, each turn in one of them.

    One sequence where the template never changes what it wrote. Turns with ``train: False`` are a
    part of what follows. Turns after the last trained one teach nothing and are left out.
    """
    assistants = [i for i in range(first, len(turns)) if turns[i]["role"] == "assistant"]
    trained = [i for i in assistants if turns[i].get(OURS, True)]
    if not trained:
        raise AlignError(
            "every assistant turn says that it is not trained; train one, or remove the row"
            if assistants
            else "no assistant turn to learn from; give messages an answer"
        )
    require_keys_rendered(tokenizer, turns[: trained[-1] + 1])
    made: list[_Sequence] = []
    checked = (0, "")
    for i in trained:
        answer = answer_at(tokenizer, turns, i, checked=checked)
        checked = (i, answer.prompt)
        if not made or not made[-1].extended_to(tokenizer, answer.prefix):
            made.append(_Sequence(answer.prefix, encode_text(tokenizer, answer.prefix)))
        made[-1].say(tokenizer, answer)
    return [sequence.done() for sequence in made]


# ---------------------------------------------------------------- groups


def group_of(
    sequences: Sequence[TokenSequence], *, id: str = "", margin: float | None = None
) -> TokenGroup:
    """A group of sequences, with the uncounted tokens that all begin with as its prefix."""
    shared = min(_uncounted(s) for s in sequences)
    heads = np.stack([s.input_ids[:shared] for s in sequences])
    same = np.all(heads == heads[0], axis=0)
    shared = shared if same.all() else int(same.argmin())
    return TokenGroup(
        heads[0, :shared],
        tuple(TokenSequence(s.input_ids[shared:], s.loss_mask[shared:]) for s in sequences),
        id=id,
        margin=margin,
    )


def _uncounted(sequence: TokenSequence) -> int:
    return int(sequence.loss_mask.argmax()) if sequence.loss_mask.any() else 0


def split_group(group: TokenGroup, max_tokens: int) -> list[TokenGroup]:
    """Split a group into parts of at most ``max_tokens`` in all, or of one longer sequence.

    A microbatch holds a whole group, so a long dialogue whose turns are sequences of their own
    would otherwise need memory for all of them at once.
    """
    prefix = len(group.prefix_ids)
    parts: list[list[TokenSequence]] = [[]]
    room = max_tokens - prefix
    for sequence in group.continuations:
        if parts[-1] and len(sequence.input_ids) > room:
            parts.append([])
            room = max_tokens - prefix
        parts[-1].append(sequence)
        room -= len(sequence.input_ids)
    if len(parts) < 2:
        return [group]
    return [
        TokenGroup(group.prefix_ids, tuple(part), id=f"{group.id}[{k}/{len(parts)}]")
        for k, part in enumerate(parts, start=1)
    ]


def cut_text(group: TokenGroup, max_tokens: int) -> list[TokenGroup]:
    """Consecutive pieces of a plain text; each but the first continues the last token before it.

    That one token of prefix is there so that no piece's first token goes unpredicted.
    """
    sequence = group.continuations[0]
    ids, mask = sequence.input_ids, sequence.loss_mask
    if len(ids) <= max_tokens:
        return [group]
    starts = [0, *range(max_tokens, len(ids), max_tokens - 1)]
    stops = [*starts[1:], len(ids)]
    return [
        TokenGroup(
            ids[max(start - 1, 0) : start],
            (TokenSequence(ids[start:stop], mask[start:stop]),),
            id=f"{group.id}[{start}:{stop}]",
        )
        for start, stop in zip(starts, stops, strict=True)
    ]
