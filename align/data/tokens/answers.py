"""Prompt and tokens of each assistant turn of a conversation.

The prompt's tokens are those of the rendered conversation up to the assistant's turn, as serving
gives them. The turn's tokens are those that it has in the whole rendered conversation. Each turn
has its own prompt, because templates rewrite what came before: they drop earlier thinking, move
the system text, or write EOS after the last turn only.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from operator import is_

import numpy as np

from align.data.tokens.template import (
    OURS,
    PROBE,
    cut_at_end,
    holds,
    left_out,
    opening,
    render,
    require_keys_rendered,
    require_rendered,
)
from align.data.tokens.text_ids import Tokenizer, encode_text, eos_id, special_tokens
from align.types import AlignError, Message, TokenGroup, TokenSequence

_CONTEXT = 48
"""Characters before a boundary that are looked at for the tokens after it."""
_RECENT = 4 * _CONTEXT
"""Tokens before a boundary among which a special one is looked for first."""


@dataclass(frozen=True)
class Answer:
    """One assistant's turn as text.

    Attributes:
        prefix: What the model is given.
        said: What it says, through the end token where ``ended``.
        ended: False where the template writes no end token: EOS is appended.
    """

    prefix: str
    said: str
    ended: bool


class Prompts:
    """Rendered prompts of one row and their tokens, each made once.

    The answers of a pair have one prompt, and the prompt of a turn goes on from that of the turn
    before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._turns: tuple[Message, ...] = ()
        self._rendered = ""  # of these turns, whose words are all in it
        self._text: str | None = None
        self._ids: list[int] = []

    def render(self, turns: Sequence[Message]) -> str:
        """The prompt that ends in these turns; refused where it leaves out any of their words."""
        known = len(self._turns)
        goes_on = known <= len(turns) and all(map(is_, self._turns, turns))
        if goes_on and known == len(turns) > 0:
            return self._rendered
        text = render(self.tokenizer, turns, open_turn=True)
        first = known if goes_on and text.startswith(self._rendered) else 0
        require_rendered(self.tokenizer, turns, text, first=first)
        self._turns, self._rendered = tuple(turns), text
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, a list of the caller's own."""
        if self._text is None or not text.startswith(self._text):
            self._ids = encode_text(self.tokenizer, text)
        elif text != self._text:
            more = text[len(self._text) :]
            added, exact = encode_after(self.tokenizer, self._text, self._ids, more)
            self._ids = self._ids + added if exact else encode_text(self.tokenizer, text)
        self._text = text
        return list(self._ids)


def answer_at(prompts: Prompts, turns: Sequence[Message], i: int) -> Answer:
    """Turn ``i`` of a conversation against its own rendered prefix."""
    tokenizer, before, turn = prompts.tokenizer, turns[:i], turns[i]
    whole = render(tokenizer, turns[: i + 1])
    prefix = prompts.render(before) if before else _opening_of_first(tokenizer, turn, whole)
    said = whole[len(prefix) :]
    if not (whole.startswith(prefix) and holds(said, turn["content"])):
        prefix, said = _rewritten(tokenizer, before, turn, prefix=prefix, whole=whole)
    return Answer(prefix, *cut_at_end(tokenizer, said))


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
    last = _last_in(special, ids, len(ids) - _RECENT)
    at = text.rfind(special[ids[last]]) if last is not None else -1
    if last is not None and 0 <= len(text) - at <= 4 * _CONTEXT and at >= 0:
        yield text[at:], ids[last:]
    else:
        cut = max(text.rfind(gap, 0, max(len(text) - _CONTEXT, 0)) for gap in (" ", "\n"))
        # sentencepiece puts a space in front of a text: there the word alone has the same tokens
        for start in (cut, cut + 1) if cut > 0 else ():
            tail = encode_text(tokenizer, text[start:])
            if tail and ids[-len(tail) :] == tail:
                yield text[start:], tail
                break
        last = _last_in(special, ids, 0)
        at = text.rfind(special[ids[last]]) if last is not None else -1
        if last is not None and at > 0:
            yield text[at:], ids[last:]
    yield text, ids


def _last_in(special: Container[int], ids: Sequence[int], start: int) -> int | None:
    """Place of the last special token among ``ids`` from ``start`` on."""
    return next((k for k in range(len(ids) - 1, max(start, 0) - 1, -1) if ids[k] in special), None)


@dataclass
class _Sequence:
    """A sequence under construction: ``ids`` are the tokens of ``text``, None where they are not.

    ``ids`` of a text that goes on are extended; so turns whose prefix is stable make one sequence.
    """

    text: str | None
    ids: list[int]
    mask: list[bool] = field(default_factory=list)

    def extended_to(self, tokenizer: Tokenizer, prefix: str) -> bool:
        """Tell whether this could be extended to a longer prefix, with exactly its tokens."""
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
    tokenizer: Tokenizer,
    turns: Sequence[Message],
    *,
    first: int = 0,
    prompts: Prompts | None = None,
) -> list[TokenSequence]:
    """Sequences that train the assistant's turns from ``first`` on, each turn in one of them.

    One sequence where the template never changes what it wrote. Turns with ``train: False`` are a
    part of what follows. Turns after the last trained one teach nothing and are left out.
    ``prompts`` are those of the row, where it has several conversations.
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
    prompts = prompts or Prompts(tokenizer)
    made: list[_Sequence] = []
    for i in trained:
        answer = answer_at(prompts, turns, i)
        if not made or not made[-1].extended_to(tokenizer, answer.prefix):
            made.append(_Sequence(answer.prefix, prompts.encode(answer.prefix)))
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
